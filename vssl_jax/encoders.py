"""Encoders by name: a run folder, published weights, or a hub id.

    encoder = vssl_jax.load('runs/salt')
    features = encoder(video)        # [B, N, D] from uint8 [B, T, H, W, 3]
    encoder = vssl_jax.load('runs/salt', dtype='bfloat16')
    encoder = vssl_jax.load('scaling4d_dist_b.npz')  # as 4DS released it

A run folder may be followed by `@<phase>` and `@<phase>/<average>`, as in
`runs/salt@pixel_teacher` or `runs/vjepa2@latent_student/encoder`. Without it
the newest checkpoint counts; of a run that validates, the best. Files of the
names of VideoMAE may be followed by the layout that decides their positions:
`x.pth#mvd` or `x.pth#videomae`.
"""

import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float

from vssl_jax import colours, methods, sharding, trees, weights
from vssl_jax import config as config_lib
from vssl_jax.data import options
from vssl_jax.methods import base
from vssl_jax.models import compare, framewise, hiera, layers, resizing
from vssl_jax.train import checkpoint, manifests

DTYPES = ('float32', 'bfloat16')
# How far floats may lie outside of [0, 1], for resampling and rounding.
SLACK = 1e-3


@dataclasses.dataclass(frozen=True)
class Clip:
  """Clips that an encoder was trained on.

  Attributes:
    video: (T, H, W, C).
    stride: frames of the video from one to the next; 0 where it is not known.
    fps: frames per second instead, then with a stride of 1; or 0.
  """

  video: tuple[int, int, int, int]
  stride: int = 0
  fps: float = 0.0


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A frozen encoder with its parameters.

  Attributes:
    module: the network.
    params: its parameters.
    name: where it came from.
    video: (T, H, W, C) of the clips it was trained on.
    stride: frames from one to the next of these clips, see `Clip`.
    fps: frames per second of these clips, see `Clip`.
    classifier: of a fine-tuned encoder; `export` keeps it.
  """

  module: nn.Module
  params: Any
  name: str
  video: tuple[int, int, int, int]
  stride: int = 0
  fps: float = 0.0
  classifier: weights.Classifier | None = None

  @property
  def clip(self) -> Clip:
    """Clips that it was trained on."""
    return Clip(self.video, self.stride, self.fps)

  @property
  def width(self) -> int:
    """Features per token, D."""
    return self.module.width

  @property
  def grid(self) -> tuple[int, int, int]:
    """Tokens (t, h, w) of a clip of the training shape."""
    return layers.grid_of((1, *self.video), self.module.patch)

  def __call__(
    self, video: np.ndarray | Array, depth: float | None = None
  ) -> Float[Array, 'B N D']:
    """Returns the tokens of clips, in raster order of (t, h, w).

    Args:
      video: uint8, or float in [0, 1]: [B, T, H, W, C], or one clip without
        B. T, H, W may differ from training; with learned positions, use `at`.
      depth: fraction of the blocks to run, as 4DS counts them; None: all
        that encode, and the final norm if there is one.

    Raises:
      ValueError: another shape, type or range of values.
    """
    video = _checked(video, self.module)
    return _apply(self.module, depth, self.params, video)

  def lower(
    self, video: jax.ShapeDtypeStruct, depth: float | None = None
  ) -> jax.stages.Lowered:
    """Returns the program of a call on clips [B, T, H, W, C], not compiled."""
    layers.grid_of(video.shape, self.module.patch)
    return _apply.lower(self.module, depth, self.params, video)

  def at(self, video: tuple[int, ...]) -> 'Encoder':
    """Returns the encoder for clips of another shape.

    Learned positions are resized to the grid of these clips, as the released
    code of the weights does (see `models.resizing`); other positions are
    formulas and need nothing. Image models have one table for all frames,
    Hiera one of space and one of time, for its first stage.

    Args:
      video: (T, H, W, C).

    Raises:
      ValueError: clips that do not divide into patches, or have other channels.
    """
    t, h, w = layers.grid_of((1, *video), self.module.patch)
    if isinstance(self.module, framewise.Framewise):
      t = 1
    network = getattr(self.module, 'image', self.module)
    colours.check(video[3], network.mean, self.name)
    if isinstance(network, hiera.Hiera):
      h, w = (n * 2**network.q_pool for n in (h, w))
    wanted = {
      'positions': (t, h, w),
      'positions_space': (1, h, w),
      'positions_time': (t, 1, 1),
    }
    params = dict(self.params)
    kind = getattr(network, 'resize', 'trilinear')
    for name, grid in wanted.items():
      found = params.get(name)
      if found is None or found.shape[:3] == grid:
        continue
      logging.getLogger(__name__).info(
        '%s: learned %s resized from a grid of %s tokens to %s, %s',
        self.name, name, found.shape[:3], grid, kind,
      )  # fmt: skip
      params[name] = resizing.resize(np.asarray(found), grid, kind)
    if all(params[name] is x for name, x in self.params.items()):
      return self
    return dataclasses.replace(self, params=params)

  def export(self, folder: str | os.PathLike[str], layout: str = 'auto') -> str:
    """Writes weights, `config.json` and colours; returns the layout.

    Of a fine-tuned encoder the classifier and its class names are written too.

    Args:
      folder: made if need be; `load` reads it.
      layout: see `weights.export`.

    Raises:
      WeightsError: the layout cannot express this encoder; says which field.
    """
    return weights.export(
      self.module,
      self.params,
      folder,
      video=self.video,
      timing=(self.stride, self.fps),
      layout=layout,
      classifier=self.classifier,
    )

  def shapes(self, video: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Returns the shape of the tokens without computing them."""
    return jax.eval_shape(
      functools.partial(_apply, self.module, None),
      self.params,
      jax.ShapeDtypeStruct(video, np.uint8),
    )


