"""The same figures as `vssl_jax.planning.bench`, of published models in torch.

    python tests/benchmarks/torch_peer.py --model=videomae --size=B \
      --sweep=32,64,128 --out=peer.json

Run by hand where torch and transformers are installed; what to compare it
with, on the same machine, alternating:

    python -m vssl_jax.planning.bench --config=configs/videomae_k400.py ...

`videomae` is the whole pretraining step of `VideoMAEForPreTraining`.
`mvd` is MVD's whole step with its two teachers, none of PMD's terms: nobody
guides the student, no memory of patches, no maps between layers. As in
mvd_k400.py no gradient is clipped, and targets are the last block's output,
before any final norm. Nothing here has drop path, so ours is switched off, and
its teachers are those of its own run, which need no weights from outside:

    python tests/benchmarks/torch_peer.py --model=mvd --size=S --side=64 \
      --frames=4 --steps=3 --sweep=1 --float32 --no-compile --out=peer.json
    python -m vssl_jax.planning.bench --config=configs/mvd_k400.py:S \
      --phase=mask_90 --sweep=1 --steps=3 --config.method.drop_path=0 \
      --config.method.image.teacher=@image_teacher \
      --config.method.video.teacher=@video_teacher \
      --config.data.frames=4 --config.data.size='(64, 64)' \
      --config.method.vit.dtype=float32 --config.method.image.dtype=float32 \
      --config.method.video.dtype=float32 --out=ours.json

is both at a size for a CPU. Published sizes: without side, frames and dtypes;
for :L ours with `method.image_teacher.encoder.size=L`, and that of the video.
`vjepa2_encoder` is forward and backward of V-JEPA 2's encoder over the whole
clip: transformers has no pretraining step of it (it drops masked tokens after
the encoder, not before). bf16 by autocast, scaled dot product attention,
torch.compile, fused AdamW, input on the device, no remat.
"""

import argparse
import json
import os
import pathlib
import sys
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # jax only counts FLOPs here

import numpy as np
import torch
import transformers

from vssl_jax import flops
from vssl_jax.checkpoint import provenance
from vssl_jax.masks import sampling
from vssl_jax.models import decoder, framewise, vit
from vssl_jax.utils import metrics

WARM_UP = 3
GIB = 2**30
MASK_RATIO = 0.9


def videomae(args, grid):
  """Returns the model, its other arguments by batch size, loss, FLOPs.

  The last are per clip, of the whole step and of frozen teachers.
  """
  ours = vit.make(args.size)
  shape = decoder.SIZES[args.size]
  patch_values = int(np.prod(ours.patch)) * 3
  config = _videomae_config(
    args,
    args.size,
    decoder_hidden_size=shape['width'],
    decoder_num_hidden_layers=shape['depth'],
    decoder_num_attention_heads=shape['num_heads'],
    decoder_intermediate_size=4 * shape['width'],
  )
  per_frame = grid[1] * grid[2]
  shown, hidden = sampling.counts(per_frame, MASK_RATIO, 'masked_floor')
  head = decoder.VideoMaeDecoder(patch_values, **shape)
  cost = flops.train(ours, grid, shown * grid[0]) + flops.train(
    head, grid, (shown * grid[0], hidden * grid[0]), in_width=ours.width
  )

  def extra(size, device):
    order = torch.rand(size, per_frame, device=device).argsort(1)
    tube = order < hidden
    return {'bool_masked_pos': tube.repeat(1, grid[0])}

  model = transformers.VideoMAEForPreTraining(config)
  return model, extra, lambda out: out.loss, (cost, 0.0)


def vjepa2_encoder(args, grid):
  """Returns the same of the encoder alone, under a mean square."""
  ours = vit.make(args.size)
  config = transformers.VJEPA2Config(
    crop_size=args.side,
    frames_per_clip=args.frames,
    hidden_size=ours.width,
    num_hidden_layers=ours.depth,
    num_attention_heads=ours.num_heads,
    mlp_ratio=(ours.mlp_width or 4 * ours.width) / ours.width,
    attn_implementation='sdpa',
  )

  def loss(out):
    return out.last_hidden_state.float().square().mean()

  model = transformers.VJEPA2Model(config)
  # The predictor is not part of the step, so it gets no gradient or update.
  model.predictor.requires_grad_(False)
  return (
    model,
    lambda size, device: {'skip_predictor': True},
    loss,
    (flops.train(ours, grid), 0.0),
  )


def _videomae_config(args, size, **fields):
  ours = vit.make(size)
  return transformers.VideoMAEConfig(
    image_size=args.side,
    num_frames=args.frames,
    hidden_size=ours.width,
    num_hidden_layers=ours.depth,
    num_attention_heads=ours.num_heads,
    intermediate_size=ours.mlp_width or 4 * ours.width,
    attn_implementation='sdpa',
    **fields,
  )


