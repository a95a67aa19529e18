"""Keys that a job would overwrite or ignore are refused by name."""

import pytest

from tests.evals import finetune_small as small
from vssl_jax import demo, main
from vssl_jax.evals.finetune import setup
from vssl_jax.evals.finetune import videos as videos_lib

PROBE = 'configs/probe_fast.py'
FINETUNE = 'configs/finetune_fast.py'
LISTS = ('probe.train=a', 'probe.test=b')


@pytest.mark.parametrize(
  ('page', 'assignments', 'key', 'remedy'),
  [
    ('', ('data.source=v',), 'data.source', 'writes its own videos'),
    ('', ('probe.protocol=knn',), 'probe.protocol', 'linear probes'),
    ('configs/demo.py:pmd', ('encoder=x',), 'encoder', 'that it trains'),
    ('configs/salt.py', ('encoder=x',), 'encoder', 'init_from'),
    ('configs/salt.py', ('probe.epochs=3',), 'probe.epochs', 'configs/probe_'),
    (PROBE, ('method.vit.patch=(4,8,8)',), 'method.vit.patch', 'weights of'),
    (PROBE, ('batch_size=8',), 'batch_size', 'probe.batch_size'),
    (PROBE, ('optim.lr=1',), 'optim.lr', 'probe.lrs'),
    (PROBE, ('data.flip=True',), 'data.flip', 'probe.augment=True'),
    (PROBE, ('data.holdout=.5',), 'data.holdout', 'probe.holdout'),
    (PROBE, (*LISTS, 'data.source=v'), 'data.source', 'probe.train'),
    (PROBE, ('probe.ks=(3,)',), 'probe.ks', "'attentive'"),
    (PROBE + ':knn', ('probe.epochs=3',), 'probe.epochs', "'knn'"),
    (PROBE + ':linear', ('probe.num_heads=3',), 'probe.num_heads', "'linear'"),
    ('configs/probe_k400.py', ('probe.loss=l1',), 'probe.loss', 'depth'),
    ('configs/depth_fast.py', ('probe.ks=(3,)',), 'probe.ks', 'job probe'),
    (FINETUNE, ('optim.warmup=9',), 'optim.warmup', 'finetune.warmup_epochs'),
    (FINETUNE, ('batch_size=9',), 'batch_size', 'finetune.batch_size'),
    (FINETUNE, ('method.steps=9',), 'method.steps', 'finetune.epochs'),
    (FINETUNE, ('data.holdout=.1',), 'data.holdout', 'finetune.holdout'),
    (FINETUNE, ('method.q_pool=2',), 'method.q_pool', "'vit'"),
    (
      PROBE,
      ('probe.lrs=(.1,)', 'probe.wds=(0,)', 'probe.holdout=.3'),
      'probe.holdout',
      'a single head',
    ),
    (PROBE, ('data.depth_units=1000',), 'data.depth_units', 'job depth'),
    (PROBE, ('data.stretch=9',), 'data.stretch', 'depth_units is 0'),
    (
      PROBE,
      ('probe.augment=True', 'data.repeat_frames=shared'),
      'data.repeat_frames',
      'one clip of each video',
    ),
    (
      'configs/depth_fast.py',
      ('data.label_column=x',),
      'data.label_column',
      'no labels',
    ),
    (
      'configs/salt.py',
      ('data.crop=centre', 'data.crop_scale=(.5,1)'),
      'data.crop_scale',
      "data.crop is 'centre'",
    ),
    (
      'configs/salt.py',
      ('data.crop_part=.5',),
      'data.crop_part',
      "'random_resized'",
    ),
    ('', ('data.depth_range=(1,2)',), 'data.depth_range', 'depth_units is 0'),
    (
      FINETUNE,
      ('finetune.valid=c', 'finetune.holdout=.3'),
      'finetune.holdout',
      'chosen by finetune.valid',
    ),
    (
      FINETUNE,
      (
        'data.frames=8',
        'data.stride=1',
        'data.size=32',
        'method.clip=(8,2,64)',
      ),
      'method.clip',
      'use data.frames',
    ),
    (
      FINETUNE,
      ('encoder=x', 'method.vit.patch=(4,8,8)'),
      'method.vit.patch',
      'weights of config.encoder',
    ),
  ],
)
def test_the_command_line_cannot_set_what_a_job_does_not_read(
  page, assignments, key, remedy
):
  with pytest.raises(ValueError, match='does not use this key') as error:
    main.resolve(page, assignments)
  assert f'--config.{key}: ' in str(error.value)
  assert remedy in str(error.value)


@pytest.mark.parametrize(
  ('page', 'assignments'),
  [
    ('', ('seed=1', 'probe.epochs=3', 'optim.lr=1e-3', 'data.workers=1')),
    ('configs/salt.py', ('method.vit.patch=(4,8,8)', 'batch_size=8')),
    (PROBE, ('probe.augment=True', 'data.flip=False', 'probe.epochs=2')),
    (PROBE, ('probe.train=a', 'data.source=b', 'data.frames=8')),
    (PROBE, ('probe.augment=True', 'data.crop_part=.5', 'probe.holdout=.3')),
    (
      PROBE,
      ('probe.augment=True', 'probe.segments=2', 'data.crop_scale=(.5,1)'),
    ),
    ('configs/depth_fast.py', ('data.stretch=9', 'data.depth_range=(1,2)')),
    (FINETUNE, ('data.frames=8', 'method.clip=(8,2,64)', 'data.crop_part=.5')),
    (PROBE + ':knn', ('probe.ks=(3,)', 'probe.test_batch_size=8')),
    (FINETUNE, ('method.vit.patch=(4,8,8)', 'optim.lr=1', 'mesh.data=2')),
    (FINETUNE, ('encoder=x', 'method.drop_path=.1', 'data.repeats=2')),
  ],
)
def test_what_a_job_reads_can_be_set(page, assignments):
  config = main.resolve(page, assignments)
  for assignment in assignments:
    assert assignment.partition('=')[0].split('.')[0] in config


def test_the_demo_overwrites_no_videos_that_a_page_names(tmp_path):
  c = demo.get_config()
  c.workdir, c.data.source = str(tmp_path / 'run'), 'mine'
  with pytest.raises(ValueError, match=r"data\.source: found 'mine', .*demo"):
    demo.run(c)
  assert not (tmp_path / 'run').exists()


def test_fine_tuning_overwrites_nothing_that_a_page_sets(tmp_path):
  c = small.config_of(tmp_path, tmp_path)
  data = {'source': '', 'where': '', 'holdout': 0.0}
  videos = videos_lib.Videos(data, data, data, ('a', 'b'), 48, {})
  assert setup.fill(c, videos).optim.warmup == 3
  c.optim.warmup = 100
  with pytest.raises(ValueError, match=r'optim\.warmup: found 100') as error:
    setup.fill(c, videos)
  assert 'use finetune.warmup_epochs' in str(error.value)
  c = small.config_of(tmp_path, tmp_path, warmup_epochs=4.0)
  with pytest.raises(ValueError, match=r'finetune\.warmup_epochs: found 4'):
    setup.fill(c, videos)


@pytest.mark.parametrize('page', ['', 'configs/salt.py', FINETUNE])
def test_depth_is_read_by_its_own_job_alone(page):
  with pytest.raises(ValueError, match=r"only the job 'depth' reads depth"):
    main.resolve(page, ['data.depth_units=1000'])
