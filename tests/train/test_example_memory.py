"""The memory of training examples: read, written, split, copied and kept."""

import collections
import dataclasses
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from tests.train import locks, small_runs, toy
from vssl_jax import sharding, trees
from vssl_jax.checkpoint import manager
from vssl_jax.methods import phase as phase_lib
from vssl_jax.train import example_memory, loop, phase_setup
from vssl_jax.train import run as run_lib

EXAMPLES, BATCH = 1500, 24
VIDEO = (2, 4, 4, 3)
# Six devices divide no 1024: then fewer axes split the examples.
MESHES = [(1, 1), (2, 2), (1, 4), (2, 3), (1, 3)]


def _mesh(shape):
  devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
  return Mesh(devices, ('data', 'fsdp'), axis_types=sharding.AUTO)


def _specs(dtype='float32'):
  return {
    'cells': phase_lib.MemorySpec((2, 3), dtype, window=2),
    'one': phase_lib.MemorySpec((), dtype, fill=0.5),
  }


def _placed(specs, mesh):
  memory = example_memory.init(specs, EXAMPLES)
  at = sharding.shardings({'example_memory': memory}, mesh)['example_memory']
  return jax.device_put(memory, at), at


def _add(specs):
  """A step that adds a number of its own to every row of the batch."""

  def step(memory, batch):
    index = batch['index']
    got = example_memory.gather(specs, memory, index, EXAMPLES)
    new = {
      k: got[k] + batch['add'].reshape(-1, *(1 for _ in s.shape))
      for k, s in specs.items()
    }
    return example_memory.scatter(specs, memory, index, new, EXAMPLES), got

  return step


def _batches(count):
  """Batches that share some examples and hold some substitutes."""
  rng = np.random.default_rng(0)
  before = rng.permutation(EXAMPLES)[:BATCH]
  for _ in range(count):
    others = np.setdiff1d(rng.permutation(EXAMPLES)[:BATCH], before)
    index = np.concatenate([before[:10], others])[:BATCH].astype(np.int32)
    index[rng.permutation(BATCH)[:4]] = EXAMPLES
    yield {'index': index, 'add': rng.integers(1, 9, BATCH).astype(np.float32)}
    before = index[index < EXAMPLES]


class _Table:
  """The same in numpy, one example after the other."""

  def __init__(self, specs):
    self.specs = specs
    self.kept = {
      k: np.full((EXAMPLES, *s.shape), s.fill, np.float32)
      for k, s in specs.items()
    }
    self.window = {k: x.copy() for k, x in self.kept.items()}

  def read(self, name, index, table):
    spec = self.specs[name]
    fill = np.full(spec.shape, spec.fill, np.float32)
    return np.stack([table[name][i] if i < EXAMPLES else fill for i in index])

  def add(self, batch):
    for i, add in zip(batch['index'], batch['add'], strict=True):
      for table in self.kept.values():
        if i < EXAMPLES:
          table[i] += add


@pytest.mark.parametrize('dtype', phase_lib.MEMORY_DTYPES)
@pytest.mark.parametrize('shape', MESHES)
def test_rows_are_a_table_of_examples(shape, dtype):
  """Read, written and copied like one; places past the last stay unwritten."""
  specs, mesh = _specs(dtype), _mesh(shape)
  table = _Table(specs)
  with jax.set_mesh(mesh):
    memory, at = _placed(specs, mesh)
    step = jax.jit(_add(specs), donate_argnums=0, out_shardings=(at, None))
    for done, batch in enumerate(_batches(5), 1):
      memory, got = step(memory, sharding.put_batch(batch, mesh))
      index = batch['index']
      for name in specs:
        want = table.read(name, index, table.kept)
        np.testing.assert_array_equal(got[name], want)
        assert got[name].dtype == jnp.float32
      want = table.read('cells', index, table.window)
      np.testing.assert_array_equal(got['cells@window'], want)
      table.add(batch)
      memory = example_memory.end_windows(specs, memory, done)
      if done % 2 == 0:
        table.window['cells'] = table.kept['cells'].copy()
  wanted = table.kept | {'cells@window': table.window['cells']}
  assert memory.keys() == wanted.keys()
  for name, want in wanted.items():
    assert memory[name].dtype == dtype
    assert memory[name].shape[0] == 2048
    np.testing.assert_array_equal(memory[name][:EXAMPLES], want)
    fill = specs[name.removesuffix(example_memory.WINDOW)].fill
    assert (np.asarray(memory[name][EXAMPLES:]) == fill).all()