class Mvd(torch.nn.Module):
  """Two frozen teachers, a student and a decoder for each of them."""

  def __init__(self, args, teachers, shape):
    super().__init__()
    config = _videomae_config(
      args,
      args.size,
      use_mean_pooling=False,  # with a norm behind the last block
      decoder_hidden_size=shape['width'],
      decoder_num_hidden_layers=shape['depth'],
      decoder_num_attention_heads=shape['num_heads'],
      decoder_intermediate_size=4 * shape['width'],
    )
    video = _videomae_config(args, teachers)
    image = transformers.ViTConfig(
      image_size=args.side,
      hidden_size=video.hidden_size,
      num_hidden_layers=video.num_hidden_layers,
      num_attention_heads=video.num_attention_heads,
      intermediate_size=video.intermediate_size,
      attn_implementation='sdpa',
    )
    self.student = transformers.VideoMAEModel(config)
    self.video = transformers.VideoMAEModel(video).requires_grad_(False)
    self.image = transformers.ViTModel(image, add_pooling_layer=False)
    self.image.requires_grad_(False)
    # Targets are what the last block gives.
    self.image.layernorm, self.video.layernorm = torch.nn.Identity(), None
    module = transformers.models.videomae.modeling_videomae
    tokens = self.student.embeddings.num_patches
    table = module.get_sinusoid_encoding_table(tokens, shape['width'])
    self.register_buffer('table', torch.as_tensor(table).float())
    self.embed, self.decoder = torch.nn.ModuleList(), torch.nn.ModuleList()
    self.mask_token = torch.nn.Parameter(torch.zeros(2, shape['width']))
    for _ in range(2):
      self.embed.append(torch.nn.Linear(config.hidden_size, shape['width']))
      decoder = module.VideoMAEDecoder(config)
      decoder.head = torch.nn.Linear(shape['width'], video.hidden_size)
      self.decoder.append(decoder)

  def forward(self, video, bool_masked_pos):
    """Returns the loss of clips [B, T, C, H, W]."""
    batch = len(video)
    with torch.no_grad():
      frames = video[:, ::2].flatten(0, 1)
      image = self.image(frames).last_hidden_state[:, 1:]
      image = image.reshape(batch, -1, image.shape[-1])
      targets = (image, self.video(video).last_hidden_state)
    hidden = self.student(
      video, bool_masked_pos=bool_masked_pos
    ).last_hidden_state
    table = self.table.expand(batch, -1, -1)
    seen, gone = (
      table[where].reshape(batch, -1, table.shape[-1])
      for where in (~bool_masked_pos, bool_masked_pos)
    )
    loss = 0.0
    for i, target in enumerate(targets):
      x = torch.cat(
        [self.embed[i](hidden) + seen, self.mask_token[i] + gone], 1
      )
      found = self.decoder[i](x, gone.shape[1])
      logits = found if torch.is_tensor(found) else found.logits
      wanted = target[bool_masked_pos].reshape(logits.shape)
      loss = loss + torch.nn.functional.smooth_l1_loss(logits, wanted)
    return loss


def mvd(args, grid):
  """Returns MVD's whole step: teachers of size B, for L of size L."""
  size = 'L' if args.size == 'L' else 'B'
  shape = decoder.MVD_SIZES[args.size]
  ours, video = vit.make(args.size), vit.make(size)
  image = vit.make(
    size, patch=(1, 16, 16), positions='sincos_2d', class_token=True
  )
  per_frame = grid[1] * grid[2]
  shown, hidden = sampling.counts(per_frame, MASK_RATIO, 'masked_floor')
  head = decoder.VideoMaeDecoder(video.width, **shape, **decoder.MVD)
  cost = flops.train(ours, grid, shown * grid[0])
  cost += 2 * flops.train(
    head, grid, (shown * grid[0], hidden * grid[0]), in_width=ours.width
  )
  frozen = flops.forward(video, grid)
  frozen += flops.forward(framewise.Framewise(image), grid)

  def extra(batch, device):
    order = torch.rand(batch, per_frame, device=device).argsort(1)
    return {'bool_masked_pos': (order < hidden).repeat(1, grid[0])}

  model = Mvd(args, size, shape)
  return model, extra, lambda loss: loss, (cost + frozen, frozen)


MODELS = {'videomae': videomae, 'vjepa2_encoder': vjepa2_encoder, 'mvd': mvd}


def finish(device):
  """Waits for the device."""
  if device == 'cuda':
    torch.cuda.synchronize()


