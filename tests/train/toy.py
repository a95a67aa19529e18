"""A phase small enough to know every number of, for tests of the trainer."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from vssl_jax.methods import cost as cost_lib
from vssl_jax.methods import phase as phase_lib


class Mean(nn.Module):
  """Tokens [B, 1, width] from the mean pixel of every channel."""

  width: int = 4
  patch: tuple = (1, 1, 1)
  mean: tuple = (0, 0, 0)

  @nn.compact
  def __call__(self, video, depth=None):
    x = jnp.mean(video.astype(jnp.float32) / 255, axis=(1, 2, 3))
    for i in range(2):
      x = nn.Dense(self.width, name=f'layer_{i}')(x)
    return x[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyPhase(phase_lib.Phase):
  """Encoder and head whose product is pulled to 1; rows count visits.

  A batch may bring factors of its predictions, as its targets `weight`.
  """

  def init(self, rng, video):
    encoder = self.encoder.init(rng, video)['params']
    head = nn.Dense(1).init(rng, jnp.zeros((1, self.encoder.width)))['params']
    return {'encoder': encoder, 'head': head}

  def loss(self, params, teachers, batch, rng):
    x = self.encoder.apply({'params': params['encoder']}, batch.video)
    y = nn.Dense(1).apply({'params': params['head']}, x[:, 0])[:, 0]
    if 'weight' in batch.targets:
      y = y * batch.targets['weight']
    target = 1.0
    for name, teacher in self.teachers.items():
      target = teacher(teachers[name], batch.video)[:, 0, 0]
    per_clip = jnp.square(y - target)
    rows = {name: batch.example_memory[name] + 1 for name in self.memory_specs}
    return jnp.mean(per_clip), phase_lib.Aux({'loss/toy': jnp.mean(y)}, rows)

  def cost(self, video):
    return cost_lib.Cost(1.0)


def phase(kind=ToyPhase, **fields):
  """A phase of the toy, or of a `kind` of it, with short defaults."""
  return kind(**(dict(name='one', steps=10, encoder=Mean()) | fields))
