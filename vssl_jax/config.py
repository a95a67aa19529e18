"""Every key a run can have, and how a page and the command line set them.

A page (`configs/*.py`) defines `get_config(variant='')`, which starts from
`default()` and overrides. Keys that do not exist are errors. A page is code:
it is run only from the clone's `configs/`, the current directory, or a folder
given with `--config_root`.
"""

import ast
import difflib
import fnmatch
import importlib.util
import json
import pathlib
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from vssl_jax import methods, ranges
from vssl_jax.data import options
from vssl_jax.evals import finetune_options, probe
from vssl_jax.train import optimizer

KEYS = ranges.Section(  # of every method; a full run of SALT
  job=(
    'train',
    ranges.Choice(('train', 'probe', 'depth', 'finetune', 'demo')),
  ),
  seed=(0, ranges.Whole(0, 2**32 - 1)),
  # Everything a run writes; '' is runs/<page>[-<variant>].
  workdir=('', ranges.Text()),
  # What a 'probe' measures and 'finetune' starts from: a run folder, a local
  # folder with published weights, or a hub id.
  encoder=('', ranges.Text()),
  # clips per step over all devices
  batch_size=(3072, ranges.Whole(1, 2**20)),
  optim=optimizer.KEYS,
  data=options.KEYS,
  mesh=ranges.Section(
    data=(1, ranges.Whole(1, 2**20, also=(-1,))),  # replicas
    # devices that split parameters and the batch; -1: the rest
    fsdp=(-1, ranges.Whole(1, 2**20, also=(-1,))),
    # ((regular expression of a leaf's name, (axis or None, ...)), ...)
    overrides=(
      (),
      ranges.Tuple(
        ranges.Record(
          (
            ranges.Text(ranges.pattern),
            ranges.Tuple(ranges.Choice(('data', 'fsdp', None))),
          )
        )
      ),
    ),
  ),
  # Folder for what frozen teachers say of the clips: written at a clip's first
  # visit and read at later ones, when the step does without its teachers. Clips
  # must be the same at every visit (data.sampling='middle', crop='centre', no
  # flip); one process only. --plan says how large it becomes. '': no cache.
  cache_targets=('', ranges.Text()),
  # Compile the next phase's step in the background while this one runs.
  compile_ahead=(True, ranges.Flag()),
  checkpoint=ranges.Section(
    every=(1000, ranges.Whole(1, ranges.MANY)),  # steps
    keep=(2, ranges.Whole(1, 10**6)),  # whole states
    # Phases whose parameters are saved at their end, and stay: regular
    # expressions of whole names. The last phase's are in any case, and those
    # that a later phase needs as its teacher.
    keep_phases=(('.*',), ranges.Tuple(ranges.Text(ranges.pattern))),
    # States after a multiple of so many steps are never removed, so that a
    # run can be taken back to them; 0: none.
    keep_every=(0, ranges.Whole(0, ranges.MANY)),
    # Every so many steps one is recorded, for --replay; best a multiple of
    # `every`, so that a state is kept from right before it. 0: none.
    probe_every=(1000, ranges.Whole(0, ranges.MANY)),
    # Resume from the newest whole checkpoint in workdir. False refuses a
    # workdir that holds one.
    resume=(True, ranges.Flag()),
    # A resumed run may differ from its first start in these keys only. Keys
    # that came into being later must have their defaults.
    may_change=(
      (
        'workdir',
        'mesh',
        'compile_ahead',
        'cache_targets',  # where they are; not whether there are any
        'method.layout',
        'checkpoint',
        'log',
        'health',
        'data.examples',
        'data.allow_change',
        'data.workers',
        'data.decode_processes',
        'data.isolate',
        'data.prefetch',
        'data.deadline_s',
        'data.memory_limit_mb',
        'method.source',  # where its copy of the first weights lies
        'finetune.test',
        'finetune.test_where',
        'finetune.allow_overlap',
        'finetune.test_batch_size',
        'finetune.sampling',
        'finetune.clips',
        'finetune.views',
      ),
      ranges.Tuple(ranges.Text()),
    ),
  ),
  log=ranges.Section(
    every=(50, ranges.Whole(1, ranges.MANY)),  # steps between lines of metrics
    tensorboard=(True, ranges.Flag()),  # where tensorboardX is installed
    # per device, for utilisation; 0: by device name
    peak_tflops=(0.0, ranges.Real(0, 1e6)),
  ),
  health=ranges.Section(
    # fraction of the run, or steps if over 1; 0: never
    every=(0.05, ranges.Real(0, ranges.MANY)),
    # clips that the panel looks at
    clips=(256, ranges.Whole(1, 2**20)),
    # stop after so many steps in a row without an update
    max_skipped=(50, ranges.Whole(0, ranges.MANY)),
    # Stop at the end of a phase of which more than this fraction of the
    # steps, or all, had no update.
    skipped_share=(0.5, ranges.Real(0, 1)),
    # warn above this multiple of the running median loss; 0: never
    spike_alarm=(10.0, ranges.Real(0)),
  ),
  probe=probe.KEYS,
  finetune=finetune_options.KEYS,
)


