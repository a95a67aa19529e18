"""A fine-tuned model's classifier and class names stay with its encoder."""

import json

import jax
import numpy as np
import pytest

from vssl_jax import encoder as encoder_lib
from vssl_jax import weights
from vssl_jax.evals.finetune import model as model_lib
from vssl_jax.models import classifier, vit
from vssl_jax.weights.readers import tensors as tensors_lib

VIDEO = (4, 16, 16, 3)
CLASSES = ('wave', 'jump', 'run', '3')
COLOURS = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
FIELDS = {
  'videomae': dict(positions='sinusoid_1d', qkv_bias='qv', **COLOURS),
  'vssl_vit': dict(rope_pairing='paired', **COLOURS),
}


def fine_tuned(layout):
  """A model whose numbers are all drawn at random."""
  module = vit.make(
    dict(width=24, depth=2, num_heads=2, mlp_width=48),
    patch=(2, 8, 8),
    final_norm=False,
    dtype='float32',
    **FIELDS[layout],
  )
  head = classifier.Classifier(len(CLASSES))
  key, video = jax.random.key(0), np.zeros((1, *VIDEO), np.uint8)
  shapes = {
    'encoder': jax.eval_shape(module.init, key, video)['params'],
    'head': jax.eval_shape(head.init, key, np.zeros((1, 8, 24), np.float32))[
      'params'
    ],
  }
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes
  )
  clip = encoder_lib.Clip(VIDEO, 1, 5.0)
  return model_lib.Model(module, head, params, CLASSES, clip)


def logits_by_hand(model, video):
  """The classifier in NumPy."""
  tokens = model.encoder.apply({'params': model.params['encoder']}, video)
  mean = np.asarray(tokens, np.float64).mean(axis=1)
  norm, linear = model.params['head']['norm'], model.params['head']['head']
  scaled = (mean - mean.mean(1, keepdims=True)) / np.sqrt(
    mean.var(1, keepdims=True) + 1e-6
  )
  scaled = scaled * norm['scale'] + norm['bias']
  return scaled @ linear['kernel'] + linear['bias']


@pytest.mark.slow
@pytest.mark.parametrize('layout', FIELDS)
def test_an_export_keeps_classifier_names_and_colours(layout, tmp_path):
  model = fine_tuned(layout)
  assert model.export(tmp_path) == layout
  again = model_lib.load(str(tmp_path))
  assert again.classes == CLASSES
  assert again.clip == model.clip
  video = np.random.default_rng(1).integers(0, 256, (3, *VIDEO), np.uint8)
  wanted = logits_by_hand(model, video)
  np.testing.assert_allclose(model(video), wanted, atol=1e-4)
  encoder = again.encoder.clone(dtype='float32')
  again = model_lib.Model(
    encoder, again.head, again.params, again.classes, again.clip
  )
  np.testing.assert_allclose(again(video), wanted, atol=1e-4)
  assert (encoder.mean, encoder.std) == (COLOURS['mean'], COLOURS['std'])
  config = json.loads((tmp_path / 'config.json').read_text())
  assert config['id2label'] == {str(i): x for i, x in enumerate(CLASSES)}
  assert config['label2id'] == {x: i for i, x in enumerate(CLASSES)}


@pytest.mark.parametrize('layout', FIELDS)
def test_the_encoder_of_such_files_loads_and_is_exported_whole(
  layout, tmp_path
):
  model = fine_tuned(layout)
  model.export(tmp_path / 'a')
  encoder = encoder_lib.load(str(tmp_path / 'a'))
  assert encoder.classifier.classes == CLASSES
  encoder.export(tmp_path / 'b')
  for name in ('config.json', 'model.safetensors'):
    a, b = ((tmp_path / x / name).read_bytes() for x in 'ab')
    assert a == b, name
  assert encoder_lib.random(encoder).classifier is None


