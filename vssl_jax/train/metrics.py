"""Where numbers go: a JSONL file always, TensorBoard if installed, a console.

Only process 0 writes. Wall time is split into buckets that sum to all of it.
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

from vssl_jax import jsonl

FILE = 'metrics.jsonl'  # in a run's folder
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
  'TPU v5': 459.0,  # what JAX calls a v5p
  'TPU v6 lite': 918.0,
  'TPU v6e': 918.0,
}


def peak_flops(given_tflops: float = 0.0, kind: str = '') -> float:
  """Returns the peak of one device in FLOP/s; 0 where none is known.

  Args:
    given_tflops: the peak in TFLOP/s where it is known better.
    kind: what JAX calls the device; '' for the one at hand.
  """
  if given_tflops:
    return given_tflops * 1e12
  kind = kind or jax.devices()[0].device_kind
  for name, tflops in PEAK_TFLOPS.items():
    if kind.startswith(name):
      return tflops * 1e12
  return 0.0


class Clock:
  """Splits wall time into buckets; at any moment one of them runs.

  Args:
    bucket: the one that runs first.
  """

  def __init__(self, bucket: str = 'start') -> None:
    self.seconds: dict[str, float] = {}
    self._bucket, self._since = bucket, time.perf_counter()

  def switch(self, bucket: str) -> str:
    """Ends the running bucket, starts another and returns the one ended."""
    now, ended = time.perf_counter(), self._bucket
    self.seconds[ended] = self.seconds.get(ended, 0.0) + now - self._since
    self._bucket, self._since = bucket, now
    return ended

  @contextlib.contextmanager
  def __call__(self, bucket: str) -> Iterator[None]:
    """Times a block and returns to the bucket that ran before it."""
    before = self.switch(bucket)
    try:
      yield
    finally:
      self.switch(before)

  def goodput(self) -> dict[str, float]:
    """Returns the fraction of wall time of each bucket so far."""
    self.switch(self._bucket)
    total = sum(self.seconds.values())
    return {f'time/{k}': v / total for k, v in self.seconds.items()}


class Logger:
  """Writes metrics of one run.

  Args:
    workdir: the run's folder; None to write no file.
    tensorboard: also write event files, where tensorboardX is installed.
    console: where lines go.
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
    # JSON knows no NaN; null keeps the line readable by every parser.
    line = {'step': step, **extra} | {
      k: v if math.isfinite(v) else None for k, v in numbers.items()
    }
    self._file.write(json.dumps(line) + '\n')
    self._file.flush()
    for name, value in numbers.items() if self._board else ():
      self._board.add_scalar(name, value, step)

  def say(self, text: str) -> None:
    """Prints a line on process 0."""
    if self._speaks:
      print(text, file=self._console, flush=True)

  def close(self) -> None:
    """Closes the files."""
    for sink in (self._file, self._board):
      if sink is not None:
        sink.close()


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the lines of a metrics file; none where there is no file.

  Steps that a rewind took back are left out.
  """
  lines = []
  for line in jsonl.read(path):
    if type(line.get('step')) is int:
      if line.get('event') == 'rewound':
        lines = [x for x in lines if x['step'] <= line['step']]
      lines.append(line)
  return lines


def last_step(workdir: pathlib.Path, total: int) -> int:
  """Returns the last step that an earlier start logged; 0 if none.

  Args:
    workdir: the run's folder.
    total: steps of the whole run; lines of steps that it does not have are
      ignored.
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
  """Returns one console line: phase, bar, numbers, time left in the run."""
  filled = round(20 * done / steps)
  bar = '#' * filled + '.' * (20 - filled)
  shown = ' '.join(f'{k} {v:.4g}' for k, v in values.items())
  eta = time.strftime('%H:%M:%S', time.gmtime(left * seconds_per_step))
  days = int(left * seconds_per_step // 86400)
  eta = f'{days}d {eta}' if days else eta
  return f'{phase} {done}/{steps} [{bar}] {shown} | {eta} left'
