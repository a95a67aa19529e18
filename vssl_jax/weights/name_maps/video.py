"""Tables from published parameter names of video models to ours."""

from vssl_jax.weights.name_maps import hiera, image, rules

_VJEPA2_BLOCK = (
  ('norm_1', 'norm1', 'norm'),
  ('attn/q', 'attention.query', 'dense'),
  ('attn/k', 'attention.key', 'dense'),
  ('attn/v', 'attention.value', 'dense'),
  ('attn/out', 'attention.proj', 'dense'),
  ('norm_2', 'norm2', 'norm'),
  *rules.MLP,
)
_VIDEOMAE_BLOCK = (
  ('norm_1', 'layernorm_before', 'norm'),
  ('attn/q', 'attention.attention.query', 'dense'),
  ('attn/k', 'attention.attention.key', 'no_bias'),
  ('attn/v', 'attention.attention.value', 'dense'),
  ('attn/out', 'attention.output.dense', 'dense'),
  ('norm_2', 'layernorm_after', 'norm'),
  ('mlp/fc1', 'intermediate.dense', 'dense'),
  ('mlp/fc2', 'output.dense', 'dense'),
)
_FUSED_BLOCK = (
  ('norm_1', 'norm1', 'norm'),
  ('attn', 'attn.qkv', 'qkv'),
  ('attn/out', 'attn.proj', 'dense'),
  ('norm_2', 'norm2', 'norm'),
  *rules.MLP,
)
_ORIGINAL_VJEPA2_BLOCK = (*_FUSED_BLOCK, ('attn', 'attn.qkv', 'qkv_bias'))
_ORIGINAL_VIDEOMAE_BLOCK = (
  *_FUSED_BLOCK,
  ('attn/q', 'attn.q_bias', 'bias'),
  ('attn/v', 'attn.v_bias', 'bias'),
)

VJEPA2 = {
  'encoder': rules.Part(
    (
      ('embed', 'encoder.embeddings.patch_embeddings.proj', 'conv'),
      ('norm', 'encoder.layernorm', 'norm'),
    ),
    _VJEPA2_BLOCK,
    'encoder.layer.{i}',
  ),
  'head': rules.Part(
    (
      ('embed', 'predictor.embeddings.predictor_embeddings', 'dense'),
      ('mask_token', 'predictor.embeddings.mask_tokens', 'stacked_tokens'),
      ('norm', 'predictor.layernorm', 'norm'),
      ('head', 'predictor.proj', 'dense'),
    ),
    _VJEPA2_BLOCK,
    'predictor.layer.{i}',
  ),
}
VIDEOMAE = {
  'encoder': rules.Part(
    (
      ('embed', 'embeddings.patch_embeddings.projection', 'conv'),
      ('norm', 'layernorm', 'norm'),
    ),
    _VIDEOMAE_BLOCK,
    'encoder.layer.{i}',
  ),
  'head': rules.Part(
    (
      ('embed', 'encoder_to_decoder', 'no_bias'),
      ('mask_token', 'mask_token', 'token'),
      ('norm', 'decoder.norm', 'norm'),
      ('head', 'decoder.head', 'dense'),
    ),
    _VIDEOMAE_BLOCK,
    'decoder.decoder_layers.{i}',
  ),
}
ORIGINAL_VJEPA2 = {
  'encoder': rules.Part(
    (('embed', 'patch_embed.proj', 'conv'), ('norm', 'norm', 'norm')),
    _ORIGINAL_VJEPA2_BLOCK,
    'blocks.{i}',
    ('target_encoder', 'encoder', ''),  # evaluation uses the average
    ('encoder',),
  ),
  'head': rules.Part(
    (
      ('embed', 'predictor_embed', 'dense'),
      ('mask_token', 'mask_tokens.{n}', 'tokens'),
      ('norm', 'predictor_norm', 'norm'),
      ('head', 'predictor_proj', 'dense'),
    ),
    _ORIGINAL_VJEPA2_BLOCK,
    'predictor_blocks.{i}',
    ('predictor', ''),
  ),
}
ORIGINAL_VIDEOMAE = {
  'encoder': rules.Part(
    (
      ('embed', 'patch_embed.proj', 'conv'),
      ('positions', 'pos_embed', 'table'),  # if learned
      ('norm', 'norm', 'norm'),
    ),
    _ORIGINAL_VIDEOMAE_BLOCK,
    'blocks.{i}',
    ('model', 'module', ''),
  ),
  'head': rules.Part(
    (
      ('embed', 'encoder_to_decoder', 'no_bias'),
      ('mask_token', 'mask_token', 'token'),
      ('norm', 'decoder.norm', 'norm'),
      ('head', 'decoder.head', 'dense'),
    ),
    _ORIGINAL_VIDEOMAE_BLOCK,
    'decoder.blocks.{i}',
    ('model', 'module', ''),
  ),
}
# Names of the depth model begin with `params/layers_0/`; its readout is not
# loaded here, see `readout`. `/` is converted to `.`.
# Source: github.com/google-deepmind/representations4d at 75aca30, models/.
SCALING4D = {
  'encoder': rules.Part(
    (
      ('embed', 'encoder.patch_embedding.Conv_0', 'flax_patches'),
      ('positions', 'encoder.posenc.embeddings', 'table'),
    ),
    (
      ('norm_1', 'attention_norm', 'flax_norm'),
      ('attn/q', 'attention.query', 'flax_heads'),
      ('attn/k', 'attention.key', 'flax_heads'),
      ('attn/v', 'attention.value', 'flax_heads'),
      ('attn/out', 'attention.out', 'flax_out'),
      ('norm_2', 'mlp_norm', 'flax_norm'),
      ('mlp/fc1', 'mlp.dense_in', 'flax_dense'),
      ('mlp/fc2', 'mlp.dense_out', 'flax_dense'),
    ),
    'processor.layers_{i}',
  ),
}

