"""Builds networks for published weights from the shapes in the file."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vssl_jax.models import decoder, framewise, predictor, vit
from vssl_jax.models.hiera import encoder as encoder_lib
from vssl_jax.weights import convert, hiera_files, video_positions
from vssl_jax.weights import source as source_lib
from vssl_jax.weights.name_maps import hiera as hiera_lib
from vssl_jax.weights.name_maps import rules
from vssl_jax.weights.readers import tensors as tensors_lib

Encoder = vit.Vit | encoder_lib.Hiera | framewise.Framewise
# Family -> width -> attention heads, for files without a config.
HEADS = {
  'vjepa2': {1024: 16, 1280: 16, 1408: 22, 384: 12},
  'videomae': {
    **{192: 3, 384: 6, 512: 8, 640: 8, 768: 12, 1024: 16, 1280: 16},
    1408: 16,  # VideoMAE V2's ViT-g
  },
  'image': {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1536: 24},
}
FIELDS = {
  'vjepa2': {
    'positions': 'rope_3d',
    'rope_pairing': 'vjepa2',
    'qkv_bias': 'full',
    'init_family': 'vjepa',
  },
  'videomae': {
    'qkv_bias': 'qv',
    'init_family': 'videomae',
  },
  'scaling4d': {
    'positions': 'learned',
    'qkv_bias': 'full',
    'init_family': '4ds',
    'gelu': 'tanh',
    'norm_eps': 1e-6,
    'final_norm': False,
    'mean': (0.0,) * 3,  # pixels in [0, 1] as they are
    'std': (1.0,) * 3,
  },
  'image': {'class_token': True, 'qkv_bias': 'full', 'init_family': 'mae'},
}
# Depth at which the released demos read features of 4DS: after 10 of 12 blocks
# and after 52 of 56. There the encoder ends; the remaining blocks were its
# decoder.
SCALING4D_TAP = 0.95


def to_fields(encoder: Encoder) -> dict[str, Any]:
  """Returns the fields of an encoder as a JSON-compatible dict."""
  if isinstance(encoder, framewise.Framewise):
    frames = {'every': encoder.every, 'cell': encoder.cell}
    return to_fields(encoder.image) | {'framewise': frames}
  fields = {
    f.name: getattr(encoder, f.name)
    for f in dataclasses.fields(encoder)
    if f.name not in ('parent', 'name')
  }
  return {'hiera' if isinstance(encoder, encoder_lib.Hiera) else 'vit': fields}


def from_fields(config: Mapping[str, Any]) -> Encoder:
  """Builds an encoder from the dict of `to_fields`."""
  if 'hiera' in config:
    encoder = encoder_lib.make(config['hiera'])
  else:
    encoder = vit.make(config['vit'])
  if 'framewise' in config:
    return framewise.Framewise(encoder, **config['framewise'])
  return encoder


def build(found: source_lib.Found, part: str, num_heads: int | None) -> Any:
  """Builds the network of a source without loading its weights.

  Sizes are taken from tensor shapes and not from the config, because the config
  has a wrong depth for some published predictors.

  Args:
    found: the source.
    part: `encoder` or `head`.
    num_heads: attention heads; None for the number in the config, or the
      default of the width.

  Raises:
    WeightsError: the file does not determine the network.
  """
  if found.layout is None:
    if not {'vit', 'hiera'} & {*found.config} or part != 'encoder':
      raise tensors_lib.WeightsError(
        f'{found.source}: weights of layout {source_lib.OURS} are encoders and '
        'need the config.json that was written beside them'
      )
    return _ours(found)
  if part not in found.layout.parts:
    raise tensors_lib.WeightsError(
      f'{found.source}: {found.layout.name} has no {part}; wanted one of '
      f'{sorted(found.layout.parts)}'
    )
  table = found.layout.parts[part]
  if found.layout.family == hiera_lib.FAMILY:
    with _says_what_is_missing(found.source):
      return hiera_files.build(found, part, num_heads)
  shapes = {n: x.shape for n, (_, x) in found.tensors(part).items()}
  if found.layout.family == 'scaling4d':
    with _says_what_is_missing(found.source):
      return _scaling4d(found.source, table, shapes, num_heads)
  with _says_what_is_missing(found.source):
    common = _common(found, table, part, shapes, num_heads)
    if part == 'encoder':
      embed = {r.ours: r.theirs for r in table.rows(0)}['embed/kernel']
      # Fine-tuned VideoMAE has no final norm: its norm follows the mean.
      norm = {r.ours: r.theirs for r in table.rows(0)}['norm/scale'] in shapes
      fields = common | FIELDS[found.layout.family] | _colours(found.config)
      channels = len(fields.get('mean', vit.Vit.mean))
      if shapes[embed][1:2] != (channels,):
        raise tensors_lib.WeightsError(
          f'{found.source}: {embed} has shape {shapes[embed]}, whose second '
          f'axis are channels, wanted {channels} as of image_mean; a '
          'config.json beside model.safetensors may give other image_mean and '
          'image_std'
        )
      fields['final_norm'] = norm or found.layout.family == 'vjepa2'
      if found.layout.family == 'image':
        return _image(found, table, fields)
      if found.layout.family == 'videomae':
        fields['positions'] = video_positions.of(found).kind
      return vit.Vit(**fields, patch=tuple(shapes[embed][2:]))
    head = next(r.theirs for r in table.rows(0) if r.ours == 'head/kernel')
    common['out_width'] = shapes[head][0]
    if found.layout.family == 'videomae':
      return decoder.VideoMaeDecoder(**common)
    stacked = shapes.get('predictor.embeddings.mask_tokens')
    single = sum(n.startswith('mask_tokens.') for n in shapes)
    return predictor.Predictor(
      **common,
      num_mask_tokens=stacked[0] if stacked else single,
      rope_pairing='vjepa2',
    )


def _ours(found: source_lib.Found) -> Encoder:
  """Builds the encoder of our own layout from its config.

  Raises:
    WeightsError: the config is invalid or does not match the tensors.
  """
  try:
    encoder = from_fields(found.config)
    network = getattr(encoder, 'image', encoder)
    expected = {'depth': network.depth, 'width': network.width}
    if isinstance(network, vit.Vit):
      expected['patch'] = math.prod(network.patch) * len(network.mean)
  except (TypeError, ValueError) as e:
    raise tensors_lib.WeightsError(
      f'{found.source}: config.json describes no network: {str(e)[:200]}'
    ) from e
  tensors = found.groups['']
  blocks = {n.split('/')[0] for n in tensors if n.startswith('block_')}
  actual = {'depth': len(blocks), 'width': network.width}
  if isinstance(network, vit.Vit):
    actual['patch'], actual['width'] = tensors['embed/kernel'].shape
  for field, value in expected.items():
    if value != actual[field]:
      raise tensors_lib.WeightsError(
        f'{found.source}: {field} is {tensors_lib.short(value)} by config.json '
        f'and {actual[field]} by the tensors (a patch counts its values); one '
        'of the two files is of another model'
      )
  return encoder


def _image(
  found: source_lib.Found, table: rules.Part, fields: Mapping[str, Any]
) -> framewise.Framewise:
  """Builds an image encoder that reads every second frame.

  Positions that equal MAE's formula are treated as fixed, which is valid for
  every grid; other tables are treated as learned.
  """
  tensors = found.tensors('encoder')
  rows = rules.by_name(table.rows(1), tensors)

  def read_piece(ours: str) -> np.ndarray:
    tensor = np.asarray(tensors[rows[ours].theirs][1], np.float32)
    return convert.piece(tensor, rows[ours], found.source)

  is_fixed = _is_formula(read_piece('positions'), read_piece('class_position'))
  kernel = tensors[rows['embed/kernel'].theirs][1].shape
  _, registers = tensors.get(rows['registers'].theirs, ('', None))
  resize = found.layout.resize
  if is_fixed:
    resize = 'trilinear'  # a formula is valid for every grid
  elif registers is not None:
    resize = 'bicubic_antialias'
  image = vit.Vit(
    **fields,
    patch=(1, *kernel[2:]),
    positions='sincos_2d' if is_fixed else 'learned',
    registers=0 if registers is None else registers.shape[1],
    layer_scale='block_00/gain_1' in rows,
    resize=resize,
  )
  return framewise.Framewise(image)


def _is_formula(of_grid: np.ndarray, of_class: np.ndarray) -> bool:
  """Returns whether a table [1, h, w, D] and its class row are MAE's."""
  if np.abs(of_class).max() > video_positions.SAME_TABLE:
    return False
  table = of_grid.reshape(-1, of_grid.shape[3])
  return video_positions.is_formula(table, 'sincos_2d', of_grid.shape[:3])


