"""What fine-tuning found, as a table that says how it was found."""

from collections.abc import Mapping
from typing import Any

from vssl_jax.evals import clips, lists, validation
from vssl_jax.evals import report as report_lib


def text(report: Mapping[str, Any]) -> str:
  """Returns the report for a console.

  Args:
    report: as `finetune.evaluate` makes it.
  """
  test, train, valid = report['test'], report['train'], report['valid']
  wanted, best = report['finetune'], report['results']['best']
  lost = validation.lost(report)
  chosen = f'{valid["total"]} videos of {valid["source"]}'
  if valid['held_out']:
    chosen += ', held out of the training videos'
  elif valid['chosen_by_test']:
    # Reports of older versions: all of them.
    every = {'count': test['evaluated'], 'total': test['evaluated']}
    shared = report.get('chosen_by', every)
    chosen += (
      f', {shared["count"]} of the {shared["total"]} test videos among them, '
      'as published codes do; flatters'
    )
  facts = {
    'encoder': report['encoder'],
    'clips': f'{clips.describe(report)}; tested on {wanted["clips"]} clips '
    f'({wanted["sampling"]}) x {wanted["views"]} crops',
    'train': f'{train["videos"]} videos of {train["source"]}, '
    f'{wanted["epochs"]} epochs',
    'rate': report['lr'],
    'chosen by': f'{chosen}: {valid["correct"]} right '
    f'({100 * valid["correct"] / valid["total"]:.2f} %), step {best["step"]} '
    f'of {report["steps"]}' + (f'; {lost}' if lost else ''),
    'test': f'{test["evaluated"]} videos of {test["source"]}, '
    f'{test["missing"]} missing (unreadable or without a label)',
    **{
      f'overlap of {name}': lists.describe(shared)
      for name, shared in report.get('overlap', {}).items()
      if shared['count']
    },
    'classes': report_lib.classes(report['classes']),
  }
  width = max(map(len, facts))
  low, high = best['interval']
  return '\n'.join(
    [
      *(f'{name.ljust(width)}  {value}' for name, value in facts.items()),
      '',
      f'accuracy {100 * best["accuracy"]:.2f} % (95 % interval '
      f'{100 * low:.2f} to {100 * high:.2f}), top 5 {100 * best["top5"]:.2f} '
      f'%, chance {100 * report["chance"]:.2f} %',
      *([report_lib.ONE_CLASS] if report['chance'] == 1 else []),
      'The interval is that of the sample of test videos; training seeds add '
      'to it.',
    ]
  )