def _checked(
  video: np.ndarray | Array, module: nn.Module
) -> np.ndarray | Array:
  """Returns clips [B, T, H, W, C] that a network can read.

  Args:
    video: what a user gives.
    module: the network.

  Raises:
    ValueError: in one sentence, what was found and what is wanted.
  """
  channels = len(getattr(module, 'image', module).mean)
  wanted = (
    f'wanted uint8 (0 to 255) or floats in [0, 1], [B, T, H, W, {channels}] or '
    f'one clip [T, H, W, {channels}]'
  )
  shape = tuple(getattr(video, 'shape', ()))
  if not isinstance(video, np.ndarray | jax.Array):
    raise ValueError(f'video: found a {type(video).__name__}, {wanted}')
  kind = f'video: found {video.dtype} of shape {shape}'
  if len(shape) not in (4, 5) or shape[-1] != channels or not video.size:
    raise ValueError(f'{kind}, {wanted}; channels come last')
  floats = jnp.issubdtype(video.dtype, jnp.floating)
  if not floats and video.dtype != np.uint8:
    raise ValueError(f'{kind}, {wanted}')
  if floats and not isinstance(video, jax.core.Tracer):
    low, high = float(video.min()), float(video.max())
    if not -SLACK <= low <= high <= 1 + SLACK:  # NaN fails too
      raise ValueError(
        f'{kind} with values from {low:.4g} to {high:.4g}, {wanted}; divide '
        'values up to 255 by 255, and leave mean and deviation to the encoder'
      )
  video = video[None] if video.ndim == 4 else video
  layers.grid_of(video.shape, module.patch)
  return video


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(
  module: nn.Module, depth: float | None, params: Any, video: Array
) -> Array:
  return module.apply({'params': params}, video, depth=depth)


@dataclasses.dataclass(frozen=True)
class Source:
  """A run folder's part that holds an encoder.

  Attributes:
    folder: the run's folder.
    phase: the phase.
    subtree: of the saved state: `params/encoder` or `ema/<name>`.
    saved: the checkpoint.
    clip: that it was trained on.
    classes: names by label, of a phase that has a classifier as its `head`.
  """

  folder: pathlib.Path
  phase: base.Phase
  subtree: str
  saved: manifests.Saved
  clip: Clip
  classes: tuple[str, ...] = ()

  @property
  def video(self) -> tuple[int, int, int, int]:
    """(T, H, W, C) of the clips that it was trained on."""
    return self.clip.video


def is_run(source: str) -> bool:
  """Returns whether a source names a run folder of ours."""
  return (split(source)[0] / manifests.RUN).exists()


def split(source: str) -> tuple[pathlib.Path, str]:
  """Splits a source into a run folder and what follows its `@`, or ''.

  A folder may have an `@` in its path: the longest one that holds a run counts.
  """
  pieces = source.split('@')
  for count in range(len(pieces), 0, -1):
    folder = pathlib.Path('@'.join(pieces[:count]))
    if (folder / manifests.RUN).exists():
      return folder, '@'.join(pieces[count:])
  return pathlib.Path(pieces[0]), '@'.join(pieces[1:])