def _scaling4d(
  source: str,
  table: rules.Part,
  shapes: Mapping[str, tuple[int, ...]],
  num_heads: int | None,
) -> vit.Vit:
  """Builds the encoder of 4DS from tensor shapes."""
  rows = {r.ours: r.theirs for r in table.rows(1)}

  def shape_of(ours: str, axes: int) -> tuple[int, ...]:
    shape = shapes[rows[ours]]
    if len(shape) != axes:
      raise tensors_lib.WeightsError(
        f'{source}: {rows[ours]} has shape {shape}, wanted {axes} axes'
      )
    return shape

  query = shape_of('block_00/attn/q/kernel', 3)
  if num_heads not in (None, query[1]):
    raise tensors_lib.WeightsError(
      f'{source}: num_heads is {num_heads} and queries of shape {query} have '
      f'{query[1]} heads; leave num_heads out'
    )
  depth = table.depth(shapes)
  return vit.Vit(
    width=query[0],
    depth=depth,
    num_heads=query[1],
    mlp_width=shape_of('block_00/mlp/fc1/kernel', 2)[1],
    patch=shape_of('embed/kernel', 5)[:3],
    decoder_blocks=depth - max(vit.tap(depth, SCALING4D_TAP), 1),
    **FIELDS['scaling4d'],
  )


