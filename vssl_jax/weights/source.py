"""Opens published weights: a folder, a file, or a model on the hub."""

import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from vssl_jax.weights import (
  config_fields,
  npz,
  pairs,
  read,
  tables,
  unpickle,
)

OURS = 'vssl_vit'  # model_type of the layout that fits every Vit
CLASSIFIER = 'classifier/'  # begins the names of a classifier there
HUB_ID = re.compile(r'^[\w-][\w.-]*/[\w-][\w.-]*$')
# Of image processors, of the older and newer names, and of the network, which
# comes last and counts most.
CONFIGS = (
  'preprocessor_config.json',
  'video_preprocessor_config.json',
  'processor_config.json',
  'config.json',
)
INDEX = 'model.safetensors.index.json'  # of a model in several files
HUB_FILES = ('*.json', '*.safetensors')
# What a VideoMAE-style source may be followed by: `x.pth#mvd`.
NAMED = ('videomae', 'mvd')
WEIGHTS = ('.safetensors', '.npz', '.pth', '.pt')


@dataclasses.dataclass(frozen=True)
class Found:
  """A source that was opened; numbers are read later.

  Attributes:
    source: what the user gave.
    config: of `config.json`; empty where there is none.
    groups: name -> key -> tensor; one group '' but for `.pth` files.
    layout: the table, or None for our own layout.
    named: the layout that the user named behind a `#`, out of `NAMED`, or ''.
    trained: whether the network that was trained comes before its average.
  """

  source: str
  config: Mapping[str, Any]
  groups: Mapping[str, Mapping[str, read.Tensor]]
  layout: pairs.Layout | None
  named: str = ''
  trained: bool = False

  def tensors(self, part: str) -> dict[str, tuple[str, read.Tensor]]:
    """Returns the table's name -> (their key, tensor) of one part."""
    if self.layout is None:
      return {
        k: (k, x)
        for k, x in self.groups[''].items()
        if not k.startswith(CLASSIFIER)
      }
    groups = self.layout.parts[part].groups
    if self.trained:
      groups = (*self.layout.parts[part].trained, *groups)
    group = next((g for g in groups if g in self.groups), None)
    if group is None:
      raise read.WeightsError(
        f'{self.source}: no {part}; found {sorted(self.groups)}, wanted one '
        f'of {groups}'
      )
    tensors = self.groups[group]
    named = {_renamed(k, self.layout): (k, x) for k, x in tensors.items()}
    if len(named) != len(tensors):
      kept = {key for key, _ in named.values()}
      double = next(k for k in tensors if k not in kept)
      raise read.WeightsError(
        f'{self.source}: {read.short(double)} and another key are the same '
        f'name of the layout {self.layout.name}'
      )
    return named


def _renamed(key: str, layout: pairs.Layout) -> str:
  for pattern, replacement in layout.renames:
    key = re.sub(pattern, replacement, key)
  return key


def _place(source: str | os.PathLike[str]) -> tuple[pathlib.Path, str]:
  """Returns the file or folder of a source, and the layout named behind it.

  Raises:
    WeightsError: it does not exist, or the layout is not one of `NAMED`.
  """
  text, named = str(source), ''
  if text and pathlib.Path(text).exists():
    return pathlib.Path(text), named
  if '#' in text:
    text, _, named = text.rpartition('#')
    if named not in NAMED:
      raise read.WeightsError(
        f'{source}: no such file, and the layout behind # is {named!r}, wanted '
        f'one of {NAMED}'
      )
  path = pathlib.Path(text)
  return (path if text and path.exists() else _download(text)), named


def open_source(source: str | os.PathLike[str]) -> Found:
  """Opens a folder, a file or a model on the hub.

  Args:
    source: a folder with `config.json` and safetensors files, or with one
      `.npz` file; a single `.safetensors`, `.npz`, `.pth` or `.pt` file; or a
      hub id. `#mvd` or `#videomae` may follow, for files of the names of
      VideoMAE that do not tell which of the two they are of.

  Raises:
    WeightsError: it does not exist, or its layout is unknown.
  """
  path, named = _place(source)
  config: dict[str, Any] = {}
  if path.is_dir():
    for file in (path / name for name in CONFIGS):
      if file.exists():
        config |= config_fields.of_file(str(file), read.json_object(file))
    groups = {'': _folder(path)}
  elif path.suffix == '.safetensors':
    groups = {'': read.safetensors(path)}
  elif path.suffix == '.npz':
    groups = {'': npz.load(path)}
  else:
    groups = _groups(path, unpickle.load(path))
  _check_tensors(str(source), groups)
  layout = _recognise(str(source), groups)
  if named and (layout is None or layout.family != 'videomae'):
    raise read.WeightsError(
      f'{source}: #{named} is for files of the names of VideoMAE, and this '
      f'one is of the layout {layout.name if layout else OURS}; leave it out'
    )
  return Found(str(source), config, groups, layout, named)


