"""How far targets in 8 bits and in bfloat16 are from those in float32.

    python tests/benchmarks/float8_targets.py --out=float8_targets.jsonl \
      --source=runs/pmd@video_teacher

Relative RMS error and mean cosine per token of the last block's tokens, as PMD
takes them: encoders of sizes S and B at random weights on 8x112x112 pixels of
noise, and those of run folders on their own clips (`--videos`). On a CPU 8 bits
are emulated: errors are those of the format, and nothing is said of speed.
"""

import argparse
import json
import pathlib

import jax
import numpy as np

import vssl_jax
from vssl_jax.checkpoint import provenance
from vssl_jax.data import options, pipeline
from vssl_jax.methods import phase
from vssl_jax.models import vit

RANDOM = {'S': 'videomae', 'B': 'videomae', 'S vjepa': 'vjepa'}


def said(module, params, video, dtype):
  """Returns the last block's tokens, as a teacher of a type gives them."""
  inside = 'float32' if dtype == 'float32' else 'bfloat16'
  source = phase.FromWeights('somewhere')
  teacher = phase.Teacher(module.clone(dtype=inside), source, dtype=dtype)
  ask = jax.jit(lambda p, v: teacher(p, v, features=True)[-1])
  return np.asarray(ask(params, video), np.float64)


def errors(module, params, video):
  """Returns dtype -> relative RMS error and mean cosine."""
  exact = said(module, params, video, 'float32')
  found = {}
  for dtype in ('bfloat16', 'float8_emulated'):
    got = said(module, params, video, dtype)
    norms = np.linalg.norm(got, axis=-1) * np.linalg.norm(exact, axis=-1)
    found[dtype] = {
      'rms': float(np.sqrt(np.mean((got - exact) ** 2) / np.mean(exact**2))),
      'cosine': float(np.mean(np.sum(got * exact, axis=-1) / norms)),
    }
  return found


def random_models():
  """Yields (name, module, parameters, clips)."""
  video = np.random.default_rng(0).integers(0, 256, (2, 8, 112, 112, 3))
  video = video.astype(np.uint8)
  for name, family in RANDOM.items():
    positions = 'sinusoid_1d' if family == 'videomae' else 'rope_3d'
    size = vit.SIZES[name[0]]
    module = vit.make(size, init=family, positions=positions)
    params = jax.jit(module.init)(jax.random.key(0), video[:1])['params']
    yield f'random {name}', module, params, video


def trained_model(source, videos):
  """Returns (name, module, parameters, clips) of a run folder."""
  encoder = vssl_jax.load(source)
  config = options.default()
  frames, *size, _ = encoder.video
  config.update(options.FIXED)
  config.update(dict(source=videos, frames=frames, size=tuple(size), stride=1))
  clips = pipeline.make(config, batch_size=8, seed=0)
  video = next(clips.iterator())['video']
  clips.close()
  name = f'trained, {encoder.width} wide, {encoder.module.depth} blocks'
  return name, encoder.module, encoder.params, video


def main():
  """Measures, prints a row for each model, and adds lines to the file."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--source', action='append', default=[])
  parser.add_argument('--videos', default='')
  parser.add_argument('--out', type=pathlib.Path)
  args = parser.parse_args()
  models = [trained_model(s, args.videos) for s in args.source]
  for name, *model in (*models, *random_models()):
    line = {'model': name, 'errors': errors(*model)}
    print(json.dumps(line), flush=True)
    if args.out:
      with args.out.open('a') as f:
        f.write(json.dumps(line | provenance.describe({})) + '\n')


if __name__ == '__main__':
  main()
