"""Loads frozen encoders from a run folder, published weights or a hub id.

    encoder = vssl_jax.load('runs/salt')
    features = encoder(video)        # [B, N, D] from uint8 [B, T, H, W, 3]
    encoder = vssl_jax.load('runs/salt', dtype='bfloat16')
    encoder = vssl_jax.load('scaling4d_dist_b.npz')  # 4DS release

A run folder may be followed by `@<phase>` or `@<phase>/<average>`, as in
`runs/salt@pixel_teacher` or `runs/vjepa2@latent_student/encoder`. The default
is the newest checkpoint, or the best one if the run validates. A file with
VideoMAE's tensor names may be followed by the layout that determines its
positions: `x.pth#mvd` or `x.pth#videomae`.
"""

import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float

from vssl_jax import methods, sharding, trees, weights
from vssl_jax.checkpoint import integrity, manager
from vssl_jax.data import options
from vssl_jax.masks import tubelets
from vssl_jax.methods import phase as phase_lib
from vssl_jax.methods import supervised
from vssl_jax.models import (
  Module,
  compatibility,
  framewise,
  layers,
  resizing,
)
from vssl_jax.models.hiera import encoder
from vssl_jax.utils import colours, config_io

DTYPES = ('float32', 'bfloat16')
# Tolerance around [0, 1] for float videos, due to resampling and rounding.
SLACK = 1e-3


