"""Tables from published parameter names of image models to ours.

All are ViTs with a class token: MAE (arXiv 2111.06377), DINO (arXiv
2104.14294) and DINOv2 (arXiv 2304.07193), with or without registers (arXiv
2309.16588), in the format of their authors and of `transformers`. MAE and DINO
have the same names and are distinguished by their position tables, see
`modules`. The ViT-g of DINOv2 has SwiGLU instead of the MLP.
"""

from vssl_jax.weights.name_maps import rules

_BLOCK = (
  ('norm_1', 'norm1', 'norm'),
  ('attn', 'attn.qkv', 'qkv'),
  ('attn', 'attn.qkv', 'qkv_bias'),
  ('attn/out', 'attn.proj', 'dense'),
  ('norm_2', 'norm2', 'norm'),
  *rules.MLP,
)
_SWIGLU = (('mlp', 'mlp.w12', 'swiglu'), ('mlp/fc2', 'mlp.w3', 'dense'))
_GAINS = (('gain_1', 'ls1.gamma', 'table'), ('gain_2', 'ls2.gamma', 'table'))
_ATTENTION = (
  ('attn/q', 'attention.attention.query', 'dense'),
  ('attn/k', 'attention.attention.key', 'dense'),
  ('attn/v', 'attention.attention.value', 'dense'),
  ('attn/out', 'attention.output.dense', 'dense'),
)
_TRANSFORMERS_BLOCK = (
  ('norm_1', 'layernorm_before', 'norm'),
  *_ATTENTION,
  ('norm_2', 'layernorm_after', 'norm'),
  ('mlp/fc1', 'intermediate.dense', 'dense'),
  ('mlp/fc2', 'output.dense', 'dense'),
)
_TRANSFORMERS_DINOV2_BLOCK = (
  ('norm_1', 'norm1', 'norm'),
  *_ATTENTION,
  ('gain_1', 'layer_scale1.lambda1', 'table'),
  ('norm_2', 'norm2', 'norm'),
  *rules.MLP,
  ('mlp', 'mlp.weights_in', 'swiglu'),
  ('mlp/fc2', 'mlp.weights_out', 'dense'),
  ('gain_2', 'layer_scale2.lambda1', 'table'),
)
_ENDS = (
  ('embed', 'patch_embed.proj', 'image_conv'),
  ('class_token', 'cls_token', 'token'),
  ('registers', 'register_tokens', 'registers'),
  ('', 'pos_embed', 'class_table'),
  ('norm', 'norm', 'norm'),
)
_TRANSFORMERS_ENDS = (
  ('embed', 'embeddings.patch_embeddings.projection', 'image_conv'),
  ('class_token', 'embeddings.cls_token', 'token'),
  ('registers', 'embeddings.register_tokens', 'registers'),
  ('', 'embeddings.position_embeddings', 'class_table'),
  ('norm', 'layernorm', 'norm'),
)
# Files of DINO contain the average (its teacher) and the trained network.
_GROUPS = ('teacher', 'model', 'student', '')
_TRAINED = ('student',)
_MARKS = ('cls_token', 'pos_embed', 'blocks.0.attn.qkv.bias')
_RENAMES = (
  (r'^(module\.)?(backbone\.)?', ''),
  # DINOv2 groups blocks in chunks for training: blocks.<chunk>.<block>.
  (r'^blocks\.\d+\.(\d+)\.', r'blocks.\1.'),
)
_TRANSFORMERS_MARKS = (
  'embeddings.cls_token',
  'embeddings.position_embeddings',
)

LAYOUTS = (
  rules.Layout(
    'DINOv2 (original)',
    {
      'encoder': rules.Part(
        _ENDS,
        (*_BLOCK, *_SWIGLU, *_GAINS),
        'blocks.{i}',
        _GROUPS,
        _TRAINED,
      )
    },
    (*_MARKS, 'blocks.0.ls1.gamma'),
    _RENAMES,
    (r'mask_token$', r'(dino_|ibot_)?head\.'),
    'image',
    'bicubic_offset',
  ),
  rules.Layout(
    'MAE or DINO (original)',
    {'encoder': rules.Part(_ENDS, _BLOCK, 'blocks.{i}', _GROUPS, _TRAINED)},
    _MARKS,
    _RENAMES,
    # MAE's decoder, DINO's head, and heads of classifiers.
    (r'mask_token$', r'decoder_', r'head\.', r'fc_norm\.'),
    'image',
    'bicubic_offset',
  ),
  rules.Layout(
    'DINOv2 (transformers)',
    {
      'encoder': rules.Part(
        _TRANSFORMERS_ENDS, _TRANSFORMERS_DINOV2_BLOCK, 'encoder.layer.{i}'
      )
    },
    (*_TRANSFORMERS_MARKS, 'encoder.layer.0.layer_scale1.lambda1'),
    ((r'^dinov2(_with_registers)?\.', ''),),
    (r'embeddings\.mask_token$', r'classifier\.'),
    'image',
    'bicubic',
  ),
  rules.Layout(
    'MAE or DINO (transformers)',
    {
      'encoder': rules.Part(
        _TRANSFORMERS_ENDS, _TRANSFORMERS_BLOCK, 'encoder.layer.{i}'
      )
    },
    (*_TRANSFORMERS_MARKS, 'encoder.layer.0.layernorm_before.weight'),
    ((r'^vit\.', ''),),
    (r'embeddings\.mask_token$', r'decoder\.', r'pooler\.', r'classifier\.'),
    'image',
    'bicubic',
  ),
)