def test_room_is_made_for_whole_thousands_on_any_mesh():
  assert [example_memory.places(n) for n in (1, 1024, 1025)] == [
    1024,
    1024,
    2048,
  ]
  memory, _ = _placed(_specs(), _mesh((2, 2)))
  for name, x in memory.items():
    parts = {s.data.shape for s in x.addressable_shards}
    assert parts == {(512, *x.shape[1:])}, name
  sizes = [{'data': d, 'fsdp': f} for d, f in MESHES]
  axes = [sharding.example_axes(2048, size) for size in sizes]
  assert axes == [('data', 'fsdp')] * 3 + [('data',)] * 2
  overrides = {'.*': ()}
  at = sharding.shardings({'example_memory': memory}, _mesh((2, 2)), overrides)
  assert at['example_memory']['one'].spec == jax.P(('data', 'fsdp'))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remembers(toy.ToyPhase):
  """Clips count by what was remembered of them at the last window end."""

  def loss(self, params, teachers, batch, rng):
    value, aux = super().loss(params, teachers, batch, rng)
    x = self.encoder.apply({'params': params['encoder']}, batch.video)
    per_clip = jnp.mean(jnp.square(x), axis=(1, 2))
    weight = 1 + 0.1 * jnp.mean(
      batch.example_memory['cells@window'], axis=(1, 2)
    )
    new = batch.example_memory['cells'] + per_clip[:, None, None]
    return value + jnp.mean(weight * per_clip), aux._replace(
      memory=aux.memory | {'cells': jax.lax.stop_gradient(new)}
    )


def _phase(name='one', steps=4, window=3, **kwargs):
  specs = {
    'cells': phase_lib.MemorySpec((2, 3), window=window),
    'seen': phase_lib.MemorySpec((), 'float16', window=1),
  }
  return toy.phase(
    Remembers, name=name, steps=steps, memory_specs=specs, **kwargs
  )


PLAN = (
  _phase(),
  _phase('two', 3, 2, carry=('params', 'opt', 'example_memory')),
  _phase('three', 2, 2, carry=('params', 'opt')),
)


def _train(config, *phases):
  """Returns {step: state} of a run; every state is kept."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_lib.methods, 'build', lambda *_: phases)
    assert loop.train(config) == 0
  return locks.states(config.workdir)


def make_config(clips, workdir):
  config = small_runs.tiny_config(clips, workdir)
  config.checkpoint.update(dict(every=1, keep=100, record_every=0))
  config.optim.warmup = 0
  return config


@pytest.fixture
def config(clips, tmp_path):
  return make_config(clips, tmp_path / 'run')


@pytest.fixture(scope='module')
def whole(clips, tmp_path_factory):
  """A run of three phases, the second of which takes over what it finds."""
  config = make_config(clips, tmp_path_factory.mktemp('whole') / 'run')
  return config, _train(config, *PLAN)


@pytest.mark.parametrize('shape', [(2, 2), (1, 4)])
def test_a_step_touches_the_rows_of_its_batch_only(config, shape):
  """What the compiler made of it: no device sends or rewrites a table."""
  config.batch_size, mesh = BATCH, _mesh(shape)
  (span,) = run_lib.spans((_phase(),))
  shapes = phase_setup.build(config, span, VIDEO, EXAMPLES)
  program = phase_setup.lower(config, shapes, VIDEO, mesh).compile(
    {'xla_cpu_use_fusion_emitters': True}  # else a scatter is a loop
  )
  text = program.as_text()
  local = collections.Counter(
    kind
    for sides, kind in re.findall(r'= \w+\[([\d,]*)\]\S* ([\w-]+)\(', text)
    if sides.split(',')[0] == str(2048 // mesh.size)
  )
  assert local.pop('parameter') and local.pop('scatter') == 2
  calls = {'fusion', 'call', 'get-tuple-element', 'bitcast', 'reshape'}
  assert not local.keys() - calls, local
  found = re.findall(r'= (.*?) ([\w-]+)(?:-start)?\(', text)
  moved = [x for x, kind in found if re.match('all-|reduce-s|collective', kind)]
  assert len(moved) >= 6
  assert not [
    x for x in moved if re.search(rf'\b(2048|{2048 // mesh.size})\b', x)
  ]


def test_the_copy_is_made_in_the_old_ones_place():
  specs, mesh = _specs(), _mesh((2, 2))
  memory, at = _placed(specs, mesh)
  for done, made in ((0, False), (1, False), (2, True), (3, False), (4, True)):
    old = memory['cells@window']
    places = [s.data.unsafe_buffer_pointer() for s in old.addressable_shards]
    memory = example_memory.end_windows(specs, memory, done)
    assert old.is_deleted() == made
    new = memory['cells@window']
    assert new.sharding.is_equivalent_to(at['cells@window'], new.ndim)
    assert places == [
      s.data.unsafe_buffer_pointer() for s in new.addressable_shards
    ]
    assert memory['cells'] is not new


@pytest.mark.parametrize('start', [2, 3])
def test_a_run_that_goes_on_remembers_what_it_would_have(
  whole, tmp_path, start
):
  """From the middle of a window, and from its very end."""
  config, states = whole
  again = config.copy_and_resolve_references()
  again.workdir, again.checkpoint.every = str(tmp_path / 'run'), 100
  shutil.copytree(config.workdir, again.workdir)
  locks.truncate(again.workdir, start)
  (pathlib.Path(again.workdir) / 'metrics.jsonl').unlink()
  found = _train(again, _phase())
  assert sorted(locks.logged(again.workdir, 'loss')) == [*range(start + 1, 5)]
  assert locks.sums(found[4]) == locks.sums(states[4])


def test_windows_end_where_they_should_and_phases_take_over(whole):
  """Ends count from a phase's start, and its last step may be one."""
  at = {n: locks.read(s, 'example_memory/') for n, s in whole[1].items()}
  seen = [int(at[n]['example_memory/seen'].sum()) for n in range(1, 10)]
  assert seen == [8 * n for n in (1, 2, 3, 4, 5, 6, 7, 1, 2)]
  for leaves in at.values():  # a window of one step
    np.testing.assert_array_equal(
      leaves['example_memory/seen@window'], leaves['example_memory/seen']
    )
  values = {n: leaves['example_memory/cells'] for n, leaves in at.items()}
  values[0] = np.zeros_like(values[1])
  for n, end in enumerate((0, 0, 3, 3, 3, 6, 6, 0, 9), 1):
    np.testing.assert_array_equal(
      at[n]['example_memory/cells@window'], values[end]
    )
    assert (values[n] != values[n - 1]).any()


