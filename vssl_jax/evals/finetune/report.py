"""Formats the results of a fine-tuning as a table that states the protocol."""

from collections.abc import Mapping
from typing import Any

from vssl_jax.evals import clips, splits
from vssl_jax.evals import report as report_lib
from vssl_jax.evals.finetune import validation


def text(report: Mapping[str, Any]) -> str:
  """Returns the report as text for a console.

  Args:
    report: from `job.evaluate`.
  """
  test, train, valid = report['test'], report['train'], report['valid']
  settings, best = report['finetune'], report['results']['best']
  better_epoch = validation.lost(report)
  chosen_by = f'{valid["total"]} videos of {valid["source"]}'
  if valid['held_out']:
    chosen_by += ', held out of the training videos'
  elif valid['chosen_by_test']:
    # Reports of older versions: all test videos.
    all_videos = {'count': test['evaluated'], 'total': test['evaluated']}
    shared = report.get('chosen_by', all_videos)
    chosen_by += (
      f', {shared["count"]} of the {shared["total"]} test videos among them, '
      'as in published code; optimistic'
    )
  facts = {
    'encoder': report['encoder'],
    'clips': f'{clips.describe(report)}; tested on {settings["clips"]} clips '
    f'({settings["sampling"]}) x {settings["views"]} crops',
    'train': f'{train["videos"]} videos of {train["source"]}, '
    f'{settings["epochs"]} epochs',
    'rate': report['lr'],
    'chosen by': f'{chosen_by}: {valid["correct"]} correct '
    f'({100 * valid["correct"] / valid["total"]:.2f} %), step {best["step"]} '
    f'of {report["steps"]}' + (f'; {better_epoch}' if better_epoch else ''),
    'test': f'{test["evaluated"]} videos of {test["source"]}, '
    f'{test["missing"]} missing (unreadable or without a label)',
    **{
      f'overlap of {name}': splits.describe(shared)
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