def parts(folder: str | pathlib.Path) -> tuple[str, ...]:
  """Returns what may follow the `@` of a run folder, in the order of the run.

  These are the phases that have a checkpoint, each followed by the averages
  of its encoder: `('pixel_teacher', 'latent_student',
  'latent_student/polyak')`.
  """
  _, phases = _opened(pathlib.Path(folder))
  names, found = [p.name for p in phases], []
  for phase in phases:
    saved = _newest(pathlib.Path(folder), phase.name, names)
    if saved is None:
      continue
    found.append(phase.name)
    kept = {
      name.split('/')[1]
      for name in saved.manifest['leaves']
      if name[:4] == 'ema/'
    }
    found += [
      f'{phase.name}/{name}'
      for name, average in phase.ema.items()
      if average.of == 'encoder' and name in kept
    ]
  return tuple(found)


def _opened(
  folder: pathlib.Path,
) -> tuple[dict[str, Any], tuple[base.Phase, ...]]:
  """Returns the record and the phases of a run."""
  record = manifests.load_record(folder)
  return record, method_of(record).phases()


def _clip_of_run(record: Mapping[str, Any]) -> Clip:
  """Returns the clips of a run by its `run.json`."""
  data = record['config']['data']
  return Clip(tuple(record['video']), data['stride'], data['fps'])


def clip_of(source: str) -> Clip:
  """Returns the clips that an encoder was trained on, without its weights."""
  if is_run(source):
    return _clip_of_run(manifests.load_record(split(source)[0]))
  return Clip(weights.clip_shape(source), *weights.clip_timing(source))


def outside(method: base.Method) -> dict[str, Any]:
  """Returns the networks of teachers from outside a run, by their source."""
  return {
    teacher.source: weights.to_fields(teacher.module)
    for phase in method.phases()
    for teacher in phase.teachers.values()
    if teacher.source[0] != '@' and isinstance(teacher.module, weights.Encoder)
  }


def method_of(record: Mapping[str, Any]) -> base.Method:
  """Returns the method of a run; its outside teachers may be gone by now.

  Args:
    record: of its `run.json`.
  """
  config, known = (
    config_lib.from_json(record['config']),
    record.get('outside', {}),
  )

  def resolve(source: str) -> nn.Module:
    if source in known:
      return weights.from_fields(known[source])
    return module_of(source)

  pixels = options.colours_of(config.data)
  return methods.build(config.method, tuple(record['video']), resolve, pixels)


def find(source: str) -> Source:
  """Finds the encoder that a run folder holds.

  Raises:
    ValueError: the phase or average does not exist, or nothing is saved yet.
  """
  folder, part = split(source)
  record, phases = _opened(folder)
  names = [p.name for p in phases]
  wanted, _, average = part.partition('/')
  saved = _newest(folder, wanted or None, names)
  if saved is None or (wanted and wanted not in names):
    raise ValueError(
      f'{source}: no finished checkpoint'
      + (f' of phase {wanted!r}' if wanted else '')
      + f'; the phases of this run are {names}, those with a checkpoint '
      + f'{[n for n in parts(folder) if "/" not in n]} '
      '(checkpoint.keep_phases)'
    )
  phase = next(p for p in phases if p.name == saved.phase)
  if average and average not in phase.ema:
    raise ValueError(
      f'{source}: no average {average!r}; phase {phase.name!r} keeps '
      f'{sorted(phase.ema)}'
    )
  subtree = f'ema/{average}' if average else 'params/encoder'
  classes = record.get('classes') if hasattr(phase, 'head') else ()
  return Source(
    folder, phase, subtree, saved, _clip_of_run(record), tuple(classes or ())
  )


def _newest(
  folder: pathlib.Path, wanted: str | None, names: list[str]
) -> manifests.Saved | None:
  """Returns the newest checkpoint of a phase, finished or under way.

  Of all phases, the best counts for more than the newest, where there is one.
  Whoever names a phase never gets its best. Files are read, to see whether
  they are whole, until one checkpoint is.
  """

  def order(saved: manifests.Saved) -> tuple[bool, int]:
    return saved.path.name == checkpoint.BEST, saved.step

  found = [s for s in manifests.listing(folder) if s.phase in names]
  if wanted:
    found = [s for s in found if s.phase == wanted and not order(s)[0]]
  for saved in sorted(found, key=order, reverse=True):
    wrong = manifests.damage(saved)
    if not wrong:
      return saved
    logging.getLogger(__name__).warning(
      'passing over %s: %s', saved.path, wrong
    )
  return None


