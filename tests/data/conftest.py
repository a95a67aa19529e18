"""Videos that tests make for themselves: every frame says which one it is."""

import fractions

import av
import numpy as np
import pytest

STEP = 4  # grey levels between frames


def number_of(pixels):
  """The number of the frame that these pixels come from."""
  return np.round((np.mean(pixels, axis=(-3, -2, -1)) - 20) / STEP).astype(int)


def _grey(number, height, width):
  return np.full((height, width, 3), 20 + STEP * number, np.uint8)


@pytest.fixture(scope='session')
def film():
  """film(path, frames=..): writes a video and returns its path as text."""

  def write(
    path,
    frames=48,
    *,
    height=48,
    width=64,
    rate=25,
    gop=12,
    codec='libx264',
    picture=_grey,
    pix_fmt='yuv420p',
    times=None,
    b_frames=0,
    rotation=0,
    mirror=False,
    audio=False,
    options=None,
  ):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), 'w', options=options or {}) as container:
      stream = container.add_stream(codec, rate=rate)
      stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
      stream.codec_context.gop_size = gop
      stream.bit_rate = 8_000_000
      stream.codec_context.qmax = 2
      if codec == 'libx264':
        stream.codec_context.max_b_frames = b_frames
        stream.options = {
          'qp': '0',
          'sc_threshold': '0',
          'preset': 'ultrafast',
        }
        if b_frames:
          stream.options |= {'preset': 'medium', 'b-adapt': '0'}
      if times is not None:
        stream.codec_context.time_base = fractions.Fraction(1, 1000)
      if rotation or mirror:
        stream.set_display_rotation(rotation, hflip=mirror)
      sound = container.add_stream('aac', rate=16000) if audio else None
      for number in range(frames):
        frame = av.VideoFrame.from_ndarray(picture(number, height, width))
        if times is not None:
          frame.pts = round(1000 * times[number])
          frame.time_base = fractions.Fraction(1, 1000)
        container.mux(stream.encode(frame))
      container.mux(stream.encode())
      if sound:
        silence = av.AudioFrame.from_ndarray(
          np.zeros((1, 16000), np.float32), 'fltp', 'mono'
        )
        silence.sample_rate, silence.pts = 16000, 0
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
    return str(path)

  return write


@pytest.fixture(scope='session')
def numbered():
  """The function that says which frame pixels come from."""
  return number_of


@pytest.fixture(scope='session')
def clips_folder(tmp_path_factory, film):
  """Ten videos in two class folders."""
  root = tmp_path_factory.mktemp('clips')
  for number in range(10):
    film(
      root / ('left', 'right')[number % 2] / f'{number}.mp4',
      frames=20 + number,
      height=32,
      width=40,
      picture=lambda k, h, w, n=number: np.full((h, w, 3), 9 * n + k, np.uint8),
    )
  return str(root)


@pytest.fixture
def data_config(clips_folder):
  """`config.data` for small clips of `clips_folder`, read in this process."""
  from vssl_jax.data import pipeline

  config = pipeline.default()
  config.source = clips_folder
  config.frames, config.stride, config.size = 4, 2, (16, 16)
  config.isolate = False
  config.decode_processes = 2
  return config