def matrix_rate(device, dtype):
  """Returns FLOP/s of a large square matrix product."""
  side = 8192 if device == 'cuda' else 2048
  a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in '12')
  seconds = []
  for _ in range(6):
    finish(device)
    start = time.perf_counter()
    a @ b
    finish(device)
    seconds.append(time.perf_counter() - start)
  return 2.0 * side**3 / min(seconds[1:])


def measure(args, size, device, grid, limit):
  """Returns the figures at one batch size."""
  torch.manual_seed(0)
  if device == 'cuda':
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
  model, extra, loss_of, (cost, frozen) = MODELS[args.model](args, grid)
  model = model.to(device).train()
  optimizer = torch.optim.AdamW(
    [p for p in model.parameters() if p.requires_grad],
    lr=1e-4,
    weight_decay=0.05,
    fused=True,
  )
  video = torch.randint(
    0,
    256,
    (size, args.frames, 3, args.side, args.side),
    dtype=torch.uint8,
    device=device,
  )
  colours = [(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)]
  mean, std = (
    torch.tensor(x, device=device).reshape(1, 1, 3, 1, 1) for x in colours
  )
  forward = torch.compile(model) if args.compile else model

  def step():
    clips = (video.float() / 255 - mean) / std
    with torch.autocast(device, torch.bfloat16, enabled=not args.float32):
      loss = loss_of(forward(clips, **extra(size, device)))
    loss.backward()
    if args.model != 'mvd':  # its scripts do not clip
      torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss

  finish(device)
  start = time.perf_counter()
  step()
  finish(device)
  first = time.perf_counter() - start
  for _ in range(WARM_UP):
    step()
  finish(device)
  seconds = []
  for _ in range(args.steps):
    start = time.perf_counter()
    loss = step()
    finish(device)
    seconds.append(time.perf_counter() - start)
  median = float(np.median(seconds))
  low, high = np.percentile(seconds, (25, 75))
  peak = torch.cuda.max_memory_allocated() / GIB if device == 'cuda' else None
  rate = cost * size / median
  return {
    'video': [args.frames, args.side, args.side, 3],
    'compile_seconds': first - median,
    'steps': args.steps,
    'step_seconds': median,
    'step_seconds_quartiles': [float(low), float(high)],
    'clips_per_s': size / median,
    'peak_gib': peak,
    'peak_source': 'device' if peak else 'unknown',
    'flops_per_clip': cost,
    'utilisation': rate / limit['flops_per_s'],
    'utilisation_of': limit['name'],
    'of_matrix_product': rate / limit['matrix_product'],
    'teacher_share_flops': frozen / cost,
    'last_loss': float(loss.detach()),
  }


def flags():
  """Returns the command line."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--model', choices=sorted(MODELS), default='videomae')
  parser.add_argument('--size', choices=sorted(decoder.SIZES), default='B')
  parser.add_argument('--frames', type=int, default=16)
  parser.add_argument('--side', type=int, default=224)
  parser.add_argument('--steps', type=int, default=30)
  parser.add_argument('--sweep', default='8', help='batch sizes: 8,16,32')
  parser.add_argument('--no-compile', dest='compile', action='store_false')
  parser.add_argument('--float32', action='store_true', help='no autocast')
  parser.add_argument('--out', default='')
  return parser.parse_args()


def main():
  """Prints and writes the result."""
  args = flags()
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  grid = (args.frames // 2, args.side // 16, args.side // 16)
  dtype = torch.float32 if args.float32 else torch.bfloat16
  product = matrix_rate(device, dtype)
  kind = torch.cuda.get_device_name() if device == 'cuda' else 'cpu'
  peaks = [v for k, v in metrics.PEAK_TFLOPS.items() if kind.startswith(k)]
  limit = {
    'name': f'1 x {kind}, peak' if peaks else f'matrix product on {kind}',
    'flops_per_s': peaks[0] * 1e12 if peaks else product,
    'matrix_product': product,
  }
  results = []
  for size in sorted(int(x) for x in args.sweep.split(',')):
    head = {'phase': f'torch/{args.model}', 'batch_size': size}
    try:
      found = measure(args, size, device, grid, limit)
    except torch.OutOfMemoryError as error:
      found = {'out_of_memory': str(error).partition('\n')[0]}
    results.append(head | found)
    print(json.dumps(results[-1]), flush=True)
    if 'out_of_memory' in found:
      break
  record = provenance.describe(vars(args))
  record['device'] = f'1 x {kind}'
  record['platform'] = device
  record['versions'] |= {
    'torch': torch.__version__,
    'transformers': transformers.__version__,
  }
  report = {
    'limit': limit,
    'devices': 1,
    'compile_cache': False,
    'results': results,
    'provenance': record,
  }
  if args.out:
    out = pathlib.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + '\n')
  return 0


if __name__ == '__main__':
  sys.exit(main())
