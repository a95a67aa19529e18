"""Full attention over tokens, with the fastest kernel of the machine.

| name | runs on | needs |
|---|---|---|
| `cudnn` | NVIDIA GPUs from Ampere | bfloat16, heads of 8, 16, ... channels |
| `splash` | TPUs | nothing; tested in interpret mode, not on a TPU |
| `xla` | everything | memory for N x N scores |

No mask is passed: masked tokens are removed before, not here.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

NAMES = ('auto', 'xla', 'cudnn', 'splash')
LANES = 128  # block sizes of the splash kernel are multiples of this


class Machine(NamedTuple):
  """Properties of a machine that decide which kernels can run.

  Attributes:
    kind: `cpu`, `tpu`, `nvidia` or `gpu` (another vendor's).
    capability: CUDA compute capability, such as 9.0; 0 elsewhere.
  """

  kind: str
  capability: float = 0.0


class Choice(NamedTuple):
  """A kernel and the reason for it, for the log."""

  name: str
  reason: str


def machine() -> Machine:
  """Returns the machine of the step: the mesh's device, else JAX's default."""
  device = jax.devices()[0]
  mesh = jax.sharding.get_abstract_mesh()
  target = getattr(mesh, 'abstract_device', None)
  if target is not None and target.platform != device.platform:
    return Machine(target.platform)  # ahead-of-time compilation
  if device.platform != 'gpu':
    return Machine(device.platform)
  version = str(getattr(device, 'compute_capability', '0'))
  if 'cuda' in device.client.platform_version.lower():
    return Machine('nvidia', float(version))
  return Machine('gpu')


def choose(
  implementation: str = 'auto',
  *,
  head_dim: int,
  dtype: str,
  on: Machine | None = None,
) -> Choice:
  """Chooses the attention kernel; returns it with the reason.

  Args:
    implementation: `auto`, or the name of a required kernel.
    head_dim: channels of one head.
    dtype: dtype of queries, keys and values.
    on: the machine; None for the current one.

  Raises:
    ValueError: `implementation` is unknown, or cannot run on the machine.
  """
  if implementation not in NAMES:
    raise ValueError(
      f'attention is {implementation!r}, wanted one of {sorted(NAMES)}'
    )
  on = on or machine()
  obstacles = {
    'xla': '',
    'cudnn': _cudnn_obstacle(head_dim, str(dtype), on),
    'splash': '' if on.kind == 'tpu' else f'needs a TPU and this is {on.kind}',
  }
  if implementation != 'auto':
    if obstacles[implementation]:
      raise ValueError(
        f'attention={implementation!r} cannot run: '
        f'{obstacles[implementation]}; use auto or xla'
      )
    return Choice(implementation, 'requested')
  for name in ('cudnn', 'splash'):
    if not obstacles[name]:
      return Choice(name, f'fastest on {on.kind}')
  if on.kind == 'nvidia':
    return Choice('xla', f'cudnn {obstacles["cudnn"]}')
  return Choice('xla', f'no special kernel for {on.kind}')


def _cudnn_obstacle(head_dim: int, dtype: str, on: Machine) -> str:
  """Returns the reason why cuDNN attention cannot run; empty if it can."""
  if on.kind != 'nvidia':
    return f'needs an NVIDIA GPU and this is {on.kind}'
  if on.capability < 8.0:
    return f'needs compute capability 8.0 and this GPU has {on.capability}'
  if dtype not in ('bfloat16', 'float16'):
    return f'needs bfloat16 and the activations are {dtype}'
  largest = 256 if on.capability >= 9.0 else 128
  if head_dim % 8 or head_dim > largest:
    return (
      f'needs heads of a multiple of 8 channels up to {largest} and they have '
      f'{head_dim}'
    )
  return ''


def attend(
  q: Float[Array, 'B N H d'],
  k: Float[Array, 'B S H d'],
  v: Float[Array, 'B S H d'],
  implementation: str = 'auto',
) -> Float[Array, 'B N H d']:
  """Returns softmax(q k^T / sqrt(d)) v, with the softmax in float32.

  Raises:
    ValueError: `implementation` is unknown, or cannot run on this machine.
  """
  head_dim, dtype = q.shape[-1], str(q.dtype)
  name, _ = choose(implementation, head_dim=head_dim, dtype=dtype)
  if name == 'splash':
    return splash(q, k, v)
  return jax.nn.dot_product_attention(q, k, v, implementation=name)


def received(
  q: Float[Array, 'B N H d'], k: Float[Array, 'B S H d']
) -> Float[Array, 'B S']:
  """Returns the mean of softmax(q k^T / sqrt(d)) over queries and heads.

  Fused kernels do not return these weights. They are computed in float32, one
  head at a time: all heads at once would need more memory than the rest of a
  teacher.
  """

  def of_head(pair: tuple[Array, Array]) -> Array:
    logits = jnp.einsum(
      'bnd,bsd->bns', *pair, preferred_element_type=jnp.float32
    )
    weights = jax.nn.softmax(logits / math.sqrt(q.shape[-1]), axis=-1)
    return jnp.mean(weights, axis=1)

  heads = jnp.moveaxis(q, 2, 0), jnp.moveaxis(k, 2, 0)
  return jnp.mean(jax.lax.map(of_head, heads), axis=0)


def splash(
  q: Float[Array, 'B N H d'],
  k: Float[Array, 'B S H d'],
  v: Float[Array, 'B S H d'],
  interpret: bool = False,
) -> Float[Array, 'B N H d']:
  """Computes attention with JAX's splash kernel for TPUs.

  Tokens are padded to whole blocks; segment ids exclude the padding. The
  compiler cannot split the kernel over devices, so under a mesh `shard_map`
  gives each device its part of the batch.

  Args:
    q: queries.
    k: keys.
    v: values.
    interpret: emulate the kernel on any device, for tests; slow.
  """
  attend_local = functools.partial(_splash_local, interpret=interpret)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return attend_local(q, k, v)
  uneven = q.shape[0] % mesh.size  # then every device has the whole batch
  spec = PartitionSpec() if uneven else PartitionSpec(mesh.axis_names)
  return jax.shard_map(
    attend_local, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
  )(q, k, v)


def _splash_local(q: Array, k: Array, v: Array, interpret: bool) -> Array:
  length, sources = q.shape[1], k.shape[1]
  rows, columns = _round_up(length), _round_up(sources)
  heads = [splash_attention.FullMask((rows, columns))] * q.shape[2]
  kernel = splash_attention.make_splash_mha_single_device(
    splash_attention.MultiHeadMask(heads),
    block_sizes=_block_sizes(rows, columns),
    interpret=interpret,
  )
  segments = splash_attention.SegmentIds(
    (jnp.arange(rows) < length).astype(jnp.int32),
    (jnp.arange(columns) < sources).astype(jnp.int32),
  )
  q = q * (1 / math.sqrt(q.shape[-1]))  # the kernel does not scale
  q, k, v = _pad(q, rows), _pad(k, columns), _pad(v, columns)
  out = jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, segments)
  return out[:, :, :length].transpose(0, 2, 1, 3).astype(v.dtype)


def _pad(x: Array, length: int) -> Array:
  """Returns [B, H, length, d] from [B, N, H, d]."""
  x = x.transpose(0, 2, 1, 3)
  return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))


def _round_up(n: int) -> int:
  return -(-n // LANES) * LANES


def _block(n: int, largest: int) -> int:
  """Returns the largest divisor of n that is a multiple of 128."""
  fits = [b for b in range(LANES, largest + 1, LANES) if n % b == 0]
  return fits[-1]


def _block_sizes(rows: int, columns: int) -> splash_attention.BlockSizes:
  # Full rows of scores if they fit, so that 1,568 tokens are padded to 1,664
  # instead of 2,048.
  q, kv = _block(rows, 512), _block(columns, 2048)
  return splash_attention.BlockSizes(
    block_q=q,
    block_kv=kv,
    block_kv_compute=_block(kv, 512),
    block_q_dkv=q,
    block_kv_dkv=kv,
    block_kv_dkv_compute=_block(kv, 512),
    block_q_dq=q,
    block_kv_dq=kv,
  )
