"""Compiles the programs of the next phase while the current one runs.

Compilation needs shapes only and runs in a thread. The compiler releases
Python's global lock, so steps continue meanwhile. On a GPU it also autotunes
kernels on the device. If compilation fails here, it is repeated when the phase
begins, and an error is raised then.
"""

import dataclasses
import threading
import time
from typing import Any

import jax

from vssl_jax import trees
from vssl_jax.train import phase_setup
from vssl_jax.train.run import Run, Span

NAME = 'compile-ahead'


@dataclasses.dataclass(frozen=True)
class Programs:
  """Compiled programs of a phase.

  Attributes:
    fresh: () -> initial state of the phase.
    update: (state, teachers, batch) -> (state, metrics).
    arguments: shapes that `update` was compiled for.
    seconds: compilation time.
  """

  fresh: Any
  update: Any
  arguments: tuple[Any, ...]
  seconds: float

  def takes(self, arguments: tuple[Any, ...]) -> bool:
    """Returns whether shapes, dtypes and shardings are those compiled for."""
    expected, actual = (dict(trees.named_leaves(x)) for x in (
      self.arguments, arguments
    ))  # fmt: skip
    return expected.keys() == actual.keys() and all(
      (x.shape, x.dtype) == (actual[name].shape, actual[name].dtype)
      and actual[name].sharding.is_equivalent_to(x.sharding, x.ndim)
      for name, x in expected.items()
    )


class Compiler:
  """Compiles for one phase at a time in a thread.

  Args:
    run: the run; without `config.compile_ahead` nothing is compiled.
  """

  def __init__(self, run: Run) -> None:
    self._run = run
    self._span: Span | None = None
    self._thread: threading.Thread | None = None
    self._made: Programs | None = None

  def start(self, span: Span | None, batch: Any) -> None:
    """Starts to compile the programs of a phase.

    Args:
      span: the phase; None after the last one.
      batch: a batch of the current phase on the device, for its shapes.
    """
    if span is None or not self._run.config.compile_ahead:
      return
    self._span, self._made = span, None
    batch_shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      batch,
    )
    # Not a daemon: the interpreter aborts when it ends during a compilation.
    self._thread = threading.Thread(
      target=self._compile, args=(span, batch_shapes), name=NAME
    )
    self._thread.start()

  def take(self, span: Span) -> Programs | None:
    """Waits for the programs of a phase and returns them.

    Returns None if compilation was not started or failed.
    """
    if self._thread is None or span != self._span:
      return None
    start = time.perf_counter()
    with self._run.clock('compile'):
      self._thread.join()
    waited = time.perf_counter() - start
    built, self._made, self._thread = self._made, None, None
    if built is not None:
      self._run.logger.log(
        f'phase {span.phase.name}: compiled ahead in {built.seconds:.1f} s, of '
        f'which the switch waited {waited:.1f} s'
      )
    return built

  def _compile(self, span: Span, batch: Any) -> None:
    start = time.perf_counter()
    try:
      # The mesh set by the run applies to its own thread only.
      with jax.set_mesh(self._run.mesh):
        *programs, arguments = _programs(self._run, span, batch)
    except Exception as error:
      reason = str(error).partition('\n')[0]
      self._run.logger.log(
        f'phase {span.phase.name}: compiling ahead failed '
        f'({type(error).__name__}: {reason}); it is tried again when the phase '
        'begins'
      )
    else:
      seconds = time.perf_counter() - start
      self._made = Programs(*programs, arguments, seconds)


def _programs(run: Run, span: Span, batch: Any) -> tuple[Any, Any, Any]:
  """Returns `fresh` and `update`, compiled, and the arguments of `update`."""
  setup = phase_setup.build(run.config, span, run.video, run.clips.num_examples)
  state, teachers = (
    phase_setup.placed(run.config, tree, run.mesh)
    for tree in (setup.state, setup.step_teachers)
  )
  shardings = jax.tree.map(lambda x: x.sharding, state)
  fresh = jax.jit(setup.fresh, out_shardings=shardings).lower().compile()
  update = phase_setup.jitted(run.config, setup, run.mesh)
  batch = phase_setup.with_targets(batch, setup, run.mesh)
  arguments = state, teachers, batch
  return fresh, update.lower(*arguments).compile(), arguments


def busy() -> bool:
  """Returns whether a compilation is running in this process."""
  return any(thread.name == NAME for thread in threading.enumerate())
