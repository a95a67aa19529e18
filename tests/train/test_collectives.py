"""What the devices of a sharded step send each other, counted.

A small twin of configs/layerlock_4b.py, compiled for 8 devices. Whatever a
device gathers is a weight that it is about to use, and whatever they sum is
the gradient of one: no optimizer state, no activations.
"""

import collections
import math
import pathlib
import re

import jax
import pytest

from vssl_jax import config as config_lib
from vssl_jax import encoder, methods, sharding, trees
from vssl_jax.data import options
from vssl_jax.train import phase_setup
from vssl_jax.train import run as run_lib

PAGE = pathlib.Path(__file__).parents[2] / 'configs/layerlock_4b.py'
VIDEO, BATCH, TOKENS = (4, 32, 32, 3), 16, 32
DEPTH, DECODER, LOCKED, WIDTH, MLP = 6, 2, 2, 128, 640
KINDS = 'all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute'


def _twin(layout='loops', target='latent'):
  _, c = config_lib.load(str(PAGE))
  c.batch_size = BATCH
  c.data.frames, c.data.stride, c.data.size = *VIDEO[:1], 1, VIDEO[1:3]
  m = c.method
  m.encoder.update(dict(width=WIDTH, depth=DEPTH, num_heads=4, mlp_width=MLP))
  m.vit.patch, m.decoder_blocks, m.masks = (2, 8, 8), DECODER, 'random:0.75'
  m.total, m.schedule = 4, f'((0, 2), ({LOCKED}, 2))'
  m.layout, m.target = layout, target
  c.optim.warmup = 0
  return c


def _collectives(config, number):
  """Returns {kind: Counter of arrays by their sides} and the parameters."""
  video = options.spec(config.data.to_dict()).shape
  phases = methods.build(config.method, video, encoder.module_of)
  mesh = sharding.make_mesh()
  shapes = phase_setup.build(config, run_lib.spans(phases)[number], video)
  lowered = phase_setup.lower(config, shapes, video, mesh)
  found = collections.defaultdict(collections.Counter)
  for line in lowered.compile().as_text().splitlines():
    match = re.search(rf'= (.*?) ({KINDS})(?:-start)?\(', line)
    if match:
      arrays = re.findall(r'\w\[([\d,]*)\]', match[1])
      found[match[2]].update(_sides(a.split(',')) for a in arrays if a)
  return found, shapes


def _sides(shape):
  """An array by its sides: a layout may turn them or add one of length 1."""
  return tuple(sorted(int(n) for n in shape if int(n) != 1))


def _split(shapes, block):
  """Returns the sides of a block's weights that devices share out."""
  tree = trees.subtree(shapes.state.params, block)
  sizes = {'data': 1, 'fsdp': jax.device_count()}
  return collections.Counter(
    _sides(x.shape)
    for name, x in trees.named_leaves(tree)
    if sharding.spec(name, x.shape, sizes)
  )


def _times(counter, factor):
  return collections.Counter({k: n * factor for k, n in counter.items()})


@pytest.fixture(scope='module')
def locked():
  return _collectives(_twin(), 1)


def test_a_weight_is_gathered_once_for_each_use(locked):
  """Loops: the locked stretch for tokens seen and for the target; the free
  one and the decoding one forward and where they are computed again."""
  found, shapes = locked
  wanted = _times(_split(shapes, 'encoder/block_00'), 2 + 2 + 2)
  wanted += _split(shapes, 'encoder/embed') + _split(shapes, 'latent_head')
  assert sum(wanted.values()) == 6 * 6 + 2
  gathered = found['all-gather']
  noise = gathered.pop((BATCH, TOKENS), 0)  # that masks are drawn from
  assert noise <= 2
  assert gathered == wanted


def test_only_gradients_of_trained_weights_are_summed(locked):
  found, shapes = locked
  wanted = _times(_split(shapes, 'encoder/block_00'), 2)  # free and decoding
  wanted += _split(shapes, 'latent_head')
  summed = found['all-reduce'] + found['reduce-scatter']
  large = {k: n for k, n in summed.items() if math.prod(k) > MLP}
  latents = large.pop((TOKENS, WIDTH), 0)  # too few to be shared out
  assert large == wanted and latents == 1


def test_activations_stay_where_their_clips_are(locked):
  found, _ = locked
  assert not found['all-to-all'] and not found['collective-permute']
  assert all(
    BATCH not in sides[:-1] or sides == (BATCH, TOKENS)
    for counter in found.values()
    for sides in counter
  )


def _hiera_twin():
  page = PAGE.with_name('kdhiera_k400.py')
  _, c = config_lib.load(f'{page}:B-self')
  c.batch_size, c.data.repeats = CLIPS, 1
  c.data.update(dict(frames=8, stride=1, size=(64, 64)))
  m = c.method
  m.vit.patch = (2, 8, 8)
  m.encoder.update(dict(channels=64, depths=(1, 1, 1, 1), num_heads=1))
  m.hiera.stride = (2, 2, 2)
  shape = dict(size='Ti', width=WIDTH, depth=4, num_heads=4, mlp_width=MLP)
  for name in ('image', 'video'):
    m[f'{name}_teacher'].encoder.update(shape)
    m[name].layers = (1, 2, 3, 4)
  return c


CLIPS, UNITS = 24, 4 * 4 * 4  # 24 is a side that no weight has


@pytest.mark.slow
def test_of_a_hiera_and_its_teachers_only_weights_are_gathered():
  """Units are windows of a clip's own tokens: no device needs another's."""
  found, shapes = _collectives(_hiera_twin(), -1)
  parameters = (shapes.state.params, *shapes.teachers.values())
  leaves = [x for tree in parameters for _, x in trees.named_leaves(tree)]
  weights = {_sides(x.shape) for x in leaves}
  gathered = {k for k in found['all-gather'] if math.prod(k) > MLP}
  noise = {k for k in gathered if CLIPS in k}  # that masks are drawn from
  assert all(math.prod(k) <= CLIPS * UNITS for k in noise), noise
  assert gathered - noise and gathered - noise <= weights
  # What comes back to rows of the position table goes to their channels' place.
  seen = 4 * 2  # units
  rows = _sides((CLIPS // 8, seen, 8 * 8, 64 // 8))
  assert set(found['all-to-all']) <= {rows}
  assert not found['collective-permute']
  summed = found['all-reduce'] + found['reduce-scatter']
  large = {k for k in summed if math.prod(k) > MLP}
  assert large <= weights
