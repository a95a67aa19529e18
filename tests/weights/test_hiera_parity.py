"""Hiera: the numbers and gradients of the package `hiera-transformer`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.weights import test_parity as parity
from vssl_jax import losses, trees, weights
from vssl_jax.masks import hiera_units, sampling
from vssl_jax.models.hiera import decoder as decoder_lib
from vssl_jax.models.hiera import encoder as encoder_lib
from vssl_jax.models.hiera import token_order
from vssl_jax.weights import hiera_files, source
from vssl_jax.weights.name_maps import hiera as hiera_lib
from vssl_jax.weights.readers import tensors as tensors_lib

try:
  import torch

  from tests.weights import published_hiera

  published = published_hiera.load()
except ImportError:
  published = None

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    published is None,
    reason='needs hiera-transformer: pip install --no-deps hiera-transformer',
  ),
]

TINY = dict(embed_dim=8, num_heads=1, stages=(1, 2, 2, 1))
VIDEO = dict(
  input_size=(8, 64, 64), q_stride=(1, 2, 2), mask_unit_size=(1, 8, 8),
  patch_kernel=(3, 7, 7), patch_stride=(2, 4, 4), patch_padding=(1, 3, 3),
  sep_pos_embed=True,
)  # fmt: skip
IMAGE = dict(input_size=(64, 64))
DECODER = dict(decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)
COLOURS = dict(mean=(0.45,) * 3, std=(0.225,) * 3)  # of their video models
KINDS = {'video': VIDEO, 'image': IMAGE}
GRIDS = {'video': (4, 2, 2), 'image': (1, 2, 2)}
UNITS = {
  'video': np.array([[0, 3, 6, 13], [1, 2, 9, 15]], np.int32),
  'image': np.array([[0, 3], [1, 2]], np.int32),
}


def make(cls, kind, **fields):
  model = getattr(published, cls)(**TINY, **KINDS[kind], **fields)
  return parity.randomised(model)


def clip(kind):
  """Pixels in [0, 1], and normalised as torch takes them."""
  frames = 8 if kind == 'video' else 1
  video = np.random.default_rng(0).random((2, frames, 64, 64, 3), np.float32)
  if kind == 'image':
    return video, parity.as_pixels(video)[:, 0]
  mean, std = (np.float32(x) for x in COLOURS.values())
  pixels = (video - mean) / std
  return video, torch.tensor(pixels.transpose(0, 4, 1, 2, 3))


def kept(kind):
  """Their mask of units: true for those that are kept."""
  mask = np.zeros((2, int(np.prod(GRIDS[kind]))), bool)
  np.put_along_axis(mask, UNITS[kind], True, axis=1)
  return torch.tensor(mask)


def load(tensors, folder, part='encoder', **fields):
  """Our module and parameters of their tensors."""
  torch.save({'model_state': dict(tensors)}, folder / 'model.pth')
  heads = 1 if part == 'encoder' else 2
  module, params, _ = weights.load_published(
    folder / 'model.pth', part=part, num_heads=heads, dtype='float32', **fields
  )
  return getattr(module, 'image', module), params


def gradients(model):
  return {
    n: torch.zeros_like(p) if p.grad is None else p.grad
    for n, p in model.named_parameters()
  }


def as_clips(stages, kind, masked):
  """Their stages, with an axis of time where images have none."""
  axis = 2 if masked else 1
  return [x if kind == 'video' else x.unsqueeze(axis) for x in stages]


def along(outputs):
  """A number whose gradient has every output in it, for torch and for JAX."""
  return sum(
    (x * parity.weight_of(tuple(x.shape)).astype(np.float32)).sum()
    if isinstance(x, jax.Array)
    else (x * torch.tensor(parity.weight_of(tuple(x.shape)))).sum()
    for x in outputs
  )


def all_close(found, wanted):
  """1e-4 of the largest value of each leaf, or of a hundredth of all."""
  assert not trees.difference(found, wanted)
  largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(wanted))
  for (name, a), (_, b) in zip(
    trees.named_leaves(found), trees.named_leaves(wanted), strict=True
  ):
    # Biases of keys have no gradient but for the rounding of what is summed.
    scale = max(float(np.abs(b).max()), 0.01 * largest)
    assert np.abs(a - b).max() <= 1e-4 * scale, name


@pytest.mark.parametrize(
  ('kind', 'q_pool', 'masked'),
  [
    ('video', 2, False),
    ('video', 2, True),
    ('video', 3, False),
    ('image', 2, True),
    ('image', 3, False),
  ],
)
def test_stages_and_gradients(tmp_path, kind, q_pool, masked):
  model = make('Hiera', kind, q_pool=q_pool, num_classes=5)
  video, pixels = clip(kind)
  mask = kept(kind) if masked else None
  logits, stages = model(pixels, mask, return_intermediates=True)
  stages = as_clips(stages, kind, masked)
  module, params = load(model.state_dict(), tmp_path, q_pool=q_pool)
  units = jnp.asarray(UNITS[kind]) if masked else None

  def apply(params):
    return module.apply({'params': params}, video, units, features=True)

  found = jax.jit(apply)(params)
  assert len(found) == 4
  for a, b in zip(found, stages, strict=True):
    parity.close(a, b.detach().numpy())
  along(stages).backward()
  _, wanted = load(gradients(model), tmp_path, q_pool=q_pool)
  grads = jax.jit(jax.grad(lambda p: along(apply(p))))(params)
  all_close(jax.tree.map(np.asarray, grads), wanted)
  if not masked:  # the classifier: mean over our tokens, then their head
    tokens = module.clone(final_norm=False).apply({'params': params}, video)
    ours = torch.tensor(np.asarray(tokens)).mean(1)
    found = model.head(model.norm(ours))
    parity.close(found.detach().numpy(), logits.detach().numpy())


@pytest.mark.parametrize('kind', ['video', 'image'])
def test_masked_autoencoder(tmp_path, kind):
  """Stages, predictions, loss and gradients of encoder and decoder."""
  model = make('MaskedAutoencoderHiera', kind, q_pool=2, **DECODER)
  video, pixels = clip(kind)
  loss, predicted, label, _ = model(pixels, mask=kept(kind))
  encoder, params = load(model.state_dict(), tmp_path)
  decoder, head = load(model.state_dict(), tmp_path, 'head')
  grid = GRIDS[kind]
  mask = sampling.partition(jnp.asarray(UNITS[kind]), int(np.prod(grid)))
  at = hiera_units.expand_units(mask.masked, grid)
  order = jnp.argsort(at, axis=1)  # they have raster order, we unit by unit
  wanted = decoder_lib.targets(video, encoder)
  if kind == 'image':  # they have channels first there
    shape = (*wanted.shape[:2], 16, 16, 3)
    wanted = wanted.reshape(shape).transpose(0, 1, 4, 2, 3)
    wanted = wanted.reshape(*shape[:2], -1)
  wanted = sampling.gather(wanted, at)

  def apply(both):
    ends = encoder.apply(
      {'params': both[0]}, video, mask.visible, features=True
    )
    return decoder.apply({'params': both[1]}, ends, mask, grid)

  def total(both):
    found = apply(both)
    return losses.mse(found, wanted), found

  (found_loss, found), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(
    (params, head)
  )
  parity.close(found_loss, loss.detach().numpy())
  for a, b in ((found, predicted), (wanted, label)):
    in_order = sampling.gather(a, order).reshape(-1, 768)
    parity.close(in_order, b.detach().numpy())
  loss.backward()
  wanted = tuple(
    load(gradients(model), tmp_path, part)[1] for part in ('encoder', 'head')
  )
  all_close(jax.tree.map(np.asarray, grads), wanted)


def test_the_order_of_tokens():
  """Theirs has units as the faster axis, ours as the slower one."""
  raster = np.arange(4 * 16 * 24, dtype=np.float32).reshape(1, 4, 16, 24, 1)
  unroll = published.hiera_utils.Unroll((8, 64, 96), (2, 4, 4), [(1, 2, 2)] * 3)
  theirs = unroll(torch.tensor(raster.reshape(1, -1, 1)))
  ours = np.asarray(token_order.unroll(jnp.asarray(raster), 3))
  found = ours[0, :, :, 0].T.reshape(-1)
  np.testing.assert_array_equal(found, theirs[0, :, 0].numpy())


@pytest.mark.parametrize(
  ('name', 'size', 'q_pool'),
  [
    ('hiera_tiny_224', 'T', 3),
    ('mae_hiera_small_224', 'S', 2),
    ('hiera_base_16x224', 'B', 3),
    ('mae_hiera_base_plus_16x224', 'B+', 2),
  ],
)
def test_their_own_sizes(name, size, q_pool):
  """Every name of every size is in the table, and the sizes are ours."""
  tensors = getattr(published, name)().state_dict()
  (layout,) = (x for x in hiera_lib.LAYOUTS if {*x.marks} <= {*tensors})
  found = source.Found(name, {}, {'model_state': tensors}, layout)
  module = hiera_files.build(found, 'encoder', None)
  image = getattr(module, 'image', module)
  shape = {n: getattr(image, n) for n in encoder_lib.FIELDS}
  assert shape == encoder_lib.SIZES[size]
  assert image.q_pool == q_pool
  side = 14 * 4
  times = 8 if name.endswith('16x224') else 1
  assert hiera_files.grid(found) == (times, side, side)
  rows = {r.theirs for x in layout.parts.values() for r in x.rows(image.depth)}
  if q_pool == 3:
    rows |= {'norm.weight', 'norm.bias'}
    rows |= {'head.projection.weight', 'head.projection.bias'}
  assert tensors.keys() <= rows


@pytest.mark.parametrize('stride', [(2, 4, 4), (4, 4, 4)])
def test_their_class_loads_what_we_export(tmp_path, stride):
  encoder = encoder_lib.make(
    dict(channels=8, depths=(1, 2, 2, 1), num_heads=1),
    stride=stride,
    q_pool=3,
    final_norm=False,
    dtype='float32',
    **COLOURS,
  )
  video, pixels = clip('video')
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), video)['params']
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: 0.15 * rng.standard_normal(x.shape).astype(np.float32), shapes
  )
  weights.export(
    encoder, params, tmp_path, video=video.shape[1:], layout='hiera'
  )
  config = json.loads((tmp_path / 'config.json').read_text())
  model = published.Hiera(num_classes=3, **config)
  tensors = tensors_lib.safetensors(tmp_path / 'model.safetensors')
  told = model.load_state_dict(
    {n: torch.tensor(np.asarray(x)) for n, x in tensors.items()}, strict=False
  )
  assert not told.unexpected_keys
  assert {n.split('.')[0] for n in told.missing_keys} == {'norm', 'head'}
  _, stages = model.eval()(pixels, return_intermediates=True)
  found = jax.jit(encoder.apply)({'params': params}, video)
  wanted = stages[-1].detach().numpy()
  parity.close(found, wanted.reshape(found.shape))