def _check_tensors(
  source: str, groups: Mapping[str, Mapping[str, read.Tensor]]
) -> None:
  """Refuses tensors without numbers, whose other axes may be of any size."""
  for group in groups.values():
    for key, x in group.items():
      if 0 in x.shape:
        raise read.WeightsError(
          f'{source}: {read.short(key)} is empty, of shape {tuple(x.shape)}'
        )


def fingerprint(source: str | os.PathLike[str]) -> str:
  """Returns a hash of the files that hold a model's weights.

  Args:
    source: as of `open_source`; all files with weights of a folder count.

  Raises:
    WeightsError: it does not exist, or holds no such file.
  """
  path, named = _place(source)
  files = sorted(path.iterdir()) if path.is_dir() else [path]
  files = [f for f in files if f.suffix in ('.json', *WEIGHTS)]
  if all(f.suffix == '.json' for f in files):
    raise read.WeightsError(f'{source}: found no file of {WEIGHTS}')
  digest = hashlib.sha256(named.encode())
  for file in files:
    with file.open('rb') as f:
      digest.update(hashlib.file_digest(f, 'sha256').digest())
  return digest.hexdigest()[:16]


def _download(source: str) -> pathlib.Path:
  if not HUB_ID.match(source):
    raise read.WeightsError(
      f'{source!r}: no such file or folder from {os.getcwd()}, and not a hub '
      'id (owner/name)'
    )
  try:
    import huggingface_hub
  except ImportError as e:
    raise read.WeightsError(
      f'{source}: no such folder here. To fetch it from the hub, pip install '
      'huggingface_hub; or download it elsewhere and give the folder'
    ) from e
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(source, allow_patterns=HUB_FILES)
    )
  except Exception as e:  # offline, not found, not allowed: many types
    raise read.WeightsError(
      f'{source}: no run folder (run.json) and no weights at '
      f'{pathlib.Path(source).resolve()}, and the hub could not be read '
      f'({type(e).__name__}: {e}). Without a network, download config.json '
      'and model.safetensors elsewhere and give their folder'
    ) from e


def _folder(path: pathlib.Path) -> dict[str, read.Tensor]:
  """Returns the tensors of one file, or of the files of an index."""
  arrays = sorted(path.glob('*.npz'))
  if len(arrays) == 1 and not list(path.glob('*.safetensors')):
    return npz.load(arrays[0])
  index = path / INDEX
  names = ['model.safetensors']
  if index.exists():
    names = _indexed(index)
  tensors: dict[str, read.Tensor] = {}
  for name in names:
    if pathlib.Path(name).name != name:
      raise read.WeightsError(
        f'{index}: {read.short(name)} is not a file beside it'
      )
    if not (path / name).exists():
      raise read.WeightsError(
        f'{path}: no {name}; found {sorted(p.name for p in path.iterdir())}. '
        'A .pth file, or one of several .npz files, is given by its own path'
      )
    tensors |= read.safetensors(path / name)
  return tensors


def _indexed(index: pathlib.Path) -> list[str]:
  """Returns the files that an index names."""
  files = read.json_object(index).get('weight_map')
  if not isinstance(files, dict) or not files:
    raise read.WeightsError(f'{index}: no weight_map, wanted key -> file')
  names = {x if isinstance(x, str) else read.short(x) for x in files.values()}
  return sorted(names)


def _groups(
  path: pathlib.Path, payload: Any
) -> dict[str, dict[str, read.Tensor]]:
  """Returns the dicts of tensors in a `.pth` file that a layout may use."""
  if not isinstance(payload, dict):
    raise read.WeightsError(f'{path}: the .pth file holds no dict of tensors')
  names = {
    name
    for layout in tables.LAYOUTS
    for part in layout.parts.values()
    for name in (*part.groups, *part.trained)
  }
  found = {}
  for name in sorted(names):
    group = payload.get(name) if name else payload
    if isinstance(group, dict):
      tensors = {
        k: x
        for k, x in group.items()
        if isinstance(k, str) and isinstance(x, unpickle.Tensor)
      }
      if tensors:
        found[name] = tensors
  if not found:
    keys = [read.short(k) for k in list(payload)[:5]]
    raise read.WeightsError(
      f'{path}: the .pth file has no tensors at its top, nor under one of '
      f'{sorted(names - {""})}; found {", ".join(keys)}'
    )
  return found


def _recognise(
  source: str, groups: Mapping[str, Mapping[str, Any]]
) -> pairs.Layout | None:
  """Returns the layout by its names, None for ours."""
  if 'embed/kernel' in groups.get('', {}):
    return None
  for layout in tables.LAYOUTS:
    for group in layout.parts['encoder'].groups:
      names = {_renamed(k, layout) for k in groups.get(group, {})}
      if names.issuperset(layout.marks):
        return layout
  some = [k[:80] for group in groups.values() for k in group][:3]
  raise read.WeightsError(
    f'{source}: the layout is unknown; keys look like {some}. Known are '
    f'{", ".join(layout.name for layout in tables.LAYOUTS)} and {OURS}'
  )
