"""Selects the targets of a phase to cache on disk; their key and size.

Clips must be the same at every visit and teachers must be frozen. Outputs of
EMA teachers are never cached.
"""

import hashlib
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import AxisType

from vssl_jax.data import options
from vssl_jax.methods import phase as phase_lib
from vssl_jax.target_cache import store

GIB = 2**30


class Cached(NamedTuple):
  """Targets of a phase that are cached on disk.

  Attributes:
    teachers: names of their teachers; the step does not evaluate these.
    shapes: target name -> shape of one example, in the stored dtype.
    program: hash of the program that computes the targets.
  """

  teachers: tuple[str, ...]
  shapes: Mapping[str, jax.ShapeDtypeStruct]
  program: str

  @property
  def stored(self) -> dict[str, dict[str, Any]]:
    """Target name -> shape and dtype, as JSON."""
    return {
      name: {'shape': list(x.shape), 'dtype': str(x.dtype)}
      for name, x in self.shapes.items()
    }


class _Listened(Mapping):
  """Parameters by teacher; records the names of the teachers that are read."""

  def __init__(self, params: Mapping[str, Any]) -> None:
    self._params = params
    self.asked: set[str] = set()

  def __getitem__(self, name: str) -> Any:  # `get`, `items` and `in` use it
    params = self._params[name]
    self.asked.add(name)
    return params

  def __iter__(self) -> Iterator[str]:
    return iter(self._params)

  def __len__(self) -> int:
    return len(self._params)


def cached(
  config: ml_collections.ConfigDict,
  phase: phase_lib.Phase,
  video: tuple[int, ...],
  params: Mapping[str, Any],
) -> Cached | None:
  """Returns the targets of a phase that can be cached; None if there are none.

  Args:
    config: a resolved config; without `cache_targets` nothing is cached.
    phase: the phase.
    video: (T, H, W, C) of a clip.
    params: teacher -> shapes of its parameters, EMA teachers included.
  """
  if not config.cache_targets or not phase.teachers:
    return None
  clip = jax.ShapeDtypeStruct((1, *video), jnp.uint8)
  used: set[str] = set()

  def trace(params: Any, video: Any) -> Any:
    recorder = _Listened(params)
    targets = phase.targets(recorder, video)
    used.update(recorder.asked)
    return targets

  # Traced for one device: targets do not depend on the mesh.
  mesh = jax.make_mesh(
    (1,), ('data',), (AxisType.Auto,), devices=jax.devices()[:1]
  )
  with jax.set_mesh(mesh):
    jax.eval_shape(trace, params, clip)
    names = tuple(sorted(used))
    sources = [phase.teachers[n].source for n in names]
    if not names or any(isinstance(x, phase_lib.FromEma) for x in sources):
      return None
    used_params = {n: params[n] for n in names}
    program, shapes = jax.make_jaxpr(
      lambda p, v: phase.targets(p, v), return_shape=True
    )(used_params, clip)
  dtype = _stored_type([phase.teachers[n] for n in names])
  return Cached(
    names,
    {n: jax.ShapeDtypeStruct(x.shape[1:], dtype) for n, x in shapes.items()},
    _digest(' '.join([str(program), *_constants(program)])),
  )


def _constants(program: jax.extend.core.ClosedJaxpr) -> Iterable[str]:
  """Yields the values of constants; the program text has only their shapes."""
  for constant in program.consts:
    yield np.asarray(constant).tobytes().hex()
  for equation in program.jaxpr.eqns:
    for inner in jax.tree.leaves(
      equation.params,
      is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr),
    ):
      if isinstance(inner, jax.extend.core.ClosedJaxpr):
        yield from _constants(inner)


def _stored_type(teachers: Sequence[phase_lib.Teacher]) -> Any:
  """Returns float32 if all teachers compute in float32, else bfloat16."""
  dtypes = {getattr(t.module, 'dtype', 'float32') for t in teachers}
  return jnp.dtype('float32' if dtypes == {'float32'} else 'bfloat16')