@contextlib.contextmanager
def _says_what_is_missing(source: str) -> Iterator[None]:
  """Converts KeyErrors to WeightsErrors, whose messages name the source."""
  try:
    yield
  except KeyError as e:
    raise tensors_lib.WeightsError(f'{source}: no tensor {e}') from e
  except tensors_lib.WeightsError as e:
    if source in str(e):
      raise
    raise tensors_lib.WeightsError(f'{source}: {e}') from e


def _common(
  found: source_lib.Found,
  table: rules.Part,
  part: str,
  shapes: Mapping[str, tuple[int, ...]],
  num_heads: int | None,
) -> dict[str, Any]:
  """Returns the fields that encoders and heads have in common."""
  config, family = found.config, found.layout.family
  rows = rules.by_name(table.rows(1), shapes)
  fc1 = rows['block_00/mlp/fc1/kernel']
  mlp, width = shapes[fc1.theirs]
  gate = rows.get('block_00/mlp/gate/kernel')
  swiglu = gate is not None and gate.theirs in shapes
  if part == 'encoder':
    name = 'num_attention_heads'
  else:
    name = {
      'vjepa2': 'pred_num_attention_heads',
      'videomae': 'decoder_num_attention_heads',
    }[family]
  heads = num_heads or config.get(name) or HEADS[family].get(width)
  if heads is None:
    raise tensors_lib.WeightsError(
      f'{found.source}: width {width} does not determine the number of heads; '
      'give a folder with model.safetensors and a config.json that has '
      f'{name}, or num_heads to weights.load_published'
    )
  if width % heads:
    raise tensors_lib.WeightsError(
      f'{found.source}: found {heads} heads by {name} or num_heads, wanted a '
      f'divisor of the width {width} of the tensors; config.json may be of '
      'another model'
    )
  activation = config.get('hidden_act', 'gelu')
  if activation not in ('gelu', 'gelu_new', 'gelu_pytorch_tanh'):
    raise tensors_lib.WeightsError(
      f'{found.source}: hidden_act is {activation!r}, wanted a GELU'
    )
  return {
    'width': width,
    'depth': table.depth(shapes),
    'num_heads': heads,
    'mlp_width': mlp // fc1.parts,
    **({'mlp': 'swiglu'} if swiglu else {}),
    'gelu': 'exact' if activation == 'gelu' else 'tanh',
    'norm_eps': config.get('layer_norm_eps', 1e-6),
  }


def _colours(config: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
  if 'image_mean' not in config:
    return {}
  return {
    'mean': tuple(config['image_mean']),
    'std': tuple(config['image_std']),
  }
