"""PMD's phases, sizes and costs at full scale, and configs that are refused."""

import functools
import itertools

import jax
import numpy as np
import pytest

from tests.methods import pmd_small as small
from vssl_jax import methods, trees
from vssl_jax.methods import masked_pixels, pmd_config
from vssl_jax.methods import phase as phase_lib
from vssl_jax.models import framewise, vit

CLIP, GRID, TOKENS = (16, 224, 224, 3), (8, 14, 14), 1568
# Width and depth of encoders, width and depth of their decoders.
SIZES = {
  'S': (384, 12, 384, 2),
  'B': (768, 12, 768, 2),
  'L': (1024, 24, 512, 4),
}
COUNTS = {75: (392, 1176), 80: (320, 1248), 85: (240, 1328), 90: (160, 1408)}


def _module(source):
  size, kind = source
  if kind == 'v':
    return vit.make(size, positions='sinusoid_1d', qkv_bias='qv')
  image = vit.make(
    size, patch=(1, 16, 16), positions='sincos_2d', class_token=True
  )
  return framewise.Framewise(image, 2)


@functools.cache
def _phases(student, teacher, mvd=False):
  c = pmd_config.default()
  c.encoder.size = c.decoder.size = student
  c.image.teacher, c.video.teacher = f'{teacher}i', f'{teacher}v'
  if mvd:
    c.update(dict(mask_ratios=(0.9,), steps=(400,)))
    c.update(dict(lambda_pg=0.0, lambda_df=0.0, lambda_al=0.0))
  return methods.build(c, CLIP, _module)


def test_the_four_phases():
  phases = _phases('B', 'B')
  assert [p.name for p in phases] == [f'mask_{r}' for r in COUNTS]
  assert [p.masks[0].counts(GRID) for p in phases] == [*COUNTS.values()]
  teachers = {'image': 'Bi', 'video': 'Bv'}
  for i, phase in enumerate(phases):
    sources = {n: str(t.source) for n, t in phase.teachers.items()}
    before = {'previous': f'@{phases[i - 1].name}'} if i else {}
    assert sources == teachers | before
    assert phase.carry == (('params', 'opt') if i else ())
    assert phase.horizon == 'run' and phase.warmup is None
    assert {t.dtype for t in phase.teachers.values()} == {'bfloat16'}
    assert len(phase.masks) == 1
    seen = phases[i - 1].masks if i else ()
    assert phase.previous_masks == seen
    if i:  # the whole student, but for its alignment
      guide = phase.teachers['previous']
      assert guide.subtree == '' and set(guide.module.decoder) == set(teachers)
    for spec in phase.memory_specs.values():
      assert (spec.shape, spec.dtype, spec.window) == ((1568,), 'float32', 7500)
      assert spec.fill == 0
    assert set(phase.memory_specs) == set(phase.align) == set(teachers)


def test_the_first_mask_hides_what_every_other_hides():
  """Invariant 8: by one order of the positions at every ratio."""
  phases = small.build()
  masks = [small.masks(p.masks)[0] for p in phases]
  for early, late in itertools.pairwise(masks):
    for b in range(3):
      more, less = set(early.visible[b]), set(late.visible[b])
      assert less < more
      assert set(late.masked[b]) == set(range(small.TOKENS)) - less
  assert [m.visible.shape[1] for m in masks] == [18, 16, 12, 8]
  for phase, before in zip(phases[1:], masks, strict=False):
    (drawn,) = small.masks(phase.previous_masks)
    np.testing.assert_array_equal(drawn.visible, before.visible)
  (same,) = small.build(previous_mask='same')[1:2]
  assert same.previous_masks == same.masks


def test_knobs_of_the_plan():
  changed = small.build
  _, second, third, _ = changed(opt='fresh', example_memory='carry')
  for phase in (second, third):
    assert phase.carry == ('params', 'example_memory')
    assert phase.horizon == 'phase'
  specs = changed(memory_dtype='float16', memory_shape='tube', window=7)
  found = specs[0].memory_specs['image']
  assert (found.dtype, found.shape, found.window) == ('float16', (36,), 7)
  many = changed(masks='random', masks_per_clip=2)[1]
  assert [s.name for s in many.masks] == ['random_1', 'random_2']
  assert [s.name for s in many.previous_masks] == ['random_1', 'random_2']
  # MVD rounds what is masked down: 1,411.2 of 1,568.
  last = changed(masks='random')[-1].masks[0]
  assert last.counts(GRID) == (157, 1411)
  half = changed(mask_ratios=(0.5, 0.625), steps=(3, 5))
  assert [(p.name, p.steps) for p in half] == [('mask_50', 3), ('mask_62.5', 5)]
  assert changed(previous_dtype='bfloat16')[1].teachers['previous'].dtype == (
    'bfloat16'
  )
  (only,) = changed(**small.MVD)
  assert set(only.teachers) == {'image', 'video'} and not only.align
  assert not only.memory_specs and not only.previous_masks
  assert (only.name, only.carry) == ('mask_90', ())


