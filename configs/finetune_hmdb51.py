"""Fine-tuning on HMDB51, one split at a time; `:S :B`.

Paper: none publishes a recipe from K400 to HMDB51; values from
xiaojieli0903/MaskAgain, `scripts/finetune_base_hmdb_slurm.sh` and S's. B is
tested on 5 clips x 3 crops at stride 4, S on 10 x 3 at stride 2. Report split
1 and the mean of the three splits.
Hardware: one GPU, with --config.optim.accumulate where memory is short.
Command: bash launch/local.sh --config=configs/finetune_hmdb51.py \
  --config.encoder=<run folder, folder with published weights, or hub id> \
  --config.finetune.train=<train list> --config.finetune.test=<test list>
Expected: VideoMAE-B pre-trained on K400 73.3, on HMDB51 alone 62.6 (its
paper). Ours: not run.
"""

from vssl_jax import config as config_lib

# Stride (0: the encoder's), clips along a test video.
SIZES = {'S': (2, 10), 'B': (0, 5)}


def get_config(variant=''):
  size = variant or 'B'
  if size not in SIZES:
    raise ValueError(
      f'finetune_hmdb51.py: found :{size}, wanted one of {list(SIZES)}'
    )
  c = config_lib.fine_tuning()
  c.method.encoder.size = size
  c.method.drop_path, c.method.dropout = 0.2, 0.5
  c.data.stride, c.finetune.clips = SIZES[size]
  c.optim.update(dict(lr=1e-3, lr_end=1e-5, layer_decay=0.7))
  c.finetune.update(dict(batch_size=128, epochs=50))
  return c
