"""Evaluations take the clips that the encoder was trained on."""

import json

import jax
import numpy as np
import pytest

from tests.evals import finetune_small as small
from vssl_jax import config as config_lib
from vssl_jax import encoder, main, weights
from vssl_jax.evals import clips, feature_memory
from vssl_jax.evals.finetune import setup as finetune_setup
from vssl_jax.evals.probe import setup as evals_setup
from vssl_jax.planning import evaluations

CLIP = encoder.Clip((8, 64, 96, 3), 2)
OPEN = ('frames', 'stride', 'fps', 'size', 'channels')


def keys(job='probe', clip=CLIP, **given):
  c = config_lib.evaluation(job)
  c.data.update(given)
  data = clips.follow(c, clip).data
  return tuple(data[name] for name in OPEN)


@pytest.mark.parametrize('job', ['probe', 'depth', 'finetune'])
def test_open_keys_are_the_encoders(job):
  assert keys(job) == (8, 2, 0.0, (64, 96), 3)
  second = encoder.Clip((16, 32, 32, 1), 1, 4.0)
  assert keys(job, second) == (16, 1, 4.0, (32, 32), 1)


def test_keys_that_are_set_stay():
  assert keys(frames=4, size=(32, 32)) == (4, 2, 0.0, (32, 32), 3)
  assert keys(stride=3) == (8, 3, 0.0, (64, 96), 3)
  # A rate replaces the stride, and a stride the rate.
  assert keys(fps=5.0) == (8, 1, 5.0, (64, 96), 3)
  rate = encoder.Clip((16, 32, 32, 3), 1, 4.0)
  assert keys(clip=rate, stride=2)[1:3] == (2, 0.0)


@pytest.mark.parametrize(
  ('clip', 'given', 'message'),
  [
    (encoder.Clip((8, 64, 96, 3)), {}, r'wanted --config\.data\.stride'),
    (CLIP, {'channels': 1}, r'data\.channels: found 1, wanted 3'),
    (
      encoder.Clip((8, 64, 96, 3), 1, 4.0),
      {'depth_units': 1000.0},
      r'but 4 per second; wanted --config\.data\.stride=<frames>$',
    ),
  ],
)
def test_what_the_encoder_cannot_decide_is_asked_for(clip, given, message):
  with pytest.raises(ValueError, match=message):
    keys(clip=clip, **given)


def test_the_clips_are_described_beside_the_encoders():
  c = clips.follow(config_lib.evaluation('probe'), CLIP)
  found = clips.report(c.data.to_dict(), CLIP)
  assert found == {
    'clip': [8, 64, 96, 3],
    'timing': 'stride 2',
    'encoder_clip': [8, 64, 96, 3],
    'encoder_timing': 'stride 2',
  }
  same = '8x64x96, stride 2, as the encoder was trained on'
  assert clips.describe(found) == same
  c.data.update(dict(frames=16, stride=1, fps=4.0))
  found = clips.report(c.data.to_dict(), CLIP)
  assert clips.describe(found) == (
    '16x64x96, 4 fps; the encoder was trained on 8x64x96, stride 2'
  )
  found = clips.report(c.data.to_dict(), None)
  assert clips.describe(found) == '16x64x96, 4 fps'


def test_a_stride_that_is_not_known_is_not_said_to_be_the_encoders():
  c = config_lib.evaluation('probe')
  c.data.stride = 2
  unknown = encoder.Clip((8, 64, 96, 3))
  found = clips.report(clips.follow(c, unknown).data.to_dict(), unknown)
  assert clips.describe(found) == (
    '8x64x96, stride 2; the encoder was trained on 8x64x96, with a stride that '
    'its weights do not state'
  )


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'size': (0, 32)}, r'data\.size: found \(0, 32\), .*size=\(64,96\), or'),
    ({'size': (20, 30)}, r'data\.size: found \(20, 30\), .*size=\(16,32\)$'),
    ({'size': (3, 16)}, r'8x8 pixels of .*data\.size=\(8,16\)$'),
    ({'frames': 7}, r'data\.frames: found 7, .* the 2 frames .*frames=8$'),
  ],
)
def test_clips_that_an_encoder_cannot_take_are_refused_by_key(
  given, message, tmp_path
):
  patch = small.encoder_of().module.patch
  c = config_lib.evaluation('probe')
  c.data.update(given)
  with pytest.raises(ValueError, match=message):
    clips.check_patches(clips.follow(c, CLIP), patch)


