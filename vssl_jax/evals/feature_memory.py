"""Compares the memory of a compiled program with the free memory."""

import functools
import os
import pathlib
from typing import Any

import jax

GIB = 2**30
CGROUP = pathlib.Path('/sys/fs/cgroup')


def is_exhausted(error: BaseException) -> bool:
  """Returns whether an exception reports exhausted memory."""
  reason = str(error)
  return isinstance(error, MemoryError) or (
    'RESOURCE_EXHAUSTED' in reason or 'out of memory' in reason.lower()
  )


def free(device: jax.Device) -> int | None:
  """Returns the free bytes of a device; None if unknown.

  CPU devices share the free memory of the machine, or of the container.
  """
  if device.platform != 'cpu':
    stats = device.memory_stats() or {}
    if 'bytes_limit' not in stats:
      return None
    return stats['bytes_limit'] - stats.get('bytes_in_use', 0)
  return _free_of_machine()


def _free_of_machine() -> int:
  page = os.sysconf('SC_PAGE_SIZE')
  available = os.sysconf('SC_AVPHYS_PAGES') * page
  try:
    lines = pathlib.Path('/proc/meminfo').read_text().splitlines()
    rows = dict(line.split(':', 1) for line in lines if ':' in line)
    available = int(rows['MemAvailable'].split()[0]) * 1024
  except (OSError, KeyError, ValueError):
    pass  # not Linux: unused pages only
  try:
    limit = int((CGROUP / 'memory.max').read_text())
    used = int((CGROUP / 'memory.current').read_text())
    return min(available, limit - used)
  except (OSError, ValueError):  # no container, or one without a limit
    return available


def needed(compiled: jax.stages.Compiled) -> int:
  """Returns the bytes that a program allocates on each device when it runs."""
  analysis = compiled.memory_analysis()
  if analysis is None:
    return 0
  return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def check(compiled: jax.stages.Compiled, rows: int, remedy: str) -> None:
  """Raises ValueError if a program needs more memory than is free.

  Args:
    compiled: the program.
    rows: clips per call, over all devices.
    remedy: config keys to change, for the message.

  Raises:
    ValueError: it does not fit; the message states how many clips would.
  """
  device = jax.local_devices()[0]
  free_bytes = free(device)
  if free_bytes is None:
    return
  num_devices = jax.local_device_count()
  bytes_needed = needed(compiled) * (
    num_devices if device.platform == 'cpu' else 1
  )
  if bytes_needed <= free_bytes:
    return
  fit = int(rows * free_bytes / bytes_needed) // num_devices * num_devices
  raise ValueError(
    f'{rows} clips at once need {bytes_needed / GIB:.1f} GiB of memory, and '
    f'{free_bytes / GIB:.1f} GiB of this {device.device_kind} are free'
    + (f', enough for some {fit}' if fit else '')
    + f'; wanted {remedy}'
  )


class Encode:
  """Encoder that checks the memory of each program before its first call.

  Args:
    encoder: the encoder.
    depth: fraction of its blocks to run; None for the encoder's default.
    remedy: config keys to change if memory is short, for the message.
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
