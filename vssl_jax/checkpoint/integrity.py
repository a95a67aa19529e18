"""Checkpoint manifests: verification and detection of corrupt files.

A manifest lists every file with its size and hash, and every leaf with its
shape, dtype and a sum over its bits. Like every JSON file that a later start
reads, it ends with a hash of its own content.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from absl import logging
from jaxtyping import Array, UInt32

from vssl_jax import trees

SUM = 'sum'  # key of the hash over the rest of a JSON file
RUN = 'run.json'  # in the run folder
# Maximum bytes of a JSON file; manifests of the largest networks have a few MB.
MAX_JSON = 256 * 2**20
MAX_NESTED = 64  # maximum nesting of objects and lists in `run.json`
# Required keys of a manifest.
REQUIRED = ('step', 'phase', 'leaves', 'files')
_KINDS: dict[str, Callable[[Any], bool]] = {
  'step': lambda x: type(x) is int,
  'phase': lambda x: isinstance(x, str),
  'leaves': lambda x: (
    isinstance(x, dict)
    and all(
      isinstance(leaf, dict)
      and isinstance(leaf.get('dtype'), str)
      and isinstance(leaf.get('shape'), list)
      and all(type(n) is int and n >= 0 for n in leaf['shape'])
      for leaf in x.values()
    )
  ),
  'files': lambda x: (
    isinstance(x, dict)
    and all(isinstance(f, list) and len(f) == 2 for f in x.values())
  ),
}
# Folders left by a killed save of a train state, and temporary ones of Orbax.
_UNFINISHED = re.compile(r'[0-9]{8}|.+\.orbax-checkpoint-tmp.*')
_STEP = re.compile(r'[0-9]{8,}')
# Content of the folder of a train state; a file that a killed save was writing
# has a suffix, such as `manifest.ocdbt.__lock`.
_PARTS = re.compile(
  r'(_CHECKPOINT_METADATA|_METADATA|_sharding|array_metadatas|d'
  r'|commit_success\.txt|manifest\.ocdbt|ocdbt\.process_.*)?(\..*)?'
)


class CorruptError(ValueError):
  """The content of a file is not what was written."""


@dataclasses.dataclass(frozen=True)
class Saved:
  """A complete checkpoint.

  Attributes:
    path: folder of its arrays.
    manifest: step, phase, files, leaves and the `extra` entries of `save`.
  """

  path: pathlib.Path
  manifest: Mapping[str, Any]

  @property
  def step(self) -> int:
    """Completed steps over the whole run."""
    return self.manifest['step']

  @property
  def phase(self) -> str:
    """Name of the phase the state belongs to."""
    return self.manifest['phase']

  def shapes(self, subtree: str = '') -> Any:
    """Returns the shapes and dtypes of its leaves, as nested dicts."""
    leaves = {
      name: jax.ShapeDtypeStruct(tuple(leaf['shape']), leaf['dtype'])
      for name, leaf in self.manifest['leaves'].items()
    }
    return trees.subtree(trees.nest(leaves), subtree)


def fingerprint(saved: Saved, subtree: str) -> str:
  """Returns a hash of a subtree of a checkpoint, from its manifest."""
  start = subtree.rstrip('/') + '/'
  part = {
    name.removeprefix(start): leaf
    for name, leaf in saved.manifest['leaves'].items()
    if name.startswith(start)
  }
  text = json.dumps(part, sort_keys=True)
  return xxhash.xxh3_64(text.encode()).hexdigest()


def listing(
  workdir: str | os.PathLike[str],
  folders: Sequence[str] = ('checkpoints', 'params'),
) -> list[Saved]:
  """Returns all complete checkpoints of a run, phase parameters included.

  Reads only; safe during the run.

  Args:
    workdir: the run folder.
    folders: subfolders to search.
  """
  root = pathlib.Path(workdir).absolute()
  return [
    Saved(p.with_suffix(''), read(p))
    for f in folders
    for p in paths_in(root / f)
  ]


def paths_in(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the manifests in a folder, by name; skips other JSON files."""
  return [
    path
    for path in sorted(folder.glob('*.json'))
    if is_state(path) or path.with_suffix('').is_dir()
  ]


