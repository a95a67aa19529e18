"""Opens published weights: a folder, a file, or a model on the hub."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from vssl_jax.weights import npz, pairs, read, tables, unpickle

OURS = 'vssl_vit'  # model_type of the layout that fits every Vit
CLASSIFIER = 'classifier/'  # begins the names of a classifier there
HUB_ID = re.compile(r'^[\w-][\w.-]*/[\w-][\w.-]*$')
HUB_FILES = ('*.json', '*.safetensors')
WEIGHTS = ('.safetensors', '.npz', '.pth', '.pt')


@dataclasses.dataclass(frozen=True)
class Found:
  """A source that was opened; numbers are read later.

  Attributes:
    source: what the user gave.
    config: of `config.json`; empty where there is none.
    groups: name -> key -> tensor; one group '' but for `.pth` files.
    layout: the table, or None for our own layout.
  """

  source: str
  config: Mapping[str, Any]
  groups: Mapping[str, Mapping[str, read.Tensor]]
  layout: pairs.Layout | None

  def tensors(self, part: str) -> dict[str, tuple[str, read.Tensor]]:
    """Returns the table's name -> (their key, tensor) of one part."""
    if self.layout is None:
      return {
        k: (k, x)
        for k, x in self.groups[''].items()
        if not k.startswith(CLASSIFIER)
      }
    groups = self.layout.parts[part].groups
    group = next((g for g in groups if g in self.groups), None)
    if group is None:
      raise read.WeightsError(
        f'{self.source}: no {part}; found {sorted(self.groups)}, wanted one '
        f'of {groups}'
      )
    return {
      _renamed(k, self.layout): (k, x) for k, x in self.groups[group].items()
    }


def _renamed(key: str, layout: pairs.Layout) -> str:
  for pattern, replacement in layout.renames:
    key = re.sub(pattern, replacement, key)
  return key


def open_source(source: str | os.PathLike[str]) -> Found:
  """Opens a folder, a file or a model on the hub.

  Args:
    source: a folder with `config.json` and safetensors files, or with one
      `.npz` file; a single `.safetensors`, `.npz`, `.pth` or `.pt` file; or a
      hub id.

  Raises:
    WeightsError: it does not exist, or its layout is unknown.
  """
  path = pathlib.Path(source)
  if not str(source) or not path.exists():
    path = _download(str(source))
  config: dict[str, Any] = {}
  if path.is_dir():
    for name in ('preprocessor_config.json', 'config.json'):
      if (path / name).exists():
        config |= _json(path / name)
    groups = {'': _folder(path)}
  elif path.suffix == '.safetensors':
    groups = {'': read.safetensors(path)}
  elif path.suffix == '.npz':
    groups = {'': npz.load(path)}
  else:
    groups = _groups(unpickle.load(path))
  return Found(str(source), config, groups, _recognise(str(source), groups))


def fingerprint(source: str | os.PathLike[str]) -> str:
  """Returns a hash of the files that hold a model's weights.

  Args:
    source: as of `open_source`; all files with weights of a folder count.

  Raises:
    WeightsError: it does not exist, or holds no such file.
  """
  path = pathlib.Path(source)
  if not path.exists():
    path = _download(str(source))
  files = sorted(path.iterdir()) if path.is_dir() else [path]
  files = [f for f in files if f.suffix in ('.json', *WEIGHTS)]
  if all(f.suffix == '.json' for f in files):
    raise read.WeightsError(f'{source}: found no file of {WEIGHTS}')
  digest = hashlib.sha256()
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


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_text())
  except (ValueError, RecursionError) as e:
    raise read.WeightsError(f'{path}: not valid JSON: {e}') from e
  if not isinstance(found, dict):
    raise read.WeightsError(f'{path}: no JSON object')
  return found


def _folder(path: pathlib.Path) -> dict[str, read.Tensor]:
  """Returns the tensors of one file, or of the files of an index."""
  arrays = sorted(path.glob('*.npz'))
  if len(arrays) == 1 and not list(path.glob('*.safetensors')):
    return npz.load(arrays[0])
  index = path / 'model.safetensors.index.json'
  names = ['model.safetensors']
  if index.exists():
    names = sorted(set(_json(index).get('weight_map', {}).values()))
  tensors: dict[str, read.Tensor] = {}
  for name in names:
    if not isinstance(name, str) or pathlib.Path(name).name != name:
      raise read.WeightsError(f'{index}: {name!r} is not a file beside it')
    if not (path / name).exists():
      raise read.WeightsError(
        f'{path}: no {name}; found {sorted(p.name for p in path.iterdir())}. '
        'A .pth file, or one of several .npz files, is given by its own path'
      )
    tensors |= read.safetensors(path / name)
  return tensors


def _groups(payload: Any) -> dict[str, dict[str, read.Tensor]]:
  """Returns every dict of tensors in a `.pth` file, by its name."""
  if not isinstance(payload, dict):
    raise read.WeightsError('the .pth file holds no dict of tensors')
  groups = {'': payload, **payload}
  found = {}
  for name, group in groups.items():
    if isinstance(group, dict):
      tensors = {
        k: x for k, x in group.items() if isinstance(x, unpickle.Tensor)
      }
      if tensors:
        found[name] = tensors
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
  some = [k for group in groups.values() for k in group][:3]
  raise read.WeightsError(
    f'{source}: the layout is unknown; keys look like {some}. Known are '
    f'{", ".join(layout.name for layout in tables.LAYOUTS)} and {OURS}'
  )
