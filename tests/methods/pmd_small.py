"""Small PMD phases, and networks that say what a test gives them."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vssl_jax import methods, rngs, trees
from vssl_jax.data import batch as batch_lib
from vssl_jax.masks import sampling
from vssl_jax.methods import pmd_config
from vssl_jax.models import framewise, vit
from vssl_jax.models import mvd_student as mvd_student_lib

# 9, 8, 6 and 4 of the 36 positions are visible in the four phases.
VIDEO, PATCH, GRID = (4, 24, 24, 3), (2, 4, 4), (2, 6, 6)
TOKENS, HEADS = 72, 2
KEY = jax.random.key(7)
IMAGE = framewise.Framewise(
  vit.make(
    dict(width=24, depth=3, num_heads=HEADS, mlp_width=32),
    patch=(1, 4, 4),
    positions='sincos_2d',
    init='mae',
    drop_path=0.3,
    dtype='float32',
  )
)
VIDEO_MODEL = vit.make(
  dict(width=16, depth=4, num_heads=HEADS, mlp_width=32),
  patch=PATCH,
  positions='sinusoid_1d',
  qkv_bias='qv',
  drop_path=0.3,
  dtype='float32',
)
OUTSIDE = {'images': IMAGE, 'videos': VIDEO_MODEL}
# One phase at 90 %.
MVD = dict(
  mask_ratios=(0.9,),
  steps=(4,),
  lambda_pg=0.0,
  lambda_df=0.0,
  lambda_al=0.0,
  feature_loss='smooth_l1',
)


def config(depth=3, **knobs):
  c = pmd_config.default()
  c.vit.update(dict(patch=PATCH, dtype='float32'))
  small = dict(size='Ti', width=32, depth=depth, num_heads=HEADS, mlp_width=48)
  c.encoder.update(small)
  c.decoder.update(dict(size='S', width=32, depth=1, num_heads=HEADS))
  for name, source in zip(('image', 'video'), OUTSIDE, strict=True):
    c[name].update(dict(teacher=source, dtype='float32'))
    c[f'{name}_teacher'].encoder.update(small)
    c[f'{name}_teacher'].decoder.update(dict(width=32, depth=1, num_heads=2))
    c[f'{name}_teacher'].steps = 3
  c.update(dict(steps=(4,) * 4, window=2, drop_path=0.0))
  c.previous_dtype = 'float32'
  for name, value in knobs.items():
    if isinstance(value, dict):
      c[name].update(value)
    else:
      c[name] = value
  return c


def build(**knobs):
  return methods.build(config(**knobs), VIDEO, OUTSIDE.__getitem__)


def phase(phases, name):
  """Returns the phase of a name."""
  (found,) = [p for p in phases if p.name == name]
  return found


def batch(size=3, rows=None, **fields):
  rng = np.random.default_rng(0)
  found = batch_lib.Batch(
    video=rng.integers(0, 255, (size, *VIDEO), dtype=np.uint8),
    index=np.arange(size, dtype=np.int32),
    repeat=np.zeros(size, np.int32),
    substituted=np.arange(size) == 1,
    progress=np.float32(0.5),
    crop=np.tile(np.float32([0, 0, 1, 1]), (size, 1)),
    flip=np.zeros(size, bool),
    example_memory={
      f'{name}{end}': np.asarray(x, np.float32)
      for name, pair in (rows or {}).items()
      for end, x in zip(('', '@window'), pair, strict=True)
    },
  )
  return jax.tree.map(jnp.asarray, dataclasses.replace(found, **fields))


def with_targets(phase, teachers, batch):
  """Returns the batch with what the teachers say of it, as a step has it."""
  targets = phase.targets(teachers, batch.video)
  return dataclasses.replace(batch, targets=targets)


def rows(size=3, cells=TOKENS, seed=5):
  """Returns {teacher: (value, window)}: some patches were never masked."""
  rng = np.random.default_rng(seed)
  found = {}
  for name in ('image', 'video'):
    value, window = rng.uniform(0, 2, (2, size, cells)).astype(np.float32)
    value[0] = 0
    value[:, ::5] = 0
    found[name] = (value, window)
  return found


def step(number=3):
  return rngs.Rng(KEY, jnp.int32(number))


@functools.cache
def masks(specs, number=3, size=3):
  """Returns the masks of a step."""
  found = [s.draw(step(number), batch(size), GRID)[0] for s in specs]
  return [sampling.Mask(*map(np.asarray, mask)) for mask in found]


def draw(tree, seed=1):
  """Returns values large enough that every path matters."""
  rng = np.random.default_rng(seed)

  def one(name, x):
    scale = 0.2 if x.ndim > 1 else 0.1
    value = scale * rng.normal(size=x.shape)
    return jnp.asarray(value + name.endswith('scale'), jnp.float32)

  return trees.map_named(one, tree)


def shapes(phase):
  clip = np.zeros((1, *VIDEO), np.uint8)
  return jax.eval_shape(lambda: phase.init(KEY, clip))


def teachers(phase):
  """Returns random parameters of what a phase listens to."""
  clip = np.zeros((1, *VIDEO), np.uint8)
  return {
    name: draw(
      jax.eval_shape(lambda t=t: t.module.init(KEY, clip)['params']), seed
    )
    for seed, (name, t) in enumerate(phase.teachers.items())
  }


def double(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


class Said(mvd_student_lib.Student):
  """Says what its parameters hold for every patch, whatever it sees."""

  def __call__(self, video, mask=None, *, at=None, deterministic=True):
    layers = self.get_variable('params', 'features')
    at = mask.masked if at is None else at
    return mvd_student_lib.Output(
      tuple(sampling.gather(x, mask.visible) for x in layers),
      {
        name: sampling.gather(self.get_variable('params', name), at)
        for name in self.decoder
      },
    )


class Told(nn.Module):
  """A teacher that says what its parameters hold."""

  patch: tuple[int, int, int] = PATCH

  def __call__(self, video, features):
    assert features
    return tuple(self.get_variable('params', 'layers'))


def _normal(seed, name, *shape):
  rng = np.random.default_rng([seed, *name.encode()])
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def said(phase, seed, size=3, depth=6, width=8):
  """Returns parameters of `Said`."""
  shape = (depth + 1, size, TOKENS, width)
  return {'features': _normal(seed, 'features', *shape)} | {
    name: _normal(seed, name, size, TOKENS, head.out_width)
    for name, head in phase.student.decoder.items()
  }


def maps(phase, seed, width=8):
  """Returns parameters of the alignment of six layers."""
  return {
    f'align_{name}': {
      f'layer_{n:02d}': {
        'kernel': _normal(seed + n, name, width, module.out_width) / 3,
        'bias': _normal(seed + n, f'{name}/bias', module.out_width),
      }
      for n in (1, 2, 3, 4)
    }
    for name, module in phase.align.items()
  }


def told(phase, seed, size=3):
  """Returns parameters of teachers of 6 and 9 layers, and of the guide."""
  params = {}
  for name, head in phase.student.decoder.items():
    depth = {'image': 6, 'video': 9}[name]
    shape = (depth + 1, size, TOKENS, head.out_width)
    params[name] = {'layers': 1 + 2 * _normal(seed, name, *shape)}
  if 'previous' in phase.teachers:
    params['previous'] = said(phase, seed + 1, size)
  return params


def speaking(phase):
  """Returns the phase with networks that say what their parameters hold."""
  student = Said(phase.student.encoder, phase.student.decoder)
  modules = {'previous': student, 'image': Told(), 'video': Told()}
  return dataclasses.replace(
    phase,
    student=student,
    teachers={
      name: dataclasses.replace(teacher, module=modules[name])
      for name, teacher in phase.teachers.items()
    },
  )