def _digest(text: str) -> str:
  """Returns a hash of text, ignoring memory addresses in it."""
  text = re.sub(r' at 0x[0-9a-f]+', '', text)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def folder(
  config: ml_collections.ConfigDict, phase: phase_lib.Phase, kept: Cached
) -> pathlib.Path:
  """Returns the cache folder; phases with equal targets and teachers share it.

  Args:
    config: a resolved config.
    phase: the phase.
    kept: from `cached`.
  """
  sources = [f'{n}={phase.teachers[n].source}' for n in kept.teachers]
  digest = _digest(' '.join([*sources, kept.program]))
  name = f'{"_".join(kept.teachers)}-{digest[:8]}'
  return pathlib.Path(config.cache_targets) / name


def clip_key(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the data options that determine the pixels of a clip."""
  spec = vars(options.spec(config.data.to_dict()))
  # Decoding threads and the limits on files do not change clips.
  left_out = ('threads', 'max_pixels', 'min_frames')
  return {k: x for k, x in spec.items() if k not in left_out}


def check(
  config: ml_collections.ConfigDict,
  kept: Sequence[Cached | None],
  processes: int,
) -> None:
  """Checks that the targets of a run can be cached.

  Args:
    config: a resolved config with `cache_targets`.
    kept: from `cached`, for all phases.
    processes: number of processes of the run.

  Raises:
    ValueError: there are several processes, clips differ between visits, or no
      phase has targets of frozen teachers.
  """
  setting = f'cache_targets={config.cache_targets!r}'
  if processes > 1:
    raise ValueError(
      f'{setting}: found {processes} processes, wanted one. Every epoch gives '
      'an example to another process, and processes do not share what they '
      "write; set --config.cache_targets=''"
    )
  unfixed = options.unfixed(config.data.to_dict())
  if unfixed:
    lines = [
      f'  data.{k}: found {a!r}, wanted {b!r}' for k, (a, b) in unfixed.items()
    ]
    flags = [f'--config.data.{k}={b!r}' for k, (_, b) in unfixed.items()]
    raise ValueError(
      f'{setting} stores teacher outputs of a clip, and a video gives another '
      'clip each time:\n' + '\n'.join(lines) + '\nset '
      f"{' '.join(flags)}, or --config.cache_targets=''"
    )
  if not any(kept):
    raise ValueError(
      f'{setting}: no phase of this run has targets of frozen teachers '
      "(an average changes); set --config.cache_targets=''"
    )


def describe(
  config: ml_collections.ConfigDict,
  phases: Sequence[phase_lib.Phase],
  kept: Sequence[Cached | None],
  examples: int,
) -> list[str]:
  """Describes each cache folder in one line: its size and filled share.

  Args:
    config: a resolved config.
    phases: phases of the run.
    kept: from `cached`, for each of `phases`.
    examples: number of training examples; 0 if unknown.
  """
  folders = {
    folder(config, phase, targets): targets
    for phase, targets in zip(phases, kept, strict=True)
    if targets is not None
  }
  return [
    _line(path, targets, config, examples) for path, targets in folders.items()
  ]


def _line(
  path: pathlib.Path,
  one: Cached,
  config: ml_collections.ConfigDict,
  examples: int,
) -> str:
  row_bytes = store.row_nbytes(one.stored)
  arrays = ', '.join(
    f'{name} {"x".join(map(str, x.shape))}' for name, x in one.shapes.items()
  )
  dtype = next(iter(one.shapes.values())).dtype
  total = f'{examples * row_bytes / GIB:.1f} GiB, ' if examples else ''
  filled = store.count_filled(path)
  share = f' ({100 * filled / examples:.0f} %)' if examples else ''
  return (
    f'targets of {", ".join(one.teachers)} on disk: {total}'
    f'{row_bytes / 2**20:.2f} MiB per clip ({arrays}; {dtype}), '
    f'{row_bytes * config.batch_size / GIB:.2f} GiB read per step; '
    f'{filled:,} clips{share} are in {path}'
  )
