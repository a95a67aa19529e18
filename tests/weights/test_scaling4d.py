"""Weights of 4DS: against the same network written out in Flax's own layers."""

import json

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vssl_jax
from vssl_jax import encoder as encoder_lib
from vssl_jax import main, trees, weights
from vssl_jax.data.tools import synthetic
from vssl_jax.models import vit
from vssl_jax.weights import convert, modules, source
from vssl_jax.weights.name_maps import video as video_lib
from vssl_jax.weights.readers import tensors as tensors_lib

VIDEO = (4, 48, 32, 3)
LAYOUT = next(x for x in video_lib.LAYOUTS if x.family == 'scaling4d')


class Mlp(nn.Module):
  hidden: int

  @nn.compact
  def __call__(self, x):
    y = nn.gelu(nn.Dense(self.hidden, name='dense_in')(x))
    return nn.Dense(x.shape[-1], name='dense_out')(y)


class Block(nn.Module):
  heads: int
  hidden: int

  @nn.compact
  def __call__(self, x):
    y = nn.LayerNorm(name='attention_norm')(x)
    x += nn.MultiHeadDotProductAttention(self.heads, name='attention')(y)
    y = nn.LayerNorm(name='mlp_norm')(x)
    return x + Mlp(self.hidden, name='mlp')(y)


class Processor(nn.Module):
  depth: int
  heads: int
  hidden: int

  @nn.compact
  def __call__(self, x):
    outputs = [x]
    for i in range(self.depth):
      block = Block(self.heads, self.hidden, name=f'layers_{i}')
      outputs.append(block(outputs[-1]))
    return outputs


class Patches(nn.Module):
  width: int

  @nn.compact
  def __call__(self, video):
    patch = (2, 16, 16)
    return nn.Conv(self.width, patch, patch, 'VALID', name='Conv_0')(video)


class Positions(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    normal = nn.initializers.normal(0.02)
    return self.param('embeddings', normal, tokens.shape[1:])[None]


class Tokens(nn.Module):
  width: int

  @nn.compact
  def __call__(self, video):
    x = Patches(self.width, name='patch_embedding')(video)
    x += Positions(name='posenc')(x)
    return x.reshape(len(x), -1, self.width)


class Released(nn.Module):
  """Pixels in [0, 1] -> embedded tokens and the output of every block.

  Source: github.com/google-deepmind/representations4d at 75aca30, models/,
  and its colabs/scaling4d_depth_demo.ipynb.
  """

  width: int = 24
  depth: int = 4
  heads: int = 3
  hidden: int = 40

  @nn.compact
  def __call__(self, video):
    x = Tokens(self.width, name='encoder')(video)
    sizes = self.depth, self.heads, self.hidden
    return Processor(*sizes, name='processor')(x)


@pytest.fixture(scope='module')
def video():
  return np.random.default_rng(0).random((2, *VIDEO), np.float32)


@pytest.fixture(scope='module')
def params(video):
  """Large random parameters everywhere: nothing is hidden by zeros."""
  shapes = jax.eval_shape(Released().init, jax.random.key(0), video)
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: (0.2 * rng.standard_normal(x.shape)).astype(np.float32), shapes
  )


def flat(params):
  return flax.traverse_util.flatten_dict(params, sep='/')


@pytest.fixture(scope='module')
def path(params, tmp_path_factory):
  path = tmp_path_factory.mktemp('4ds') / 'scaling4d.npz'
  np.savez(path, **flat(params))
  return path


def close(found, wanted, message=''):
  scale = max(float(np.abs(wanted).max()), 1.0)
  np.testing.assert_allclose(
    found, wanted, rtol=0, atol=1e-5 * scale, err_msg=message
  )


def test_every_block_and_every_tap(path, params, video):
  module, ours, report = weights.load_published(path, dtype='float32')
  assert sorted(report.loaded) == sorted(flat(params))
  assert report.resized == report.missing == report.unused == ()
  assert module == vit.Vit(
    24, 4, 3, 40, positions='learned', final_norm=False, init_family='4ds',
    gelu='tanh', mean=(0.0,) * 3, std=(1.0,) * 3, decoder_blocks=2,
    dtype='float32',
  )  # fmt: skip
  wanted = jax.jit(Released().apply)(params, video)
  run = jax.jit(module.apply, static_argnames=('features', 'depth'))
  found = run({'params': ours}, video, features=True)
  for k, (a, b) in enumerate(zip(found, wanted, strict=True)):
    close(a, b, f'after {k} blocks')
  # The released code lists [tokens, input of block 1, ..., input of block L].
  listed = [wanted[0], *wanted[:-1]]
  for fraction in (0.5, 0.95, 1.0):
    entry = listed[int(len(listed) * fraction) - 1]
    close(run({'params': ours}, video, depth=fraction), entry)
  close(run({'params': ours}, video), listed[int(5 * 0.95) - 1])


def test_gradients(path, params, video):
  module, ours, _ = weights.load_published(path, dtype='float32')
  aim = np.random.default_rng(2).random((2, 12, 24), np.float32)

  def loss(outputs):
    return sum(jnp.mean((x - aim) ** 2) for x in outputs)

  wanted = jax.jit(jax.grad(lambda p: loss(Released().apply(p, video))))(params)
  found = jax.jit(
    jax.grad(lambda p: loss(module.apply({'params': p}, video, features=True)))
  )(ours)
  named = {
    k.removeprefix('params/').replace('/', '.'): np.asarray(x)
    for k, x in flat(wanted).items()
  }
  rows = LAYOUT.parts['encoder'].rows(4)
  wanted, _ = convert.to_ours(named, rows, ours)
  for (name, a), (_, b) in zip(
    trees.named_leaves(found), trees.named_leaves(wanted), strict=True
  ):
    scale = max(float(np.abs(b).max()), 1e-2)
    assert np.abs(a - b).max() <= 1e-4 * scale, name


