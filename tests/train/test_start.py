"""How a phase starts: weights from outside, carried ones, and averages."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import locks, small_runs, test_kdhiera, test_pmd, toy
from vssl_jax import encoder as encoder_lib
from vssl_jax import methods, trees, weights
from vssl_jax.methods import phase as phase_lib
from vssl_jax.models import vit
from vssl_jax.planning import report
from vssl_jax.train import loop, phase_setup, phase_start, train_step
from vssl_jax.train import run as run_lib


def _random(module, video, seed=7):
  """Parameters of a module, none of them at a fresh start's values."""
  clip = jax.ShapeDtypeStruct((1, *video), 'uint8')
  shapes = jax.eval_shape(module.init, jax.random.key(0), clip)['params']
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes
  )


def _export(phase, video, folder):
  """Writes weights for a phase's encoder; returns them by name."""
  params = _random(phase.encoder, video)
  weights.export(phase.encoder, params, folder, video=video, layout='vssl_vit')
  return dict(trees.named_leaves(params))


def _begun(config, **fields):
  """Returns the state that the last phase starts from, with other fields."""
  run = run_lib.open_run(config)
  try:
    with jax.set_mesh(run.mesh):
      span = run_lib.spans(run.phases)[-1]
      span = dataclasses.replace(
        span, phase=dataclasses.replace(span.phase, **fields)
      )
      shapes = phase_setup.build(config, span, run.video, 40)
      return phase_start.state(run, shapes, None, False)
  finally:
    run.clips.close()
    run.logger.close()


def _student(clips, workdir):
  c = small_runs.tiny_config(clips, workdir)
  c.method.phases = ('latent_student',)
  student = c.method.latent_student
  student.teacher, student.ema = '@ema/encoder', (0.5, 0.5)
  student.polyak, student.steps = 0.5, 3
  c.checkpoint.update(dict(every=1, keep=100, record_every=0))
  return c


@pytest.mark.slow
def test_averages_start_from_the_weights_that_were_loaded(clips, tmp_path):
  """A run without a learning rate leaves student and averages at the file's."""
  c = _student(clips, tmp_path / 'run')
  c.optim.update(dict(lr=0.0, lr_start=0.0, lr_end=0.0))
  video = (4, 16, 16, 3)
  (phase,) = methods.build(c.method, video, lambda _: None)
  source = _export(phase, video, tmp_path / 'source')
  c.method.latent_student.init_from = str(tmp_path / 'source')
  assert loop.train(c) == 0
  states = locks.states(c.workdir)
  assert sorted(states) == [1, 2, 3]
  for saved in states.values():
    leaves = locks.read(saved, '')
    for name, value in source.items():
      for role in ('params/encoder', 'ema/encoder', 'ema/polyak'):
        np.testing.assert_array_equal(leaves[f'{role}/{name}'], value)


@pytest.mark.parametrize(
  ('source', 'carried', 'wanted'),
  [
    ({}, {}, (1, 2)),
    ({}, {'ema/slow/w': jnp.full(3, 5.0)}, (5, 2)),
    (
      {'encoder': phase_lib.FromWeights('x')},
      {'ema/slow/w': jnp.full(3, 5.0)},
      (1, 2),
    ),
  ],
)
def test_averages_are_derived_from_the_parameters(source, carried, wanted):
  """All leaves but those that are carried; none of a role that was loaded."""
  params = {'w': jnp.full(3, 1.0, jnp.bfloat16), 'b': jnp.full(2, 2.0)}
  ema = {'slow': {'w': jnp.zeros(3), 'b': jnp.zeros(2)}}
  state = train_step.TrainState(0, {'encoder': params}, (), ema, {}, {})
  phase = _phase('one', ema=STILL, init_from=source)
  average = phase_start._averages(phase, state, carried)['slow']
  for name, value in zip('wb', wanted, strict=True):
    np.testing.assert_array_equal(average[name], value)
    assert average[name].dtype == jnp.float32
    assert average[name] is not params[name]  # both are donated


CONFIGS = {
  'salt': small_runs.tiny_config,
  'layerlock': locks.tiny,
  'pmd': test_pmd._config,
  'kdhiera': test_kdhiera.config_of,
}