def is_state(path: pathlib.Path) -> bool:
  """Returns whether a manifest has the name of a train state's manifest."""
  return bool(_STEP.fullmatch(path.stem))


def damage(saved: Saved) -> str:
  """Verifies the files of a checkpoint; returns the problem, or ''."""
  if 'corrupt' in saved.manifest:
    return saved.manifest['corrupt']
  files = saved.manifest['files']
  present = [
    name
    for name in _list_files(saved.path)
    if name in files or not pathlib.Path(name).name.startswith('.')
  ]
  for name in sorted(set(files) - set(present)):
    return f'{name} is missing'
  for name in sorted(set(present) - set(files)):
    return f'{name} is not in the manifest'
  for name, (size, digest) in files.items():
    path = saved.path / name
    if path.stat().st_size != size:
      return f'{name} has {path.stat().st_size} bytes, wanted {size}'
    if _hash_file(path) != digest:
      return f'the hash of {name} differs from the manifest'
  return ''


@jax.jit
def bit_sums(
  leaves: Mapping[str, Array | np.ndarray],
) -> dict[str, UInt32[Array, '2']]:
  """Returns `bit_sum` of every leaf.

  One program computes all sums: on CPU devices, many small programs that wait
  for each other's collectives occupy all threads and deadlock.
  """
  return {name: bit_sum(x) for name, x in leaves.items()}


def bit_sum(x: Array) -> UInt32[Array, '2']:
  """Returns a 64-bit sum of an array's bits, weighted by position.

  The result is two sums of words modulo 2^32. They do not depend on the order
  of summation, nor on the mesh. The weights are odd: a single flipped bit
  always changes both sums.
  """
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
  position = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    position = position * jnp.uint32(x.shape[axis]) + jax.lax.broadcasted_iota(
      jnp.uint32, x.shape, axis
    )
  one = jnp.uint32(1)
  mixed = (position * jnp.uint32(0x9E3779B1)) ^ (position >> 15)
  return jnp.stack(
    [
      jnp.sum(bits * (position * jnp.uint32(2) + one), dtype=jnp.uint32),
      jnp.sum(bits * (mixed | one), dtype=jnp.uint32),
    ]
  )


def path_of(path: pathlib.Path) -> pathlib.Path:
  """Returns the path of the manifest of a checkpoint folder."""
  return path.parent / (path.name + '.json')


def read(path: pathlib.Path) -> dict[str, Any]:
  """Loads a manifest; for an unusable one, `damage` returns the reason."""
  step = int(path.stem) if is_state(path) else None
  try:
    manifest = load(path)
    missing = [key for key in REQUIRED if key not in manifest]
    if missing:
      raise CorruptError(f'{path.name} lacks {missing}')
    invalid = [key for key in REQUIRED if not _KINDS[key](manifest[key])]
    if invalid:
      raise CorruptError(f'{path.name} has invalid {invalid}')
    if step not in (None, manifest['step']):
      raise CorruptError(f'{path.name} is of step {manifest["step"]}')
    return manifest
  except (OSError, CorruptError) as error:
    logging.error('manifest %s cannot be used: %s', path, error)
    step = -1 if step is None else step
    return {'step': step, 'phase': '', 'leaves': {}, 'corrupt': str(error)}


def load(path: pathlib.Path) -> dict[str, Any]:
  """Loads a JSON object and verifies the hash that `write_atomic` added.

  A file without a hash is from an earlier version and is not verified.

  Raises:
    CorruptError: the content is not what was written.
    OSError: the file does not exist or cannot be read.
  """
  size = path.stat().st_size
  if size > MAX_JSON:
    raise CorruptError(
      f'{path} is corrupt: found {size} bytes, wanted at most {MAX_JSON}'
    )
  try:
    tree = json.loads(path.read_bytes())
    if not isinstance(tree, dict):
      raise CorruptError(f'{path} is corrupt: it holds no JSON object')
    checksum = tree.pop(SUM, None)
    expected = _digest(tree)
  except CorruptError:
    raise
  except (ValueError, RecursionError) as error:
    raise CorruptError(f'{path} is corrupt: {error}') from error
  if checksum not in (None, expected):
    raise CorruptError(
      f'{path} is corrupt: its checksum does not match its content'
    )
  return tree