# Parameters: section 2 of the table of sizes, from the released code; 4DS
# prints 88 M (B) and 3,811 M (e).
@pytest.mark.parametrize(
  ('size', 'count', 'tap'),
  [
    ('B', 87_439_104, 10),
    ('e', 3_809_464_064, 52),
  ],
)
def test_sizes_by_shapes(size, count, tap):
  fields = vit.SIZES[size]
  released = Released(*(fields[name] for name in vit.FIELDS))
  clip = jax.ShapeDtypeStruct((1, 16, 224, 224, 3), np.float32)
  shapes = flat(jax.eval_shape(released.init, jax.random.key(0), clip))
  assert sum(x.size for x in shapes.values()) == count
  shapes = {
    k: np.broadcast_to(np.float32(), x.shape) for k, x in shapes.items()
  }
  found = source.Found('x.npz', {}, {'': shapes}, LAYOUT)
  module = modules.build(found, 'encoder', None)
  assert {name: getattr(module, name) for name in vit.FIELDS} == fields
  assert module.depth - module.decoder_blocks == tap
  ours = jax.eval_shape(module.init, jax.random.key(0), clip)
  assert sum(x.size for x in jax.tree.leaves(ours)) == count


def test_the_depth_model_leaves_its_readout_unused(params, path, tmp_path):
  readout = {'query': np.zeros((6, 2, 4), np.float32)}
  tree = {'params': {'layers_0': params['params'], 'layers_2': readout}}
  np.savez(tmp_path / 'depth.npz', **flat(tree))
  _, ours, report = weights.load_published(tmp_path / 'depth.npz')
  assert report.unused == ('params/layers_2/query',)
  key = 'params/layers_0/processor/layers_3/attention/out/kernel'
  assert key in report.loaded
  jax.tree.map(
    np.testing.assert_array_equal, ours, weights.load_published(path)[1]
  )
  # Its only npz file stands for a folder.
  assert weights.describe(tmp_path) == weights.describe(path)


def changed(tensors, tmp_path):
  np.savez(tmp_path / 'x.npz', **tensors)
  return tmp_path / 'x.npz'


def test_what_does_not_fit_is_named(params, path, tmp_path):
  tensors = flat(params)
  block = 'params/processor/layers_0/attention'
  less = {k: x for k, x in tensors.items() if k != f'{block}/out/bias'}
  with pytest.raises(tensors_lib.WeightsError, match='block_00/attn/out/bias'):
    weights.load_published(changed(less, tmp_path))
  more = tensors | {f'{block}/query_norm/scale': np.ones(8)}
  with pytest.raises(
    tensors_lib.WeightsError, match=r'layers_0\.attention\.query_nor'
  ):
    weights.load_published(changed(more, tmp_path))
  kernel = tensors[f'{block}/query/kernel']
  flattened = {f'{block}/query/kernel': kernel.reshape(24, 24)}
  with pytest.raises(
    tensors_lib.WeightsError, match=r'\(24, 24\), wanted 3 axes'
  ):
    weights.load_published(changed(tensors | flattened, tmp_path))
  with pytest.raises(tensors_lib.WeightsError, match='num_heads is 4'):
    weights.load_published(path, num_heads=4)
  with pytest.raises(tensors_lib.WeightsError, match='has no head'):
    weights.load_published(path, part='head')


def test_loaded_in_one_line_at_any_clip_shape(path, params, video):
  encoder = vssl_jax.load(str(path))
  assert encoder.video == VIDEO and encoder.grid == (2, 3, 2)
  wanted = jax.jit(Released().apply)(params, video)[2]
  np.testing.assert_allclose(encoder(video), wanted, rtol=0.1, atol=0.1)
  larger = (8, 32, 64, 3)
  with pytest.raises(ValueError, match=r'\(2, 3, 2\).*\(4, 2, 4\)'):
    encoder(np.zeros((1, *larger), np.uint8))
  resized = encoder.at(larger)
  assert resized(np.zeros((1, *larger), np.uint8)).shape == (1, 32, 24)
  _, again, report = weights.load_published(path, grid=(4, 2, 4))
  assert len(report.resized) == 1
  np.testing.assert_array_equal(resized.params['positions'], again['positions'])
  assert encoder.at(VIDEO) is encoder
  start = encoder_lib.random(encoder).params['block_00']['mlp']['fc1']['kernel']
  bound = np.sqrt(6 / (24 + 40))  # Glorot's
  assert 0.9 * bound < np.abs(start).max() <= bound


def test_the_probe_job_measures_it(path, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  synthetic.write(
    tmp_path / 'clips', clips={'train': 24, 'test': 12}, size=48, frames=4
  )
  status = main.main(
    [
      '--config=configs/probe_fast.py:knn',
      f'--config.encoder={path}',
      '--config.probe.train=clips/train',
      '--config.probe.test=clips/test',
      '--config.workdir=out',
      '--config.data.frames=4',
      '--config.data.stride=1',
      '--config.data.size=(48, 32)',
      '--config.data.isolate=False',
      '--config.probe.test_batch_size=8',
    ]
  )
  assert status == 0
  report = json.loads((tmp_path / 'out' / 'report.json').read_text())
  assert report['test']['evaluated'] == 12
  assert report['encoder_clip'] == list(VIDEO)
  assert report['clip'] == list(VIDEO)
