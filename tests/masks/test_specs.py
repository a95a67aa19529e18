import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax import rngs
from vssl_jax.data import batch as batch_lib
from vssl_jax.masks import specs as specs_lib

GRID = (4, 8, 8)
SAMPLE = jax.jit(specs_lib.Spec.draw, static_argnums=(0, 3))
NAMES = ('short_long', 'tube2', 'causal2', 'random:0.9', 'frames:0.75')


def batch_of(index, repeat=None):
  index = jnp.asarray(index, jnp.int32)
  repeat = jnp.zeros_like(index) if repeat is None else jnp.asarray(repeat)
  return batch_lib.Batch(video=None, index=index, repeat=repeat)


def draw(spec, index, step=3, seed=0, repeat=None):
  rng = rngs.Rng(jax.random.key(seed), jnp.int32(step))
  return SAMPLE(spec, rng, batch_of(index, repeat), GRID)[0]


@pytest.mark.parametrize(
  ('spec', 'grid', 'wanted'),
  [
    (specs_lib.SHORT, (8, 14, 14), (320, 656)),
    (specs_lib.LONG, (8, 14, 14), (80, 1096)),
    (specs_lib.SHORT, (8, 16, 16), (416, 856)),
    (specs_lib.LONG, (8, 16, 16), (104, 1432)),
    (specs_lib.SHORT, (8, 8, 8), (104, 216)),
    (specs_lib.LONG, (8, 8, 8), (24, 360)),
    (specs_lib.SHORT, (4, 8, 8), (56, 104)),
    (specs_lib.LONG, (4, 8, 8), (16, 176)),
    (specs_lib.SHORT, (8, 7, 7), (80, 160)),
    (specs_lib.LONG, (8, 7, 7), (16, 272)),
    (specs_lib.Tube('', 0.75), (8, 14, 14), (392, 1176)),
    (specs_lib.Tube('', 0.80), (8, 14, 14), (320, 1248)),
    (specs_lib.Tube('', 0.85), (8, 14, 14), (240, 1328)),
    (specs_lib.Tube('', 0.90), (8, 14, 14), (160, 1408)),
    (specs_lib.Tube('', 0.90, 'visible_floor'), (8, 14, 14), (152, 1416)),
    (specs_lib.Frames('', 0.75), (8, 14, 14), (392, 1176)),
    (specs_lib.Frames('', 0.90), (8, 14, 14), (152, 1416)),
    (specs_lib.Random('', 0.95), (8, 14, 14), (78, 1490)),
    (specs_lib.Random('', 0.95, 'masked_floor'), (8, 14, 14), (79, 1489)),
    (specs_lib.Random('', 0.90), (8, 7, 7), (39, 353)),
  ],
)
def test_counts_match_the_table(spec, grid, wanted):
  assert spec.counts(grid) == wanted


@pytest.mark.parametrize('text', NAMES)
def test_draws_have_their_static_counts(text):
  for spec in specs_lib.parse(text):
    rng = rngs.Rng(jax.random.key(0), jnp.int32(0))
    mask, metrics = SAMPLE(spec, rng, batch_of([4, 9]), GRID)
    visible, masked = spec.counts(GRID)
    assert mask.visible.shape == (2, visible)
    assert mask.masked.shape == (2, masked)
    assert metrics['visible_tokens'] == visible
    assert metrics['masked_tokens'] == masked


def test_scales_are_the_published_ones():
  short, long = specs_lib.parse('short_long')
  assert (short.blocks, short.scale, short.aspect) == (8, 0.15, (0.75, 1.5))
  assert (long.blocks, long.scale, long.aspect) == (2, 0.7, (0.75, 1.5))


@pytest.mark.parametrize(
  'spec', [*specs_lib.parse('short_long'), *specs_lib.parse('tube1')]
)
def test_a_mask_depends_on_seed_step_example_and_repeat_only(spec):
  whole = draw(spec, [5, 11, 2, 7])
  again = draw(spec, [2, 5])
  np.testing.assert_array_equal(again.masked, whole.masked[jnp.array([2, 0])])
  for other in (
    draw(spec, [5, 11, 2, 7], step=4),
    draw(spec, [5, 11, 2, 7], seed=1),
    draw(spec, [5, 11, 2, 7], repeat=[1, 1, 1, 1]),
    draw(spec, [6, 12, 3, 8]),
  ):
    same = (np.asarray(other.masked) == np.asarray(whole.masked)).all(1)
    assert not same.any()


def test_names_separate_streams():
  first, second = specs_lib.parse('tube2')
  assert (first.name, second.name) == ('tube_1', 'tube_2')
  index = np.arange(4)
  same = draw(first, index).visible == draw(second, index).visible
  assert not np.asarray(same).all(1).any()
  renamed = dataclasses.replace(second, name=first.name)
  np.testing.assert_array_equal(
    draw(first, index).visible, draw(renamed, index).visible
  )


def test_specs_are_hashable():
  specs = [s for text in NAMES for s in specs_lib.parse(text)]
  assert len(set(specs)) == len(specs)


def test_parse_reads_ratios_counts_and_knobs():
  (tube,) = specs_lib.parse('tube:0.75')
  assert tube == specs_lib.Tube('tube', 0.75)
  (short,) = specs_lib.parse('short:24/32', select='raster_truncate')
  assert short.counts((4, 4, 4)) == (24, 32)
  assert short.select == 'raster_truncate'
  short, random = specs_lib.parse('short+random:0.9', size_per='example')
  assert short.size_per == 'example'
  assert random == specs_lib.Random('random', 0.9)


@pytest.mark.parametrize(
  ('text', 'nearest'),
  [
    ('short_lon', 'short_long'),
    ('tube', 'tube:0.9'),
    ('tube:1.5', 'tube:0.9'),
    ('tube:', 'tube:0.9'),
    ('short:24', 'short:24/32'),
    ('short:0/32', 'short:24/32'),
    ('causal3', 'causal2'),
    ('short+lang', 'long'),
  ],
)
def test_parse_names_the_nearest(text, nearest):
  with pytest.raises(ValueError, match=f"nearest is '{nearest}'"):
    specs_lib.parse(text)


def test_a_grid_too_small_for_blocks_is_named():
  with pytest.raises(ValueError, match="mask 'short': 8 visible and 8 masked"):
    specs_lib.SHORT.counts((1, 2, 2))
