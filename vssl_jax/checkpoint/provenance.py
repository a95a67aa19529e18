"""Provenance of results: versions, device, git commit and config hash."""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'av',
  'numpy',
)


def describe(config: dict[str, Any] | None = None) -> dict[str, Any]:
  """Returns versions, device, flags, git state and the hash of a config."""
  return {
    'python': platform.python_version(),
    'versions': {p: _version(p) for p in PACKAGES},
    **machine(),
    'git': _git(),
    'config_hash': digest(config) if config is not None else '',
    'command': sys.argv,
  }


def machine() -> dict[str, Any]:
  """Returns the hardware and settings that the bits of a result depend on."""
  device = jax.devices()[0]
  return {
    'device': f'{jax.device_count()} x {device.device_kind}',
    'platform': device.platform,
    'processes': jax.process_count(),
    'xla_flags': os.environ.get('XLA_FLAGS', ''),
    'jaxlib': _version('jaxlib'),
  }


def digest(tree: Any) -> str:
  """Returns a short hash of a JSON-serializable object."""
  text = json.dumps(tree, sort_keys=True, default=list)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return 'not installed'


def _git() -> str:
  """Returns the commit of the clone, `+dirty` with changes; '' outside one."""
  folder = pathlib.Path(__file__).parent

  def run(*args: str) -> str:
    return subprocess.run(
      ['git', *args],
      cwd=folder,
      capture_output=True,
      text=True,
      check=True,
      timeout=10,
    ).stdout.strip()

  try:
    commit = run('rev-parse', 'HEAD')
    return commit + ('+dirty' if run('status', '--porcelain') else '')
  except (OSError, subprocess.SubprocessError):
    return ''
