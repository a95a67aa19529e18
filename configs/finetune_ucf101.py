"""Fine-tuning on UCF101, one split at a time.

Paper: none publishes a recipe from K400 to UCF101; values for ViT-B from
xiaojieli0903/MaskAgain, `scripts/finetune_base_ucf_slurm.sh`. After
pre-training on UCF101 itself MCG-NJU/VideoMAE's scripts have the same values.
5 clips x 3 crops, stride 4.
Report split 1 and the mean of the three splits.
Hardware: one GPU, with --config.optim.accumulate where memory is short.
Command: bash launch/local.sh --config=configs/finetune_ucf101.py \
  --config.encoder=<run folder, folder with published weights, or hub id> \
  --config.finetune.train=<train list> --config.finetune.test=<test list>
Expected: VideoMAE-B pre-trained on K400 96.1, on UCF101 alone 91.3 (its
paper). Ours: not run.
"""

from vssl_jax import config as config_lib


def get_config(variant=''):
  if variant:
    raise ValueError(f'finetune_ucf101.py: found :{variant}, has no variants')
  c = config_lib.fine_tuning()
  c.method.drop_path, c.method.dropout = 0.2, 0.5
  c.optim.update(dict(lr=5e-4, lr_end=1e-5, layer_decay=0.7))
  c.finetune.update(dict(batch_size=128, epochs=100))
  return c