def load(source: str, *, dtype: str | None = None) -> Encoder:
  """Loads a frozen encoder.

  Args:
    source: a run folder (`runs/salt`, `runs/salt@pixel_teacher`), a local
      folder or file with published weights, or a hub id.
    dtype: of activations and matrix products, `float32` or `bfloat16`. None:
      `float32` on CPUs, and elsewhere the one that the encoder was trained
      in, `bfloat16` for published weights.

  Raises:
    ValueError: the source does not exist or does not fit, or its weights are
      no finite numbers.
    CheckpointError: the run's checkpoint is damaged.
  """
  if dtype not in (None, *DTYPES):
    raise ValueError(f'dtype: found {dtype!r}, wanted one of {DTYPES} or None')
  classifier = None
  if is_run(source):
    run = find(source)
    module, clip = run.phase.encoder, run.clip
    params = _restore(source, run.saved, run.subtree)
    if run.classes and run.subtree == 'params/encoder':
      head = _restore(source, run.saved, 'params/head')
      classifier = weights.Classifier(jax.device_get(head), run.classes)
  else:
    module, params, _ = weights.load_published(source)
    clip = clip_of(source)
    classifier = weights.load_classifier(source)
  if dtype is None and jax.default_backend() == 'cpu':
    dtype = 'float32'
  if dtype is not None:
    module = layers.with_dtype(module, dtype)
  return Encoder(
    module,
    params,
    source,
    *(clip.video, clip.stride, clip.fps),
    classifier,
  )


def load_role(source: str, role: str = 'encoder') -> tuple[Any, Any]:
  """Loads the network that training a role continues from.

  `load` takes the average of a published training state, such as the
  `target_encoder` of V-JEPA 2, because that is what is evaluated. This takes
  the network that was trained: V-JEPA 2's `encoder`, and its `predictor`.

  Args:
    source: as of `load`.
    role: name in `Method.init`: `encoder`, or, of a run, any role of its
      phase; of published weights any other role is the predictor or decoder
      beside the encoder.

  Returns:
    The module, None where a phase has no field of the role's name, and its
    parameters, as float32 arrays or as they were saved.

  Raises:
    ValueError: the source does not exist, has no such role, or its weights
      are no finite numbers.
    CheckpointError: the run's checkpoint is damaged.
  """
  if not is_run(source):
    part = 'encoder' if role == 'encoder' else 'head'
    module, params, _ = weights.load_published(source, part=part, trained=True)
    return module, params
  run = find(source)
  subtree = run.subtree if role == 'encoder' else f'params/{role}'
  roles = run.saved.shapes('params')
  if role != 'encoder' and role not in roles:
    raise ValueError(
      f'{source}: phase {run.phase.name!r} has no {role!r}; wanted one of '
      f'{sorted(roles)}'
    )
  module = getattr(run.phase, role, None)
  return module, _restore(source, run.saved, subtree)


def _restore(source: str, saved: manifests.Saved, subtree: str) -> Any:
  """Restores parameters of a run onto one device or the mesh that is set."""
  place = _place()
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    saved.shapes(subtree),
  )
  params = checkpoint.restore(saved, target, subtree)
  trees.check_finite(params, source)
  return params


def load_as(source: str, module: nn.Module) -> Encoder:
  """Loads the weights of a source into a network of the same function.

  The network may look at other frames, and at cells of another size, than the
  source: both belong to the clips and not to the weights.

  Args:
    source: as of `load`.
    module: such as a teacher's, made for the clips of a run.

  Raises:
    ValueError: the network computes another function than the source's.
  """
  loaded = load(source)
  differing = compare.differing_fields(loaded.module, module)
  differing = {n: x for n, x in differing.items() if n not in ('every', 'cell')}
  if differing:
    raise ValueError(
      f'{source}: its weights are of a network of another function: '
      f'{compare.describe(differing)}. If a run still trains there, name one '
      f'of its phases: {source}@<phase>'
    )
  return dataclasses.replace(loaded, module=module)


def _place() -> jax.sharding.Sharding:
  """Returns one device, or all those of the mesh that is set."""
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return SingleDeviceSharding(jax.local_devices()[0])
  return sharding.replicated(mesh)


def fingerprint(source: str) -> str:
  """Returns a hash of a source's numbers without loading them."""
  if is_run(source):
    found = find(source)
    return manifests.fingerprint(found.saved, found.subtree)
  return weights.fingerprint(source)


def module_of(source: str) -> nn.Module:
  """Returns the network of a source without reading its parameters."""
  if is_run(source):
    return find(source).phase.encoder
  return weights.describe(source)


def random(like: Encoder, seed: int = 0) -> Encoder:
  """Returns the same encoder with parameters as they were before training."""
  clip = jax.ShapeDtypeStruct((1, *like.video), np.uint8)
  params = jax.jit(
    lambda key: like.module.init(key, np.zeros(clip.shape, clip.dtype))
  )(jax.random.key(seed))['params']
  differing = trees.difference(params, like.params)
  if differing:
    raise ValueError(f'{like.name} differs from its own module:\n{differing}')
  return dataclasses.replace(
    like,
    params=params,
    name=f'{like.name} at random initialisation',
    classifier=None,
  )
