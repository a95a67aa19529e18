"""Names of published weights and of ours, one table per layout.

A line of a table pairs one of our layers with one of theirs, and says what
kind it is; `rows` turns it into pairs of tensors. `{i}` is the block and `{n}`
a running number.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, NamedTuple


class Row(NamedTuple):
  """One of our leaves and the tensor, or the part of one, that fills it.

  Attributes:
    ours: `block_00/attn/q/kernel`.
    theirs: `blocks.0.attn.qkv.weight`.
    form: how numbers are laid out, a name in `convert.FORMS`.
    part: which of `parts` equal pieces along the first axis.
    parts: number of pieces.
  """

  ours: str
  theirs: str
  form: str = 'same'
  part: int = 0
  parts: int = 1


@dataclasses.dataclass(frozen=True)
class Part:
  """The table of one network.

  Attributes:
    layers: (ours, theirs, kind) outside the blocks.
    block: (ours, theirs, kind) inside a block.
    blocks: their name of block {i}.
    groups: where in a `.pth` file it is, best first; '' for the top.
  """

  layers: tuple[tuple[str, str, str], ...]
  block: tuple[tuple[str, str, str], ...]
  blocks: str
  groups: tuple[str, ...] = ('',)

  def depth(self, names: Iterable[str]) -> int:
    """Returns how many blocks a file has, whatever its config says."""
    pattern = re.escape(self.blocks).replace(r'\{i\}', r'(\d+)')
    numbers = [int(m[1]) for n in names if (m := re.match(pattern, n))]
    return max(numbers, default=-1) + 1

  def rows(self, depth: int, tokens: int = 1) -> tuple[Row, ...]:
    """Returns all pairs of tensors.

    Args:
      depth: number of blocks.
      tokens: number of mask tokens, for predictors.
    """
    rows: list[Row] = []
    for ours, theirs, kind in self.layers:
      rows += KINDS[kind](ours, theirs, tokens)
    for i in range(depth):
      block = self.blocks.format(i=i)
      for ours, theirs, kind in self.block:
        name = f'block_{i:02d}/{ours}'
        rows += KINDS[kind](name, f'{block}.{theirs}', tokens)
    return tuple(rows)


def _pair(leaf: str, form: str) -> Any:
  return lambda ours, theirs, tokens: [
    Row(f'{ours}/{leaf}', f'{theirs}.weight', form),
    Row(f'{ours}/bias', f'{theirs}.bias'),
  ]


def _flax(leaf: str, form: str, bias: str = 'same') -> Any:
  return lambda ours, theirs, tokens: [
    Row(f'{ours}/{leaf}', f'{theirs}.{leaf}', form),
    Row(f'{ours}/bias', f'{theirs}.bias', bias),
  ]


def _fused(form: str, leaf: str, suffix: str) -> Any:
  return lambda ours, theirs, tokens: [
    Row(f'{ours}/{x}/{leaf}', f'{theirs}.{suffix}', form, part, 3)
    for part, x in enumerate('qkv')
  ]


KINDS = {
  'dense': _pair('kernel', 'dense'),
  'conv': _pair('kernel', 'conv'),
  'norm': _pair('scale', 'same'),
  'no_bias': lambda ours, theirs, tokens: [
    Row(f'{ours}/kernel', f'{theirs}.weight', 'dense')
  ],
  'bias': lambda ours, theirs, tokens: [Row(f'{ours}/bias', theirs)],
  'qkv': _fused('dense', 'kernel', 'weight'),
  'qkv_bias': _fused('same', 'bias', 'bias'),
  'token': lambda ours, theirs, tokens: [Row(ours, theirs, 'token')],
  'stacked_tokens': lambda ours, theirs, tokens: [
    Row(f'{ours}_{n}', theirs, 'token', n, tokens) for n in range(tokens)
  ],
  'tokens': lambda ours, theirs, tokens: [
    Row(f'{ours}_{n}', theirs.format(n=n), 'token') for n in range(tokens)
  ],
  # As Flax lays them out, which is ours but for axes of their own for heads
  # and for the frames and pixels of a patch.
  'flax_dense': _flax('kernel', 'same'),
  'flax_norm': _flax('scale', 'same'),
  'flax_patches': _flax('kernel', 'patches'),
  'flax_heads': _flax('kernel', 'heads', 'head_bias'),
  'flax_out': _flax('kernel', 'from_heads'),
  'table': lambda ours, theirs, tokens: [Row(ours, theirs)],
}

_MLP = (('mlp/fc1', 'mlp.fc1', 'dense'), ('mlp/fc2', 'mlp.fc2', 'dense'))
_VJEPA2_BLOCK = (
  ('norm_1', 'norm1', 'norm'),
  ('attn/q', 'attention.query', 'dense'),
  ('attn/k', 'attention.key', 'dense'),
  ('attn/v', 'attention.value', 'dense'),
  ('attn/out', 'attention.proj', 'dense'),
  ('norm_2', 'norm2', 'norm'),
  *_MLP,
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
  *_MLP,
)
_ORIGINAL_VJEPA2_BLOCK = (*_FUSED_BLOCK, ('attn', 'attn.qkv', 'qkv_bias'))
_ORIGINAL_VIDEOMAE_BLOCK = (
  *_FUSED_BLOCK,
  ('attn/q', 'attn.q_bias', 'bias'),
  ('attn/v', 'attn.v_bias', 'bias'),
)

VJEPA2 = {
  'encoder': Part(
    (
      ('embed', 'encoder.embeddings.patch_embeddings.proj', 'conv'),
      ('norm', 'encoder.layernorm', 'norm'),
    ),
    _VJEPA2_BLOCK,
    'encoder.layer.{i}',
  ),
  'head': Part(
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
  'encoder': Part(
    (
      ('embed', 'embeddings.patch_embeddings.projection', 'conv'),
      ('norm', 'layernorm', 'norm'),
    ),
    _VIDEOMAE_BLOCK,
    'encoder.layer.{i}',
  ),
  'head': Part(
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
  'encoder': Part(
    (('embed', 'patch_embed.proj', 'conv'), ('norm', 'norm', 'norm')),
    _ORIGINAL_VJEPA2_BLOCK,
    'blocks.{i}',
    ('target_encoder', 'encoder', ''),  # evaluation uses the average
  ),
  'head': Part(
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
  'encoder': Part(
    (('embed', 'patch_embed.proj', 'conv'), ('norm', 'norm', 'norm')),
    _ORIGINAL_VIDEOMAE_BLOCK,
    'blocks.{i}',
    ('model', 'module', ''),
  ),
  'head': Part(
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
# The names of the depth model, whose readout is left to `readout`, begin with
# `params/layers_0/`; `/` is read as `.`.
# Source: github.com/google-deepmind/representations4d at 75aca30, models/.
SCALING4D = {
  'encoder': Part(
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


@dataclasses.dataclass(frozen=True)
class Layout:
  """A family of files.

  Attributes:
    name: for messages.
    parts: `encoder` and `head` (its predictor or decoder).
    marks: names that only this layout has together.
    renames: (pattern, replacement) that bring all variants to the table's
      names: prefixes, and names that changed between releases.
    others: patterns of names that belong to neither part; never an error.
    family: `vjepa2`, `videomae` or `scaling4d`, which decides the fields of
      the network.
  """

  name: str
  parts: dict[str, Part]
  marks: tuple[str, ...]
  renames: tuple[tuple[str, str], ...]
  others: tuple[str, ...]
  family: str


LAYOUTS = (
  Layout(
    'V-JEPA 2 (transformers)',
    VJEPA2,
    ('encoder.embeddings.patch_embeddings.proj.weight',),
    ((r'^vjepa2\.', ''),),
    (r'pooler\.', r'classifier\.'),
    'vjepa2',
  ),
  Layout(
    'VideoMAE (transformers)',
    VIDEOMAE,
    ('embeddings.patch_embeddings.projection.weight',),
    (
      (r'^videomae\.', ''),
      # Every file on the hub has these names; transformers 5 renamed them.
      (r'\.attention\.q_bias$', '.attention.query.bias'),
      (r'\.attention\.v_bias$', '.attention.value.bias'),
    ),
    (r'fc_norm\.', r'classifier\.'),
    'videomae',
  ),
  Layout(
    'V-JEPA 2 (original)',
    ORIGINAL_VJEPA2,
    ('patch_embed.proj.weight', 'blocks.0.attn.qkv.bias'),
    ((r'^(module\.)?(backbone\.)?', ''),),
    (),
    'vjepa2',
  ),
  Layout(
    'VideoMAE (original)',
    ORIGINAL_VIDEOMAE,
    ('patch_embed.proj.weight', 'blocks.0.attn.q_bias'),
    ((r'^(module\.)?(encoder\.)?', ''),),
    (r'fc_norm\.', r'head\.'),
    'videomae',
  ),
  Layout(
    '4DS (released npz)',
    SCALING4D,
    ('encoder.posenc.embeddings', 'processor.layers_0.attention.query.kernel'),
    ((r'/', '.'), (r'^params\.(layers_0\.)?', '')),
    (r'layers_2\.',),  # the readout of the depth model
    'scaling4d',
  ),
)