def test_teachers_from_nothing():
  own = dict(
    image=dict(teacher='@image_teacher'), video=dict(teacher='@video_teacher')
  )
  image, video, *rest = small.build(**own)
  assert (image.name, video.name) == ('image_teacher', 'video_teacher')
  assert image.masks[0].counts(GRID) == (8 * 49, 8 * 147)
  assert video.masks[0].counts(GRID) == COUNTS[90]
  for phase in (image, video):
    assert isinstance(phase, masked_pixels.PixelPhase)
    assert phase.pixel_loss == 'mse' and phase.carry == ()
    assert not phase.teachers and not phase.memory_specs
    assert phase.horizon == 'phase' and phase.steps == 3
  # MAE on the first frame of every tubelet; VideoMAE.
  assert image.encoder.every == 2 and image.encoder.image.patch == (1, 4, 4)
  assert (image.pixel_norm, video.pixel_norm) == ('patch', 'patch_channel')
  assert image.encoder.image.positions == 'sincos_2d'
  assert video.encoder.positions == 'sinusoid_1d'
  assert rest[0].carry == () and len(rest) == 4
  for phase in rest:
    for name in ('image', 'video'):
      source = phase_lib.FromPhase(f'{name}_teacher')
      assert phase.teachers[name].source == source
    assert phase.teachers['video'].module.width == video.encoder.width
  default = pmd_config.default().image_teacher.decoder
  assert dict(default) == dict(width=512, depth=8, num_heads=16)


