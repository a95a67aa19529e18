"""Pages that pre-train hold the published values, see `recipes.py`."""

import math

import pytest

from tests import recipes
from vssl_jax import config as config_lib
from vssl_jax import methods
from vssl_jax.data import options
from vssl_jax.masks import tubelets
from vssl_jax.models import framewise, vit
from vssl_jax.train import optimizer
from vssl_jax.train import run as run_lib


@pytest.mark.parametrize('spec', recipes.RECIPES)
def test_a_page_holds_the_published_values(spec):
  resolved = _resolved(spec)
  found = {key: _look(resolved, key) for key in recipes.RECIPES[spec]}
  differing = {
    key: (_plain(found[key], wanted), wanted)
    for key, wanted in recipes.RECIPES[spec].items()
    if not _same(found[key], wanted)
  }
  assert differing.keys() == recipes.OTHERWISE.get(spec, set()), differing


SECOND = [f'salt.py:{size}' for size in 'BLHgG']
SECOND += ['salt_single_gpu.py', 'vjepa2.py:H', 'videomae_k400.py:S', 'demo.py']


@pytest.mark.parametrize('spec', SECOND)
def test_a_second_student_follows_the_variant(spec):
  """As wide, as deep and as long as the first, which the page describes."""
  name, c = config_lib.load(f'configs/{spec}')
  first = 'latent_student'
  if 'videomae' in name:
    first = 'pixel_teacher'  # the page has no student of its own
    c.method.latent_student.teacher = '@pixel_teacher'
  c.method.phases = tuple(dict.fromkeys((first, 'latent_student')))
  c.method.phases += ('latent_student_2',)
  if name not in ('vjepa2-H', 'videomae_k400-S'):
    c.method.phases = ('pixel_teacher', *c.method.phases)
  phases = methods.build(c.method, options.spec(c.data).shape, _outside)
  *_, first, second = phases
  assert second.name == 'latent_student_2'
  assert second.encoder == first.encoder
  assert second.steps == first.steps
  predictors = [p.predictor.clone(out_width=1) for p in (first, second)]
  assert predictors[0] == predictors[1]


@pytest.mark.parametrize('size', 'SBL')
def test_teachers_of_a_distillation_follow_the_variant(size):
  """Where a run trains them itself, as those from outside would be."""
  _, c = config_lib.load(f'configs/mvd_k400.py:{size}')
  c.method.image.teacher = '@image_teacher'
  c.method.video.teacher = '@video_teacher'
  phases = methods.build(c.method, options.spec(c.data).shape, _outside)
  teachers = {p.name: p for p in phases[:2]}
  steps = phases[2].steps
  for phase in teachers.values():
    assert _shape(phase) == recipes.VIT['L' if size == 'L' else 'B']
    assert phase.steps == steps


@pytest.mark.parametrize(
  ('page', 'over_mae'),
  [
    ('layerlock_2b.py:L', 1.337),
    ('layerlock_2b.py:G', 1.54),
    ('layerlock_4b.py', 1.578),
    ('layerlock_single_gpu.py', None),
  ],
)
def test_an_mae_of_as_many_flops(page, over_mae):
  """By the method's notes 54 % more than an MAE of as many steps for G."""
  joint = '-' if ':' in page else ':'
  locks, mae, flops = (
    _flops(page + knob) for knob in ('', f'{joint}mae', f'{joint}mae-flops')
  )
  assert flops == pytest.approx(locks, rel=2e-5)
  if over_mae:
    assert locks / mae == pytest.approx(over_mae, abs=5e-3)


def _built(spec):
  _, c = config_lib.load(f'configs/{spec}')
  clip = options.spec(c.data).shape
  return (
    c,
    clip,
    methods.build(c.method, clip, _outside, options.colours_of(c.data)),
  )


def _outside(source):
  size, *image = recipes.OUTSIDE[source]
  if not image:
    return vit.make(size, positions='sinusoid_1d', qkv_bias='qv')
  patch, positions = image
  fields = dict(patch=(1, patch, patch), class_token=True)
  return framewise.Framewise(vit.make(size, positions=positions, **fields))


def _flops(spec):
  _, clip, phases = _built(spec)
  return sum(p.steps * p.cost(clip).total for p in phases)


def _resolved(spec):
  """Returns the config's sections, and by phase what is made of them."""
  c, clip, built = _built(spec)
  spans = run_lib.spans(built)
  phases = {span.phase.name: span.phase for span in spans}
  out = {key: c[key] for key in c} | {'phases': phases, 'count': len(spans)}
  out['ends'] = {span.phase.name: span.end for span in spans}
  out['steps'] = {name: phase.steps for name, phase in phases.items()}
  out['teachers'] = {
    name: {of: str(teacher.source) for of, teacher in phase.teachers.items()}
    for name, phase in phases.items()
  }
  out['masks'] = {
    name: {mask.name: mask.counts(_grid(phase, clip)) for mask in phase.masks}
    for name, phase in phases.items()
  }
  out['shapes'] = {name: _shape(phase) for name, phase in phases.items()}
  horizons = {
    span.phase.name: optimizer.horizon(span.phase, span.start, span.covers)
    for span in spans
  }
  out['lr'] = {
    name: _from(over, optimizer.learning_rate(c.optim, over, c.batch_size))
    for name, over in horizons.items()
  }
  out['wd'] = {
    name: _from(over, optimizer.weight_decay(c.optim, over))
    for name, over in horizons.items()
  }
  return out


def _from(over, schedule):
  """Counts a schedule's steps from where it begins."""
  return lambda step: float(schedule(over.start + step))


def _grid(phase, clip):
  if hasattr(phase.encoder, 'unit_grid'):
    return phase.encoder.unit_grid((1, *clip))
  return tubelets.grid_of((1, *clip), phase.encoder.patch)


def _shape(phase):
  encoder = getattr(phase.encoder, 'image', phase.encoder)
  if hasattr(encoder, 'unit_grid'):
    return encoder.channels, encoder.depths, encoder.num_heads
  return encoder.width, encoder.depth, encoder.num_heads


def _look(found, key):
  for part in key.split('.'):
    if isinstance(found, tuple):
      found = found[int(part)]
    else:
      found = found[part] if hasattr(found, 'keys') else getattr(found, part)
  return found


def _plain(found, wanted):
  return {x: found(x) for x in wanted} if callable(found) else found


def _same(found, wanted):
  found = _plain(found, wanted)
  if isinstance(wanted, dict):
    return {*found} == {*wanted} and all(
      _same(found[key], wanted[key]) for key in wanted
    )
  if isinstance(wanted, tuple):
    return len(found) == len(wanted) and all(map(_same, found, wanted))
  if isinstance(wanted, float):
    return math.isclose(found, wanted, rel_tol=2e-4, abs_tol=1e-12)
  return found == wanted
