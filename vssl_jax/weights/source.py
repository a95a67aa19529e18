"""Opens published weights from a folder, a file, or the hub."""

import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from vssl_jax.weights.name_maps import rules, video
from vssl_jax.weights.readers import config_fields, npz, torch_pickle
from vssl_jax.weights.readers import tensors as tensors_lib

OURS = 'vssl_vit'  # model_type of our own layout, for all encoders
CLASSIFIER = 'classifier/'  # prefix of classifier names in our own layout
HUB_ID = re.compile(r'^[\w-][\w.-]*/[\w-][\w.-]*$')
# Configs of image processors (older and newer names) and of the network. Later
# ones override earlier ones.
CONFIGS = (
  'preprocessor_config.json',
  'video_preprocessor_config.json',
  'processor_config.json',
  'config.json',
)
INDEX = 'model.safetensors.index.json'  # for models in several files
HUB_FILES = ('*.json', '*.safetensors')
# Layouts that can be named after a VideoMAE-style source: `x.pth#mvd`.
NAMED = ('videomae', 'mvd')
WEIGHTS = ('.safetensors', '.npz', '.pth', '.pt')


@dataclasses.dataclass(frozen=True)
class Found:
  """An opened source, with tensors that are loaded on access.

  Attributes:
    source: the source as given by the user.
    config: fields of `config.json`; empty if there is none.
    groups: group -> key -> tensor; a single group '' except for `.pth` files.
    layout: the layout with its tables, or None for our own layout.
    named: the layout named by the user after `#`, one of `NAMED`, or ''.
    trained: whether the trained network has priority over its average.
  """

  source: str
  config: Mapping[str, Any]
  groups: Mapping[str, Mapping[str, tensors_lib.Tensor]]
  layout: rules.Layout | None
  named: str = ''
  trained: bool = False

  def tensors(self, part: str) -> dict[str, tuple[str, tensors_lib.Tensor]]:
    """Returns name in the table -> (published key, tensor) of one part."""
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
      raise tensors_lib.WeightsError(
        f'{self.source}: no {part}; found {sorted(self.groups)}, wanted one '
        f'of {groups}'
      )
    tensors = self.groups[group]
    named = {_renamed(k, self.layout): (k, x) for k, x in tensors.items()}
    if len(named) != len(tensors):
      unique = {key for key, _ in named.values()}
      double = next(k for k in tensors if k not in unique)
      raise tensors_lib.WeightsError(
        f'{self.source}: {tensors_lib.short(double)} and another key are the '
        f'same name of the layout {self.layout.name}'
      )
    return named


def _renamed(key: str, layout: rules.Layout) -> str:
  for pattern, replacement in layout.renames:
    key = re.sub(pattern, replacement, key)
  return key


def _place(source: str | os.PathLike[str]) -> tuple[pathlib.Path, str]:
  """Returns the path of a source and the layout named after its `#`.

  Raises:
    WeightsError: the source does not exist, or the layout is not in `NAMED`.
  """
  text, named = str(source), ''
  if text and pathlib.Path(text).exists():
    return pathlib.Path(text), named
  if '#' in text:
    text, _, named = text.rpartition('#')
    if named not in NAMED:
      raise tensors_lib.WeightsError(
        f'{source}: no such file, and the layout behind # is {named!r}, wanted '
        f'one of {NAMED}'
      )
  path = pathlib.Path(text)
  return (path if text and path.exists() else _download(text)), named


def open_source(source: str | os.PathLike[str]) -> Found:
  """Opens published weights and recognises their layout.

  Args:
    source: a folder with `config.json` and safetensors files, or with one
      `.npz` file; a single `.safetensors`, `.npz`, `.pth` or `.pt` file; or a
      hub id. `#mvd` or `#videomae` may follow, for files with VideoMAE's tensor
      names, from which the two models cannot be distinguished.

  Raises:
    WeightsError: the source does not exist, or its layout is unknown.
  """
  path, named = _place(source)
  config: dict[str, Any] = {}
  if path.is_dir():
    for file in (path / name for name in CONFIGS):
      if file.exists():
        config |= config_fields.of_file(
          str(file), tensors_lib.json_object(file)
        )
    groups = {'': _folder(path)}
  elif path.suffix == '.safetensors':
    groups = {'': tensors_lib.safetensors(path)}
  elif path.suffix == '.npz':
    groups = {'': npz.load(path)}
  else:
    groups = _groups(path, torch_pickle.load(path))
  _check_tensors(str(source), groups)
  layout = _recognise(str(source), groups)
  if named and (layout is None or layout.family != 'videomae'):
    raise tensors_lib.WeightsError(
      f'{source}: #{named} is for files of the names of VideoMAE, and this '
      f'one is of the layout {layout.name if layout else OURS}; leave it out'
    )
  return Found(str(source), config, groups, layout, named)


def _check_tensors(
  source: str, groups: Mapping[str, Mapping[str, tensors_lib.Tensor]]
) -> None:
  """Raises for empty tensors, whose other axes could have any size."""
  for group in groups.values():
    for key, x in group.items():
      if 0 in x.shape:
        raise tensors_lib.WeightsError(
          f'{source}: {tensors_lib.short(key)} is empty, of shape '
          f'{tuple(x.shape)}'
        )


