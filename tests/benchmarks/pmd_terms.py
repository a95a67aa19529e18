"""What each part of PMD adds to MVD's step, as ratios taken in one run.

    python tests/benchmarks/pmd_terms.py --out=pmd_terms.json
    python tests/benchmarks/pmd_terms.py --config.batch_size=64 \
      --config.data.size='(224, 224)' --config.data.frames=16 --size=B

Phases take turns step by step. Without a size the widths are small ones for a
CPU (teachers and student 192 wide, 12 blocks, clips of 8x64x64); published for
ViT-B over all phases: 1.14 in FLOPs, 1.12 in hours.
"""

import argparse
import json
import pathlib

from vssl_jax import config as config_lib
from vssl_jax.planning import phase_sweep

PARTS = ('lambda_pg', 'lambda_df', 'lambda_al')
RUNS = {
  'MVD': (),
  '+PSD': ('lambda_pg',),
  '+DARE': ('lambda_df',),
  '+CLFA': ('lambda_al',),
  'PMD': PARTS,
}


def config(size, assignments):
  """Returns PMD whose teachers need no weights from outside."""
  _, c = config_lib.load(f'configs/pmd_k400.py:{size or "S"}-self')
  c.method.opt = 'fresh'
  if not size:
    c.batch_size = 8
    c.data.frames, c.data.size = 8, (64, 64)
    c.method.vit.update(dict(patch=(2, 8, 8), dtype='float32'))
    for part in ('', 'image_teacher', 'video_teacher'):
      section = c.method[part] if part else c.method
      section.encoder.update(dict(size='Ti', width=192, num_heads=3))
      section.encoder.mlp_width = 768
    c.method.decoder.update(dict(width=192, num_heads=3))
    for name in ('image', 'video'):
      c.method[name].dtype = c.method.previous_dtype = 'float32'
  return config_lib.override(c, assignments)


def compared(size, assignments):
  """Returns MVD's phase at 90 %, then each part's, then all of PMD's."""
  out = []
  for name, parts in RUNS.items():
    c = config(size, assignments)
    for part in PARTS:
      if part not in parts:
        c.method[part] = 0.0
    if name == 'MVD':
      c.method.mask_ratios, c.method.steps = (0.9,), c.method.steps[:1]
    found = phase_sweep.entries(c, f'{name} ')
    found = [e for e in found if 'teacher' not in e.span.phase.name]
    out += found if name == 'PMD' else found[-1:]
  return out


def main():
  """Measures, prints the table and writes it."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--size', default='')
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument('--out', type=pathlib.Path)
  args, rest = parser.parse_known_args()
  assignments = [x.removeprefix('--config.') for x in rest]
  found = phase_sweep.phases(compared(args.size, assignments), steps=args.steps)
  if args.out:
    args.out.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
  main()
