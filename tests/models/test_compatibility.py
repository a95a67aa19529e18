"""Which fields of a network change what given parameters compute."""

import dataclasses

import jax
import numpy as np
import pytest

from vssl_jax.models import (
  compatibility,
  framewise,
  mvd_student,
  predictor,
  vit,
)
from vssl_jax.models.hiera import encoder

BASE = vit.make(
  {'width': 24, 'depth': 2, 'num_heads': 2}, mlp_width=48, patch=(2, 4, 4),
  dtype='float32',
)  # fmt: skip
# Another value of every field that changes the function. Those in brackets
# change the shapes of parameters, too.
COUNTS = {
  'positions': 'sinusoid_1d', 'rope_pairing': 'vjepa2', 'num_heads': 1,
  'gelu': 'tanh', 'norm_eps': 0.1, 'mean': (0.0,) * 3, 'std': (1.0,) * 3,
  'patch': (4, 4, 2),
}  # fmt: skip
RESHAPES = {
  'width': 48, 'depth': 1, 'mlp_width': 24, 'qkv_bias': 'qv',
  'final_norm': False, 'decoder_blocks': 1, 'class_token': True,
  'layer_scale': True, 'registers': 1, 'mlp': 'swiglu',
}  # fmt: skip
NEUTRAL = {
  'dtype': 'bfloat16', 'products': 'float8', 'attention': 'xla',
  'remat': 'full', 'loops': (0,), 'drop_path': 0.5, 'init_family': 'mae',
  'resize': 'bicubic_offset',
}  # fmt: skip


def test_every_field_is_known():
  """A new field belongs into one of the tables above."""
  fields = {f.name for f in dataclasses.fields(vit.Vit)} - {'parent', 'name'}
  assert fields <= {*COUNTS, *RESHAPES, *NEUTRAL}
  assert {*NEUTRAL} <= compatibility.NEUTRAL
  for name, value in (COUNTS | RESHAPES).items():
    if name in fields:
      found = compatibility.differing_fields(BASE, BASE.clone(**{name: value}))
      assert found == {name: (getattr(BASE, name), value)}
  for name, value in NEUTRAL.items():
    if name in fields:
      assert not compatibility.differing_fields(
        BASE, BASE.clone(**{name: value})
      )


@pytest.mark.slow
def test_the_fields_that_count_change_features():
  """With the same parameters; the others change nothing, but for rounding."""
  video = np.random.default_rng(0).random((1, 4, 16, 16, 3), np.float32)
  params = jax.jit(BASE.init)(jax.random.key(0), video)
  params = jax.tree.map(
    lambda x: np.random.default_rng(x.size).normal(0, 0.3, x.shape), params
  )
  features = BASE.apply(params, video)
  size = np.abs(features).max()
  fields = {f.name for f in dataclasses.fields(vit.Vit)}
  for name, value in (COUNTS | NEUTRAL).items():
    if name in fields:
      other = BASE.clone(**{name: value}).apply(params, video)
      apart = np.abs(other - features).max() / size
      rounded = 0.1 if name in ('dtype', 'products') else 1e-5
      assert (apart > 3e-5) if name in COUNTS else (apart < rounded), name


def test_inner_networks_and_values_that_mean_the_same():
  images = framewise.Framewise(vit.make('Ti', patch=(1, 16, 16)))
  other = images.clone(norm_eps=1e-12, every=4)
  assert compatibility.differing_fields(images, other) == {
    'image.norm_eps': (1e-6, 1e-12),
    'every': (2, 4),
  }
  whole = mvd_student.Student(BASE, {'image': predictor.Predictor(8)})
  changed = mvd_student.Student(
    BASE, {'image': predictor.Predictor(8, depth=3)}
  )
  found = compatibility.differing_fields(whole, changed)
  assert found == {'decoder.image.depth': (12, 3)}
  assert compatibility.differing_fields(BASE, encoder.make('T')) == {
    'network': ('Vit', 'Hiera')
  }
  # A default written out, and a rotation by which nothing turns.
  wide = BASE.clone(mlp_width=96)
  assert not compatibility.differing_fields(wide, BASE.clone(mlp_width=None))
  fixed = BASE.clone(positions='sinusoid_1d')
  assert not compatibility.differing_fields(
    fixed, fixed.clone(rope_pairing='vjepa2')
  )
