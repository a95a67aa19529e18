"""Small KDHiera phases, their batches and their teachers."""

import dataclasses
import functools

import jax
import numpy as np

from tests.methods import pmd_small
from vssl_jax import methods
from vssl_jax.data import batch as batch_lib
from vssl_jax.masks import sampling
from vssl_jax.methods import kdhiera_config
from vssl_jax.models import framewise, vit
from vssl_jax.models.hiera import encoder as encoder_lib

# Units of 16 pixels in two time steps; a teacher's token has 8 of them.
VIDEO, PATCH = (4, 32, 48, 3), (2, 8, 8)
UNITS, GRID, TOKENS, HEADS = (2, 2, 3), (2, 4, 6), 48, 2
SHAPE = dict(depth=4, num_heads=HEADS, mlp_width=24)
IMAGE = framewise.Framewise(
  vit.make(
    dict(width=24, **SHAPE),
    patch=(1, 8, 8),
    positions='sincos_2d',
    class_token=True,
    init='mae',
    drop_path=0.3,
    dtype='float32',
  )
)
VIDEO_MODEL = vit.make(
  dict(width=16, **SHAPE),
  patch=PATCH,
  positions='sinusoid_1d',
  qkv_bias='qv',
  drop_path=0.3,
  dtype='float32',
)
OUTSIDE = {'images': IMAGE, 'videos': VIDEO_MODEL}
# Hiera-MAE by knobs.
MAE = dict(objective='pixels', units='random', teachers=(), mask_ratio=0.6)
step, with_targets = pmd_small.step, pmd_small.with_targets


def config(**knobs):
  """Returns knobs of which 2 of 6 units are visible at every time step."""
  c = kdhiera_config.default()
  c.encoder.update(dict(channels=16, depths=(1, 1, 1, 1), num_heads=1))
  c.hiera.update(dict(kernel=(3, 5, 5), stride=(2, 2, 2), padding=(1, 2, 2)))
  c.hiera.dtype = 'float32'
  c.vit.update(dict(patch=PATCH, dtype='float32'))
  c.decoder.update(dict(width=16, depth=1, num_heads=2))
  small = dict(size='Ti', width=16, depth=4, num_heads=2, mlp_width=24)
  for name, source in zip(('image', 'video'), OUTSIDE, strict=True):
    c[name].update(dict(teacher=source, dtype='float32', layers=(1, 2, 3, 4)))
    c[f'{name}_teacher'].encoder.update(small)
    c[f'{name}_teacher'].decoder.update(dict(width=16, depth=1, num_heads=2))
    c[f'{name}_teacher'].steps = 3
  c.update(dict(steps=4, drop_path=0.0, mask_ratio=0.75))
  for name, value in knobs.items():
    if isinstance(value, dict):
      c[name].update(value)
    else:
      c[name] = value
  return c


@functools.cache
def _built(knobs):
  return methods.build(
    config(**{k: dict(v) if isinstance(v, frozenset) else v for k, v in knobs}),
    VIDEO,
    OUTSIDE.__getitem__,
  )


def build(**knobs):
  """Returns phases; dicts are sections."""
  return _built(
    tuple(
      (k, frozenset(v.items()) if isinstance(v, dict) else v)
      for k, v in knobs.items()
    )
  )


class Said(encoder_lib.Hiera):
  """Says what its parameters hold for every unit, whatever it sees."""

  def __call__(self, video, units, *, features, deterministic=True):
    assert features
    ends = self.get_variable('params', 'ends')
    return tuple(sampling.gather(x, units) for x in ends)


def speaking(phase, size=2):
  """Returns the phase with `Said`, and what that says: ends of the stages."""
  known = encoder_lib.Hiera.__dataclass_fields__.keys() - {'parent', 'name'}
  encoder = Said(**{n: getattr(phase.encoder, n) for n in known})
  rng = np.random.default_rng(6)
  ends = tuple(
    jax.numpy.asarray(rng.normal(size=(size, 12, 1, n, n, c)), np.float32)
    for n, c in ((8, 16), (4, 32), (2, 64), (2, 128))
  )
  return dataclasses.replace(phase, encoder=encoder), {'ends': ends}


def batch(size=2, seed=0):
  rng = np.random.default_rng(seed)
  return batch_lib.Batch(
    video=rng.integers(0, 256, (size, *VIDEO), dtype=np.uint8),
    index=np.arange(size, dtype=np.int32),
    repeat=np.zeros(size, np.int32),
  )


def clip(size=1):
  return np.zeros((size, *VIDEO), np.uint8)


def params(phase):
  """Returns values large enough that every path matters."""
  shapes = jax.eval_shape(lambda: phase.init(pmd_small.KEY, clip()))
  return pmd_small.draw(shapes)


def teachers(phase):
  """Returns random parameters of the teachers."""
  return {
    name: pmd_small.draw(
      jax.eval_shape(
        lambda t=t: t.module.init(pmd_small.KEY, clip())['params']
      ),
      seed,
    )
    for seed, (name, t) in enumerate(phase.teachers.items())
  }
