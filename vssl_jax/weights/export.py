"""Exports encoders as safetensors, in a published layout if possible."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vssl_jax import trees
from vssl_jax.models import framewise
from vssl_jax.models.hiera import encoder as encoder_lib
from vssl_jax.weights import classifiers, convert, modules
from vssl_jax.weights import source as source_lib
from vssl_jax.weights.name_maps import hiera as hiera_lib
from vssl_jax.weights.name_maps import video as video_lib
from vssl_jax.weights.readers import tensors as tensors_lib

LAYOUTS = ('auto', 'vjepa2', 'videomae', 'hiera', source_lib.OURS)
TABLES = {
  'vjepa2': video_lib.VJEPA2['encoder'],
  'videomae': video_lib.VIDEOMAE['encoder'],
  'hiera': hiera_lib.PARTS['encoder'],
}
# Fields that are fixed in the authors' code, or that it requires for clips.
HIERA = {
  'separable': True,
  'gelu': 'exact',
  'norm_eps': 1e-6,
}


def export(
  encoder: modules.Encoder,
  params: Any,
  folder: str | os.PathLike[str],
  *,
  video: Sequence[int] = (16, 224, 224, 3),
  timing: tuple[int, float] = (0, 0.0),
  layout: str = 'auto',
  classifier: classifiers.Classifier | None = None,
) -> str:
  """Writes `model.safetensors`, `config.json` and `preprocessor_config.json`.

  `preprocessor_config.json` contains sizes and pixel mean and deviation for the
  image processors of `transformers`. In the layout `hiera` it contains
  everything that is not an argument of the authors' class. Our own layout does
  not need it.

  Args:
    encoder: the module.
    params: its parameters.
    folder: created if it does not exist.
    video: (T, H, W, C) of the clips the encoder was trained on.
    timing: stride and frames per second of these clips; 0 if unknown.
    layout: one of
      `vjepa2`, `videomae`: can be loaded by `transformers`;
      `hiera`: its config contains the arguments of `Hiera` in
      `hiera-transformer`. The norm and the classifier after the mean over
      tokens are written if there is a `classifier`; our `final_norm` is not;
      `vssl_vit`: supports every encoder;
      `auto`: the first of `vjepa2`, `videomae` and `vssl_vit` that supports
      the encoder.
    classifier: classifier of a fine-tuned encoder; its class names are written
      to `config.json`.

  Returns:
    The layout.

  Raises:
    WeightsError: the layout cannot express a field of this encoder, which the
      message names; or the folder has an index, which would make readers load
      other files.
  """
  obstacles = {name: _obstacle(encoder, name, video) for name in TABLES}
  if classifier is not None:
    obstacles['vjepa2'] = 'a linear classifier'
  obstacles[source_lib.OURS] = ''
  if layout == 'auto':
    layout = next(
      name for name in obstacles if not obstacles[name] and name != 'hiera'
    )
  if layout not in obstacles:
    raise tensors_lib.WeightsError(
      f'layout is {layout!r}, wanted one of {LAYOUTS}'
    )
  if obstacles[layout]:
    raise tensors_lib.WeightsError(
      f'layout {layout!r} has no place for {obstacles[layout]}: other code '
      f'would compute something else; use {source_lib.OURS!r}'
    )
  folder = pathlib.Path(folder)
  if (folder / source_lib.INDEX).exists():
    raise tensors_lib.WeightsError(
      f'{folder}: found {source_lib.INDEX}, which names the files of another '
      'model to read in place of model.safetensors; export into another folder'
    )
  folder.mkdir(parents=True, exist_ok=True)
  if layout == source_lib.OURS:
    tensors = {n: np.asarray(x) for n, x in trees.named_leaves(params)}
  else:
    rows = TABLES[layout].rows(encoder.depth)
    tensors = convert.to_theirs(params, rows, encoder.patch)
  config, processor = _config(encoder, layout, video), {}
  if layout != source_lib.OURS:
    processor = _processor(encoder, layout, video)
  if classifier is not None:
    if layout == 'videomae':
      tensors = {f'videomae.{name}': x for name, x in tensors.items()}
      config['architectures'] = ['VideoMAEForVideoClassification']
    tensors |= classifiers.to_tensors(classifier, layout)
    label_entries = classifiers.labels(classifier.classes)
    if layout == 'hiera':
      config['num_classes'] = len(classifier.classes)
      processor |= label_entries
    else:
      config |= label_entries
  (processor if layout == 'hiera' else config)['clip'] = list(timing)
  tensors_lib.write_safetensors(folder / 'model.safetensors', tensors)
  _write(folder / 'config.json', config)
  if processor:
    _write(folder / 'preprocessor_config.json', processor)
  return layout


def _write(path: pathlib.Path, config: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(config, indent=2) + '\n')


def _colours(encoder: modules.Encoder) -> dict[str, list[float]]:
  return {'image_mean': list(encoder.mean), 'image_std': list(encoder.std)}


def _processor(
  encoder: modules.Encoder, layout: str, video: Sequence[int]
) -> dict[str, Any]:
  """Returns the config of an image processor: sizes, mean and deviation."""
  if layout == 'hiera':
    return _colours(encoder)
  kinds = {'image_processor_type': 'VideoMAEImageProcessor'}
  if layout == 'vjepa2':
    kinds['video_processor_type'] = 'VJEPA2VideoProcessor'
  return kinds | {
    'do_resize': True,
    'size': {'shortest_edge': video[1]},
    'resample': 2,  # bilinear
    'do_center_crop': True,
    'crop_size': {'height': video[1], 'width': video[2]},
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    **_colours(encoder),
  }


def _obstacle(
  encoder: modules.Encoder, layout: str, video: Sequence[int]
) -> str:
  """Returns the first field that a layout cannot express; '' if none."""
  if isinstance(encoder, framewise.Framewise):
    return 'an encoder of single frames'
  if isinstance(encoder, encoder_lib.Hiera) != (layout == 'hiera'):
    return 'stages' if layout != 'hiera' else 'an encoder without stages'
  if layout == 'hiera':
    return _differs(encoder, HIERA)
  allowed = dict(modules.FIELDS[layout], gelu=('exact', 'tanh'))
  allowed |= {'class_token': False, 'layer_scale': False, 'mlp': 'gelu'}
  del allowed['init_family']
  if layout == 'videomae':
    allowed = {'positions': 'sinusoid_1d', **allowed}
  if layout == 'vjepa2':
    allowed['final_norm'] = True
  if encoder.patch[1] != encoder.patch[2] or video[1] != video[2]:
    return (
      f'patch {encoder.patch} of clips {tuple(video)}, which are not square'
    )
  return _differs(encoder, allowed)


def _differs(encoder: modules.Encoder, wanted: Mapping[str, Any]) -> str:
  """Returns the first field whose value is not allowed; '' if none."""
  for field, value in wanted.items():
    actual = getattr(encoder, field)
    if actual not in (value if isinstance(value, tuple) else (value,)):
      return f'{field}={actual!r}'
  return ''


def _config(
  encoder: modules.Encoder, layout: str, video: Sequence[int]
) -> dict[str, Any]:
  if layout == source_lib.OURS:
    fields = modules.to_fields(encoder)
    return {'model_type': layout, **fields, 'video': list(video)}
  if layout == 'hiera':
    return _hiera_config(encoder, video)
  mlp = encoder.block_spec.mlp_width
  config = {
    'model_type': layout,
    'hidden_size': encoder.width,
    'num_hidden_layers': encoder.depth,
    'num_attention_heads': encoder.num_heads,
    'hidden_act': 'gelu' if encoder.gelu == 'exact' else 'gelu_pytorch_tanh',
    'layer_norm_eps': encoder.norm_eps,
    'patch_size': encoder.patch[1],
    'tubelet_size': encoder.patch[0],
    **_colours(encoder),
  }
  if layout == 'vjepa2':
    return config | {
      'architectures': ['VJEPA2Model'],
      'crop_size': video[1],
      'frames_per_clip': video[0],
      'in_chans': video[3],
      'mlp_ratio': mlp / encoder.width,
      'qkv_bias': True,
    }
  return config | {
    'architectures': ['VideoMAEModel'],
    'image_size': video[1],
    'num_frames': video[0],
    'num_channels': video[3],
    'intermediate_size': mlp,
    'qkv_bias': True,
    'use_mean_pooling': not encoder.final_norm,
  }


def _hiera_config(
  encoder: encoder_lib.Hiera, video: Sequence[int]
) -> dict[str, Any]:
  """Returns the arguments of the authors' `Hiera` class."""
  return {
    'input_size': list(video[:3]),
    'in_chans': video[3],
    'embed_dim': encoder.channels,
    'num_heads': encoder.num_heads,
    'stages': list(encoder.depths),
    'q_pool': encoder.q_pool,
    'q_stride': [1, 2, 2],
    'mask_unit_size': list(encoder.unit),
    'patch_kernel': list(encoder.kernel),
    'patch_stride': list(encoder.stride),
    'patch_padding': list(encoder.padding),
    'sep_pos_embed': encoder.separable,
  }