def keys(method: str) -> ranges.Section:
  """Returns every key of a run, with defaults and ranges.

  Args:
    method: whose keys `method` holds.

  Raises:
    ValueError: no method has that name.
  """
  return ranges.Section(**{**KEYS, 'method': methods.keys(method)})


# Jobs that take clips as an encoder was trained on.
OF_ENCODERS = ('probe', 'depth', 'finetune')


def default(method: str = 'salt') -> ml_collections.ConfigDict:
  """Returns every key there is, at the values of a full SALT run.

  Args:
    method: whose keys `config.method` holds.
  """
  # A page that invents a key fails there.
  return keys(method).defaults().lock()


def check(config: ml_collections.ConfigDict) -> None:
  """Raises for the first key that is unknown or outside of its range.

  Raises:
    ValueError: in one line: key, value, range, default.
  """
  declared = keys(config.method.name)
  names = [name for name, _ in declared.flat()]
  for name, value in flatten(config):
    if name not in names:
      near = difflib.get_close_matches(name, names, 1)
      raise ValueError(
        f'{name}: found {ranges.shown(value)} for a key that does not exist'
        + (f'; did you mean {near[0]}?' if near else '')
      )
  declared.check(config)
  if config.job in OF_ENCODERS:
    return
  for name in ('frames', 'stride', 'size', 'channels'):
    value = config.data[name]
    if not (all(value) if isinstance(value, tuple) else value):
      raise ValueError(
        f'data.{name}: found {ranges.shown(value)}, wanted at least 1: only in '
        f'the jobs {", ".join(OF_ENCODERS)} an encoder decides it'
      )


def evaluation(job: str) -> ml_collections.ConfigDict:
  """Returns the default of a job that takes clips as its encoder saw them.

  Args:
    job: 'probe', 'depth' or 'finetune'.
  """
  c = default('supervised' if job == 'finetune' else 'salt')
  c.job = job
  c.data.update(dict(frames=0, stride=0, size=(0, 0), channels=0))
  return c


def fine_tuning() -> ml_collections.ConfigDict:
  """Returns the job `finetune` by the recipe of VideoMAE and MVD, ViT-B."""
  c = evaluation('finetune')
  c.data.workers = 8
  c.data.sampling = 'linspace'
  c.data.update(dict(crop_scale=(0.08, 1.0), crop_aspect=(0.75, 4 / 3)))
  c.data.update(dict(auto_augment='rand-m7-n4-mstd0.5-inc1', erase=0.25))
  # Repeated augmentation: two crops of the same frames.
  c.data.update(dict(repeats=2, repeat_frames='shared'))
  c.optim.update(dict(lr=5e-4, lr_start=0.0, lr_end=1e-6, layer_decay=0.75))
  c.optim.update(dict(weight_decay=0.05, weight_decay_end=0.05))
  c.optim.update(dict(b2=0.999, clip=0.0, decay_tokens=False))
  # Features of one class are meant to grow alike here.
  c.health.every = 0.0
  return c