def test_jobs_refuse_clips_that_do_not_divide_into_patches(tmp_path):
  given = small.encoder_of()
  weights.export(
    given.module, given.params, tmp_path, video=small.SHAPE, timing=(1, 0.0)
  )
  jobs = (
    ('probe', lambda c: evals_setup.make(c, given)),
    ('probe', evaluations.probe),
    ('finetune', lambda c: finetune_setup.write(c, given)),
    ('finetune', evaluations.finetune),
  )
  for name, start in jobs:
    c = config_lib.evaluation(name)
    c.encoder, c.data.size = str(tmp_path), (20, 20)
    if name == 'finetune':
      c.workdir = str(tmp_path / 'run')
      c.data.update(dict(frames=4, stride=1, channels=3))
    with pytest.raises(ValueError, match=r'data\.size: found \(20, 20\)'):
      start(c)


def test_files_state_the_clips(tmp_path):
  given = small.encoder_of()
  weights.export(given.module, given.params, tmp_path, video=small.SHAPE)
  assert encoder.clip_of(str(tmp_path)) == encoder.Clip(small.SHAPE)
  path = str(tmp_path / 'known')
  loaded = encoder.load(str(tmp_path))
  assert (loaded.stride, loaded.fps) == (0, 0.0)
  weights.export(
    given.module, given.params, path, video=small.SHAPE, timing=(1, 4.0)
  )
  assert encoder.clip_of(path) == encoder.Clip(small.SHAPE, 1, 4.0)
  assert encoder.load(path).clip == encoder.clip_of(path)


@pytest.mark.parametrize(
  ('layout', 'wanted'), [('vjepa2', (1, 4.0)), ('videomae', (4, 0.0))]
)
def test_published_encoders_have_the_clips_of_their_papers(
  tmp_path, layout, wanted
):
  module = small.encoder_of().module.clone(
    **{
      'vjepa2': dict(positions='rope_3d', rope_pairing='vjepa2'),
      'videomae': dict(positions='sinusoid_1d', qkv_bias='qv'),
    }[layout]
  )
  video = np.zeros((1, *small.SHAPE), np.uint8)
  params = module.init(jax.random.key(0), video)['params']
  weights.export(module, params, tmp_path, video=small.SHAPE, layout=layout)
  config = json.loads((tmp_path / 'config.json').read_text())
  del config['clip']  # which other people's files do not have
  (tmp_path / 'config.json').write_text(json.dumps(config))
  clip = encoder.clip_of(str(tmp_path))
  assert clip == encoder.Clip(small.SHAPE, *wanted)


def test_fine_tuning_from_nothing_has_clips_of_its_own():
  _, c = config_lib.load('configs/finetune_fast.py')
  clip = finetune_setup.clip_of(c, None)
  assert clip == encoder.Clip((8, 32, 32, 3), 1)
  given = small.encoder_of()
  assert finetune_setup.clip_of(c, given) == given.clip


def test_programs_are_held_to_the_free_memory(monkeypatch):
  given = small.encoder_of()
  encode = feature_memory.Encode(given, None, 'a smaller probe.test_batch_size')
  video = jax.random.randint(jax.random.key(1), (8, *small.SHAPE), 0, 256)
  video = video.astype('uint8')
  np.testing.assert_allclose(encode(video), given(video), atol=1e-6)
  shapes = jax.eval_shape(encode, jax.ShapeDtypeStruct(video.shape, 'uint8'))
  assert shapes.shape == given(video).shape
  monkeypatch.setattr(feature_memory, 'free', lambda device: 2**16)
  other = feature_memory.Encode(given, None, 'a smaller probe.test_batch_size')
  with pytest.raises(ValueError, match=r'8 clips at once need .* GiB') as error:
    other(video)
  assert 'wanted a smaller probe.test_batch_size' in str(error.value)
  monkeypatch.setattr(feature_memory, 'free', lambda device: None)
  other(video)


def test_free_memory_is_that_of_the_machine_or_its_container(
  monkeypatch, tmp_path
):
  (tmp_path / 'memory.max').write_text('1000')
  (tmp_path / 'memory.current').write_text('400')
  monkeypatch.setattr(feature_memory, 'CGROUP', tmp_path)
  assert feature_memory.free(jax.local_devices()[0]) == 600
  (tmp_path / 'memory.max').write_text('max')
  assert feature_memory.free(jax.local_devices()[0]) > 2**20


def test_a_device_without_memory_is_one_line(monkeypatch, capsys):
  def job(config):
    raise jax.errors.JaxRuntimeError(
      'RESOURCE_EXHAUSTED: Out of memory allocating 60814716928 bytes.\nmore'
    )

  monkeypatch.setitem(main.JOBS, 'probe', job)
  assert main.main(['--config=configs/probe_fast.py']) == 1
  line = capsys.readouterr().err.strip().splitlines()[-1]
  assert line.startswith('error: out of memory (RESOURCE_EXHAUSTED')
  assert 'wanted smaller --config.probe.batch_size' in line