def test_layouts_without_such_a_classifier_are_refused(tmp_path):
  model = fine_tuned('videomae')
  module = model.encoder.clone(
    positions='rope_3d', rope_pairing='vjepa2', qkv_bias='full', final_norm=True
  )
  with pytest.raises(
    tensors_lib.WeightsError, match='no place for a linear class'
  ):
    weights.export(
      module,
      {},
      tmp_path,
      layout='vjepa2',
      classifier=weights.Classifier({}, CLASSES),
    )


def test_encoders_without_a_classifier_are_no_model(tmp_path):
  model = fine_tuned('videomae')
  weights.export(model.encoder, model.params['encoder'], tmp_path, video=VIDEO)
  assert weights.load_classifier(tmp_path) is None
  with pytest.raises(ValueError, match='without a classifier'):
    model_lib.load(str(tmp_path))


def spoiled(folder, **tensors):
  """Changes tensors of an exported folder; None takes one out."""
  file = folder / 'model.safetensors'
  kept = {
    k: np.array(x) for k, x in tensors_lib.safetensors(file).items()
  } | tensors
  tensors_lib.write_safetensors(
    file, {k: x for k, x in kept.items() if x is not None}
  )


@pytest.mark.parametrize(
  ('layout', 'name', 'value'),
  [
    ('videomae', 'classifier.weight', np.nan),
    ('videomae', 'fc_norm.bias', -np.inf),
    ('vssl_vit', 'classifier/head/kernel', np.inf),
  ],
)
def test_a_classifier_that_is_not_finite_is_refused_by_name(
  tmp_path, layout, name, value
):
  fine_tuned(layout).export(tmp_path)
  x = np.array(tensors_lib.safetensors(tmp_path / 'model.safetensors')[name])
  x.flat[0] = value
  spoiled(tmp_path, **{name: x})
  for load in (encoder_lib.load, model_lib.load):
    with pytest.raises(ValueError, match=f'NaN or Inf in 1 of 4.*{name}'):
      load(str(tmp_path))


def test_integers_are_no_classifier(tmp_path):
  fine_tuned('videomae').export(tmp_path)
  spoiled(tmp_path, **{'classifier.weight': np.ones((4, 24), np.int8)})
  with pytest.raises(ValueError, match=r'integers in 1 .*classifier\.weight'):
    encoder_lib.load(str(tmp_path))


@pytest.mark.parametrize(
  'change',
  [{'classifier/head/bias': None}, {'classifier/x/y': np.zeros(3, np.float32)}],
)
def test_half_a_classifier_is_named(tmp_path, change):
  fine_tuned('vssl_vit').export(tmp_path)
  spoiled(tmp_path, **change)
  with pytest.raises(
    tensors_lib.WeightsError, match=r'found a classifier of .*want'
  ):
    encoder_lib.load(str(tmp_path))


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    ({'id2label': ['a', 'b']}, 'id2label is a list, wanted an object of names'),
    ({'id2label': {'0': ['a']}}, 'id2label is a dict, wanted an object of na'),
    ({'clip': 5}, 'clip is 5, wanted stride and frames'),
    ({'clip': [1]}, r'clip is \[1\], wanted stride and frames'),
    ({'clip': [-3, 0.0]}, 'clip is a list, wanted stride and frames'),
  ],
)
def test_configs_of_classifiers_that_lie(tmp_path, config, message):
  fine_tuned('vssl_vit').export(tmp_path)
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | config))
  with pytest.raises(tensors_lib.WeightsError, match=f'config.json: {message}'):
    encoder_lib.load(str(tmp_path))


def test_an_export_is_not_hidden_behind_another_models_index(tmp_path):
  """Readers follow an index, so the old weights were loaded from there."""
  model = fine_tuned('vssl_vit')
  model.export(tmp_path)
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': {'x': 'old.safetensors'}}))
  before = sorted(tmp_path.iterdir())
  with pytest.raises(
    tensors_lib.WeightsError, match=r'found model\.safetensors\.ind'
  ):
    model.export(tmp_path)
  assert sorted(tmp_path.iterdir()) == before
