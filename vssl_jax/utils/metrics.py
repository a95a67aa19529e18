"""Metrics logging: to a JSONL file, TensorBoard (if installed) and a console.

Only process 0 writes. Wall time is split into buckets whose sum is the total.
"""

import contextlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import jax

from vssl_jax.utils import jsonl

FILE = 'metrics.jsonl'  # in the run folder
# Dense bf16 peaks per device in TFLOP/s, from the vendors' data sheets.
PEAK_TFLOPS = {
  'NVIDIA H200': 989.0,
  'NVIDIA H100': 989.0,
  'NVIDIA A100': 312.0,
  'NVIDIA L4': 121.0,
  'TPU v4': 275.0,
  'TPU v5p': 459.0,
  'TPU v5 lite': 197.0,
  'TPU v5e': 197.0,
  'TPU v5': 459.0,  # JAX's name of a v5p
  'TPU v6 lite': 918.0,
  'TPU v6e': 918.0,
}


def peak_flops(given_tflops: float = 0.0, kind: str = '') -> float:
  """Returns the peak of one device in FLOP/s; 0 if unknown.

  Args:
    given_tflops: a peak in TFLOP/s that overrides the table; 0: none.
    kind: JAX's `device_kind`; '' for the first device of this process.
  """
  if given_tflops:
    return given_tflops * 1e12
  kind = kind or jax.devices()[0].device_kind
  for name, tflops in PEAK_TFLOPS.items():
    if kind.startswith(name):
      return tflops * 1e12
  return 0.0


class Clock:
  """Splits wall time into buckets, one of which is active at any time.

  Args:
    bucket: the first active bucket.
  """

  def __init__(self, bucket: str = 'start') -> None:
    self.seconds: dict[str, float] = {}
    self._bucket, self._since = bucket, time.perf_counter()

  def switch(self, bucket: str) -> str:
    """Activates a bucket and returns the name of the previous one."""
    now, ended = time.perf_counter(), self._bucket
    self.seconds[ended] = self.seconds.get(ended, 0.0) + now - self._since
    self._bucket, self._since = bucket, now
    return ended

  @contextlib.contextmanager
  def __call__(self, bucket: str) -> Iterator[None]:
    """Times a block, then reactivates the previous bucket."""
    before = self.switch(bucket)
    try:
      yield
    finally:
      self.switch(before)

  def goodput(self) -> dict[str, float]:
    """Returns the fraction of wall time per bucket so far."""
    self.switch(self._bucket)
    total = sum(self.seconds.values())
    return {f'time/{k}': v / total for k, v in self.seconds.items()}


class Logger:
  """Writes metrics of one run.

  Args:
    workdir: the run folder; None to write no file.
    tensorboard: also write event files, if tensorboardX is installed.
    console: stream for console lines; None: stdout.
  """

  def __init__(
    self,
    workdir: pathlib.Path | None,
    tensorboard: bool = True,
    console: TextIO | None = None,
  ) -> None:
    self._console = console or sys.stdout
    self._file = self._board = None
    self._speaks = jax.process_index() == 0
    if workdir is None or not self._speaks:
      return
    self._file = jsonl.append_to(workdir / FILE)
    if tensorboard:
      with contextlib.suppress(ImportError):
        import tensorboardX

        self._board = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'))

  def write(self, step: int, values: Mapping[str, Any], **extra: Any) -> None:
    """Writes one line of scalars, and text such as the phase's name."""
    if self._file is None:
      return
    numbers = {k: float(v) for k, v in values.items()}
    # JSON has no NaN; null keeps the line readable by every parser.
    line = {'step': step, **extra} | {
      k: v if math.isfinite(v) else None for k, v in numbers.items()
    }
    self._file.write(json.dumps(line) + '\n')
    self._file.flush()
    for name, value in numbers.items() if self._board else ():
      self._board.add_scalar(name, value, step)

  def log(self, text: str) -> None:
    """Prints a line on process 0."""
    if self._speaks:
      print(text, file=self._console, flush=True)

  def close(self) -> None:
    """Closes the files."""
    for sink in (self._file, self._board):
      if sink is not None:
        sink.close()


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the lines of a metrics file; [] if there is no file.

  Steps that a rewind discarded are left out.
  """
  lines = []
  for line in jsonl.read(path):
    if type(line.get('step')) is int:
      if line.get('event') == 'rewound':
        lines = [x for x in lines if x['step'] <= line['step']]
      lines.append(line)
  return lines


def last_step(workdir: pathlib.Path, total: int) -> int:
  """Returns the last step logged by an earlier start of the run; 0 if none.

  Args:
    workdir: the run folder.
    total: number of steps of the run; lines of other steps are ignored.
  """
  steps = [x['step'] for x in read(workdir / FILE) if 0 <= x['step'] <= total]
  return steps[-1] if steps else 0


def progress_line(
  phase: str,
  done: int,
  steps: int,
  values: Mapping[str, float],
  seconds_per_step: float,
  left: int,
) -> str:
  """Formats one console line: phase, progress bar, metrics, time left.

  Args:
    phase: name of the phase.
    done: completed steps of the phase.
    steps: number of steps of the phase.
    values: metrics by name.
    seconds_per_step: seconds per step, for the time left.
    left: steps left in the run.
  """
  filled = round(20 * done / steps)
  bar = '#' * filled + '.' * (20 - filled)
  shown = ' '.join(f'{k} {v:.4g}' for k, v in values.items())
  eta = time.strftime('%H:%M:%S', time.gmtime(left * seconds_per_step))
  days = int(left * seconds_per_step // 86400)
  eta = f'{days}d {eta}' if days else eta
  return f'{phase} {done}/{steps} [{bar}] {shown} | {eta} left'
