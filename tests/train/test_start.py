"""How a phase starts: weights from outside, carried ones, and averages."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.train import conftest, locks, test_kdhiera, test_pmd, toy
from vssl_jax import methods, trees, weights
from vssl_jax.methods import base
from vssl_jax.train import ahead, begin, trainer
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
      span = run_lib.spans(run.method)[-1]
      span = dataclasses.replace(
        span, phase=dataclasses.replace(span.phase, **fields)
      )
      shapes = ahead.outline(config, run.method, span, run.video, 40)
      return begin.state(run, shapes, None, False)
  finally:
    run.clips.close()
    run.logger.close()


def _student(clips, workdir):
  c = conftest.tiny_config(clips, workdir)
  c.method.phases = ('latent_student',)
  student = c.method.latent_student
  student.teacher, student.ema = '@ema/encoder', (0.5, 0.5)
  student.polyak, student.steps = 0.5, 3
  c.checkpoint.update(dict(every=1, keep=100, probe_every=0))
  return c


def test_averages_start_from_the_weights_that_were_loaded(clips, tmp_path):
  """A run without a learning rate leaves student and averages at the file's."""
  c = _student(clips, tmp_path / 'run')
  c.optim.update(dict(lr=0.0, lr_start=0.0, lr_end=0.0))
  video = (4, 16, 16, 3)
  (phase,) = methods.build(c.method, video, lambda _: None).phases()
  source = _export(phase, video, tmp_path / 'source')
  c.method.latent_student.init_from = str(tmp_path / 'source')
  assert trainer.train(c) == 0
  states = locks.states(c.workdir)
  assert sorted(states) == [1, 2, 3]
  for saved in states.values():
    leaves = locks.read(saved, '')
    for name, value in source.items():
      for role in ('params/encoder', 'ema/encoder', 'ema/polyak'):
        np.testing.assert_array_equal(leaves[f'{role}/{name}'], value)


CONFIGS = {
  'salt': conftest.tiny_config,
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
  phase = methods.build(c.method, video, lambda _: None).phases()[-1]
  source = _export(phase, video, tmp_path / 'source')
  state = _begun(
    c,
    ema={'slow': base.Ema('encoder', (0.9, 0.9))},
    init_from={'encoder': str(tmp_path / 'source')},
  )
  for tree in (state.params['encoder'], state.ema['slow']):
    leaves = dict(trees.named_leaves(tree))
    assert leaves.keys() == source.keys()
    for name, value in source.items():
      np.testing.assert_array_equal(leaves[name], value, err_msg=name)


def _trained(clips, workdir, *plan):
  """Trains the toy; returns {step: {name: leaf}} of every state."""
  c = conftest.tiny_config(clips, workdir)
  c.checkpoint.update(dict(every=1, keep=100, probe_every=0))
  c.optim.warmup = 0
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_lib.methods, 'build', lambda *_: toy.Toy(plan))
    assert trainer.train(c) == 0
  return {n: locks.read(s, '') for n, s in locks.states(c.workdir).items()}


STILL = {'slow': base.Ema('encoder', (1.0, 1.0))}  # keeps what it starts from


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
  """Only rows could be carried into it, and it has none."""
  fresh = toy.phase(name='two', steps=1, ema=STILL, init='fresh', opt='fresh')
  before = toy.phase(steps=2, ema=STILL)
  states = _trained(clips, tmp_path / 'run', before, fresh)
  kernels = [n for n in states[3] if n.startswith('ema/') and 'kernel' in n]
  assert len(kernels) == 2
  for name in kernels:
    assert not np.array_equal(states[3][name], states[2][name]), name
