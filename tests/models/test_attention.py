"""Attention: the formula, the choice of a kernel, the TPU kernel emulated."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from vssl_jax.models import attention

KEY = jax.random.key(0)
HOPPER = attention.Machine('nvidia', 9.0)


def draw(batch, length, sources, heads, head_dim, dtype=jnp.float32):
  keys = jax.random.split(KEY, 3)
  shapes = [(batch, n, heads, head_dim) for n in (length, sources, sources)]
  return [
    2 * jax.random.normal(k, s, dtype)
    for k, s in zip(keys, shapes, strict=True)
  ]


def test_against_numpy():
  q, k, v = draw(2, 5, 7, 3, 8)
  scores = np.einsum('bnhd,bshd->bhns', q, k) / 8**0.5
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  wanted = np.einsum('bhns,bshd->bnhd', weights, v)
  np.testing.assert_allclose(attention.attend(q, k, v), wanted, atol=1e-5)


def test_softmax_is_float32_for_bfloat16_inputs():
  # Two scores of 400 and 401: equal in bfloat16, 0.27 and 0.73 in float32.
  q = jnp.full((1, 1, 1, 1), 1.0, jnp.bfloat16)
  k = jnp.array([400.0, 402.0], jnp.bfloat16).reshape(1, 2, 1, 1)
  q = q * jnp.bfloat16(0.5)
  v = jnp.array([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1)
  out = float(attention.attend(q, k, v)[0, 0, 0, 0])
  assert out == pytest.approx(0.731, abs=3e-3)


@pytest.mark.parametrize(
  ('on', 'dtype', 'head_dim', 'name', 'reason'),
  [
    (attention.Machine('cpu'), 'bfloat16', 64, 'xla', 'no special kernel'),
    (attention.Machine('gpu'), 'bfloat16', 64, 'xla', 'no special kernel'),
    (attention.Machine('tpu'), 'bfloat16', 64, 'splash', 'fastest on tpu'),
    (HOPPER, 'bfloat16', 64, 'cudnn', 'fastest on nvidia'),
    (HOPPER, 'bfloat16', 24, 'cudnn', 'fastest on nvidia'),
    (HOPPER, 'bfloat16', 136, 'cudnn', 'fastest on nvidia'),
    (HOPPER, 'float32', 64, 'xla', 'activations are float32'),
    (HOPPER, 'bfloat16', 12, 'xla', 'multiple of 8 channels up to 256'),
    (attention.Machine('nvidia', 8.6), 'bfloat16', 136, 'xla', 'up to 128'),
    (attention.Machine('nvidia', 7.5), 'bfloat16', 64, 'xla', 'has 7.5'),
  ],
)
def test_choice(on, dtype, head_dim, name, reason):
  choice = attention.choose('auto', head_dim=head_dim, dtype=dtype, on=on)
  assert choice.name == name
  assert reason in choice.reason


def test_a_kernel_that_cannot_run_is_an_error_that_says_why():
  for name, why in (('cudnn', 'NVIDIA GPU'), ('splash', 'needs a TPU')):
    with pytest.raises(ValueError, match=f'{name}.* cannot run: .*{why}.*cpu'):
      attention.choose(
        name, head_dim=64, dtype='bfloat16', on=attention.Machine('cpu')
      )
  with pytest.raises(ValueError, match="'flash'"):
    attention.choose('flash', head_dim=64, dtype='bfloat16')
  q, k, v = draw(1, 4, 4, 1, 8)
  forced = attention.choose('xla', head_dim=8, dtype='float32', on=HOPPER)
  assert forced == ('xla', 'requested')
  with pytest.raises(ValueError, match='activations are float32'):
    attention.choose('cudnn', head_dim=8, dtype='float32', on=HOPPER)
  if jax.default_backend() == 'cpu':
    with pytest.raises(ValueError, match='cannot run'):
      attention.attend(q, k, v, 'cudnn')


@pytest.mark.parametrize(
  ('version', 'wanted'),
  [('PJRT C API cuda 12090', HOPPER), ('rocm 6', attention.Machine('gpu'))],
)
def test_machine_tells_nvidia_from_other_gpus(monkeypatch, version, wanted):
  device = types.SimpleNamespace(
    platform='gpu',
    compute_capability='9.0',
    client=types.SimpleNamespace(platform_version=version),
  )
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  assert attention.machine() == wanted


def test_a_mesh_of_other_devices_decides():
  """A step compiled here for a TPU gets the TPU's kernel."""
  device = jax.sharding.AbstractDevice('TPU v5', 2, 'tpu')
  mesh = jax.sharding.AbstractMesh((8,), ('fsdp',), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    assert attention.machine() == attention.Machine('tpu')
  assert attention.machine().kind == jax.default_backend()


def scalar(function):
  return lambda q, k, v: jnp.sum(function(q, k, v) ** 3)


@pytest.mark.parametrize(
  ('length', 'sources', 'head_dim'), [(200, 200, 24), (128, 300, 64)]
)
def test_splash_equals_xla_with_gradients(length, sources, head_dim):
  q, k, v = draw(2, length, sources, 2, head_dim)

  def emulated(q, k, v):
    return attention.splash(q, k, v, interpret=True)

  out = jax.jit(emulated)(q, k, v)
  plain = attention.attend(q, k, v, 'xla')
  np.testing.assert_allclose(out, plain, atol=2e-5)
  for a, b in zip(
    jax.jit(jax.grad(scalar(emulated), (0, 1, 2)))(q, k, v),
    jax.jit(jax.grad(scalar(attention.attend), (0, 1, 2)))(q, k, v),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, atol=2e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize('batch', [4, 3])
def test_splash_runs_on_each_device_s_part_of_the_batch(batch):
  mesh = jax.make_mesh(
    (2, 2), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2
  )
  arrays = draw(batch, 130, 130, 1, 8)
  plain = attention.attend(*arrays)

  @jax.jit
  def emulated(q, k, v):
    return attention.splash(q, k, v, interpret=True)

  with jax.set_mesh(mesh):
    if batch == 4:
      spec = jax.NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
      arrays = [jax.device_put(x, spec) for x in arrays]
    out = emulated(*arrays)
    text = emulated.lower(*arrays).as_text()
  np.testing.assert_allclose(out, plain, atol=2e-5)
  split = re.search('in_shardings=.*', text).group()
  assert ('[{"data", "fsdp"}, {}' in split) == (batch == 4), split


@pytest.mark.parametrize(
  ('tokens', 'padded', 'q', 'kv'),
  [(1568, 1664, 128, 1664), (400, 512, 512, 512), (1176, 1280, 256, 1280)],
)
def test_splash_blocks_divide_the_padded_tokens(tokens, padded, q, kv):
  assert attention._round_up(tokens) == padded
  sizes = attention._block_sizes(padded, padded)
  assert (sizes.block_q, sizes.block_kv) == (q, kv)
  assert sizes.block_kv % sizes.block_kv_compute == 0
  assert sizes.has_backward_blocks
