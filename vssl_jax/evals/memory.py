"""Compares what a compiled program needs with the memory that is free."""

import functools
import os
import pathlib
from typing import Any

import jax

GIB = 2**30
CGROUP = pathlib.Path('/sys/fs/cgroup')


def is_exhausted(error: BaseException) -> bool:
  """Returns whether an error says that memory is short."""
  reason = str(error)
  return isinstance(error, MemoryError) or (
    'RESOURCE_EXHAUSTED' in reason or 'out of memory' in reason.lower()
  )


def free(device: jax.Device) -> int | None:
  """Returns the free bytes of a device, None where that is not known.

  CPU devices share what is free of the machine, or of the container.
  """
  if device.platform != 'cpu':
    found = device.memory_stats() or {}
    if 'bytes_limit' not in found:
      return None
    return found['bytes_limit'] - found.get('bytes_in_use', 0)
  return _free_of_machine()


def _free_of_machine() -> int:
  page = os.sysconf('SC_PAGE_SIZE')
  available = os.sysconf('SC_AVPHYS_PAGES') * page
  try:
    lines = pathlib.Path('/proc/meminfo').read_text().splitlines()
    rows = dict(line.split(':', 1) for line in lines if ':' in line)
    available = int(rows['MemAvailable'].split()[0]) * 1024
  except (OSError, KeyError, ValueError):
    pass  # not Linux: what is entirely unused
  try:
    limit = int((CGROUP / 'memory.max').read_text())
    used = int((CGROUP / 'memory.current').read_text())
    return min(available, limit - used)
  except (OSError, ValueError):  # no container, or one without a limit
    return available


def needed(compiled: jax.stages.Compiled) -> int:
  """Returns the bytes that a program allocates on each device as it runs."""
  found = compiled.memory_analysis()
  if found is None:
    return 0
  return found.temp_size_in_bytes + found.output_size_in_bytes


def check(compiled: jax.stages.Compiled, rows: int, remedy: str) -> None:
  """Refuses a program that needs more memory than is free.

  Args:
    compiled: the program.
    rows: clips that it works on at once, on all devices.
    remedy: the keys to change.

  Raises:
    ValueError: it does not fit; states how many clips would.
  """
  device = jax.local_devices()[0]
  room = free(device)
  if room is None:
    return
  count = jax.local_device_count()
  bytes_needed = needed(compiled) * (count if device.platform == 'cpu' else 1)
  if bytes_needed <= room:
    return
  fit = int(rows * room / bytes_needed) // count * count
  raise ValueError(
    f'{rows} clips at once need {bytes_needed / GIB:.1f} GiB of memory, and '
    f'{room / GIB:.1f} GiB of this {device.device_kind} are free'
    + (f', enough for some {fit}' if fit else '')
    + f'; wanted {remedy}'
  )


class Encode:
  """An encoder whose programs are held to the free memory before they run.

  Args:
    encoder: the encoder.
    depth: fraction of its blocks to run; None for its own choice.
    remedy: keys to change where memory is short.
  """

  def __init__(self, encoder: Any, depth: float | None, remedy: str) -> None:
    self._encoder, self._depth, self._remedy = encoder, depth, remedy
    self._compiled = functools.lru_cache(maxsize=None)(self._compile)

  def __call__(self, video: Any) -> jax.Array:
    """Returns the tokens [B, N, D] of clips [B, T, H, W, C]."""
    if isinstance(video, jax.core.Tracer) or not isinstance(video, jax.Array):
      return self._encoder(video, self._depth)
    compiled = self._compiled(video.shape, video.dtype, video.sharding)
    return compiled(self._encoder.params, video)

  def _compile(
    self, shape: tuple[int, ...], dtype: Any, sharding: Any
  ) -> jax.stages.Compiled:
    clip = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    compiled = self._encoder.lower(clip, self._depth).compile()
    check(compiled, shape[0], self._remedy)
    return compiled
