"""The programs of the next phase, compiled while this one runs.

They are made from shapes alone, in a thread: the compiler does its work
without Python's lock, so steps go on meanwhile. On a GPU it also tries kernels
out on the device. What fails here is tried again when the phase begins, and is
an error then.
"""

import dataclasses
import threading
import time
from typing import Any

import jax

from vssl_jax import trees
from vssl_jax.train import ahead
from vssl_jax.train.run import Run, Span

NAME = 'compile-ahead'


@dataclasses.dataclass(frozen=True)
class Programs:
  """What a phase runs, compiled.

  Attributes:
    fresh: () -> its state before the first step.
    update: (state, teachers, batch) -> (state, metrics).
    arguments: shapes that `update` was compiled for.
    seconds: that it took.
  """

  fresh: Any
  update: Any
  arguments: tuple[Any, ...]
  seconds: float

  def takes(self, arguments: tuple[Any, ...]) -> bool:
    """Returns whether `update` was compiled for such arrays, and there."""
    wanted, found = (dict(trees.named_leaves(x)) for x in (
      self.arguments, arguments
    ))  # fmt: skip
    return wanted.keys() == found.keys() and all(
      (x.shape, x.dtype) == (found[name].shape, found[name].dtype)
      and found[name].sharding.is_equivalent_to(x.sharding, x.ndim)
      for name, x in wanted.items()
    )


class Compiler:
  """Compiles for one phase at a time, beside the run.

  Args:
    run: the run; `config.compile_ahead` switches it off.
  """

  def __init__(self, run: Run) -> None:
    self._run = run
    self._span: Span | None = None
    self._thread: threading.Thread | None = None
    self._made: Programs | None = None

  def start(self, span: Span | None, batch: Any) -> None:
    """Begins to compile for a phase.

    Args:
      span: the phase; None after the last one.
      batch: one of this run on the device; the next phase's are like it.
    """
    if span is None or not self._run.config.compile_ahead:
      return
    self._span, self._made = span, None
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      batch,
    )
    # Not a daemon: the interpreter aborts when it ends during a compilation.
    self._thread = threading.Thread(
      target=self._compile, args=(span, like), name=NAME
    )
    self._thread.start()

  def take(self, span: Span) -> Programs | None:
    """Returns the programs of a phase, and waits until they are there.

    None if they were not begun, or could not be made.
    """
    if self._thread is None or span != self._span:
      return None
    start = time.perf_counter()
    with self._run.clock('compile'):
      self._thread.join()
    waited = time.perf_counter() - start
    made, self._made, self._thread = self._made, None, None
    if made is not None:
      self._run.logger.say(
        f'phase {span.phase.name}: compiled ahead in {made.seconds:.1f} s, of '
        f'which the switch waited {waited:.1f} s'
      )
    return made

  def _compile(self, span: Span, batch: Any) -> None:
    start = time.perf_counter()
    try:
      # The mesh that the run has set holds in its own thread only.
      with jax.set_mesh(self._run.mesh):
        *made, arguments = _programs(self._run, span, batch)
    except Exception as error:
      reason = str(error).partition('\n')[0]
      self._run.logger.say(
        f'phase {span.phase.name}: compiling ahead failed '
        f'({type(error).__name__}: {reason}); it is tried again when the phase '
        'begins'
      )
    else:
      seconds = time.perf_counter() - start
      self._made = Programs(*made, arguments, seconds)


def _programs(run: Run, span: Span, batch: Any) -> tuple[Any, Any, Any]:
  """Returns a phase's programs, and the shapes that the second takes."""
  shapes = ahead.outline(
    run.config, run.method, span, run.video, run.clips.num_examples
  )
  state, teachers = (
    ahead.placed(run.config, tree, run.mesh)
    for tree in (shapes.state, shapes.step_teachers)
  )
  at = jax.tree.map(lambda x: x.sharding, state)
  fresh = jax.jit(shapes.fresh, out_shardings=at).lower().compile()
  update = ahead.jitted(run.config, run.method, shapes, run.mesh)
  batch = ahead.with_targets(batch, shapes, run.mesh)
  arguments = state, teachers, batch
  return fresh, update.lower(*arguments).compile(), arguments


def busy() -> bool:
  """Returns whether a compilation is under way in this process."""
  return any(thread.name == NAME for thread in threading.enumerate())
