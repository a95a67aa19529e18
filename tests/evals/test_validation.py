"""What the best of earlier epochs is, and what is said when it was lost."""

import numpy as np

from vssl_jax.checkpoint import integrity, manager
from vssl_jax.evals.finetune import report, validation

REPORT = {
  'encoder': 'ours',
  'clip': [4, 16, 16, 3],
  'timing': 'every frame',
  'lr': '0.1',
  'steps': 12,
  'classes': ['a', 'b'],
  'chance': 0.5,
  'finetune': {'clips': 1, 'views': 1, 'sampling': 'even', 'epochs': 3},
  'train': {'videos': 4, 'source': 'train'},
  'test': {'evaluated': 4, 'source': 'test', 'missing': 0},
  'valid': {
    **{'correct': 3, 'total': 4, 'source': 'train'},
    **{'held_out': True, 'chosen_by_test': False},
  },
  'history': [
    {'epoch': 1, 'accuracy': 0.75, 'loss': 0.5},
    {'epoch': 2, 'accuracy': 0.75, 'loss': 0.4},
    {'epoch': 3, 'accuracy': 0.75, 'loss': 0.4},
  ],
}


def _told(step):
  best = {'accuracy': 0.5, 'interval': [0.1, 0.9], 'top5': 1.0, 'step': step}
  return report.text({**REPORT, 'results': {'best': best}})


def test_the_report_says_when_a_better_epoch_was_lost():
  # Of equal epochs the earlier is the best.
  assert 'not the best' not in _told(8)
  for step, epoch in ((4, 1), (12, 3)):
    said = _told(step)
    assert 'not the best of the run: epoch 2 had 75.00 % and loss 0.4' in said
    assert f'tested is epoch {epoch};' in said


def test_the_report_says_how_many_test_videos_chose_the_best():
  best = {'accuracy': 0.5, 'interval': [0.1, 0.9], 'top5': 1.0, 'step': 8}
  valid = REPORT['valid'] | {'held_out': False, 'chosen_by_test': True}
  found = {**REPORT, 'valid': valid, 'results': {'best': best}}
  chosen = {'count': 2, 'total': 9}
  text = report.text({**found, 'chosen_by': chosen})
  assert '2 of the 9 test videos among them' in text and 'optimistic' in text
  # Older reports do not say.
  assert '4 of the 4 test videos among them' in report.text(found)


def test_the_best_of_earlier_epochs_is_known_without_reading_it(
  tmp_path, monkeypatch
):
  kept = manager.Checkpoints(tmp_path)
  params = {'params': {'a': np.ones(3, np.float32)}}
  valid = {'correct': 3, 'total': 4, 'loss': 0.5}
  extra = {'valid': valid}
  kept.save_params(params, 4, 'labels', name=manager.BEST, extra=extra)
  read = []
  monkeypatch.setattr(integrity, '_hash_file', read.append)
  assert validation._before(kept, 8) == valid
  assert validation._before(kept, 4) is None
  assert not read
  # A manifest that cannot be read says nothing of how good it was.
  (tmp_path / 'params' / 'best.json').write_text('{"step": 4')
  assert validation._before(kept, 8) is None
