"""What a table of names is made of: published weights beside ours.

A line of a table pairs one of our layers with one of theirs, and says what
kind it is; `rows` turns it into pairs of tensors. `{i}` is the block and `{n}`
a running number.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from vssl_jax.weights import read

MAX_BLOCKS = 512  # of which a ViT-e has 56


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
    groups: where in a `.pth` file it is, best to evaluate first; '' for the
      top.
    trained: those to continue training from, which come before `groups` then.
  """

  layers: tuple[tuple[str, str, str], ...]
  block: tuple[tuple[str, str, str], ...]
  blocks: str
  groups: tuple[str, ...] = ('',)
  trained: tuple[str, ...] = ()

  def depth(self, names: Iterable[str]) -> int:
    """Returns how many blocks a file has, whatever its config says.

    Raises:
      WeightsError: more than any model has, or numbers without a block, as by
        a hostile name.
    """
    pattern = re.escape(self.blocks).replace(r'\{i\}', r'(\d+)')
    texts = {m[1] for n in names if (m := re.match(pattern, n))}
    if any(len(text) > 4 or int(text) >= MAX_BLOCKS for text in texts):
      raise read.WeightsError(
        f'found a block {read.short(max(texts, key=len))}, wanted at most '
        f'{MAX_BLOCKS} blocks'
      )
    blocks = {int(text) for text in texts}
    depth = max(blocks, default=-1) + 1
    if len(blocks) != depth:  # networks of many blocks take long to build
      gap = min(set(range(depth)) - blocks)
      raise read.WeightsError(
        f'found a block {self.blocks.format(i=depth - 1)} and none '
        f'{self.blocks.format(i=gap)}, wanted all {depth}; the file is not '
        'whole'
      )
    return depth

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


def _halves(ours: str, theirs: str, tokens: int) -> list[Row]:
  """One linear layer for SwiGLU's gate and for what it gates."""
  del tokens
  return [
    Row(f'{ours}/{layer}/{leaf}', f'{theirs}.{suffix}', form, part, 2)
    for part, layer in enumerate(('gate', 'fc1'))
    for leaf, suffix, form in (
      ('kernel', 'weight', 'dense'),
      ('bias', 'bias', 'same'),
    )
  ]


KINDS = {
  'dense': _pair('kernel', 'dense'),
  'conv': _pair('kernel', 'conv'),
  'image_conv': _pair('kernel', 'image_conv'),
  'whole_conv': _pair('kernel', 'whole_conv'),
  'norm': _pair('scale', 'same'),
  'no_bias': lambda ours, theirs, tokens: [
    Row(f'{ours}/kernel', f'{theirs}.weight', 'dense')
  ],
  'bias': lambda ours, theirs, tokens: [Row(f'{ours}/bias', theirs)],
  'qkv': _fused('dense', 'kernel', 'weight'),
  'qkv_bias': _fused('same', 'bias', 'bias'),
  'swiglu': _halves,
  'registers': lambda ours, theirs, tokens: [Row(ours, theirs, 'registers')],
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
  'table': lambda ours, theirs, tokens: [Row(ours, theirs, 'table')],
  # One table whose first row belongs to the class token.
  'class_table': lambda ours, theirs, tokens: [
    Row('class_position', theirs, 'class_row'),
    Row('positions', theirs, 'grid_rows'),
  ],
}


def by_name(rows: Iterable[Row], names: Iterable[str]) -> dict[str, Row]:
  """Returns our names and their rows; a row that the file has comes first.

  Args:
    rows: a table, which may have several rows for a leaf of ours where codes
      name it differently.
    names: of the file's tensors.
  """
  rows, names = list(rows), set(names)
  there = {r.ours: r for r in rows if r.theirs in names}
  return {r.ours: r for r in reversed(rows)} | there


# Lines of a block, as most codes call these layers.
MLP = (('mlp/fc1', 'mlp.fc1', 'dense'), ('mlp/fc2', 'mlp.fc2', 'dense'))


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
    family: `vjepa2`, `videomae`, `scaling4d`, `image` or `hiera`, which
      decides the fields of the network.
    resize: how the released code makes its learned positions fit another
      grid, a name in `resizing.NAMES`.
  """

  name: str
  parts: dict[str, Part]
  marks: tuple[str, ...]
  renames: tuple[tuple[str, str], ...]
  others: tuple[str, ...]
  family: str
  resize: str = 'trilinear'
