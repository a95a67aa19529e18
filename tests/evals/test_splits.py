"""Lists of videos are what keys say, and two ways to say one are one."""

import numpy as np
import pytest

from tests.evals import finetune_small as small
from vssl_jax import config as config_lib
from vssl_jax import weights
from vssl_jax.data.sources import holdout
from vssl_jax.evals import splits
from vssl_jax.evals.finetune import videos
from vssl_jax.evals.probe import setup
from vssl_jax.planning import evaluations


def config_of(section, **wanted):
  c = config_lib.default()
  c.data.update(dict(source='a,b', where='fold=0', frames=4, size=(16, 16)))
  c[section].update(wanted)
  return c


def test_a_list_is_that_of_the_data_where_nothing_is_given():
  c = config_of('probe', train=('x', 'y'), test_where='fold=1')
  train, test = (splits.of(c, 'probe', which) for which in ('train', 'test'))
  assert (train['source'], train['where']) == ('x,y', 'fold=0')
  assert (test['source'], test['where']) == ('a,b', 'fold=1')
  assert splits.name(test) == 'a,b where fold=1'
  assert train['stride'] == c.data.stride


@pytest.mark.parametrize(
  ('change', 'wanted'),
  [
    ({}, True),
    ({'source': 'b, a'}, True),
    ({'source': 'a'}, False),
    ({'where': 'fold=1'}, False),
    ({'split': 'test'}, False),
    ({'holdout': 0.1}, False),
  ],
)
def test_two_lists_are_one_if_all_that_picks_videos_is(change, wanted):
  data = splits.of(config_of('probe'), 'probe', 'train')
  assert splits.same(data, data | change) == wanted


@pytest.mark.parametrize('section', ['probe', 'finetune'])
@pytest.mark.parametrize('train', ['a,b', 'b,a'])
def test_evaluations_find_a_list_that_is_said_in_two_ways(section, train):
  c = config_of(section, train=tuple(train.split(',')))
  with pytest.raises(ValueError, match='name the same videos') as error:
    if section == 'probe':
      setup.make(c, small.encoder_of())
    else:
      videos.find(c)
  assert f'{section}.train and {section}.test' in str(error.value)
  assert f'--config.{section}.test_where' in str(error.value)


def test_a_plan_names_the_lists_that_are_measured(tmp_path):
  given = small.encoder_of()
  weights.export(given.module, given.params, tmp_path, video=small.SHAPE)
  c = config_of('probe', train=('x', 'y'), test_where='fold=1')
  c.encoder = str(tmp_path)
  found = evaluations.probe(c)
  for which in ('train', 'test'):
    data = splits.of(c, 'probe', which)
    assert f': {splits.name(data)}, not available' in found
  assert 'train: x,y where fold=0' in found


@pytest.mark.parametrize('section', ['probe', 'finetune'])
def test_lists_of_nothing_are_said_to_be_empty(section):
  c = config_of(section, train=('',), test=('',))
  c.data.source = ''
  with pytest.raises(ValueError, match=rf'{section}\.train: found no videos'):
    if section == 'probe':
      setup.make(c, small.encoder_of())
    else:
      videos.find(c)


@pytest.mark.parametrize('section', ['probe', 'finetune'])
def test_what_is_held_out_and_what_is_left_have_labels(section, tmp_path):
  out = holdout.held_out(np.arange(24), 0.3)

  def start(labelled, fraction):
    rows = [f'{i}.mp4,{"ab"[i % 2] if x else ""}' for i, x in labelled]
    (tmp_path / 'list.csv').write_text('\n'.join(['path,label', *rows]))
    data = config_lib.default().data.to_dict()
    data['source'] = str(tmp_path / 'list.csv')
    splits.check_share(section, data, fraction, may_be_none=section == 'probe')
    return splits.labelled(data)

  known = start([(i, i % 3) for i in range(24)], 0.3)
  assert known.tolist() == [i % 3 > 0 for i in range(24)]
  for labelled, fraction, wanted in (
    (~out, 0.3, 'holds out 5 of 24 .* choose by; wanted a larger'),
    (out, 0.3, 'holds out 5 of 24 .* train on; wanted a smaller'),
    (out | True, 0.999, 'holds out 24 of 24 .* train on; wanted a smaller'),
  ):
    with pytest.raises(ValueError, match=rf'{section}\.holdout: .*{wanted}'):
      start(enumerate(labelled), fraction)
  every = list(enumerate(out | True))
  if section == 'probe':  # no head is chosen then, and the report says so
    assert start(every, 1e-4).all()
  else:
    with pytest.raises(ValueError, match='choose by; wanted a larger'):
      start(every, 1e-4)
