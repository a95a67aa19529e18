import json
import pathlib

import numpy as np

from vssl_jax import config as config_lib
from vssl_jax.checkpoint import integrity
from vssl_jax.evals import report
from vssl_jax.evals.finetune import job
from vssl_jax.utils import config_io

REPORT = {
  'encoder': 'runs/x',
  'protocol': 'linear',
  'tap': 'after block 12 of 12, final norm',
  'clip': [8, 32, 32, 3],
  'timing': 'stride 1',
  'encoder_clip': [16, 32, 32, 3],
  'encoder_timing': 'stride 2',
  'segments': 2,
  'clips': 1,
  'views': 3,
  'train': {'source': 'a', 'videos': 40, 'trained_on': 36},
  'test': {'source': 'b', 'evaluated': 19, 'missing': 1},
  'held_out': 4,
  'heads': [{'lr': 1e-3, 'wd': 0.01}, {'lr': 5e-3, 'wd': 0.1}],
  'classes': [f'c{i}' for i in range(10)],
  'chance': 0.1,
  'test_classes': 10,
  'overlap': {'count': 0, 'total': 20},
  'results': {
    'selected': {
      'accuracy': 0.5,
      'interval': [0.3, 0.7],
      'lr': 1e-3,
      'wd': 0.01,
    },
    'max': {'accuracy': 0.75, 'interval': [0.5, 0.9], 'lr': 5e-3, 'wd': 0.1},
  },
  'median': 0.25,
}


def test_text_says_how_it_was_measured_and_labels_both_accuracies():
  lines = report.text(REPORT).splitlines()
  text = '\n'.join(lines)
  for wanted in (
    '2 segments x 3 views; 8x32x32, stride 1; the encoder was trained on '
    '16x32x32, stride 2',
    '40 videos of a, heads are trained on 36 of them (90 %), 4 are held out',
    '19 videos of b, 1 missing',
    '10: 0 c0, 1 c1',
    'linear, frozen; tapped after block 12 of 12, final norm',
    'interval   (tapped after block 12 of 12, final norm)',
  ):
    assert wanted in text
  (selected,) = [x for x in lines if x.startswith('selected')]
  assert '50.00 %   30.00 to 70.00   lr 0.001, wd 0.01' in selected
  assert 'held-out training clips' in selected
  (best,) = [x for x in lines if x.startswith('max')]
  assert '75.00 %' in best
  assert 'optimistic' in best
  (chance,) = [x for x in lines if x.startswith('chance')]
  assert '10.00 %' in chance


def test_text_states_the_share_of_the_videos_that_heads_are_trained_on():
  every = {'train': {'source': 'a', 'videos': 40, 'trained_on': 40}}
  one = report.text(REPORT | every | {'held_out': 0, 'heads': [{}]})
  assert 'on 40 of them (100 %): one head leaves nothing to choose' in one
  assert one.count('(the only head)') == 2 and 'optimistic' not in one
  grid = report.text(REPORT | every | {'held_out': 0})
  assert '(100 %); none is chosen without the test videos' in grid


def test_text_states_how_many_training_videos_have_no_label():
  train = {'source': 'a', 'videos': 40, 'trained_on': 30, 'unlabelled': 6}
  text = report.text(REPORT | {'train': train})
  assert 'on 30 of them (75 %), 6 have no label, 4 are held out' in text


def test_clips_that_vote_alone_are_told():
  text = report.text(REPORT | {'segments': 1, 'clips': 4})
  assert '1 segments x 4 clips x 3 views' in text


def test_knn_results_have_intervals():
  found = report.knn_results({10: 8, 20: 5}, 10)
  assert found['k=10']['accuracy'] == 0.8
  low, high = found['k=10']['interval']
  assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
  assert found['k=20']['accuracy'] == 0.5


def test_chance_is_a_guess_among_the_classes_that_occur():
  found = report.chance(np.asarray([0, 0, 7, 2]))
  assert found == {'test_classes': 3, 'chance': 1 / 3}
  assert 'one of the 10 classes that occur' in report.text(REPORT)
  assert report.ONE_CLASS not in report.text(REPORT)
  for change in ({'classes': ['a']}, report.chance(np.asarray([2, 2]))):
    assert report.ONE_CLASS in report.text(REPORT | change)


def test_neighbours_that_were_left_out_are_listed():
  text = report.text(REPORT | {'left_out': ['k=100', 'k=200']})
  assert 'left out: k=100, k=200' in text


def test_a_report_replaces_only_one_of_the_same_measurement(tmp_path):
  first = report.write(REPORT, tmp_path)
  other = REPORT | {'encoder': 'runs/y'}
  second = report.write(other, tmp_path)
  assert [first, second] == [
    str(tmp_path / name) for name in ('report.json', 'report-2.json')
  ]
  again = other | {'chance': 0.2, 'seconds': 3.0}
  assert report.write(again, tmp_path) == second
  assert integrity.load(tmp_path / 'report.json') == REPORT
  (tmp_path / 'report-3.json').write_text('{"encoder": ')  # damaged
  changes = ({'clip': [4, 32, 32, 3]}, {'test': {'source': 'c'}})
  for number, change in enumerate(changes, start=4):
    path = report.write(REPORT | change, tmp_path)
    assert path == str(tmp_path / f'report-{number}.json')


def test_the_file_is_json(tmp_path):
  report.write(REPORT, tmp_path / 'new')
  content = json.loads((tmp_path / 'new/report.json').read_text())
  assert content | REPORT == content


def test_a_corrupt_report_is_not_taken_for_a_result(tmp_path, caplog):
  config = config_lib.fine_tuning()
  config.workdir = str(tmp_path)
  found = {'finetune': config_io.to_json(config)['finetune'], 'accuracy': 0.5}
  path = pathlib.Path(report.write(found, tmp_path))
  assert job._tested(config) == found
  path.write_text(path.read_text().replace('0.5', '0.7'))
  assert job._tested(config) is None
  assert f'{path} is corrupt' in caplog.text