@pytest.mark.parametrize('shape', [(1, 1), (1, 2), (2, 2), (2, 3)])
def test_rows_have_the_same_bits_on_every_mesh(tmp_path, shape):
  """Saved on four devices and read on one, two, four and six."""
  memory, _ = _placed(_specs('float16'), _mesh((1, 4)))
  rng = np.random.default_rng(0)
  memory = jax.tree.map(
    lambda x: jax.device_put(
      rng.normal(size=x.shape).astype(np.float16), x.sharding
    ),
    memory,
  )
  saver = manager.Checkpoints(tmp_path)
  saver.save({'example_memory': memory}, 1, 'one')
  saver.finish()
  shapes = trees.shapes({'example_memory': memory})
  at = sharding.shardings(shapes, _mesh(shape))
  target = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, at
  )
  back = manager.restore(saver.newest(), target)['example_memory']
  for name, x in memory.items():
    np.testing.assert_array_equal(back[name], x)
    split = sharding.example_axes(2048, dict(zip(('data', 'fsdp'), shape)))
    pieces = np.prod([back[name].sharding.mesh.shape[a] for a in split])
    part = back[name].addressable_shards[0].data
    assert part.shape[0] == 2048 // pieces


def test_rows_must_be_those_declared():
  specs = {'seen': phase_lib.MemorySpec((2,))}
  index = jnp.arange(3)
  for new in ({}, {'seen': jnp.zeros((3,))}, {'saw': jnp.zeros((3, 2))}):
    with pytest.raises(ValueError, match=r"wanted \{'seen': \(3, 2\)\}"):
      example_memory.scatter(
        specs, example_memory.init(specs, 4), index, new, 4
      )


def test_what_is_too_large_for_its_type_is_the_largest():
  """An infinite value would stay for good: nothing decays it."""
  specs = {'seen': phase_lib.MemorySpec((), 'float16')}
  memory = example_memory.init(specs, 4)
  new = {'seen': jnp.array([1e6, -1e6, 0.1])}
  memory = example_memory.scatter(specs, memory, jnp.arange(3), new, 4)
  want = np.float16([65504, -65504, 0.1, 0])
  np.testing.assert_array_equal(memory['seen'][:4], want)


@pytest.mark.parametrize(
  ('field', 'message'),
  [
    (dict(dtype='int32'), r"found 'int32', wanted one of \('float32'"),
    (dict(window=-1), 'window: found -1, wanted steps, or 0'),
  ],
)
def test_a_row_that_cannot_be_kept_is_refused(field, message):
  with pytest.raises(ValueError, match=message):
    phase_lib.MemorySpec((2,), **field)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'data.repeats': 2}, r'with data\.repeats=2; set --config\.data\.repeats'),
    ({'data.weights': (1, 2)}, r'with data\.weights=\(1, 2\); set'),
    ({'batch_size': 48}, r'batch_size=48 of 40 videos; lower'),
  ],
)
def test_a_batch_may_not_hold_an_example_twice(
  config, monkeypatch, changes, message
):
  if 'data.weights' in changes:
    config.data.source = ','.join([config.data.source] * 2)
  config.update_from_flattened_dict(changes)
  for phase in (_phase(), toy.phase()):
    monkeypatch.setattr(run_lib.methods, 'build', lambda *_: (phase,))
    if phase.memory_specs:
      with pytest.raises(ValueError, match=message):
        run_lib.open_run(config, read_only=True)
    else:  # without rows it may
      run_lib.open_run(config, read_only=True).clips.close()
