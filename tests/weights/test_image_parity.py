"""Image models: the numbers and gradients of `transformers`, on frames."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.weights import test_parity as parity
from vssl_jax import encoder as encoder_lib
from vssl_jax import trees, weights
from vssl_jax.models import framewise
from vssl_jax.weights.readers import tensors

try:
  import torch
  import transformers
except ImportError:
  torch = None

pytestmark = [pytest.mark.slow, parity.needs_parity]

CLIP = (2, 4, 48, 48, 3)  # frames 0 and 2 are looked at
SMALL = dict(
  image_size=48, patch_size=16, hidden_size=48, num_hidden_layers=3,
  num_attention_heads=2, attn_implementation='eager',
)  # fmt: skip


def mae(cls='ViTMAEModel', **overrides):
  config = transformers.ViTMAEConfig(
    **SMALL, intermediate_size=96, decoder_hidden_size=32,
    decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
    decoder_intermediate_size=64, **{'mask_ratio': 0.0, **overrides},
  )  # fmt: skip
  model = getattr(transformers, cls)(config)
  # transformers leaves the table of sines to the file; this fills it.
  embeddings = getattr(model, 'vit', model).embeddings
  for part in (
    embeddings.position_embeddings,
    embeddings.patch_embeddings.projection,
  ):
    part._is_hf_initialized = False
  embeddings.initialize_weights()
  return randomised(model)


def dino():
  config = transformers.ViTConfig(**SMALL, intermediate_size=96)
  return randomised(transformers.ViTModel(config))


def dinov2():
  config = transformers.Dinov2Config(
    **{**SMALL, 'patch_size': 12, 'mlp_ratio': 2}
  )
  return randomised(transformers.Dinov2Model(config))


def registers(**more):
  config = transformers.Dinov2WithRegistersConfig(
    **{**SMALL, 'patch_size': 12, 'mlp_ratio': 2, **more}, num_register_tokens=3
  )
  return randomised(transformers.Dinov2WithRegistersModel(config))


def swiglu():
  config = transformers.Dinov2Config(
    **{**SMALL, 'patch_size': 12, 'mlp_ratio': 3}, use_swiglu_ffn=True
  )
  return randomised(transformers.Dinov2Model(config))


def both():
  return registers(use_swiglu_ffn=True)


def randomised(model):
  """Large random parameters, but for a table that nobody trains."""
  kept = {
    n: p.clone() for n, p in model.named_parameters() if not p.requires_grad
  }
  model = parity.randomised(model)
  with torch.no_grad():
    for name, p in model.named_parameters():
      if name in kept:
        p.copy_(kept[name])
  return model


def as_frames(video):
  """Normalised [B * t, C, H, W] of every second frame, for torch."""
  pixels = parity.as_pixels(video[:, ::2])
  return pixels.reshape(-1, *pixels.shape[2:])


def load(model, folder):
  model.save_pretrained(folder)
  return weights.load_published(folder, dtype='float32')


def close(found, wanted, tolerance=1e-5):
  found, wanted = np.asarray(found), np.asarray(wanted)
  scale = max(float(np.abs(wanted).max()), 1.0)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * scale)


@pytest.fixture(scope='module')
def video():
  return np.random.default_rng(0).random(CLIP, np.float32)


def in_order(model, frames):
  """MAE's encoder shuffles its tokens unless the noise ascends."""
  if not hasattr(model.config, 'mask_ratio'):
    return {}
  count = (48 // model.config.patch_size) ** 2
  noise = torch.linspace(0, 1, count)[None].expand(len(frames), -1)
  return {'noise': noise}


@pytest.mark.parametrize(
  ('make', 'positions'),
  [
    (mae, 'sincos_2d'),
    (dino, 'learned'),
    (dinov2, 'learned'),
    (registers, 'learned'),
    (swiglu, 'learned'),
    (both, 'learned'),
  ],
)
def test_hidden_states_and_gradients(tmp_path, video, make, positions):
  model, frames = make(), as_frames(video)
  out = model(frames, output_hidden_states=True, **in_order(model, frames))
  # Without the class token; frames of a clip in a row.
  states = [*out.hidden_states, out.last_hidden_state]
  first = 1 + getattr(model.config, 'num_register_tokens', 0)
  states = [x[:, first:].reshape(2, -1, 48) for x in states]
  module, params, _ = load(model, tmp_path / 'weights')
  assert module.image.positions == positions
  scaled = make not in (mae, dino)
  assert (module.every, module.image.layer_scale) == (2, scaled)

  def apply(params):
    features = module.apply({'params': params}, video, features=True)
    return (*features, module.apply({'params': params}, video))

  found = jax.jit(apply)(params)
  assert len(found) == len(states) == 5
  for a, b in zip(found, states, strict=True):
    close(a, b.detach().numpy())

  directions = [parity.weight_of(tuple(x.shape)) for x in states]
  sum(
    (x * torch.tensor(d)).sum() for x, d in zip(states, directions, strict=True)
  ).backward()

  def loss(params):
    return sum(
      jnp.sum(x * d) for x, d in zip(apply(params), directions, strict=True)
    )

  grads = jax.jit(jax.grad(loss))(params)
  with torch.no_grad():
    for p in model.parameters():
      if p.requires_grad:
        p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
  _, wanted, _ = load(model, tmp_path / 'gradients')
  assert not trees.difference(grads, wanted)
  largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(wanted))
  for (name, a), (_, b) in zip(
    trees.named_leaves(grads), trees.named_leaves(wanted), strict=True
  ):
    # Biases of keys have no gradient but for the rounding of what is summed.
    scale = max(float(np.abs(b).max()), 0.01 * largest)
    assert np.abs(a - b).max() <= 1e-5 * scale, name


