"""What fine-tuning starts from: pages, the encoder's weights, a new head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.evals import finetune_small as small
from vssl_jax import config as config_lib
from vssl_jax import encoder, methods, trees, weights
from vssl_jax.data import options
from vssl_jax.evals import clips
from vssl_jax.evals.finetune import setup
from vssl_jax.models import classifier
from vssl_jax.train import optimizer
from vssl_jax.train import run as run_lib


def test_the_run_starts_from_the_encoder_without_its_final_norm(tmp_path):
  c = config_lib.fine_tuning()
  c.workdir = str(tmp_path)
  given = small.encoder_of()
  c = clips.follow(c, setup.clip_of(c, given))
  setup.write(c, given)
  module, params, _ = weights.load_published(c.method.source)
  wanted = dict(trees.named_leaves(given.params))
  found = dict(trees.named_leaves(params))
  assert wanted.keys() - found.keys() == {'norm/scale', 'norm/bias'}
  for name, value in found.items():
    np.testing.assert_array_equal(value, wanted[name])
  c.method.update(dict(steps=1, classes=3, drop_path=0.3))
  (phase,) = methods.build(c.method, small.SHAPE, encoder.module_of)
  assert phase.encoder == module.clone(
    drop_path=0.3, remat='none', dtype='bfloat16'
  )
  assert phase.encoder.block_spec.drop_path == 0.3


def test_blocks_that_decode_are_left_behind(tmp_path):
  c = config_lib.fine_tuning()
  c.workdir, c.data.frames, c.data.size = str(tmp_path), 4, (16, 16)
  c.data.update(dict(stride=1, channels=3))
  setup.write(c, small.encoder_of(decoder_blocks=1, final_norm=False))
  module, params, _ = weights.load_published(c.method.source)
  assert (module.depth, module.decoder_blocks) == (1, 0)
  assert 'block_00' in params and 'block_01' not in params


def test_the_head_starts_near_zero_and_is_what_it_says():
  head = classifier.Classifier(400, scale=0.001)
  rng = np.random.default_rng(0)
  tokens = rng.normal(2, 3, (2, 5, 64)).astype(np.float32)
  params = head.init(jax.random.key(0), jnp.asarray(tokens))['params']
  kernel = np.asarray(params['head']['kernel'])
  np.testing.assert_allclose(kernel.std(), 0.02 * 0.001, rtol=0.02)
  np.testing.assert_array_equal(params['head']['bias'], 0)
  np.testing.assert_array_equal(params['norm']['scale'], 1)
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params
  )
  mean = tokens.mean(axis=1)
  normed = (mean - mean.mean(1, keepdims=True)) / np.sqrt(
    mean.var(1, keepdims=True) + 1e-6
  )
  given = jax.tree.map(np.asarray, params)
  normed = normed * given['norm']['scale'] + given['norm']['bias']
  logits = normed @ given['head']['kernel'] + given['head']['bias']
  np.testing.assert_allclose(
    head.apply({'params': params}, jnp.asarray(tokens)), logits, atol=1e-4
  )


PAGES = {
  'finetune_k400.py': ['', 'S', 'B', 'L', 'H'],
  'finetune_ssv2.py': ['', 'S', 'B', 'L', 'H'],
  'finetune_ucf101.py': [''],
  'finetune_hmdb51.py': ['', 'S', 'B'],
  'finetune_fast.py': [''],
}
SPAN = 'linspace'
# Learning rate, flip, sampling, epochs, clips along a test video, layer decay,
# drop path, dropout, batch, stride (which 'scattered' has no use for).
ROWS = {
  'finetune_k400.py:S': (7.5e-4, True, SPAN, 150, 5, 0.75, 0.1, 0, 384, 4),
  'finetune_k400.py:B': (7.5e-4, True, SPAN, 75, 5, 0.75, 0.1, 0, 384, 4),
  'finetune_k400.py:L': (2e-3, True, SPAN, 50, 5, 0.75, 0.3, 0.5, 512, 4),
  'finetune_k400.py:H': (1e-3, True, SPAN, 50, 5, 0.75, 0.3, 0.5, 256, 4),
  'finetune_ssv2.py:S': (1.5e-3, False, 'scattered', 40, 2, 0.7, 0.1, 0, 384),
  'finetune_ssv2.py:B': (7.5e-4, False, 'scattered', 30, 2, 0.75, 0.1, 0, 384),
  'finetune_ssv2.py:L': (5e-4, False, 'scattered', 30, 2, 0.75, 0.3, 0.5, 256),
  'finetune_ssv2.py:H': (25e-5, False, 'scattered', 30, 2, 0.75, 0.3, 0.5, 128),
  'finetune_ucf101.py': (2.5e-4, True, SPAN, 100, 5, 0.7, 0.2, 0.5, 128, 4),
  'finetune_hmdb51.py:B': (5e-4, True, SPAN, 50, 5, 0.7, 0.2, 0.5, 128, 4),
  'finetune_hmdb51.py:S': (5e-4, True, SPAN, 50, 10, 0.7, 0.2, 0.5, 128, 2),
}
# What all of them share.
COMMON = {
  'optim': dict(rule='adamw', b1=0.9, b2=0.999, eps=1e-8, clip=0.0),
  'data': dict(
    frames=16,
    size=(224, 224),
    crop='random_resized',
    crop_scale=(0.08, 1.0),
    crop_aspect=(0.75, 4 / 3),
    auto_augment='rand-m7-n4-mstd0.5-inc1',
    erase=0.25,
    repeats=2,
    repeat_frames='shared',
  ),
  'method': dict(
    mixup=0.8, cutmix=1.0, probability=1.0, switch=0.5, smoothing=0.1
  ),
}


@pytest.mark.parametrize(
  'spec', [f'{p}:{v}' if v else p for p, vs in PAGES.items() for v in vs]
)
def test_pages_hold_the_published_values(spec):
  _, c = config_lib.load(f'configs/{spec}')
  assert c.job == 'finetune'
  # VideoMAE's and MVD's encoders are trained on clips such as these.
  assert setup.clip_of(c, None).video[0] in (8, 16)
  c = clips.follow(c, setup.clip_of(c, None))
  c.method.classes = 7
  setup.set_steps(c, 100)
  phases = methods.build(
    c.method, options.spec(c.data).shape, encoder.module_of
  )
  (span,) = run_lib.spans(phases)
  assert span.end == 100 * c.finetune.epochs
  if spec not in ROWS:
    return
  lr, *wanted = ROWS[spec]
  rate = optimizer.learning_rate(
    c.optim, optimizer.horizon(span.phase, 0, (0, span.end)), c.batch_size
  )
  np.testing.assert_allclose(rate(0), 0, atol=1e-12)
  np.testing.assert_allclose(rate(500), lr, rtol=1e-5)
  end = c.optim.lr_end * lr / c.optim.lr
  np.testing.assert_allclose(rate(span.end), end, rtol=1e-2)
  found = [c.data.flip, c.data.sampling, c.finetune.epochs, c.finetune.clips]
  found += [c.optim.layer_decay, span.phase.encoder.block_spec.drop_path]
  found += [c.method.dropout, c.finetune.batch_size, c.data.stride]
  assert found[: len(wanted)] == wanted
  assert c.method.encoder.size == (spec.partition(':')[2] or 'B')
  # `--min_lr` of the scripts; 1e-6 is the default of run_class_finetuning.py.
  large_data = spec.startswith(('finetune_k400', 'finetune_ssv2'))
  default = large_data and spec != 'finetune_ssv2.py:H'
  assert c.optim.lr_end == (1e-6 if default else 1e-5)
  for section, values in COMMON.items():
    assert {name: c[section][name] for name in values} == values
  decay = optimizer.weight_decay(
    c.optim, optimizer.horizon(span.phase, 0, (0, span.end))
  )
  for step in (0, span.end // 2, span.end):
    np.testing.assert_allclose(decay(step), 0.05, rtol=1e-6)
  ssv2 = spec.startswith('finetune_ssv2')
  assert c.finetune.sampling == ('interleaved' if ssv2 else 'spread')
  assert c.finetune.views == 3
  assert f'= {lr:g};' in setup.describe_lr(c)


@pytest.mark.parametrize('page', PAGES)
def test_pages_refuse_other_variants(page):
  for variant in ('nonsense', 'own'):
    with pytest.raises(ValueError, match=f'{page}: found :{variant}'):
      config_lib.load(f'configs/{page}:{variant}')
