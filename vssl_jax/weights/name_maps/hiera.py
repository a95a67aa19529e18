"""Tables from published parameter names of Hiera to ours.

The authors' files contain a network under `model_state`: a classifier, or
Hiera-MAE with its decoder. Networks for images have convolutions without an
axis of time and a single table of positions, see `hiera_files`.

Source: github.com/facebookresearch/hiera at b12b842.
"""

from vssl_jax.weights.name_maps import rules

FAMILY = 'hiera'
KERNEL = 'patch_embed.proj.weight'
# Position tables: spatial, temporal, joint, and of the decoder.
SPACE, TIME = 'pos_embed_spatial', 'pos_embed_temporal'
BOTH, DECODER = 'pos_embed', 'decoder_pos_embed'
TABLES = (SPACE, TIME, BOTH, DECODER)

_BLOCK = (
  ('norm_1', 'norm1', 'norm'),
  ('attn', 'attn.qkv', 'qkv'),
  ('attn', 'attn.qkv', 'qkv_bias'),
  ('attn/out', 'attn.proj', 'dense'),
  ('norm_2', 'norm2', 'norm'),
  *rules.MLP,
)
_GROUPS = ('model_state', '')
PARTS = {
  'encoder': rules.Part(
    (
      ('embed', 'patch_embed.proj', 'whole_conv'),
      ('positions_space', SPACE, 'table'),
      ('positions_time', TIME, 'table'),
      ('positions', BOTH, 'table'),
    ),
    (*_BLOCK, ('shortcut', 'proj', 'dense')),
    'blocks.{i}',
    _GROUPS,
  ),
  'head': rules.Part(
    (
      ('fuse_1', 'multi_scale_fusion_heads.0', 'conv'),
      ('fuse_2', 'multi_scale_fusion_heads.1', 'conv'),
      ('fuse_norm', 'encoder_norm', 'norm'),
      ('embed', 'decoder_embed', 'dense'),
      ('mask_token', 'mask_token', 'token'),
      ('positions', DECODER, 'table'),
      ('norm', 'decoder_norm', 'norm'),
      ('head', 'decoder_pred', 'dense'),
    ),
    _BLOCK,
    'decoder_blocks.{i}',
    _GROUPS,
  ),
}


def _layout(name: str, *marks: str) -> rules.Layout:
  marks = (KERNEL, 'blocks.0.attn.qkv.bias', *marks)
  # The norm and the classifier after the mean over tokens.
  others = (r'norm\.', r'head\.')
  return rules.Layout(name, PARTS, marks, (), others, FAMILY)


LAYOUTS = (
  _layout('Hiera', SPACE, TIME),
  _layout('Hiera-MAE of images', BOTH, 'multi_scale_fusion_heads.0.weight'),
  _layout('Hiera of images', BOTH, 'head.projection.weight'),
)
