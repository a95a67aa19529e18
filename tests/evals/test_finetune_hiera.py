"""Fine-tuning Hiera: its pages, and a start that pools once more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.evals import finetune_small as small
from vssl_jax import config as config_lib
from vssl_jax import encoder as encoder_lib
from vssl_jax import methods, trees, weights
from vssl_jax.data import options
from vssl_jax.data.tools import synthetic
from vssl_jax.evals import clips as clips_lib
from vssl_jax.evals.finetune import job, setup
from vssl_jax.evals.finetune import model as model_lib
from vssl_jax.methods import phase as phase_lib
from vssl_jax.models import framewise, vit
from vssl_jax.models.hiera import encoder as hiera_encoder
from vssl_jax.train import optimizer
from vssl_jax.train import run as run_lib
from vssl_jax.utils import config_io

SHAPE = (4, 32, 32, 3)


def encoder_of():
  """A Hiera as it was pre-trained: two poolings."""
  module = hiera_encoder.make(
    dict(channels=8, depths=(1, 1, 1, 1), num_heads=1),
    stride=(2, 2, 2),
    drop_path=0.3,
    dtype='float32',
  )
  params = jax.jit(module.init)(jax.random.key(3), np.zeros((1, *SHAPE), 'u1'))
  return encoder_lib.Encoder(module, params['params'], 'ours', SHAPE)


def config_of(folder):
  c = config_lib.fine_tuning()
  c.workdir = str(folder)
  c.data.update(dict(frames=4, stride=1, size=(32, 32), channels=3))
  c.method.update(dict(steps=1, classes=3, drop_path=0.2))
  return c


def test_the_run_starts_from_the_same_leaves_and_pools_once_more(tmp_path):
  """Invariant 11 of KDHiera: none is missing, none is left over."""
  c, given = config_of(tmp_path), encoder_of()
  setup.write(c, given)
  _, params, report = weights.load_published(c.method.source)
  assert not report.missing and not report.unused
  wanted = dict(trees.named_leaves(given.params))
  found = dict(trees.named_leaves(params))
  assert found.keys() == wanted.keys()
  for name, value in found.items():
    np.testing.assert_array_equal(value, wanted[name])
  # As it is read back from the run's record.
  section = config_io.from_json(config_io.to_json(c)).method
  (phase,) = methods.build(section, SHAPE, encoder_lib.module_of)
  assert phase.encoder == given.module.clone(
    q_pool=3, drop_path=0.2, final_norm=False, dtype='bfloat16'
  )
  assert phase.init_from == {'encoder': phase_lib.FromWeights(c.method.source)}
  clip = np.zeros((2, *SHAPE), np.uint8)
  shapes = jax.eval_shape(lambda: phase.init(jax.random.key(0), clip))
  assert not trees.difference(params, shapes['encoder'])
  tokens = jax.eval_shape(phase.encoder.apply, {'params': params}, clip)
  assert tokens.shape == (2, 2 * 2 * 2, 64)
  assert phase.cost(SHAPE).total > 0


def test_the_head_starts_as_released():
  """Biases of .02, of the linear layer times the scale of its weights."""
  c = config_lib.fine_tuning()
  c.method.update(dict(steps=1, classes=400, family='hiera', head_scale=0.1))
  (phase,) = methods.build(c.method, SHAPE, encoder_lib.module_of)
  params = phase.head.init(jax.random.key(0), jnp.zeros((1, 1, 64)))
  norm, head = params['params']['norm'], params['params']['head']
  np.testing.assert_array_equal(norm['scale'], 1)
  np.testing.assert_array_equal(norm['bias'], np.float32(0.02))
  np.testing.assert_allclose(head['bias'], 0.002, rtol=1e-6)
  np.testing.assert_allclose(np.std(head['kernel']), 0.002, rtol=0.02)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hiera_is_fine_tuned_and_tested(tmp_path):
  """Through the trainer, with layer-wise decay over its named blocks."""
  synthetic.write(
    tmp_path / 'videos', clips={'train': 24, 'test': 16}, size=32, frames=8
  )
  c = small.config_of(tmp_path / 'videos', tmp_path / 'run', epochs=2)
  c.data.size = (32, 32)
  found = job.evaluate(c, encoder_of())
  assert found['method']['family'] == 'hiera' and found['method']['q_pool'] == 3
  assert found['test']['evaluated'] == 16
  assert 0 <= found['results']['best']['accuracy'] <= 1
  model = model_lib.load(str(tmp_path / 'run'))
  assert model.encoder.q_pool == 3
  assert model(np.zeros(SHAPE, np.uint8)).shape == (1, len(model.classes))


def test_another_encoder_is_refused(tmp_path):
  c = config_of(tmp_path)
  images = framewise.Framewise(vit.make('Ti', patch=(1, 8, 8)))
  other = encoder_lib.Encoder(images, {}, 'ours', SHAPE)
  with pytest.raises(
    ValueError, match=r'ours: found a Framewise, wanted a Vit'
  ):
    setup.write(c, other)
  c.method.family = 'cnn'
  with pytest.raises(ValueError, match=r"method.family: found 'cnn', wanted"):
    methods.build(c.method, SHAPE, encoder_lib.module_of)


# Rate at the batch, epochs, warm-up, layer decay, drop path, dropout, views.
ROWS = {
  'finetune_hiera_k400.py': (8e-4, 150, 10, 0.8, 0.2, 0.3, 5),
  'finetune_hiera_k400.py:B': (8e-4, 150, 10, 0.8, 0.2, 0.3, 5),
  'finetune_hiera_k400.py:B+': (8e-4, 150, 10, 0.8, 0.2, 0.3, 5),
  'finetune_hiera_k400.py:L': (8e-4, 100, 10, 0.875, 0.2, 0.5, 5),
  'finetune_hiera_k400.py:H': (4e-4, 100, 10, 0.875, 0.3, 0.5, 5),
  'finetune_hiera_ssv2.py': (0.16, 40, 3, 0.875, 0.1, 0.5, 1),
}


@pytest.mark.parametrize('spec', ROWS)
def test_pages_hold_the_published_values(spec):
  _, c = config_lib.load(f'configs/{spec}')
  assert c.job == 'finetune'
  c = clips_lib.follow(c, setup.clip_of(c, None))
  assert options.spec(c.data).shape == (16, 224, 224, 3)
  c.method.classes = 7
  setup.set_steps(c, 100)
  phases = methods.build(
    c.method, options.spec(c.data).shape, encoder_lib.module_of
  )
  (span,) = run_lib.spans(phases)
  encoder = span.phase.encoder
  lr, epochs, warmup, decay, drop_path, dropout, clips = ROWS[spec]
  rate = optimizer.learning_rate(
    c.optim, optimizer.horizon(span.phase, 0, (0, span.end)), c.batch_size
  )
  np.testing.assert_allclose(rate(0), 0, atol=1e-12)
  np.testing.assert_allclose(rate(100 * warmup), lr, rtol=1e-5)
  assert span.end == 100 * epochs and c.finetune.clips == clips
  assert (c.optim.layer_decay, c.method.dropout) == (decay, dropout)
  assert encoder.drop_path == drop_path and encoder.q_pool == 3
  assert c.finetune.batch_size == 256 and c.finetune.views == 3
  assert (c.method.mixup, c.method.cutmix, c.method.smoothing) == (0.8, 1, 0.1)
  size = spec.partition(':')[2] or ('L' if 'ssv2' in spec else 'B')
  assert encoder.depths == hiera_encoder.SIZES[size]['depths']
  assert encoder.channels == hiera_encoder.SIZES[size]['channels']
  ssv2 = 'ssv2' in spec
  assert c.data.flip != ssv2 and c.optim.rule == ('sgd' if ssv2 else 'adamw')
  assert c.optim.weight_decay == (1e-4 if ssv2 else 0.05)
  assert c.optim.clip == (0 if ssv2 else 5)
  assert c.data.repeats == (1 if ssv2 else 2)


@pytest.mark.parametrize(
  'page', ['finetune_hiera_k400.py', 'finetune_hiera_ssv2.py']
)
def test_pages_refuse_other_variants(page):
  with pytest.raises(ValueError, match=f'{page}: found :nonsense'):
    config_lib.load(f'configs/{page}:nonsense')
