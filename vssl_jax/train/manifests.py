"""Manifests: what makes a checkpoint whole, and how rot in it is found.

A manifest lists every file with its size and hash, and every leaf with its
shape, dtype and a sum over its bits.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import xxhash
from absl import logging
from jaxtyping import Array, UInt32

from vssl_jax import trees


@dataclasses.dataclass(frozen=True)
class Saved:
  """One whole checkpoint.

  Attributes:
    path: folder of its arrays.
    manifest: step, phase, files, leaves and whatever was given to `save`.
  """

  path: pathlib.Path
  manifest: Mapping[str, Any]

  @property
  def step(self) -> int:
    """Steps done over the whole run."""
    return self.manifest['step']

  @property
  def phase(self) -> str:
    """Name of the phase the state belongs to."""
    return self.manifest['phase']

  def shapes(self, subtree: str = '') -> Any:
    """Returns the tree of shapes and dtypes it holds, as nested dicts."""
    leaves = {
      name: jax.ShapeDtypeStruct(tuple(leaf['shape']), leaf['dtype'])
      for name, leaf in self.manifest['leaves'].items()
    }
    return trees.subtree(trees.nest(leaves), subtree)


def fingerprint(saved: Saved, subtree: str) -> str:
  """Returns a hash over the bits of a part of a checkpoint, by its manifest."""
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
  """Returns all whole checkpoints of a run, phase parameters included.

  Reads only; safe while the run is going on.

  Args:
    workdir: the run's folder.
    folders: where in it to look.
  """
  root = pathlib.Path(workdir).absolute()
  manifests = [p for f in folders for p in root.glob(f'{f}/*.json')]
  return [Saved(p.with_suffix(''), read(p)) for p in manifests]


def damage(saved: Saved) -> str:
  """Returns what is wrong with the files of a checkpoint, or ''."""
  files = saved.manifest.get('files', {})
  present = _list_files(saved.path)
  for name in sorted(set(files) - set(present)):
    return f'{name} is missing'
  for name in sorted(set(present) - set(files)):
    return f'{name} is not in the manifest'
  for name, (size, digest) in files.items():
    path = saved.path / name
    if path.stat().st_size != size:
      return f'{name} has {path.stat().st_size} bytes, wanted {size}'
    if _hash_file(path) != digest:
      return f'the hash of {name} is not that of what was written'
  return ''


@jax.jit
def bit_sums(leaves: Mapping[str, Array]) -> dict[str, UInt32[Array, '2']]:
  """Returns `bit_sum` of every leaf."""
  return {name: bit_sum(x) for name, x in leaves.items()}


def bit_sum(x: Array) -> UInt32[Array, '2']:
  """Returns a 64-bit sum of an array's bits, each word weighted by its place.

  Sums modulo 2^32 do not depend on their order, so neither on the mesh. The
  weights are odd: a single flipped bit always changes both halves.
  """
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    place = place * jnp.uint32(x.shape[axis]) + jax.lax.broadcasted_iota(
      jnp.uint32, x.shape, axis
    )
  one = jnp.uint32(1)
  mixed = (place * jnp.uint32(0x9E3779B1)) ^ (place >> 15)
  return jnp.stack(
    [
      jnp.sum(bits * (place * jnp.uint32(2) + one), dtype=jnp.uint32),
      jnp.sum(bits * (mixed | one), dtype=jnp.uint32),
    ]
  )


def path_of(path: pathlib.Path) -> pathlib.Path:
  """Returns where the manifest of a checkpoint's folder is."""
  return path.parent / (path.name + '.json')


def read(path: pathlib.Path) -> dict[str, Any]:
  """Reads a manifest; an unreadable one lists no files."""
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    # Unreadable is damaged: `damage` finds files that no manifest lists.
    logging.error('manifest %s cannot be read: %s', path, error)
    step = int(path.stem) if path.stem.isdigit() else -1
    return {'step': step, 'phase': '', 'files': {}, 'leaves': {}}


def write_atomic(
  path: pathlib.Path, tree: Any, indent: int | None = None
) -> None:
  """Writes JSON so that the file is there whole or not at all."""
  partial = path.with_suffix('.partial')
  with partial.open('w') as f:
    json.dump(tree, f, indent=indent)
    f.flush()
    os.fsync(f.fileno())
  partial.replace(path)


def remove_leftovers(folder: pathlib.Path) -> None:
  """Removes what a killed process left: anything without a manifest."""
  for path in folder.iterdir():
    if path.suffix == '.partial':
      path.unlink()
    elif path.is_dir() and path.suffix != '.rotten':
      if not path_of(path).exists():
        logging.warning('removing the unfinished checkpoint %s', path)
        shutil.rmtree(path)


def _list_files(folder: pathlib.Path) -> list[str]:
  return [str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file()]


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
