"""The same numbers and gradients as `transformers`, from the same weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.weights import pth
from vssl_jax import encoder as encoder_lib
from vssl_jax import trees, weights
from vssl_jax.evals.finetune import model as model_lib
from vssl_jax.masks import sampling
from vssl_jax.models import classifier, decoder, predictor, vit
from vssl_jax.weights import convert
from vssl_jax.weights.name_maps import video as video_lib
from vssl_jax.weights.readers import tensors as tensors_lib
from vssl_jax.weights.readers import torch_pickle

try:
  import torch
  import transformers
except ImportError:
  torch = None

needs_parity = pytest.mark.skipif(
  torch is None, reason='needs the extra parity: pip install .[parity]'
)
pytestmark = [pytest.mark.slow, needs_parity]

GRID = (2, 3, 3)
VIDEO = (4, 48, 48, 3)
MASK = sampling.Mask(
  jnp.array([[0, 4, 7, 17], [3, 9, 10, 11]], jnp.int32),
  jnp.array([[1, 2, 5, 6, 16], [0, 1, 2, 8, 15]], jnp.int32),
)


@pytest.fixture(scope='module')
def video():
  return np.random.default_rng(0).random((2, *VIDEO), np.float32)


def as_pixels(video):
  """Normalised [B, T, C, H, W] for torch."""
  mean = np.array([0.485, 0.456, 0.406], np.float32)
  std = np.array([0.229, 0.224, 0.225], np.float32)
  return torch.tensor(((video - mean) / std).transpose(0, 1, 4, 2, 3))


def randomised(model):
  """Large random parameters everywhere, so that nothing is hidden by zeros."""
  torch.manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      centre = 1.0 if 'norm' in name and name.endswith('weight') else 0.0
      scale = 0.15 if p.ndim > 1 else 0.1
      p.copy_(centre + scale * torch.randn_like(p))
  return model.float().eval()


def vjepa2():
  config = transformers.VJEPA2Config(
    crop_size=48, patch_size=16, frames_per_clip=4, tubelet_size=2,
    hidden_size=48, num_attention_heads=2, num_hidden_layers=3, mlp_ratio=3.0,
    pred_hidden_size=32, pred_num_attention_heads=2, pred_num_mask_tokens=3,
    pred_num_hidden_layers=2, attn_implementation='eager',
  )  # fmt: skip
  return randomised(transformers.VJEPA2Model(config))


def videomae(cls=None, **overrides):
  config = transformers.VideoMAEConfig(
    image_size=48, num_frames=4, hidden_size=48, num_hidden_layers=3,
    num_attention_heads=2, intermediate_size=96, decoder_hidden_size=32,
    decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
    decoder_intermediate_size=80, attn_implementation='eager',
    **{'use_mean_pooling': False, **overrides},
  )  # fmt: skip
  return randomised((cls or transformers.VideoMAEModel)(config))


VJEPA2 = dict(
  width=48, depth=3, num_heads=2, mlp_width=144, rope_pairing='vjepa2',
  dtype='float32',
)  # fmt: skip
VIDEOMAE = dict(
  width=48, depth=3, num_heads=2, mlp_width=96, positions='sinusoid_1d',
  qkv_bias='qv', norm_eps=1e-12, init='videomae', dtype='float32',
)  # fmt: skip


def numbers(model, gradients=False):
  """Returns key -> numpy, of parameters or of their gradients."""
  found = {}
  for name, p in model.named_parameters():
    x = p.grad if gradients else p
    if x is not None:
      found[name.removeprefix('videomae.')] = x.detach().numpy()
  return found


def ours(model, part, rows, shapes, gradients=False):
  del part
  names = {r.theirs for r in rows}
  tensors = numbers(model, gradients)
  tensors = {k: x for k, x in tensors.items() if k in names}
  return convert.to_ours(tensors, rows, shapes)[0]


def close(found, wanted):
  """1e-4 of the largest number."""
  found, wanted = np.asarray(found), np.asarray(wanted)
  scale = max(float(np.abs(wanted).max()), 1.0)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * scale)


def all_close(found, wanted):
  assert not trees.difference(found, wanted)
  for (name, a), (_, b) in zip(
    trees.named_leaves(found), trees.named_leaves(wanted), strict=True
  ):
    scale = max(float(np.abs(b).max()), 1e-2)
    assert np.abs(a - b).max() <= 1e-4 * scale, name


def weight_of(shape):
  """A fixed direction, so that every output counts in the gradient."""
  return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def check(model, module, rows, apply, output):
  """Compares outputs and the gradients of all parameters."""
  shapes = jax.eval_shape(apply.init)['params']
  params = ours(model, '', rows, shapes)
  direction = weight_of(output.shape)
  found = jax.jit(apply)(params)
  close(found, output.detach().numpy())
  model.zero_grad()
  (output * torch.tensor(direction)).sum().backward()
  wanted = ours(model, '', rows, shapes, gradients=True)
  grads = jax.jit(jax.grad(lambda p: jnp.sum(apply(p) * direction)))(params)
  all_close(jax.tree.map(np.asarray, grads), wanted)
  return params


class Apply:
  """A module with its inputs."""

  def __init__(self, module, *args):
    self.module, self.args = module, args

  def init(self):
    return self.module.init(jax.random.key(0), *self.args)

  def __call__(self, params):
    return self.module.apply({'params': params}, *self.args)


def test_vjepa2_encoder(video):
  model, encoder = vjepa2(), vit.make(VJEPA2)
  output = model(as_pixels(video), skip_predictor=True).last_hidden_state
  rows = video_lib.VJEPA2['encoder'].rows(3)
  check(model, encoder, rows, Apply(encoder, video), output)


def test_vjepa2_predictor(video):
  model = vjepa2()
  head = predictor.Predictor(
    48, width=32, depth=2, num_heads=2, mlp_width=128, num_mask_tokens=3,
    rope_pairing='vjepa2', dtype='float32',
  )  # fmt: skip
  masks = [torch.tensor(np.asarray(m)).long() for m in MASK]
  out = model(as_pixels(video), context_mask=[masks[0]], target_mask=[masks[1]])
  tokens = out.last_hidden_state.detach().numpy()
  z = sampling.gather(jnp.asarray(tokens), MASK.visible)
  rows = video_lib.VJEPA2['head'].rows(2, 3)
  check(
    model,
    head,
    rows,
    Apply(head, z, MASK, GRID, 1),  # transformers uses the second token
    out.predictor_output.last_hidden_state,
  )


@pytest.mark.parametrize('masked', [False, True])
def test_videomae_encoder(video, masked):
  model, encoder = videomae(), vit.make(VIDEOMAE)
  hidden, visible = None, None
  if masked:
    visible = MASK.visible
    hidden = np.ones((2, 18), bool)
    np.put_along_axis(hidden, np.asarray(visible), False, 1)
    hidden = torch.tensor(hidden)
  output = model(as_pixels(video), bool_masked_pos=hidden).last_hidden_state
  rows = video_lib.VIDEOMAE['encoder'].rows(3)
  check(model, encoder, rows, Apply(encoder, video, visible), output)


def test_videomae_whole(video):
  """Encoder and decoder in a row: pixels in, predicted pixels out."""
  model = videomae(transformers.VideoMAEForPreTraining)
  encoder = vit.make(VIDEOMAE)
  head = decoder.VideoMaeDecoder(
    1536, width=32, depth=2, num_heads=2, mlp_width=80, norm_eps=1e-12,
    dtype='float32',
  )  # fmt: skip
  visible = np.asarray(MASK.visible)
  hidden = np.ones((2, 18), bool)
  np.put_along_axis(hidden, visible, False, 1)
  masked = np.stack([np.flatnonzero(row) for row in hidden])
  mask = sampling.Mask(MASK.visible, jnp.asarray(masked, jnp.int32))
  out = model(as_pixels(video), bool_masked_pos=torch.tensor(hidden)).logits
  rows = [
    row._replace(ours=f'{part}/{row.ours}')
    for part, depth in (('encoder', 3), ('head', 2))
    for row in video_lib.VIDEOMAE[part].rows(depth)
  ]

  class Both:
    def init(self):
      key = jax.random.key(0)
      z = jnp.zeros((2, visible.shape[1], 48))
      return {
        'params': {
          'encoder': encoder.init(key, video)['params'],
          'head': head.init(key, z, mask, GRID)['params'],
        }
      }

    def __call__(self, params):
      z = encoder.apply({'params': params['encoder']}, video, mask.visible)
      return head.apply({'params': params['head']}, z, mask, GRID)

  check(model, None, rows, Both(), out)


@pytest.mark.parametrize('family', ['vjepa2', 'videomae', 'videomae_tuned'])
def test_folders_that_transformers_writes(tmp_path, video, family):
  if family == 'vjepa2':
    model = vjepa2()
    inner, options = model, {'skip_predictor': True}
  elif family == 'videomae':
    model = videomae(transformers.VideoMAEForPreTraining)
    inner, options = model.videomae, {}
  else:
    cls = transformers.VideoMAEForVideoClassification
    model = videomae(cls, use_mean_pooling=True)
    inner, options = model.videomae, {}
  model.save_pretrained(tmp_path)
  output = inner(as_pixels(video), **options).last_hidden_state
  module, params, report = weights.load_published(tmp_path, dtype='float32')
  close(
    jax.jit(module.apply)({'params': params}, video), output.detach().numpy()
  )
  on_disk = set(tensors_lib.safetensors(tmp_path / 'model.safetensors'))
  assert set(report.loaded) | set(report.unused) == on_disk
  assert not set(report.loaded) & set(report.unused)
  assert weights.clip_shape(tmp_path) == VIDEO
  assert module.final_norm == (family != 'videomae_tuned')


@pytest.mark.parametrize('family', ['vjepa2', 'videomae'])
def test_transformers_loads_what_we_export(tmp_path, video, family):
  fields = VJEPA2 if family == 'vjepa2' else VIDEOMAE
  encoder = vit.make(fields)
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), video)['params']
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: 0.15 * rng.standard_normal(x.shape).astype(np.float32), shapes
  )
  assert weights.export(encoder, params, tmp_path, video=VIDEO) == family
  options = {}
  if family == 'vjepa2':
    options = {'skip_predictor': True}
    path = tmp_path / 'config.json'  # a small predictor: it is not in the file
    config = json.loads(path.read_text())
    config |= {'pred_hidden_size': 32, 'pred_num_attention_heads': 2}
    path.write_text(json.dumps(config))
  model, told = transformers.AutoModel.from_pretrained(
    tmp_path, output_loading_info=True
  )
  missing = [k for k in told['missing_keys'] if not k.startswith('predictor.')]
  assert not missing
  assert not told['unexpected_keys']
  output = model.eval()(as_pixels(video), **options).last_hidden_state
  found = jax.jit(encoder.apply)({'params': params}, video)
  close(found, output.detach().numpy())


@pytest.mark.parametrize('family', ['vjepa2', 'videomae'])
def test_transformers_reads_colours_and_sizes(tmp_path, video, family):
  colours = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
  encoder = vit.make(VJEPA2 if family == 'vjepa2' else VIDEOMAE, **colours)
  params = encoder.init(jax.random.key(0), video)['params']
  assert weights.export(encoder, params, tmp_path, video=VIDEO) == family
  found = transformers.AutoImageProcessor.from_pretrained(tmp_path)
  np.testing.assert_allclose(found.image_mean, colours['mean'])
  np.testing.assert_allclose(found.image_std, colours['std'])
  assert found.crop_size['height'] == found.size['shortest_edge'] == 48
  frames = list((video[0] * 255).astype(np.uint8))
  pixels = found(frames, return_tensors='np')['pixel_values'][0]
  wanted = np.stack(frames).astype(np.float32) / 255 - colours['mean']
  wanted = (wanted / colours['std']).transpose(0, 3, 1, 2)
  np.testing.assert_allclose(pixels, wanted, atol=1e-5)


def test_transformers_classifies_as_a_fine_tuned_model(tmp_path, video):
  encoder = vit.make(VIDEOMAE, final_norm=False)
  head = classifier.Classifier(3)
  key, tokens = jax.random.key(0), jnp.zeros((1, 4, encoder.width))
  rng = np.random.default_rng(0)
  params = {
    'encoder': jax.eval_shape(encoder.init, key, video)['params'],
    'head': jax.eval_shape(head.init, key, tokens)['params'],
  }
  params = jax.tree.map(
    lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32), params
  )
  clip = encoder_lib.Clip(VIDEO, 4)
  model = model_lib.Model(encoder, head, params, ('a', 'b', 'c'), clip)
  assert model.export(tmp_path) == 'videomae'
  theirs, told = transformers.AutoModelForVideoClassification.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not told['missing_keys'] and not told['unexpected_keys']
  assert theirs.config.id2label == {0: 'a', 1: 'b', 2: 'c'}
  output = theirs.eval()(as_pixels(video)).logits.detach().numpy()
  close(model(video), output)


def test_files_that_torch_saves(tmp_path):
  x = torch.arange(12.0).reshape(3, 4)
  state = {
    'a': x,
    'turned': x.T,
    'row': x[1],
    'half': x.to(torch.bfloat16),
    'count': torch.tensor(3),
    'parameter': torch.nn.Parameter(x),
  }
  torch.save({'model': state, 'epoch': 1}, tmp_path / 'x.pth')
  found = torch_pickle.load(tmp_path / 'x.pth')['model']
  assert found.keys() == state.keys()
  for key, wanted in state.items():
    np.testing.assert_array_equal(
      np.asarray(found[key], np.float32), wanted.detach().float().numpy()
    )


def test_torch_reads_the_files_of_our_other_tests(tmp_path):
  x = np.arange(12, dtype=np.float32).reshape(3, 4)
  pth.save(tmp_path / 'x.pth', {'a': pth.FakeTensor(x)})
  found = torch.load(tmp_path / 'x.pth', weights_only=True)
  np.testing.assert_array_equal(found['a'].numpy(), x)