# Hiera and image models come first: their names are supersets of the others'.
LAYOUTS = (
  *hiera.LAYOUTS,
  *image.LAYOUTS,
  rules.Layout(
    'V-JEPA 2 (transformers)',
    VJEPA2,
    ('encoder.embeddings.patch_embeddings.proj.weight',),
    ((r'^vjepa2\.', ''),),
    (r'pooler\.', r'classifier\.'),
    'vjepa2',
  ),
  rules.Layout(
    'VideoMAE (transformers)',
    VIDEOMAE,
    ('embeddings.patch_embeddings.projection.weight',),
    (
      (r'^videomae\.', ''),
      # Names in all files on the hub; transformers 5 renamed them.
      (r'\.attention\.q_bias$', '.attention.query.bias'),
      (r'\.attention\.v_bias$', '.attention.value.bias'),
    ),
    (r'fc_norm\.', r'classifier\.'),
    'videomae',
  ),
  rules.Layout(
    'V-JEPA 2 (original)',
    ORIGINAL_VJEPA2,
    ('patch_embed.proj.weight', 'blocks.0.attn.qkv.bias'),
    ((r'^(module\.)?(backbone\.)?', ''),),
    (),
    'vjepa2',
  ),
  # Pretraining files: a decoder and a mask token for each of two teachers.
  # Fine-tuned files of MVD have the names of VideoMAE, see `video_positions`.
  rules.Layout(
    'MVD (original)',
    {'encoder': ORIGINAL_VIDEOMAE['encoder']},
    (
      'patch_embed.proj.weight',
      'blocks.0.attn.q_bias',
      'mask_token_img',
      'mask_token_vid',
    ),
    ((r'^module\.', ''),),
    (
      r'mask_token_(img|vid)$',
      r'pos_embed_(img|vid)$',
      r'down_(img|vid)\.',
      r'decoder_(img|vid)\.',
    ),
    'videomae',
  ),
  rules.Layout(
    'VideoMAE (original)',
    ORIGINAL_VIDEOMAE,
    ('patch_embed.proj.weight', 'blocks.0.attn.q_bias'),
    ((r'^(module\.)?(encoder\.)?', ''),),
    (r'fc_norm\.', r'head\.'),
    'videomae',
  ),
  rules.Layout(
    '4DS (released npz)',
    SCALING4D,
    ('encoder.posenc.embeddings', 'processor.layers_0.attention.query.kernel'),
    ((r'/', '.'), (r'^params\.(layers_0\.)?', '')),
    (r'layers_2\.',),  # the readout of the depth model
    'scaling4d',
  ),
)
