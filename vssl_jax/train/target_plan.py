"""Which targets of a phase are kept on disk, what for, and how large they are.

Clips must be the same at every visit, and teachers must stand still: what an
average says is never kept.
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
from vssl_jax.methods import base
from vssl_jax.train import target_store

GIB = 2**30


class Cached(NamedTuple):
  """Targets of a phase that are kept.

  Attributes:
    teachers: who says them; the step does without these.
    shapes: name -> shape of one example, in the type that is stored.
    program: hash of how they are computed.
  """

  teachers: tuple[str, ...]
  shapes: Mapping[str, jax.ShapeDtypeStruct]
  program: str

  @property
  def stored(self) -> dict[str, dict[str, Any]]:
    """Name -> shape and type, as JSON."""
    return {
      name: {'shape': list(x.shape), 'dtype': str(x.dtype)}
      for name, x in self.shapes.items()
    }


class _Listened(Mapping):
  """Parameters by teacher, and who was asked for, in whatever way."""

  def __init__(self, params: Mapping[str, Any]) -> None:
    self._params = params
    self.asked: set[str] = set()

  def __getitem__(self, name: str) -> Any:  # `get`, `items` and `in` come here
    found = self._params[name]
    self.asked.add(name)
    return found

  def __iter__(self) -> Iterator[str]:
    return iter(self._params)

  def __len__(self) -> int:
    return len(self._params)


def cached(
  config: ml_collections.ConfigDict,
  method: base.Method,
  phase: base.Phase,
  video: tuple[int, ...],
  params: Mapping[str, Any],
) -> Cached | None:
  """Returns what of a phase's targets is kept; None for nothing.

  Args:
    config: a resolved config; `cache_targets` switches it on.
    method: its method.
    phase: one of its phases.
    video: (T, H, W, C) of a clip.
    params: teacher -> shapes of its parameters, averages too.
  """
  if not config.cache_targets or not phase.teachers:
    return None
  clip = jax.ShapeDtypeStruct((1, *video), jnp.uint8)
  asked: set[str] = set()

  def listen(params: Any, video: Any) -> Any:
    listened = _Listened(params)
    found = method.targets(listened, video, phase)
    asked.update(listened.asked)
    return found

  # Traced as one device would: what they say does not depend on the mesh.
  alone = jax.make_mesh(
    (1,), ('data',), (AxisType.Auto,), devices=jax.devices()[:1]
  )
  with jax.set_mesh(alone):
    jax.eval_shape(listen, params, clip)
    names = tuple(sorted(asked))
    moving = [n for n in names if phase.teachers[n].source.startswith('@ema/')]
    if not names or moving:
      return None
    needed = {n: params[n] for n in names}
    program, shapes = jax.make_jaxpr(
      lambda p, v: method.targets(p, v, phase), return_shape=True
    )(needed, clip)
  dtype = _stored_type([phase.teachers[n] for n in names])
  return Cached(
    names,
    {n: jax.ShapeDtypeStruct(x.shape[1:], dtype) for n, x in shapes.items()},
    _digest(' '.join([str(program), *_constants(program)])),
  )


def _constants(program: jax.extend.core.ClosedJaxpr) -> Iterable[str]:
  """Yields the bytes of the arrays in a program; its text has their shapes."""
  for constant in program.consts:
    yield np.asarray(constant).tobytes().hex()
  for equation in program.jaxpr.eqns:
    for inner in jax.tree.leaves(
      equation.params,
      is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr),
    ):
      if isinstance(inner, jax.extend.core.ClosedJaxpr):
        yield from _constants(inner)


def _stored_type(teachers: Sequence[base.Teacher]) -> Any:
  """Returns the type that teachers compute in; bfloat16 unless all of one."""
  found = {getattr(t.module, 'dtype', 'float32') for t in teachers}
  return jnp.dtype('float32' if found == {'float32'} else 'bfloat16')


def _digest(text: str) -> str:
  """Returns a hash of text, whatever addresses it mentions."""
  text = re.sub(r' at 0x[0-9a-f]+', '', text)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def folder(
  config: ml_collections.ConfigDict, phase: base.Phase, kept: Cached
) -> pathlib.Path:
  """Returns where targets are: phases with the same of like teachers share.

  Args:
    config: a resolved config.
    phase: the phase.
    kept: from `cached`.
  """
  sources = [f'{n}={phase.teachers[n].source}' for n in kept.teachers]
  made_of = _digest(' '.join([*sources, kept.program]))
  name = f'{"_".join(kept.teachers)}-{made_of[:8]}'
  return pathlib.Path(config.cache_targets) / name


def clip_key(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns what decides about the pixels of a video's clip."""
  spec = vars(options.spec(config.data.to_dict()))
  # How it is decoded, and what is refused, changes no clip.
  left_out = ('threads', 'max_pixels', 'min_frames')
  return {k: x for k, x in spec.items() if k not in left_out}