@pytest.mark.slow
@pytest.mark.parametrize('name', CONFIGS)
def test_averages_of_every_method_start_from_the_weights(name, clips, tmp_path):
  c = CONFIGS[name](clips, tmp_path / 'run')
  c.optim.warmup = 0
  video = (c.data.frames, *c.data.size, 3)
  phase = methods.build(c.method, video, lambda _: None)[-1]
  source = _export(phase, video, tmp_path / 'source')
  state = _begun(
    c,
    ema={'slow': phase_lib.Ema('encoder', (0.9, 0.9))},
    init_from={'encoder': phase_lib.FromWeights(str(tmp_path / 'source'))},
  )
  for tree in (state.params['encoder'], state.ema['slow']):
    leaves = dict(trees.named_leaves(tree))
    assert leaves.keys() == source.keys()
    for name, value in source.items():
      np.testing.assert_array_equal(leaves[name], value, err_msg=name)


def _trained(clips, workdir, *plan):
  """Trains the toy; returns {step: {name: leaf}} of every state."""
  c = small_runs.tiny_config(clips, workdir)
  c.checkpoint.update(dict(every=1, keep=100, record_every=0))
  c.optim.warmup = 0
  with pytest.MonkeyPatch.context() as patch:
    phases = phase_lib.check(plan)
    patch.setattr(run_lib.methods, 'build', lambda *_: phases)
    assert loop.train(c) == 0
  return {n: locks.read(s, '') for n, s in locks.states(c.workdir).items()}


STILL = {
  'slow': phase_lib.Ema('encoder', (1.0, 1.0))
}  # keeps what it starts from
ONE = phase_lib.FromPhase('one')


@pytest.mark.slow
def test_an_average_that_a_phase_adds_starts_from_what_is_carried(
  clips, tmp_path
):
  """And one that the phase before had goes on."""
  plan = [
    toy.phase(name=name, steps=1, ema=average)
    for name, average in (('one', {}), ('two', STILL), ('three', STILL))
  ]
  states = _trained(clips, tmp_path / 'run', *plan)
  first, added, kept = (states[n] for n in (1, 2, 3))
  leaves = [n.removeprefix('ema/slow/') for n in added if n.startswith('ema/')]
  assert len(leaves) == 4
  for leaf in leaves:
    carried = first[f'params/encoder/{leaf}']
    np.testing.assert_array_equal(added[f'ema/slow/{leaf}'], carried)
    np.testing.assert_array_equal(kept[f'ema/slow/{leaf}'], carried)
    assert not np.array_equal(kept[f'params/encoder/{leaf}'], carried)


@pytest.mark.slow
def test_a_fresh_phase_has_averages_of_its_own_start(clips, tmp_path):
  """Its own first values, or those of an earlier phase that it names."""
  fresh = dict(steps=1, ema=STILL, carry=('example_memory',))
  plan = (
    toy.phase(steps=2, ema=STILL),
    toy.phase(name='two', **fresh),  # only rows could be carried: it has none
    toy.phase(name='three', **fresh, init_from={'encoder': ONE}),
  )
  states = _trained(clips, tmp_path / 'run', *plan)
  leaves = [n for n in states[3] if n.startswith('ema/')]
  assert len(leaves) == 4
  for name in leaves:
    if 'kernel' in name:
      assert not np.array_equal(states[3][name], states[2][name]), name
    end = states[2][name.replace('ema/slow', 'params/encoder')]
    np.testing.assert_array_equal(states[4][name], end)


def test_phases_start_from_earlier_ones_of_the_same_function():
  c = small_runs.tiny_config('nowhere', 'nowhere')
  first, source = _phase('first'), {'encoder': phase_lib.FromPhase('first')}
  phase_start.check_sources(c, (first, _phase('second', init_from=source)))
  for phases, message in (
    ((_phase('second', init_from=source), first), "'@first', wanted a phase"),
    ((first, _phase('second', TURNED, init_from=source)), 'rope_pairing is'),
  ):
    with pytest.raises(ValueError, match=message):
      phase_start.check_sources(c, phases)