def load_record(folder: pathlib.Path) -> dict[str, Any]:
  """Loads and checks the `run.json` of a run folder.

  Raises:
    CorruptError: the content is not what was written.
    OSError: the file does not exist or cannot be read.
  """
  try:
    record = load(folder / RUN)
    _check_record(folder / RUN, record)
    return record
  except CorruptError as error:
    raise CorruptError(
      f'{error}. The command that trained the run writes the file again, from '
      'its newest checkpoint'
    ) from error


def _check_record(path: pathlib.Path, record: Mapping[str, Any]) -> None:
  """Checks the entries of `run.json` that are needed to open the run."""
  level: list[Any] = [record]
  for _ in range(MAX_NESTED):
    level = [
      y
      for x in level
      if isinstance(x, dict | list)
      for y in (x.values() if isinstance(x, dict) else x)
    ]
  if level:
    raise CorruptError(
      f'{path} is corrupt: found objects nested more than {MAX_NESTED} deep, '
      'wanted the record of a run'
    )
  config, video = record.get('config'), record.get('video')
  sections = config if isinstance(config, dict) else {}
  data = sections.get('data')
  checks = {
    'config.method': isinstance(sections.get('method'), dict),
    'config.data': isinstance(data, dict),
    **{
      f'config.data.{name}': isinstance(data, dict)
      and type(data.get(name)) in (int, float)
      for name in ('stride', 'fps')
    },
    'video': isinstance(video, list)
    and len(video) == 4
    and all(type(n) is int and n > 0 for n in video),
  }
  wrong = [name for name, is_right in checks.items() if not is_right]
  if wrong:
    raise CorruptError(
      f'{path} is corrupt: found no {" and no ".join(wrong)} in it, wanted the '
      'record of a run'
    )


def write_atomic(
  path: pathlib.Path, tree: Mapping[str, Any], indent: int | None = None
) -> None:
  """Writes a JSON object and its hash to a file atomically.

  Args:
    path: path of the file.
    tree: the object, without the key `sum`.
    indent: spaces per level; None for one line.
  """
  tree = json.loads(json.dumps(tree))
  partial = path.with_suffix('.partial')
  with partial.open('w') as f:
    json.dump(tree | {SUM: _digest(tree)}, f, indent=indent)
    f.flush()
    os.fsync(f.fileno())
  partial.replace(path)


def _digest(tree: Mapping[str, Any]) -> str:
  """Returns a hash of a JSON object, independent of the order of keys."""
  text = json.dumps(tree, sort_keys=True)
  return xxhash.xxh3_64(text.encode()).hexdigest()


def remove_leftovers(folder: pathlib.Path) -> None:
  """Removes the files of killed saves and leaves all others in place."""
  for path in folder.iterdir():
    if path.is_file() and re.fullmatch(r'[0-9]{8}\.partial', path.name):
      path.unlink()
    elif path.is_dir() and _UNFINISHED.fullmatch(path.name):
      # A broken link also counts as a manifest: a disk may be unmounted.
      if not os.path.lexists(path_of(path)) and _is_ours(path):
        logging.warning('removing the unfinished checkpoint %s', path)
        shutil.rmtree(path, ignore_errors=True)


def _is_ours(folder: pathlib.Path) -> bool:
  """Returns whether a folder contains only parts of a checkpoint."""
  return all(_PARTS.fullmatch(path.name) for path in folder.iterdir())


def _list_files(folder: pathlib.Path) -> list[str]:
  """Returns the relative paths of the files below a folder.

  Skips `.nfs*`: removed files on NFS that a process still has open.
  """
  return [
    str(p.relative_to(folder))
    for p in folder.rglob('*')
    if p.is_file() and not p.name.startswith('.nfs')
  ]


def hash_files(folder: pathlib.Path) -> dict[str, tuple[int, str]]:
  """Returns (bytes, hash) of every file below a folder."""
  return {
    name: ((folder / name).stat().st_size, _hash_file(folder / name))
    for name in _list_files(folder)
  }


def _hash_file(path: pathlib.Path) -> str:
  digest = xxhash.xxh3_64()
  with path.open('rb') as f:
    while block := f.read(1 << 22):
      digest.update(block)
  return digest.hexdigest()