@pytest.mark.parametrize(
  ('student', 'teacher', 'decoder', 'total', 'maps'),
  [
    ('S', 'B', 3_992_832, 29_865_600, 4_730_880),
    ('B', 'B', 15_357_696, 116_942_592, 9_449_472),
    ('B', 'L', 15_554_560, 117_336_320, None),
    ('L', 'L', 13_659_136, 331_179_008, 33_587_200),
  ],
)
def test_numbers_of_parameters(student, teacher, decoder, total, maps):
  phase = _phases(student, teacher)[-1]
  clip = np.zeros((1, *CLIP), np.uint8)
  shapes = jax.eval_shape(lambda: phase.init(small.KEY, clip))
  count = {role: trees.count(tree) for role, tree in shapes.items()}
  aligned = count.pop('align_image') + count.pop('align_video')
  assert count['decoder_image'] == count['decoder_video'] == decoder
  assert sum(count.values()) == total
  # Two thirds of the student's layers for each of two teachers.
  width, depth, *_ = SIZES[student]
  out = SIZES[teacher][0]
  assert aligned == 2 * (2 * depth // 3) * (width * out + out)
  assert maps in (None, aligned)
  names = set(shapes['align_image'])
  assert names == {f'layer_{n:02d}' for n in range(1, 2 * depth // 3 + 1)}


# TFLOP per clip and step of the method's page: MVD at 90 %, then PMD.
TABLE = {
  'SB': (0.784, 0.832, 0.874, 0.855, 0.837),
  'BB': (1.102, 1.256, 1.394, 1.329, 1.265),
  'BL': (2.642,),
  'LL': (2.853, 3.390, 3.561, 3.334, 3.112),
}
# Dense forward of the teachers: clips, and 8 frames with a class token.
GMACS = {'B': 180.34 + 140.5, 'L': 596.83 + 492.4}


def _blocks(tokens, width, depth):
  """Returns multiply-adds of blocks whose MLP is four times as wide."""
  return depth * (12 * tokens * width**2 + 2 * tokens**2 * width)


def _student(size, teacher, visible, masked, embedded):
  """Returns multiply-adds of a student's forward pass."""
  width, depth, inside, blocks = SIZES[size]
  ends = visible * width + masked * SIZES[teacher][0]
  decoder = ends * inside + _blocks(TOKENS, inside, blocks)
  encoder = embedded * 1536 * width + _blocks(visible, width, depth)
  return encoder + 2 * decoder


def _costs(student, teacher, ratio, guide):
  """Returns TFLOP by the page's count, and by ours.

  The page embeds all patches, of which an encoder keeps the visible ones, and
  has the guide see what the student sees; ours embeds what is seen, and the
  guide sees what it saw in its own phase. Neither needs gradients of pixels.
  """
  visible, masked = COUNTS[ratio]
  width, depth, *_ = SIZES[student]
  maps = 2 * (2 * depth // 3) * visible * width * SIZES[teacher][0]
  teachers = GMACS[teacher] * 1e9
  found = []
  for embedded, seen in ((TOKENS, ratio), (visible, ratio - 5)):
    total = 3 * _student(student, teacher, visible, masked, embedded)
    total += teachers - embedded * 1536 * width
    if guide:
      saw = COUNTS[seen][0]
      at = TOKENS if embedded == TOKENS else saw
      total += _student(student, teacher, saw, masked, at)
    if guide is not None:
      total += 3 * maps
    found.append(2 * total / 1e12)
  return found


@pytest.mark.parametrize('sizes', TABLE)
def test_table_of_costs(sizes):
  student, teacher = sizes
  mvd, *row = TABLE[sizes]
  (only,) = _phases(student, teacher, mvd=True)
  costs = [only.cost(CLIP)]
  wanted = [(mvd, _costs(student, teacher, 90, None))]
  if row:
    costs += [phase.cost(CLIP) for phase in _phases(student, teacher)]
    wanted += [
      (cell, _costs(student, teacher, ratio, ratio > 75))
      for cell, ratio in zip(row, COUNTS, strict=True)
    ]
  for cost, (cell, (page, ours)) in zip(costs, wanted, strict=True):
    assert page == pytest.approx(cell, abs=1.1e-3)
    assert cost.total / 1e12 == pytest.approx(ours, rel=1e-4)
    assert cost.total / 1e12 == pytest.approx(cell, rel=0.015)


def test_what_is_frozen_is_the_teachers_and_the_guide():
  first, second, *_ = _phases('B', 'B')
  teachers = first.cost(CLIP).frozen
  assert teachers == pytest.approx(2e9 * GMACS['B'], rel=1e-4)
  guide = 2 * _student('B', 'B', 392, 1248, 392)
  assert second.cost(CLIP).frozen - teachers == pytest.approx(guide)


@pytest.mark.parametrize(
  ('knobs', 'message'),
  [
    (dict(image=dict(teacher='')), "method.image.teacher: found ''; .*random"),
    (
      dict(image=dict(teacher='@mask_75')),
      "method.image.teacher: found '@mask_75'; .*@image_teacher to train",
    ),
    (dict(video=dict(teacher='@image_teacher')), 'method.video.teacher'),
    (dict(mask_ratios=(0.8, 0.75), steps=(4, 4)), 'in rising order'),
    (dict(mask_ratios=(0.8, 0.8), steps=(4, 4)), 'none of them twice'),
    (dict(steps=(4, 4)), 'as many numbers of steps'),
    (dict(steps=(4, 4, 0, 4)), r'method.steps: found \(4, 4, 0, 4\)'),
    (dict(mask_ratios=(), steps=()), 'method.phases is empty'),
    (dict(teachers=()), r'method.teachers: found \(\)'),
    (dict(teachers=('image', 'sound')), 'method.teachers: found .*sound'),
    (dict(masks_per_clip=0), 'masks_per_clip: found 0, wanted an integer'),
    (dict(window=0), 'window: found 0, wanted an integer'),
    (dict(mask_ratios=(0.01, 0.75), steps=(4, 4)), 'leaves 36 of 36 positions'),
    (dict(encoder=dict(depth=2)), '3 blocks or more, found 2'),
    (dict(decoder=dict(size='XL')), "method.decoder.size: found 'XL'"),
    *(
      ({knob: 'x'}, f"method.{knob}: found 'x', wanted one of")
      for knob in (
        'masks', 'feature_loss', 'target_norm', 'dare', 'pg_positions',
        'previous_mask', 'align_norm', 'memory_shape', 'memory_frame',
        'memory_dtype', 'example_memory', 'opt',
      )
    ),
  ],
)  # fmt: skip
def test_bad_configs_are_refused_by_name(knobs, message):
  with pytest.raises(ValueError, match=message):
    small.shapes(small.build(**knobs)[-1])