def fingerprint(source: str | os.PathLike[str]) -> str:
  """Returns a hash of the files that hold a model's weights.

  Args:
    source: as in `open_source`. In a folder, all JSON files and files with
      weights are hashed.

  Raises:
    WeightsError: the source does not exist, or has no file with weights.
  """
  path, named = _place(source)
  files = sorted(path.iterdir()) if path.is_dir() else [path]
  files = [f for f in files if f.suffix in ('.json', *WEIGHTS)]
  if all(f.suffix == '.json' for f in files):
    raise tensors_lib.WeightsError(f'{source}: found no file of {WEIGHTS}')
  digest = hashlib.sha256(named.encode())
  for file in files:
    with file.open('rb') as f:
      digest.update(hashlib.file_digest(f, 'sha256').digest())
  return digest.hexdigest()[:16]


def _download(source: str) -> pathlib.Path:
  if not HUB_ID.match(source):
    raise tensors_lib.WeightsError(
      f'{source!r}: no such file or folder from {os.getcwd()}, and not a hub '
      'id (owner/name)'
    )
  try:
    import huggingface_hub
  except ImportError as e:
    raise tensors_lib.WeightsError(
      f'{source}: no such folder here. To fetch it from the hub, pip install '
      'huggingface_hub; or download it elsewhere and give the folder'
    ) from e
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(source, allow_patterns=HUB_FILES)
    )
  except Exception as e:  # many types: offline, not found, no access
    raise tensors_lib.WeightsError(
      f'{source}: no run folder (run.json) and no weights at '
      f'{pathlib.Path(source).resolve()}, and the hub could not be read '
      f'({type(e).__name__}: {e}). Without a network, download config.json '
      'and model.safetensors elsewhere and give their folder'
    ) from e


def _folder(path: pathlib.Path) -> dict[str, tensors_lib.Tensor]:
  """Returns the tensors in a folder: of one file, or all files of an index."""
  arrays = sorted(path.glob('*.npz'))
  if len(arrays) == 1 and not list(path.glob('*.safetensors')):
    return npz.load(arrays[0])
  index = path / INDEX
  names = ['model.safetensors']
  if index.exists():
    names = _indexed(index)
  tensors: dict[str, tensors_lib.Tensor] = {}
  for name in names:
    if pathlib.Path(name).name != name:
      raise tensors_lib.WeightsError(
        f'{index}: {tensors_lib.short(name)} is not a file beside it'
      )
    if not (path / name).exists():
      raise tensors_lib.WeightsError(
        f'{path}: no {name}; found {sorted(p.name for p in path.iterdir())}. '
        'A .pth file, or one of several .npz files, is given by its own path'
      )
    tensors |= tensors_lib.safetensors(path / name)
  return tensors


def _indexed(index: pathlib.Path) -> list[str]:
  """Returns the file names in an index."""
  files = tensors_lib.json_object(index).get('weight_map')
  if not isinstance(files, dict) or not files:
    raise tensors_lib.WeightsError(
      f'{index}: no weight_map, wanted key -> file'
    )
  names = {
    x if isinstance(x, str) else tensors_lib.short(x) for x in files.values()
  }
  return sorted(names)


def _groups(
  path: pathlib.Path, payload: Any
) -> dict[str, dict[str, tensors_lib.Tensor]]:
  """Returns the groups of tensors in a `.pth` file that any layout uses."""
  if not isinstance(payload, dict):
    raise tensors_lib.WeightsError(
      f'{path}: the .pth file holds no dict of tensors'
    )
  names = {
    name
    for layout in video.LAYOUTS
    for part in layout.parts.values()
    for name in (*part.groups, *part.trained)
  }
  groups = {}
  for name in sorted(names):
    group = payload.get(name) if name else payload
    if isinstance(group, dict):
      tensors = {
        k: x
        for k, x in group.items()
        if isinstance(k, str) and isinstance(x, torch_pickle.Tensor)
      }
      if tensors:
        groups[name] = tensors
  if not groups:
    keys = [tensors_lib.short(k) for k in list(payload)[:5]]
    raise tensors_lib.WeightsError(
      f'{path}: the .pth file has no tensors at its top, nor under one of '
      f'{sorted(names - {""})}; found {", ".join(keys)}'
    )
  return groups


def _recognise(
  source: str, groups: Mapping[str, Mapping[str, Any]]
) -> rules.Layout | None:
  """Recognises the layout by its tensor names; None for our own layout."""
  if 'embed/kernel' in groups.get('', {}):
    return None
  for layout in video.LAYOUTS:
    for group in layout.parts['encoder'].groups:
      names = {_renamed(k, layout) for k in groups.get(group, {})}
      if names.issuperset(layout.marks):
        return layout
  examples = [k[:80] for group in groups.values() for k in group][:3]
  raise tensors_lib.WeightsError(
    f'{source}: the layout is unknown; keys look like {examples}. Known are '
    f'{", ".join(layout.name for layout in video.LAYOUTS)} and {OURS}'
  )
