"""Closed-form FLOPs against published numbers and the compiler's count."""

import jax
import jax.numpy as jnp
import pytest

from vssl_jax import flops
from vssl_jax.masks import sampling
from vssl_jax.models import decoder, framewise, predictor, vit
from vssl_jax.models.hiera import decoder as hiera_decoder
from vssl_jax.models.hiera import encoder as encoder_lib

GRID = (8, 14, 14)  # 16 x 224 x 224 in tubelets of 2 x 16 x 16
SHORT_LONG = ((320, 656), (80, 1096))


@pytest.mark.parametrize(
  ('size', 'gmacs'),
  [
    ('Ti', 20.12),
    ('S', 56.88),
    ('M', 90.63),
    ('B', 180.34),
    ('L', 596.83),
    ('H', 1190.99),
    ('g', 1862.84),
    ('G', 3282.27),
    ('e', 6459.52),
  ],
)
def test_dense_encoders(size, gmacs):
  found = flops.forward(vit.make(size), GRID) / 2e9
  assert found == pytest.approx(gmacs, abs=0.006)


# Frames 0, 2, ..., 14 of 224 x 224 with a class token: 197 tokens each.
@pytest.mark.parametrize(
  ('size', 'gmacs'), [('S', 36.8), ('B', 140.5), ('L', 492.4)]
)
def test_image_encoders_on_frames(size, gmacs):
  image = vit.make(
    size, patch=(1, 16, 16), positions='sincos_2d', class_token=True
  )
  module = framewise.Framewise(image)
  found = flops.forward(module, GRID) / 2e9
  assert found == pytest.approx(gmacs, abs=0.06)
  # Blocks are counted, the visible tokens are shared by the frames, and what
  # a backward pass costs is eight times that of a frame.
  half = flops.forward(module, GRID, depth=image.depth // 2) / 2e9
  assert gmacs / 2 < half < 0.51 * gmacs
  seen = flops.forward(module, GRID, 392)
  assert seen == 8 * flops.forward(image, (1, 14, 14), 49)
  trained = flops.train(module, GRID, 392, frozen=2)
  assert trained == 8 * flops.train(image, (1, 14, 14), 49, frozen=2)
  kept = flops.activations(module, 392)
  assert kept == flops.activations(image, 392)


def test_a_decoder_on_frames():
  inner = decoder.VideoMaeDecoder(768, **decoder.SIZES['B'])
  module = framewise.FramewiseDecoder(inner)
  found = flops.train(module, GRID, (392, 1176), 768)
  assert found == 8 * flops.train(inner, (1, 14, 14), (49, 147), 768)
  assert flops.activations(module, 1568) == flops.activations(inner, 1568)


# Paper, arXiv 2306.00989: B 102, B+ 133, L 413, H 1159; the others by its
# code. With two poolings all tokens, and then 39, 40, 80 and 104 units.
HIERA = {
  'T': (50.85, 71.79, 6.41, 6.55, 12.43, 16.15),
  'S': (69.51, 90.44, 7.59, 7.76, 15.01, 19.62),
  'B': (101.73, 134.53, 10.79, 11.05, 21.86, 28.74),
  'B+': (132.30, 175.02, 14.38, 14.73, 29.19, 38.33),
  'L': (412.13, 502.54, 40.52, 41.55, 84.04, 110.76),
  'H': (1157.80, 1415.63, 123.99, 127.16, 255.99, 335.45),
}


@pytest.mark.parametrize('size', HIERA)
def test_hiera(size):
  three, two = (encoder_lib.make(size, q_pool=n) for n in (3, 2))
  found = [flops.forward(three, (8, 7, 7)), flops.forward(two, GRID)]
  # The published code runs the convolution over hidden units too.
  conv = 2 * 8 * 56 * 56 * 3 * 7 * 7 * 3 * two.channels
  found += [
    flops.forward(two, GRID, 4 * n) + conv * (392 - n) / 392
    for n in (39, 40, 80, 104)
  ]
  for one, gmacs in zip(found, HIERA[size], strict=True):
    assert one / 2e9 == pytest.approx(gmacs, abs=0.006)


@pytest.mark.parametrize(('size', 'tflop'), [('B', 0.428), ('L', 0.609)])
def test_hiera_mae_step(size, tflop):
  encoder, head = encoder_lib.make(size), hiera_decoder.Decoder(768)
  found = flops.train(encoder, GRID, 4 * 39)
  found += flops.train(head, GRID, (4 * 39, 4 * 353), encoder.width)
  # The published figure has the convolution over hidden units too, and the
  # gradient of all pixels, which nobody needs.
  conv = 2 * 8 * 56 * 56 * 3 * 7 * 7 * 3 * encoder.channels
  conv *= 3 - 2 * 39 / 392
  assert (found + conv) / 1e12 == pytest.approx(tflop, rel=2e-3)


def test_hiera_in_part():
  encoder = encoder_lib.make('T')
  whole = flops.forward(encoder, GRID)
  parts = [flops.forward(encoder, GRID, depth=n) for n in range(13)]
  assert parts == sorted(parts)
  assert parts[-1] == whole
  conv = parts[0]
  assert flops.train(encoder, GRID) == 3 * whole - conv
  frozen = flops.train(encoder, GRID, frozen=4)
  assert frozen == pytest.approx(3 * whole - 2 * parts[4])
  # Units are independent until the third stage; their cost is their share.
  few = flops.forward(encoder, GRID, 4 * 49, depth=3)
  assert few == pytest.approx(parts[3] / 8)
  with pytest.raises(ValueError, match='multiple of the 4'):
    flops.forward(encoder, GRID, 39)
  kept = [
    flops.activations(encoder.clone(remat=r), 156)
    for r in ('none', 'dots', 'full')
  ]
  assert kept == sorted(kept, reverse=True)
  assert flops.activations(encoder, 312) == 2 * kept[0]


def both_masks(encoder, head):
  return sum(
    flops.train(encoder, GRID, visible)
    + flops.train(head, GRID, (visible, masked), encoder.width)
    for visible, masked in SHORT_LONG
  )


@pytest.mark.parametrize(
  ('student', 'teacher', 'tflop'),
  [('B', 'B', 0.986), ('L', 'L', 2.361), ('L', 'B', 1.527)],
)
def test_salt_step(student, teacher, tflop):
  student, teacher = vit.make(student), vit.make(teacher)
  head = predictor.Predictor(teacher.width)
  found = both_masks(student, head) + flops.forward(teacher, GRID)
  assert found / 1e12 == pytest.approx(tflop, abs=6e-4)


@pytest.mark.parametrize(('size', 'tflop'), [('B', 0.628), ('L', 1.170)])
def test_pixel_teacher_step(size, tflop):
  found = both_masks(vit.make(size), predictor.Predictor(1536))
  assert found / 1e12 == pytest.approx(tflop, abs=6e-4)


@pytest.mark.parametrize(('size', 'tflop'), [('B', 0.209), ('L', 0.851)])
def test_videomae_step(size, tflop):
  encoder = vit.make(size)
  head = decoder.VideoMaeDecoder(1536, **decoder.SIZES[size])
  found = flops.train(encoder, GRID, 160)
  found += flops.train(head, GRID, (160, 1408), encoder.width)
  # The published code embeds hidden patches too, forward and backward.
  hidden = 2 * flops.embedding(encoder, 1408)
  assert (found + hidden) / 1e12 == pytest.approx(tflop, abs=6e-4)
  assert 0.02 * hidden < hidden < 0.04 * found  # what we save


def compiled(function, *args):
  return jax.jit(function).lower(*args).compile().cost_analysis()['flops']


def test_encoder_agrees_with_the_compiler():
  encoder = vit.make(
    {'width': 1024, 'depth': 2, 'num_heads': 4, 'patch': (2, 16, 16)},
    dtype='float32',
  )
  video = jax.ShapeDtypeStruct((1, 8, 112, 112, 3), jnp.uint8)
  params = jax.eval_shape(encoder.init, jax.random.key(0), video)
  visible = jax.ShapeDtypeStruct((1, 100), jnp.int32)
  for index, count in ((None, 196), (visible, 100)):
    found = compiled(encoder.apply, params, video, index)
    wanted = flops.forward(encoder, (4, 7, 7), count)
    assert found == pytest.approx(wanted, rel=0.02)
    assert found > wanted


@pytest.mark.slow
@pytest.mark.parametrize('q_pool', [2, 3])
def test_hiera_agrees_with_the_compiler(q_pool):
  encoder = encoder_lib.make(
    {'channels': 128, 'depths': (1, 1, 2, 1), 'num_heads': 1},
    dtype='float32',
    q_pool=q_pool,
  )
  video = jax.ShapeDtypeStruct((1, 8, 64, 64, 3), jnp.uint8)
  params = jax.eval_shape(encoder.init, jax.random.key(0), video)
  units = jax.ShapeDtypeStruct((1, 10), jnp.int32)
  left = 4 ** (3 - q_pool)
  grid = {2: (4, 4, 4), 3: (4, 2, 2)}[q_pool]
  for index, count in ((None, None), (units, 10 * left)):
    found = compiled(encoder.apply, params, video, index)
    wanted = flops.forward(encoder, grid, count)
    assert found == pytest.approx(wanted, rel=0.04)


@pytest.mark.parametrize('kind', ['predictor', 'videomae'])
def test_heads_agree_with_the_compiler(kind):
  fields = {'out_width': 600, 'width': 1024, 'depth': 2, 'num_heads': 4}
  cls = {
    'predictor': predictor.Predictor, 'videomae': decoder.VideoMaeDecoder,
  }[kind]  # fmt: skip
  head = cls(**fields, dtype='float32')
  z = jax.ShapeDtypeStruct((1, 60, 700), jnp.float32)
  mask = sampling.Mask(
    jax.ShapeDtypeStruct((1, 60), jnp.int32),
    jax.ShapeDtypeStruct((1, 90), jnp.int32),
  )

  def init(z, mask):
    return head.init(jax.random.key(0), z, mask, (4, 7, 7))

  params = jax.eval_shape(init, z, mask)
  found = compiled(
    lambda p, z, mask: head.apply(p, z, mask, (4, 7, 7)), params, z, mask
  )
  wanted = flops.forward(head, (4, 7, 7), (60, 90), in_width=700)
  assert found == pytest.approx(wanted, rel=0.02)
  assert found > wanted


def test_what_has_no_count_says_so():
  with pytest.raises(TypeError, match='in_width=None'):
    flops.forward(predictor.Predictor(8), GRID, (3, 4))
  with pytest.raises(TypeError, match='FlopsUnknown'):
    flops.forward(type('FlopsUnknown', (), {})(), GRID)


PARAMETERS = {'L': 0.303e9, 'H': 0.632e9, 'g': 1.012e9, 'G': 1.843e9}


def salt_rule(teacher_steps, student_steps, student='L'):
  """Parameters and tokens as the SALT paper counts them, in 1e21."""
  step = 3072 * 1568
  encoder, head = 0.1 * 2 * step, 2 * step
  small = 0.022e9
  teacher = teacher_steps * flops.rule_of_six(
    [(PARAMETERS['L'], encoder), (small, head)]
  )
  latent = student_steps * flops.rule_of_six(
    [(PARAMETERS[student], encoder), (small, head)], [(PARAMETERS['L'], step)]
  )
  return teacher / 1e21, latent / 1e21


@pytest.mark.parametrize(
  ('teacher_steps', 'student_steps', 'wanted'),
  [
    (80e3, 160e3, (0.242, 0.951, 1.193)),
    (40e3, 200e3, (0.121, 1.188, 1.309)),
    (20e3, 220e3, (0.060, 1.307, 1.368)),
    (80e3, 80e3, (0.242, 0.475, 0.717)),
    (40e3, 120e3, (0.121, 0.713, 0.834)),
    (80e3, 40e3, (0.242, 0.238, 0.480)),
  ],
)
def test_the_papers_rule_for_compute_splits(
  teacher_steps, student_steps, wanted
):
  teacher, student = salt_rule(teacher_steps, student_steps)
  found = (teacher, student, teacher + student)
  assert found == pytest.approx(wanted, abs=0.002)


@pytest.mark.parametrize(
  ('student', 'total'), [('L', 1.193), ('H', 1.497), ('g', 1.848), ('G', 2.617)]
)
def test_the_papers_rule_for_student_sizes(student, total):
  assert sum(salt_rule(80e3, 160e3, student)) == pytest.approx(total, abs=0.002)
