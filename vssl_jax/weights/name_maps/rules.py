"""Defines tables from published parameter names to ours.

A line of a table has the name of one of our layers, its published name, and the
kind of layer. `Part.rows` converts lines to pairs of tensors. `{i}` is the
index of the block and `{n}` that of the mask token.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from vssl_jax.weights.readers import tensors

MAX_BLOCKS = 512  # a ViT-e has 56


class Row(NamedTuple):
  """One of our parameters and the published tensor, or part of it, for it.

  Attributes:
    ours: our name, such as `block_00/attn/q/kernel`.
    theirs: published name, such as `blocks.0.attn.qkv.weight`.
    form: how the tensor is converted, a name in `convert.FORMS`.
    part: index of the part, of `parts` equal ones along the first axis.
    parts: number of parts.
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
    layers: (our name, published name, kind) of layers outside the blocks.
    block: (our name, published name, kind) of layers inside a block.
    blocks: published name of block {i}.
    groups: keys of the network in a `.pth` file, in order of preference for
      evaluation; '' for the top level.
    trained: keys with priority over `groups` for continued training.
  """

  layers: tuple[tuple[str, str, str], ...]
  block: tuple[tuple[str, str, str], ...]
  blocks: str
  groups: tuple[str, ...] = ('',)
  trained: tuple[str, ...] = ()

  def depth(self, names: Iterable[str]) -> int:
    """Returns the number of blocks of a file, by its tensor names.

    Args:
      names: names of the file's tensors.

    Raises:
      WeightsError: more blocks than any model has, or gaps in their numbers,
        for example in a hostile file.
    """
    pattern = re.escape(self.blocks).replace(r'\{i\}', r'(\d+)')
    texts = {m[1] for n in names if (m := re.match(pattern, n))}
    if any(len(text) > 4 or int(text) >= MAX_BLOCKS for text in texts):
      raise tensors.WeightsError(
        f'found a block {tensors.short(max(texts, key=len))}, wanted at most '
        f'{MAX_BLOCKS} blocks'
      )
    blocks = {int(text) for text in texts}
    depth = max(blocks, default=-1) + 1
    if len(blocks) != depth:  # a network of many blocks takes long to build
      gap = min(set(range(depth)) - blocks)
      raise tensors.WeightsError(
        f'found a block {self.blocks.format(i=depth - 1)} and none '
        f'{self.blocks.format(i=gap)}, wanted all {depth}; the file is '
        'incomplete'
      )
    return depth

  def rows(self, depth: int, tokens: int = 1) -> tuple[Row, ...]:
    """Returns the rows of all tensors of the network.

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
  """Returns the rows of SwiGLU's fused layer: gate first, then value."""
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
  # Flax layouts: as ours, except for separate axes for heads and for the frames
  # and pixels of a patch.
  'flax_dense': _flax('kernel', 'same'),
  'flax_norm': _flax('scale', 'same'),
  'flax_patches': _flax('kernel', 'patches'),
  'flax_heads': _flax('kernel', 'heads', 'head_bias'),
  'flax_out': _flax('kernel', 'from_heads'),
  'table': lambda ours, theirs, tokens: [Row(ours, theirs, 'table')],
  # One table whose first row is for the class token.
  'class_table': lambda ours, theirs, tokens: [
    Row('class_position', theirs, 'class_row'),
    Row('positions', theirs, 'grid_rows'),
  ],
}


def by_name(rows: Iterable[Row], names: Iterable[str]) -> dict[str, Row]:
  """Returns our name -> row, with preference for rows that are in the file.

  Args:
    rows: a table. It can have several rows for one of our parameters, if its
      published name varies between codebases.
    names: names of the file's tensors.
  """
  rows, names = list(rows), set(names)
  present = {r.ours: r for r in rows if r.theirs in names}
  return {r.ours: r for r in reversed(rows)} | present


# Lines of a block with the most common names of the MLP layers.
MLP = (('mlp/fc1', 'mlp.fc1', 'dense'), ('mlp/fc2', 'mlp.fc2', 'dense'))


@dataclasses.dataclass(frozen=True)
class Layout:
  """A layout of published files.

  Attributes:
    name: name for messages.
    parts: tables of the `encoder` and the `head` (its predictor or decoder).
    marks: names by which the layout is recognised. The first layout whose
      marks are all in the file is used.
    renames: (pattern, replacement) that convert the names of all variants to
      those of the table: prefixes, and names that differ between releases.
    others: patterns of names that belong to neither part and are ignored.
    family: `vjepa2`, `videomae`, `scaling4d`, `image` or `hiera`; determines
      the fields of the network.
    resize: method by which the released code resizes learned positions to
      another grid, a name in `resizing.NAMES`.
  """

  name: str
  parts: dict[str, Part]
  marks: tuple[str, ...]
  renames: tuple[tuple[str, str], ...]
  others: tuple[str, ...]
  family: str
  resize: str = 'trilinear'