def load(
  spec: str, roots: tuple[str, ...] = ()
) -> tuple[str, ml_collections.ConfigDict]:
  """Runs a config page.

  Args:
    spec: `path/to/page.py` or `path/to/page.py:variant`.
    roots: folders that pages may come from besides the clone's `configs/` and
      the current directory.

  Returns:
    A name for the run (`page` or `page-variant`) and the config.

  Raises:
    ValueError: the path is a URL, leads out of the roots, or is no page.
  """
  path_text, _, variant = spec.partition(':')
  if '://' in spec:
    raise ValueError(
      f'--config: found the address {spec!r}; a page is code and is run only '
      'from a local file'
    )
  path = pathlib.Path(path_text)
  allowed = [pathlib.Path.cwd(), clone_root() / 'configs', *roots]
  if not path.exists() and (clone_root() / path_text).exists():
    path = clone_root() / path_text
  resolved = path.resolve()  # follows links, so a link out is seen as such
  if not any(resolved.is_relative_to(_resolve(r)) for r in allowed):
    raise ValueError(
      f'--config: {path_text} is {resolved}, outside of '
      f'{[str(_resolve(r)) for r in allowed]}; a page is code. If you trust '
      f'it, add --config_root={resolved.parent}'
    )
  if not resolved.is_file():
    found = sorted(p.name for p in (clone_root() / 'configs').glob('*.py'))
    near = difflib.get_close_matches(path.name, found, 1)
    raise ValueError(
      f'--config: no file {path_text}'
      + (f'; did you mean configs/{near[0]}?' if near else f'; pages: {found}')
    )
  if resolved.suffix != '.py':
    raise ValueError(
      f'--config: found {path_text}, wanted a page, which ends in .py'
    )
  name = resolved.stem + (f'-{variant}' if variant else '')
  module_spec = importlib.util.spec_from_file_location(
    f'vssl_jax_page_{resolved.stem}', resolved
  )
  module = importlib.util.module_from_spec(module_spec)
  try:
    module_spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
      raise ValueError(f'--config: {path_text} defines no get_config(variant)')
    config = module.get_config(variant)
  except ValueError:
    raise
  except Exception as error:  # a page is code: anything may go wrong in it
    raise ValueError(_wrong_line(path_text, module.__file__, error)) from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise ValueError(
      f'{path_text}: get_config returned {ranges.shown(config)}, wanted '
      'config.default(...) with changes'
    )
  return name, config


def _wrong_line(page: str, file: str, error: Exception) -> str:
  """Returns file, line and message of an error that a page raised."""
  if isinstance(error, SyntaxError):
    return f'{page}, line {error.lineno}: {error.msg}'
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if frame.filename == file
  ]
  text = str(error.args[0] if error.args else error).strip('"\'')
  text = ' '.join(text.partition('. Other')[0].split())
  if isinstance(error, AttributeError | KeyError | TypeError):
    advice = (
      'Every key has its place and its range in vssl_jax/config.py and beside '
      'the methods'
    )
  else:
    text, advice = f'{type(error).__name__}: {text}', 'Correct the page'
  return f'{page}, line {lines[-1] if lines else 1}: {text}. {advice}'


def clone_root() -> pathlib.Path:
  """Returns the folder that holds the package: the clone, when it is one."""
  return pathlib.Path(__file__).resolve().parent.parent


def _resolve(path: str | pathlib.Path) -> pathlib.Path:
  return pathlib.Path(path).expanduser().resolve()


def override(
  config: ml_collections.ConfigDict, assignments: list[str]
) -> ml_collections.ConfigDict:
  """Applies `key.sub=value` assignments from the command line.

  Values are read as Python literals where they are one, else as text, and
  must have the type of the value they replace.

  Raises:
    ValueError: a key that does not exist (the nearest is named) or a value of
      another type.
  """
  for assignment in assignments:
    key, equals, text = assignment.partition('=')
    if not equals:
      raise ValueError(
        f'--config.{key}: no value; write --config.{key}=<value>'
      )
    keys = [k for k, _ in flatten(config)]
    if key not in keys:
      inside = [k[len(key) + 1 :] for k in keys if k.startswith(key + '.')]
      near = difflib.get_close_matches(key, keys, 1)
      if inside:
        first = list(dict.fromkeys(k.partition('.')[0] for k in inside))
        raise ValueError(
          f'--config.{key}: no such key; {key} is a section with keys {first}'
        )
      raise ValueError(
        f'--config.{key}: no such key'
        + (f'; did you mean --config.{near[0]}?' if near else '')
      )
    section = config
    *parents, last = key.split('.')
    for parent in parents:
      section = section[parent]
    value = _parse(text, section[last], key)
    if key == 'method.name' and value != section[last]:
      raise ValueError(
        f'--config.{key}: found {value!r} for a page whose knobs are those of '
        f'{section[last]!r}; take a page of that method, see configs/README.md'
      )
    section[last] = value
  return config