SAME = {
  'rope_pairing': ('vjepa2', 'method.vit.rope_pairing'),
  'positions': ('sinusoid_1d', 'method.vit.positions'),
  'qkv_bias': ('qv', 'method.vit.qkv_bias'),
  'patch': ((4, 8, 8), 'method.vit.patch'),
  'num_heads': (1, 'method.latent_student.encoder.num_heads'),
  'width': (32, 'method.latent_student.encoder.width'),
  'norm_eps': (1e-12, 'method.vit.norm_eps'),
  'gelu': ('tanh', ''),
  'final_norm': (False, ''),
  'mean': ((0.0, 0.0, 0.0), 'data.mean'),
  'std': ((1.0, 1.0, 1.0), 'data.std'),
}


@pytest.mark.parametrize('field', SAME)
def test_weights_of_another_function_are_refused(clips, tmp_path, field):
  """Before anything runs: by field, both values, and the key that sets it."""
  c = _student(clips, tmp_path / 'run')
  video, (theirs, key) = (4, 16, 16, 3), SAME[field]
  (phase,) = methods.build(c.method, video, lambda _: None)
  other = phase.encoder.clone(**{field: theirs})
  source, ours = tmp_path / 'source', getattr(phase.encoder, field)
  params = _random(other, video)
  weights.export(other, params, source, video=video, layout='vssl_vit')
  c.method.latent_student.init_from = str(source)
  remedy = f'--config.{key}={theirs!r}' if key else 'no config key sets it'
  wanted = f'{field} is {theirs!r} there and {ours!r} here ({remedy})'
  with pytest.raises(ValueError, match=re.escape(wanted)) as plan_error:
    report.describe(c)
  with pytest.raises(ValueError, match=re.escape(wanted)) as train_error:
    loop.train(c)
  for error in (plan_error, train_error):
    assert '\n' not in str(error.value) and str(source) in str(error.value)
  assert not (tmp_path / 'run' / 'run.json').exists()


VIT = vit.make({'width': 16, 'depth': 1, 'num_heads': 2}, patch=(2, 8, 8))
TURNED = VIT.clone(rope_pairing='vjepa2')


def _phase(name, encoder=VIT, **fields):
  return toy.phase(name=name, steps=1, encoder=encoder, **fields)


def _turned(source):
  return phase_lib.Teacher(TURNED, source)


@pytest.mark.parametrize(
  ('second', 'message'),
  [
    (
      {'teachers': {'wise': _turned(phase_lib.FromPhase('first'))}},
      "teacher 'wise' has the parameters of @first.*rope_pairing is 'paired'",
    ),
    (
      {
        'teachers': {'wise': _turned(phase_lib.FromEma('slow'))},
        'ema': {'slow': phase_lib.Ema('encoder', (0.5, 0.5))},
      },
      "teacher 'wise' has the parameters of @ema/slow.*'vjepa2' here",
    ),
    ({'encoder': TURNED}, "'second' carries.*'first'.*its encoder differs.*vj"),
  ],
)
def test_weights_of_a_phase_go_into_the_same_function(second, message):
  """Teachers, averages and what is carried; precision and memory may differ."""
  with pytest.raises(ValueError, match=message):
    phase_lib.check((_phase('first'), _phase('second', **second)))
  alike = VIT.clone(dtype='float32', remat='full', drop_path=0.1, depth=2)
  alone = _phase('second', TURNED, carry=('opt', 'example_memory'))
  for phase in (alone, _phase('second', alike)):
    assert phase_lib.check((_phase('first'), phase))[1] is phase


def test_a_source_that_changed_is_no_teacher(tmp_path):
  video = (4, 16, 16, 3)
  params = _random(TURNED, video)
  weights.export(TURNED, params, tmp_path, video=video, layout='vssl_vit')
  loaded = encoder_lib.load_as(str(tmp_path), TURNED.clone(dtype='float32'))
  assert loaded.module.dtype == 'float32'
  with pytest.raises(ValueError, match="rope_pairing is 'vjepa2' there"):
    encoder_lib.load_as(str(tmp_path), VIT)
