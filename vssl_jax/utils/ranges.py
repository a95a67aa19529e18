"""Declares config keys: each with its default value and its range.

    KEYS = Section(
      steps=(1000, Whole(1)),  # an integer of at least 1
      lr=(1e-3, Real(0, 1e3)),  # a finite number from 0 to 1000
      b1=(0.9, Real(0, below=1)),  # 1 itself is refused
      rule=('adamw', Choice(('adamw', 'sgd'))),
      flip=(True, Flag()),
      size=((224, 224), Tuple(Whole(1), lengths=(1, 2))),
      masks=('tube:0.9', Text(mask_specs.parse)),  # parse raises ValueError
      encoder=Section(...),
    )

To add a key, add a line to the `KEYS` of its module, with a comment beside it.
`KEYS.defaults()` returns the section as a `ConfigDict`;
`KEYS.check(section, name)` raises for the first value out of range.
`config.check` checks all keys of a run before the start, so that other code
does not need to.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_collections

LONGEST = 80  # characters of a value in a message
LONGEST_TEXT = 4096  # characters of a string, as of a path
# Largest number of steps or examples: devices count them in int32.
MANY = 10**9
# Least normal number of float32: devices may treat smaller ones as 0.
LEAST = 1.2e-38


class Range:
  """Set of allowed values of a key."""

  def wanted(self) -> str:
    """Describes the range for error messages."""
    raise NotImplementedError

  def fits(self, value: Any) -> bool:
    """Returns whether a value is in the range."""
    raise NotImplementedError

  def refusal(self, value: Any) -> str:
    """Returns why a value is out of range; '' if it is in range."""
    if self.fits(value):
      return ''
    return f'found {shown(value)}, wanted {self.wanted()}'


@dataclasses.dataclass(frozen=True)
class _Number(Range):
  """Numbers between bounds.

  Attributes:
    low: inclusive lower bound; None for no bound.
    high: inclusive upper bound; None for no bound.
    above: exclusive lower bound; None for no bound.
    below: exclusive upper bound; None for no bound.
    also: further allowed numbers, with a special meaning.
  """

  low: float | int | None = None
  high: float | int | None = None
  above: float | int | None = None
  below: float | int | None = None
  also: tuple[float | int, ...] = ()

  def wanted(self) -> str:
    """Describes the bounds."""
    bounds = [
      f'{words} {bound}'
      for words, bound in (
        ('of at least', self.low),
        ('above', self.above),
        ('of at most', self.high),
        ('below', self.below),
      )
      if bound is not None
    ]
    extra = ''.join(f', or {number}' for number in self.also)
    return ' '.join((self.noun, ' and '.join(bounds))).strip() + extra

  def fits(self, value: Any) -> bool:
    """Returns whether a value is a number within the bounds."""
    if isinstance(value, bool) or not isinstance(value, self.types):
      return False
    if value in self.also:
      return True
    return (
      -math.inf < value < math.inf
      and (self.low is None or value >= self.low)
      and (self.high is None or value <= self.high)
      and (self.above is None or value > self.above)
      and (self.below is None or value < self.below)
    )


class Whole(_Number):
  """Integers."""

  noun = 'an integer'
  types = (int,)


class Real(_Number):
  """Finite numbers."""

  noun = 'a number'
  types = (int, float)


@dataclasses.dataclass(frozen=True)
class Choice(Range):
  """One of a few values."""

  values: Sequence[Any]

  def wanted(self) -> str:
    """Lists the values."""
    return f'one of {tuple(self.values)}'

  def fits(self, value: Any) -> bool:
    """Returns whether a value equals one of them and has its type."""
    return any(type(value) is type(v) and value == v for v in self.values)


class Flag(Range):
  """True or False."""

  def wanted(self) -> str:
    """Lists both values."""
    return 'True or False'

  def fits(self, value: Any) -> bool:
    """Returns whether a value is a bool."""
    return isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Text(Range):
  """Strings.

  Attributes:
    parse: raises ValueError for strings outside of the range.
  """

  parse: Callable[[str], Any] | None = None

  def wanted(self) -> str:
    """Describes the allowed strings."""
    return f'a string of at most {LONGEST_TEXT} characters without NUL'

  def fits(self, value: Any) -> bool:
    """Returns whether a value is a string of allowed length without NUL."""
    return (
      isinstance(value, str)
      and len(value) <= LONGEST_TEXT
      and '\0' not in value
    )

  def refusal(self, value: Any) -> str:
    """Returns why a value is out of range; '' if it is in range."""
    if self.fits(value) and self.parse:
      try:
        self.parse(value)
      except ValueError as error:
        return str(error).replace(repr(value), shown(value))
    return super().refusal(value)


@dataclasses.dataclass(frozen=True)
class Tuple(Range):
  """Tuples whose items all have the same range.

  Attributes:
    item: range of each item.
    lengths: allowed numbers of items; () for any.
    rising: whether items must not decrease.
    unique: whether items must be distinct.
  """

  item: Range
  lengths: tuple[int, ...] = ()
  rising: bool = False
  unique: bool = False

  def wanted(self) -> str:
    """Describes the number of items and their range."""
    count = ' or '.join(map(str, self.lengths)) or 'any number of'
    order = ', in rising order' if self.rising else ''
    order += ', none of them twice' if self.unique else ''
    return f'a tuple of {count} items, each {self.item.wanted()}{order}'

  def fits(self, value: Any) -> bool:
    """Returns whether a value is a tuple of allowed length."""
    if not isinstance(value, tuple):
      return False
    return not self.lengths or len(value) in self.lengths

  def refusal(self, value: Any) -> str:
    """Returns why a value is out of range; '' if it is in range."""
    if not self.fits(value):
      return super().refusal(value)
    for item in value:
      if not self.item.fits(item):
        return f'found {shown(value)}, wanted {self.wanted()}'
      if refusal := self.item.refusal(item):
        return refusal
    order = list(value) == sorted(value) if self.rising else True
    if not order or (self.unique and len(set(value)) < len(value)):
      return f'found {shown(value)}, wanted {self.wanted()}'
    return ''


@dataclasses.dataclass(frozen=True)
class Record(Range):
  """Tuples of fixed length with one range per item."""

  items: tuple[Range, ...]

  def wanted(self) -> str:
    """Describes the ranges of all items."""
    return f'({", ".join(item.wanted() for item in self.items)})'

  def fits(self, value: Any) -> bool:
    """Returns whether a value is a tuple of the right length."""
    return isinstance(value, tuple) and len(value) == len(self.items)

  def refusal(self, value: Any) -> str:
    """Returns why a value is out of range; '' if it is in range."""
    if not self.fits(value):
      return super().refusal(value)
    refusals = (r.refusal(x) for r, x in zip(self.items, value, strict=True))
    return next(filter(None, refusals), '')


class Section(dict[str, Any]):
  """Section of a config: key -> (default, range), or a nested section.

  Raises:
    ValueError: a default is out of range.
  """

  def __init__(self, **keys: Any) -> None:
    super().__init__(keys)
    for name, (value, span) in self.flat():
      if refusal := span.refusal(value):
        raise ValueError(f'the default of {name}: {refusal}')

  def flat(self, prefix: str = '') -> Iterator[tuple[str, tuple[Any, Range]]]:
    """Yields the dotted name of every key with its default and range."""
    for name, declared in self.items():
      if isinstance(declared, Section):
        yield from declared.flat(f'{prefix}{name}.')
      else:
        yield f'{prefix}{name}', declared

  def defaults(self) -> ml_collections.ConfigDict:
    """Returns all keys at their default values."""
    return ml_collections.ConfigDict(
      {
        name: declared.defaults()
        if isinstance(declared, Section)
        else declared[0]
        for name, declared in self.items()
      }
    )

  def check(self, section: ml_collections.ConfigDict, prefix: str = '') -> None:
    """Raises for the first value out of range.

    Args:
      section: section of a config. Missing and additional keys are ignored.
      prefix: name of the section, for messages.

    Raises:
      ValueError: the message has one line: key, value, range, default.
    """
    prefix += '.' if prefix else ''
    for name, declared in self.items():
      if name not in section:
        continue
      value = section[name]
      if isinstance(declared, Section):
        if not isinstance(value, ml_collections.ConfigDict):
          raise ValueError(
            f'{prefix}{name}: found {shown(value)}, wanted a section with keys '
            f'{list(declared)}'
          )
        declared.check(value, prefix + name)
      elif refusal := declared[1].refusal(value):
        raise ValueError(
          f'{prefix}{name}: {refusal.removeprefix(f"{prefix}{name}: ")}; set '
          f'--config.{prefix}{name} (default {shown(declared[0])})'
        )


def shown(value: Any) -> str:
  """Formats a value in at most `LONGEST` characters."""
  try:
    text = repr(value)
  except ValueError:  # integers of more digits than Python prints
    return f'{type(value).__name__} too long to print'
  return text if len(text) <= LONGEST else f'{text[: LONGEST - 4]} ...'


def pattern(text: str) -> None:
  """Raises ValueError if a text is not a valid regular expression."""
  try:
    re.compile(text)
  except (re.error, OverflowError, RecursionError) as error:
    raise ValueError(
      f'found {shown(text)}, wanted a regular expression: {error}'
    ) from error