def refuse_unused(
  job: str, assignments: Sequence[str], unused: Mapping[str, str]
) -> None:
  """Refuses keys of the command line that a job overwrites or ignores.

  Args:
    job: its name.
    assignments: `key.sub=value`, as of `override`.
    unused: pattern of keys -> the key to use instead, or the reason. The first
      pattern that matches counts.

  Raises:
    ValueError: there is such a key.
  """
  for key in (assignment.partition('=')[0] for assignment in assignments):
    for pattern, remedy in unused.items():
      if fnmatch.fnmatchcase(key, pattern):
        raise ValueError(
          f'--config.{key}: the job {job!r} does not use this key; {remedy}'
        )


def _parse(text: str, old: Any, key: str) -> Any:
  """Reads a value of the type of the one it replaces."""
  wanted = type(old)
  if wanted is str:
    return text
  if wanted is bool:
    words = {'true': True, '1': True, 'false': False, '0': False}
    if text.lower() not in words:
      raise ValueError(f'--config.{key}: found {text!r}, wanted True or False')
    return words[text.lower()]
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    value = text
  if wanted is tuple and not isinstance(value, tuple):
    value = tuple(value) if isinstance(value, list) else (value,)
  if wanted is float and type(value) is int:
    value = float(value)
  if wanted is int and isinstance(value, float) and value.is_integer():
    value = int(value)
  if type(value) is not wanted:
    raise ValueError(
      f'--config.{key}: found {text!r}, wanted '
      f'{"an" if wanted is int else "a"} {wanted.__name__} such as '
      f'{old!r}'
    )
  return value


def flatten(
  config: ml_collections.ConfigDict, prefix: str = ''
) -> list[tuple[str, Any]]:
  """Returns `(dotted key, value)` of every leaf."""
  out = []
  for key, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      out += flatten(value, f'{prefix}{key}.')
    else:
      out.append((prefix + key, value))
  return out


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the config as plain nested dicts, as JSON would read it back."""
  return json.loads(json.dumps(config.to_dict(), default=list))


def from_json(tree: dict[str, Any]) -> ml_collections.ConfigDict:
  """Reads back `to_json`; JSON's lists are tuples again."""

  def one(x: Any) -> Any:
    if isinstance(x, dict):
      return {k: one(v) for k, v in x.items()}
    return tuple(one(v) for v in x) if isinstance(x, list) else x

  return ml_collections.ConfigDict(one(tree))


def difference(
  before: ml_collections.ConfigDict,
  after: ml_collections.ConfigDict,
  except_for: tuple[str, ...] = (),
) -> str:
  """Returns a line for every key whose value differs; '' if none does.

  Args:
    before: one config.
    after: another.
    except_for: keys or sections that may differ.
  """
  a, b = dict(flatten(before)), dict(flatten(after))
  lines = [
    f'  {k}: was {a.get(k, "absent")!r}, is {b.get(k, "absent")!r}'
    for k in sorted(a.keys() | b.keys())
    if a.get(k) != b.get(k)
    and not any(k == e or k.startswith(e + '.') for e in except_for)
  ]
  return '\n'.join(lines)


def describe(
  config: ml_collections.ConfigDict, base: ml_collections.ConfigDict
) -> str:
  """Returns one line for every key, marking those that differ from `base`."""
  defaults = dict(flatten(base))
  lines = []
  for key, value in flatten(config):
    mark = ' ' if defaults.get(key, value) == value else '*'
    lines.append(f'{mark} {key} = {value!r}')
  return '\n'.join(lines)