def test_mae_on_visible_patches(tmp_path, video):
  model = mae(mask_ratio=0.7)
  frames = as_frames(video)
  # Of every frame two of nine patches, ascending, those of the lowest noise.
  visible = np.array([[0, 7, 9, 13], [3, 4, 10, 17]], np.int32)
  noise = np.ones((4, 9), np.float32)
  noise[np.arange(4)[:, None], visible.reshape(4, 2) % 9] = [0.1, 0.2]
  out = model(frames, noise=torch.tensor(noise)).last_hidden_state
  module, params, _ = load(model, tmp_path)
  found = jax.jit(module.apply)({'params': params}, video, visible)
  close(found, out[:, 1:].reshape(2, 4, 48).detach().numpy())


def test_a_folder_of_a_whole_mae(tmp_path, video):
  """The decoder beside the encoder is told as unused."""
  model, frames = mae('ViTMAEForPreTraining'), as_frames(video)
  out = model.vit(frames, **in_order(model, frames)).last_hidden_state
  module, params, report = load(model, tmp_path)
  found = jax.jit(module.apply)({'params': params}, video)
  close(found, out[:, 1:].reshape(2, 18, 48).detach().numpy())
  on_disk = set(tensors.safetensors(tmp_path / 'model.safetensors'))
  assert set(report.loaded) | set(report.unused) == on_disk
  unused = {n for n in on_disk if n.startswith('decoder.')}
  table = 'vit.embeddings.position_embeddings'
  assert set(report.unused) == unused | {table}
  assert weights.clip_shape(tmp_path) == (16, 48, 48, 3)
  assert isinstance(weights.describe(tmp_path), framewise.Framewise)


@pytest.mark.parametrize('make', [dino, dinov2, registers])
def test_clips_of_another_size(tmp_path, make):
  """Positions are resized as `transformers` does, each model in its way."""
  model = make()
  model.save_pretrained(tmp_path)
  patch = model.config.patch_size
  for h, w in ((6, 5), (2, 3)):
    size = (4, h * patch, w * patch, 3)
    video = np.random.default_rng(0).random((2, *size), np.float32)
    more = {'interpolate_pos_encoding': True} if make is dino else {}
    out = model(as_frames(video), **more).last_hidden_state
    first = 1 + getattr(model.config, 'num_register_tokens', 0)
    encoder = encoder_lib.load(str(tmp_path)).at(size)
    found = encoder(video)
    close(found, out[:, first:].reshape(2, -1, 48).detach().numpy())


def original(model, folder):
  """The names of the authors' code: DINOv2, with blocks in chunks of two."""
  model.save_pretrained(folder)
  stored = tensors.safetensors(folder / 'model.safetensors')
  renamed = {
    'embeddings.cls_token': 'cls_token',
    'embeddings.mask_token': 'mask_token',
    'embeddings.register_tokens': 'register_tokens',
    'embeddings.position_embeddings': 'pos_embed',
    'embeddings.patch_embeddings.projection.': 'patch_embed.proj.',
    'layernorm.': 'norm.',
    'attention.attention.query': 'attn.qkv',
    'attention.output.dense': 'attn.proj',
    'layer_scale1.lambda1': 'ls1.gamma',
    'layer_scale2.lambda1': 'ls2.gamma',
    'mlp.weights_in': 'mlp.w12',
    'mlp.weights_out': 'mlp.w3',
  }
  found = {}
  for key in stored:
    if 'attention.key' in key or 'attention.value' in key:
      continue
    parts = (
      ('query', 'key', 'value') if 'attention.query' in key else ('query',)
    )
    x = np.concatenate([stored[key.replace('query', n)] for n in parts])
    name = key
    for theirs, ours in renamed.items():
      name = name.replace(theirs, ours)
    if name.startswith('encoder.layer.'):
      i, rest = name.removeprefix('encoder.layer.').split('.', 1)
      name = f'blocks.{int(i) // 2}.{i}.{rest}'
    found[f'backbone.{name}'] = torch.tensor(np.array(x))
  return found


@pytest.mark.parametrize('make', [registers, swiglu, both])
def test_dinov2_in_the_names_of_its_authors(tmp_path, video, make):
  model = make()
  state = original(model, tmp_path / 'folder')
  torch.save({'teacher': state}, tmp_path / 'reg4.pth')
  module, params, report = weights.load_published(
    tmp_path / 'reg4.pth', num_heads=2, dtype='float32'
  )
  assert report.layout == 'DINOv2 (original)'
  assert report.unused == ('backbone.mask_token',)
  first = 1 + getattr(model.config, 'num_register_tokens', 0)
  out = model(as_frames(video)).last_hidden_state
  found = jax.jit(module.apply)({'params': params}, video)
  close(found, out[:, first:].reshape(2, -1, 48).detach().numpy())