@dataclasses.dataclass(frozen=True)
class Clip:
  """Shape and frame rate of the clips that an encoder was trained on.

  Attributes:
    video: (T, H, W, C).
    stride: video frames between sampled frames; 0 if unknown.
    fps: frames per second, used instead of a stride (which is then 1); or 0.
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
    name: the source it was loaded from.
    video: (T, H, W, C) of the clips it was trained on.
    stride: frame stride of these clips, see `Clip`.
    fps: frames per second of these clips, see `Clip`.
    classifier: classifier of a fine-tuned encoder; `export` writes it.
  """

  module: Module
  params: Any
  name: str
  video: tuple[int, int, int, int]
  stride: int = 0
  fps: float = 0.0
  classifier: weights.Classifier | None = None

  @property
  def clip(self) -> Clip:
    """Shape and frame rate of the training clips."""
    return Clip(self.video, self.stride, self.fps)

  @property
  def width(self) -> int:
    """Features per token, D."""
    return self.module.width

  @property
  def grid(self) -> tuple[int, int, int]:
    """Token grid (t, h, w) of a clip of the training shape."""
    return tubelets.grid_of((1, *self.video), self.module.patch)

  def __call__(
    self, video: np.ndarray | Array, depth: float | None = None
  ) -> Float[Array, 'B N D']:
    """Computes the tokens of clips, in raster order of (t, h, w).

    Args:
      video: [B, T, H, W, C] or one clip [T, H, W, C]; uint8, or float in
        [0, 1]. T, H, W may differ from training; with learned positions, call
        `at` first.
      depth: tap as a fraction of the depth, counted as in 4DS, see
        `vit.tap`; None: all encoder blocks, and the final norm if there is one.

    Returns:
      Tokens [B, N, D].

    Raises:
      ValueError: unsupported shape, dtype or range of values.
    """
    video = _checked(video, self.module)
    return _apply(self.module, depth, self.params, video)

  def lower(
    self, video: jax.ShapeDtypeStruct, depth: float | None = None
  ) -> jax.stages.Lowered:
    """Lowers a call on clips [B, T, H, W, C] without compiling it."""
    tubelets.grid_of(video.shape, self.module.patch)
    return _apply.lower(self.module, depth, self.params, video)

  def at(self, video: tuple[int, ...]) -> 'Encoder':
    """Returns the encoder with its positions resized for another clip shape.

    Learned positions are resized to the token grid of these clips in the same
    way as in the released code of the weights (see `models.resizing`). Fixed
    positions are formulas and stay as they are. Image models have one table
    for all frames; Hiera has a spatial and a temporal one, for its first stage.

    Args:
      video: (T, H, W, C).

    Raises:
      ValueError: the clips do not divide into patches, or their number of
        channels differs.
    """
    t, h, w = tubelets.grid_of((1, *video), self.module.patch)
    if isinstance(self.module, framewise.Framewise):
      t = 1
    network = getattr(self.module, 'image', self.module)
    colours.check(video[3], network.mean, self.name)
    if isinstance(network, encoder.Hiera):
      h, w = (n * 2**network.q_pool for n in (h, w))
    grids = {
      'positions': (t, h, w),
      'positions_space': (1, h, w),
      'positions_time': (t, 1, 1),
    }
    params = dict(self.params)
    kind = getattr(network, 'resize', 'trilinear')
    for name, grid in grids.items():
      table = params.get(name)
      if table is None or table.shape[:3] == grid:
        continue
      logging.getLogger(__name__).info(
        '%s: learned %s resized from a grid of %s tokens to %s, %s',
        self.name, name, table.shape[:3], grid, kind,
      )  # fmt: skip
      params[name] = resizing.resize(np.asarray(table), grid, kind)
    if all(params[name] is x for name, x in self.params.items()):
      return self
    return dataclasses.replace(self, params=params)

  def export(self, folder: str | os.PathLike[str], layout: str = 'auto') -> str:
    """Writes weights, `config.json` and pixel mean and deviation.

    For a fine-tuned encoder, the classifier and its class names are written
    too. `load` reads the folder.

    Args:
      folder: created if it does not exist.
      layout: see `weights.export`.

    Returns:
      The layout that was written.

    Raises:
      WeightsError: the layout cannot express a field of this encoder, which
        the message names.
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


def _checked(video: np.ndarray | Array, module: Module) -> np.ndarray | Array:
  """Validates an input video and returns it as [B, T, H, W, C].

  Args:
    video: user input, see `Encoder.__call__`.
    module: the network.

  Raises:
    ValueError: unsupported type, shape, dtype or range of values.
  """
  channels = len(getattr(module, 'image', module).mean)
  formats = (
    f'wanted uint8 (0 to 255) or floats in [0, 1], [B, T, H, W, {channels}] or '
    f'one clip [T, H, W, {channels}]'
  )
  shape = tuple(getattr(video, 'shape', ()))
  if not isinstance(video, np.ndarray | jax.Array):
    raise ValueError(f'video: found a {type(video).__name__}, {formats}')
  actual = f'video: found {video.dtype} of shape {shape}'
  if len(shape) not in (4, 5) or shape[-1] != channels or not video.size:
    raise ValueError(f'{actual}, {formats}; channels come last')
  floats = jnp.issubdtype(video.dtype, jnp.floating)
  if not floats and video.dtype != np.uint8:
    raise ValueError(f'{actual}, {formats}')
  if floats and not isinstance(video, jax.core.Tracer):
    low, high = float(video.min()), float(video.max())
    if not -SLACK <= low <= high <= 1 + SLACK:  # NaN fails too
      raise ValueError(
        f'{actual} with values from {low:.4g} to {high:.4g}, {formats}; divide '
        'values up to 255 by 255; the encoder applies mean and deviation'
      )
  video = video[None] if video.ndim == 4 else video
  tubelets.grid_of(video.shape, module.patch)
  return video


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(
  module: Module, depth: float | None, params: Any, video: Array
) -> Array:
  return module.apply({'params': params}, video, depth=depth)


@dataclasses.dataclass(frozen=True)
class Source:
  """Location of an encoder in a run folder.

  Attributes:
    folder: the run folder.
    phase: the phase.
    subtree: subtree of the saved state: `params/encoder` or `ema/<name>`.
    saved: the checkpoint.
    clip: the training clips.
    classes: class names by label, if the phase has a classifier as its `head`.
  """

  folder: pathlib.Path
  phase: phase_lib.Phase
  subtree: str
  saved: integrity.Saved
  clip: Clip
  classes: tuple[str, ...] = ()

  @property
  def video(self) -> tuple[int, int, int, int]:
    """(T, H, W, C) of the training clips."""
    return self.clip.video


def is_run(source: str) -> bool:
  """Returns whether a source is a run folder of this package."""
  return (split(source)[0] / integrity.RUN).exists()


def split(source: str) -> tuple[pathlib.Path, str]:
  """Splits a source into a run folder and the part after `@` ('' if none).

  Paths may contain `@`: the longest prefix that is a run folder is used.
  """
  pieces = source.split('@')
  for count in range(len(pieces), 0, -1):
    folder = pathlib.Path('@'.join(pieces[:count]))
    if (folder / integrity.RUN).exists():
      return folder, '@'.join(pieces[count:])
  return pathlib.Path(pieces[0]), '@'.join(pieces[1:])


def parts(folder: str | pathlib.Path) -> tuple[str, ...]:
  """Lists the encoders of a run folder: the valid parts after its `@`.

  These are the phases with a checkpoint, in the order of the run, each followed
  by the averages of its encoder: `('pixel_teacher', 'latent_student',
  'latent_student/polyak')`.
  """
  _, phases = _opened(pathlib.Path(folder))
  names, sources = [p.name for p in phases], []
  for phase in phases:
    saved = _newest(pathlib.Path(folder), phase.name, names)
    if saved is None:
      continue
    sources.append(phase.name)
    averages = {
      name.split('/')[1]
      for name in saved.manifest['leaves']
      if name[:4] == 'ema/'
    }
    sources += [
      f'{phase.name}/{name}'
      for name, average in phase.ema.items()
      if average.of == 'encoder' and name in averages
    ]
  return tuple(sources)


def _opened(
  folder: pathlib.Path,
) -> tuple[dict[str, Any], tuple[phase_lib.Phase, ...]]:
  """Loads the record (`run.json`) and the phases of a run."""
  record = integrity.load_record(folder)
  return record, phases_of(record)


def _clip_of_run(record: Mapping[str, Any]) -> Clip:
  """Returns the training clips recorded in a `run.json`."""
  data = record['config']['data']
  return Clip(tuple(record['video']), data['stride'], data['fps'])


def clip_of(source: str) -> Clip:
  """Returns the training clips of an encoder without loading its weights."""
  if is_run(source):
    return _clip_of_run(integrity.load_record(split(source)[0]))
  return Clip(weights.clip_shape(source), *weights.clip_timing(source))


def outside(phases: Sequence[phase_lib.Phase]) -> dict[str, Any]:
  """Returns the fields of external teacher networks by source."""
  return {
    teacher.source.path: weights.to_fields(teacher.module)
    for phase in phases
    for teacher in phase.teachers.values()
    if isinstance(teacher.source, phase_lib.FromWeights)
    and isinstance(teacher.module, weights.Encoder)
  }


def phases_of(record: Mapping[str, Any]) -> tuple[phase_lib.Phase, ...]:
  """Builds the phases of a run, even if external teachers no longer exist.

  Args:
    record: contents of its `run.json`.
  """
  config, networks = (
    config_io.from_json(record['config']),
    record.get('outside', {}),
  )

  def resolve(source: str) -> Module:
    if source in networks:
      return weights.from_fields(networks[source])
    return module_of(source)

  pixels = options.colours_of(config.data)
  return methods.build(config.method, tuple(record['video']), resolve, pixels)


def find(source: str) -> Source:
  """Finds an encoder in a run folder.

  Args:
    source: run folder, optionally followed by `@<phase>[/<average>]`.

  Raises:
    ValueError: the phase or average does not exist, or has no checkpoint yet.
  """
  folder, part = split(source)
  record, phases = _opened(folder)
  names = [p.name for p in phases]
  phase_name, _, average = part.partition('/')
  saved = _newest(folder, phase_name or None, names)
  if saved is None or (phase_name and phase_name not in names):
    raise ValueError(
      f'{source}: no finished checkpoint'
      + (f' of phase {phase_name!r}' if phase_name else '')
      + f'; the phases of this run are {names}, those with a checkpoint '
      + f'{[n for n in parts(folder) if "/" not in n]} '
      '(checkpoint.keep_phases)'
    )
  phase = next(p for p in phases if p.name == saved.phase)
  if average and average not in phase.ema:
    raise ValueError(
      f'{source}: no average {average!r}; phase {phase.name!r} has '
      f'{sorted(phase.ema)}'
    )
  subtree = f'ema/{average}' if average else 'params/encoder'
  classes = (
    record.get('classes')
    if isinstance(phase, supervised.SupervisedPhase)
    else ()
  )
  return Source(
    folder, phase, subtree, saved, _clip_of_run(record), tuple(classes or ())
  )


def _newest(
  folder: pathlib.Path, wanted: str | None, names: list[str]
) -> integrity.Saved | None:
  """Returns the newest intact checkpoint of a phase, finished or in progress.

  If no phase is named, the best checkpoint has priority over the newest. If one
  is named, the best checkpoint is not used. Corrupt checkpoints are skipped
  with a warning.
  """

  def priority(saved: integrity.Saved) -> tuple[bool, int]:
    return saved.path.name == manager.BEST, saved.step

  checkpoints = [s for s in integrity.listing(folder) if s.phase in names]
  if wanted:
    checkpoints = [
      s for s in checkpoints if s.phase == wanted and not priority(s)[0]
    ]
  for saved in sorted(checkpoints, key=priority, reverse=True):
    problem = integrity.damage(saved)
    if not problem:
      return saved
    logging.getLogger(__name__).warning('skipping %s: %s', saved.path, problem)
  return None


def load(source: str, *, dtype: str | None = None) -> Encoder:
  """Loads a frozen encoder.

  Args:
    source: a run folder (`runs/salt`, `runs/salt@pixel_teacher`), a local
      folder or file with published weights, or a hub id.
    dtype: dtype of activations and matrix products, `float32` or `bfloat16`.
      None: `float32` on CPUs; on other devices the dtype of training, or
      `bfloat16` for published weights.

  Raises:
    ValueError: the source does not exist or has an unsupported format, or its
      weights are not finite.
    CheckpointError: the run's checkpoint is corrupt.
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
  """Loads the network of a role as a starting point for further training.

  For a published training state, `load` returns the averaged network, such as
  the `target_encoder` of V-JEPA 2, because that one is evaluated. This function
  returns the trained network: V-JEPA 2's `encoder` or `predictor`.

  Args:
    source: as in `load`.
    role: name in `Phase.init`. For a run: `encoder` or any role of the phase.
      For published weights: `encoder`; any other name is the predictor or
      decoder in the same file.

  Returns:
    The module and its parameters. The module is None if the phase has no field
    with the role's name. Published parameters are float32; parameters of a run
    have their saved dtype.

  Raises:
    ValueError: the source does not exist, has no such role, or its weights
      are not finite.
    CheckpointError: the run's checkpoint is corrupt.
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


def _restore(source: str, saved: integrity.Saved, subtree: str) -> Any:
  """Restores parameters of a run onto one device or the current mesh."""
  placement = _place()
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement),
    saved.shapes(subtree),
  )
  params = manager.restore(saved, target, subtree)
  trees.check_finite(params, source)
  return params


def load_as(source: str, module: Module) -> Encoder:
  """Loads the weights of a source into a given, compatible module.

  `every` and `cell` (the frames and the cell size of an image model) may differ
  from the source, because they depend on the clips and not on the weights.

  Args:
    source: as in `load`.
    module: for example a teacher built for the clips of a run.

  Raises:
    ValueError: the module computes a different function than the source's.
  """
  loaded = load(source)
  differing = compatibility.differing_fields(loaded.module, module)
  differing = {n: x for n, x in differing.items() if n not in ('every', 'cell')}
  if differing:
    raise ValueError(
      f'{source}: its weights are of an incompatible network: '
      f'{compatibility.describe(differing)}. If a run is still training there, '
      f'name one of its phases: {source}@<phase>'
    )
  return dataclasses.replace(loaded, module=module)


def _place() -> jax.sharding.Sharding:
  """Returns a single-device sharding, or a replicated one if a mesh is set."""
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return SingleDeviceSharding(jax.local_devices()[0])
  return sharding.replicated(mesh)


def fingerprint(source: str) -> str:
  """Returns a hash of a source's weights without loading them."""
  if is_run(source):
    run = find(source)
    return integrity.fingerprint(run.saved, run.subtree)
  return weights.fingerprint(source)


def module_of(source: str) -> Module:
  """Builds the network of a source without loading its parameters."""
  if is_run(source):
    return find(source).phase.encoder
  return weights.describe(source)


def random(like: Encoder, seed: int = 0) -> Encoder:
  """Returns the encoder with randomly initialised parameters.

  Args:
    like: the trained encoder.
    seed: seed of the initialisation.

  Raises:
    ValueError: the new parameters differ from those of `like` in names, shapes
      or dtypes.
  """
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