def check(
  config: ml_collections.ConfigDict,
  kept: Sequence[Cached | None],
  processes: int,
) -> None:
  """Refuses what cannot be kept.

  Args:
    config: a resolved config with `cache_targets`.
    kept: from `cached`, of all phases.
    processes: that train together.

  Raises:
    ValueError: several processes, clips that differ from visit to visit, or
      no phase with frozen teachers.
  """
  where = f'cache_targets={config.cache_targets!r}'
  if processes > 1:
    raise ValueError(
      f'{where}: found {processes} processes, wanted one. Every epoch gives '
      'an example to another process, and nothing tells one what another has '
      "written; set --config.cache_targets=''"
    )
  loose = options.unfixed(config.data.to_dict())
  if loose:
    found = [
      f'  data.{k}: found {a!r}, wanted {b!r}' for k, (a, b) in loose.items()
    ]
    flags = [f'--config.data.{k}={b!r}' for k, (_, b) in loose.items()]
    raise ValueError(
      f'{where} keeps what teachers say of a clip, and a video gives another '
      'clip at every visit:\n' + '\n'.join(found) + '\nset '
      f"{' '.join(flags)}, or --config.cache_targets=''"
    )
  if not any(kept):
    raise ValueError(
      f'{where}: no phase of this run has targets that frozen teachers give '
      "(an average moves); set --config.cache_targets=''"
    )


def describe(
  config: ml_collections.ConfigDict,
  phases: Sequence[base.Phase],
  kept: Sequence[Cached | None],
  examples: int,
) -> list[str]:
  """Returns size and filling of what is kept, a line for each folder.

  Args:
    config: a resolved config.
    phases: some of the run.
    kept: from `cached`, of each.
    examples: training examples; 0 if they are not at hand.
  """
  found = {
    folder(config, phase, one): one
    for phase, one in zip(phases, kept, strict=True)
    if one is not None
  }
  return [_line(path, one, config, examples) for path, one in found.items()]


def _line(
  path: pathlib.Path,
  one: Cached,
  config: ml_collections.ConfigDict,
  examples: int,
) -> str:
  row = target_store.row_nbytes(one.stored)
  arrays = ', '.join(
    f'{name} {"x".join(map(str, x.shape))}' for name, x in one.shapes.items()
  )
  dtype = next(iter(one.shapes.values())).dtype
  total = f'{examples * row / GIB:.1f} GiB, ' if examples else ''
  filled = target_store.count_filled(path)
  share = f' ({100 * filled / examples:.0f} %)' if examples else ''
  return (
    f'targets of {", ".join(one.teachers)} on disk: {total}'
    f'{row / 2**20:.2f} MiB per clip ({arrays}; {dtype}), '
    f'{row * config.batch_size / GIB:.2f} GiB read per step; '
    f'{filled:,} clips{share} are in {path}'
  )
