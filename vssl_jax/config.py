"""Config keys of a run, config pages, and command-line overrides.

A page (`configs/*.py`) defines `get_config(variant='')`, which calls
`default()` and overrides values. Unknown keys are errors. A page is code: it
is run only from the clone's `configs/`, the current directory, or a folder
given with `--config_root`.
"""

import ast
import dataclasses
import difflib
import fnmatch
import importlib.util
import os
import pathlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from vssl_jax import methods
from vssl_jax.data import options
from vssl_jax.evals.finetune import options as finetune_options
from vssl_jax.evals.probe import train_heads, unused_options
from vssl_jax.train import optimizer
from vssl_jax.utils import config_io, ranges

KEYS = ranges.Section(  # shared by all methods; a full run of SALT
  job=(
    'train',
    ranges.Choice(('train', 'probe', 'depth', 'finetune', 'demo')),
  ),
  seed=(0, ranges.Whole(0, 2**32 - 1)),
  # Run folder, for all output; '' is runs/<page>[-<variant>].
  workdir=('', ranges.Text()),
  # Encoder that 'probe' evaluates and 'finetune' starts from: a run folder, a
  # local folder with published weights, or a hub id.
  encoder=('', ranges.Text()),
  # clips per step over all devices
  batch_size=(options.BATCH_SIZE, ranges.Whole(1, 2**20)),
  optim=optimizer.KEYS,
  data=options.KEYS,
  mesh=ranges.Section(
    data=(1, ranges.Whole(1, 2**20, also=(-1,))),  # replicas
    # devices over which parameters and batch are sharded; -1: the rest
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
  # Folder for cached targets (outputs of frozen teachers). They are written in
  # a clip's first epoch and read in later ones, where the step runs without
  # teachers. Clips must be the same in every epoch (data.sampling='middle',
  # crop='centre', no flip); one process only. --plan prints its size.
  # '': no cache.
  cache_targets=('', ranges.Text()),
  # Compile the next phase's step in the background while this one runs.
  compile_ahead=(True, ranges.Flag()),
  checkpoint=ranges.Section(
    every=(1000, ranges.Whole(1, ranges.MANY)),  # steps
    keep=(2, ranges.Whole(1, 10**6)),  # number of full states kept
    # Phases whose final parameters are saved and never removed: regular
    # expressions that match the full name. The last phase and the teachers of
    # later phases are always saved.
    keep_phases=(('.*',), ranges.Tuple(ranges.Text(ranges.pattern))),
    # States at multiples of this number of steps are never removed, so that a
    # run can be rewound to them; 0: none.
    keep_every=(0, ranges.Whole(0, ranges.MANY)),
    # Interval in steps at which a step is recorded for --replay. It should be
    # a multiple of `every`, so that the state before it is saved. 0: none.
    record_every=(1000, ranges.Whole(0, ranges.MANY)),
    # Resume from the newest intact checkpoint in workdir. False: raise if
    # workdir contains one.
    resume=(True, ranges.Flag()),
    # Keys that may change when a run is resumed. Keys that were added to the
    # package since must have their default values.
    may_change=(
      (
        'workdir',
        'mesh',
        'compile_ahead',
        'cache_targets',  # its folder, not whether there is a cache
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
        'method.source',  # location of the copy of its initial weights
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
    tensorboard=(True, ranges.Flag()),  # if tensorboardX is installed
    # peak per device, for utilisation; 0: looked up by device name
    peak_tflops=(0.0, ranges.Real(0, 1e6)),
  ),
  health=ranges.Section(
    # interval: fraction of the run, or steps if over 1; 0: never
    every=(0.05, ranges.Real(0, ranges.MANY)),
    # clips in the panel
    clips=(256, ranges.Whole(1, 2**20)),
    # stop after this many consecutive steps without an update
    max_skipped=(50, ranges.Whole(0, ranges.MANY)),
    # Stop at the end of a phase if all of its steps, or more than this
    # fraction, had no update.
    skipped_share=(0.5, ranges.Real(0, 1)),
    # warn if the loss exceeds this multiple of its running median; 0: never
    spike_alarm=(10.0, ranges.Real(0)),
  ),
  probe=train_heads.KEYS,
  finetune=finetune_options.KEYS,
)


def keys(method: str) -> ranges.Section:
  """Returns all config keys of a run, with defaults and ranges.

  Args:
    method: name of the method, whose keys are under `method`.

  Raises:
    ValueError: unknown method.
  """
  return ranges.Section(**{**KEYS, 'method': methods.keys(method)})


def _unused_by_demo(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Maps patterns of keys that the demo does not read to remedies."""
  data_remedy = (
    'the demo writes its own videos. For yours take a page such as '
    'configs/salt_single_gpu.py with --config.data.source'
  )
  names = ('source', 'where', 'path_column', 'label_column', 'split', 'classes')
  used = {f.name for f in dataclasses.fields(train_heads.Settings)} | {
    'batch_size'
  }
  probe_remedy = (
    'the demo measures with linear probes and nearest neighbours only'
  )
  return {
    **{f'data.{name}': data_remedy for name in (*names, 'examples', 'weights')},
    **{f'probe.{n}': probe_remedy for n in config.probe if n not in used},
    **unused_options.of_data(config.data, config.data.repeats, tested=False),
    **unused_options.one_head(config.probe),
    'encoder': 'the demo measures the encoder that it trains',
    'finetune.*': 'the demo fine-tunes nothing',
  }


TRAIN_UNUSED = {
  'encoder': 'to start from weights, set the key init_from of a phase in '
  'config.method',
  'probe.*': 'it belongs to the jobs probe and depth (configs/probe_*.py)',
  'finetune.*': 'it belongs to the job finetune (configs/finetune_*.py)',
}
# Job -> config -> patterns of keys that the job does not read, and remedies.
UNUSED: dict[str, Callable[[ml_collections.ConfigDict], dict[str, str]]] = {
  'train': lambda config: (
    TRAIN_UNUSED
    | unused_options.of_data(config.data, config.data.repeats, tested=False)
  ),
  'probe': unused_options.unused_by_probe,
  'depth': unused_options.unused_by_depth,
  'finetune': finetune_options.unused,
  'demo': _unused_by_demo,
}
# Jobs whose clip shape is that of the encoder.
OF_ENCODERS = ('probe', 'depth', 'finetune')


def default(method: str = 'salt') -> ml_collections.ConfigDict:
  """Returns the default config: the values of a full SALT run.

  Args:
    method: name of the method, whose keys are under `config.method`.
  """
  # Locked, so that a page cannot add a key.
  return keys(method).defaults().lock()


def check(config: ml_collections.ConfigDict) -> None:
  """Raises for the first key that is unknown or whose value is out of range.

  Raises:
    ValueError: the message has one line: key, value, range, default.
  """
  declared = keys(config.method.name)
  names = [name for name, _ in declared.flat()]
  for name, value in config_io.flatten(config):
    if name not in names:
      near = difflib.get_close_matches(name, names, 1)
      raise ValueError(
        f'{name}: found {ranges.shown(value)} for a key that does not exist'
        + (f'; did you mean {near[0]}?' if near else '')
      )
  declared.check(config)
  if config.data.depth_units and config.job in ('train', 'finetune', 'demo'):
    raise ValueError(
      f'data.depth_units: found {config.data.depth_units} for the job '
      f"{config.job!r}, wanted 0: only the job 'depth' reads depth"
    )
  if config.job in OF_ENCODERS:
    return
  for name in ('frames', 'stride', 'size', 'channels'):
    value = config.data[name]
    if not (all(value) if isinstance(value, tuple) else value):
      raise ValueError(
        f'data.{name}: found {ranges.shown(value)}, wanted at least 1: only '
        f'the jobs {", ".join(OF_ENCODERS)} take it from an encoder'
      )


def defaults(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns default values by dotted key, for a config's method."""
  return dict(config_io.flatten(default(config.method.name)))


def evaluation(job: str) -> ml_collections.ConfigDict:
  """Returns the default config of a job that evaluates an encoder.

  Frames, stride, size and channels are set to 0: the encoder determines them.

  Args:
    job: 'probe', 'depth' or 'finetune'.
  """
  c = default('supervised' if job == 'finetune' else 'salt')
  c.job = job
  c.data.update(dict(frames=0, stride=0, size=(0, 0), channels=0))
  return c


def fine_tuning() -> ml_collections.ConfigDict:
  """Returns the `finetune` config: the recipe of VideoMAE and MVD, ViT-B."""
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
  # No health checks: features of one class are supposed to become similar.
  c.health.every = 0.0
  return c


def load(
  spec: str, roots: tuple[str, ...] = ()
) -> tuple[str, ml_collections.ConfigDict]:
  """Runs a config page.

  Args:
    spec: `path/to/page.py` or `path/to/page.py:variant`.
    roots: allowed folders for pages, in addition to the clone's `configs/` and
      the current directory.

  Returns:
    The name of the run (`page` or `page-variant`) and the config.

  Raises:
    ValueError: the path is a URL, is outside of the allowed folders, or is not
      a config page.
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
  resolved = path.resolve()  # resolves links, to detect links to other folders
  if not any(resolved.is_relative_to(_resolve(r)) for r in allowed):
    raise ValueError(
      f'--config: {path_text} is {resolved}, outside of '
      f'{[str(_resolve(r)) for r in allowed]}; a page is code. If you trust '
      f'it, add --config_root={resolved.parent}'
    )
  if not resolved.is_file():
    pages = sorted(p.name for p in (clone_root() / 'configs').glob('*.py'))
    near = difflib.get_close_matches(path.name, pages, 1)
    raise ValueError(
      f'--config: no file {path_text}'
      + (f'; did you mean configs/{near[0]}?' if near else f'; pages: {pages}')
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
  except Exception as error:  # a page is code and can raise anything
    raise ValueError(_wrong_line(path_text, module.__file__, error)) from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise ValueError(
      f'{path_text}: get_config returned {ranges.shown(config)}, wanted '
      'config.default(...) with changes'
    )
  return name, config


def _wrong_line(page: str, file: str, error: Exception) -> str:
  """Formats an error raised by a page: file, line and message."""
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
      'Every key and its range are declared in vssl_jax/config.py and in '
      'vssl_jax/methods/*_config.py'
    )
  else:
    text, advice = f'{type(error).__name__}: {text}', 'Correct the page'
  return f'{page}, line {lines[-1] if lines else 1}: {text}. {advice}'


def clone_root() -> pathlib.Path:
  """Returns the parent folder of the package: the clone, if there is one."""
  return pathlib.Path(__file__).resolve().parent.parent


def _resolve(path: str | pathlib.Path) -> pathlib.Path:
  return pathlib.Path(path).expanduser().resolve()


def override(
  config: ml_collections.ConfigDict, assignments: list[str]
) -> ml_collections.ConfigDict:
  """Applies `key.sub=value` assignments from the command line.

  Values are parsed as Python literals if possible, else taken as text. They
  must have the type of the value they replace.

  Raises:
    ValueError: an unknown key (the message names the nearest one) or a value
      of another type.
  """
  for assignment in assignments:
    key, equals, text = assignment.partition('=')
    if not equals:
      raise ValueError(
        f'--config.{key}: no value; write --config.{key}=<value>'
      )
    names = [k for k, _ in config_io.flatten(config)]
    if key not in names:
      subkeys = [k[len(key) + 1 :] for k in names if k.startswith(key + '.')]
      near = difflib.get_close_matches(key, names, 1)
      if subkeys:
        fields = list(dict.fromkeys(k.partition('.')[0] for k in subkeys))
        raise ValueError(
          f'--config.{key}: no such key; {key} is a section with keys {fields}'
        )
      raise ValueError(
        f'--config.{key}: no such key'
        + (f'; did you mean --config.{near[0]}?' if near else '')
      )
    section = config
    *parents, leaf = key.split('.')
    for parent in parents:
      section = section[parent]
    value = _parse(text, section[leaf], key)
    if key == 'method.name' and value != section[leaf]:
      raise ValueError(
        f'--config.{key}: found {value!r} for a page with the keys of '
        f'{section[leaf]!r}; take a page of that method, see configs/README.md'
      )
    section[leaf] = value
  return config


def resolve(
  page: str, assignments: Sequence[str], roots: tuple[str, ...] = ()
) -> ml_collections.ConfigDict:
  """Loads a config page and applies the command line.

  Args:
    page: `configs/x.py:variant`.
    assignments: `key.sub=value`, such as `optim.lr=1e-3`.
    roots: additional allowed folders for pages.

  Raises:
    ValueError: see `load` and `complete`.
  """
  return complete(*load(page, roots), assignments)


def complete(
  name: str, config: ml_collections.ConfigDict, assignments: Sequence[str]
) -> ml_collections.ConfigDict:
  """Applies the command line to a page's config and checks the result.

  Args:
    name: name of the run, from `load`; the default workdir is `runs/<name>`.
    config: from `load`.
    assignments: `key.sub=value`, as in `override`.

  Raises:
    ValueError: a key that does not exist or that the job does not read, or a
      value out of range.
  """
  config = override(config, list(assignments))
  check(config)
  refuse_unused(config.job, assignments, UNUSED[config.job](config))
  if not config.workdir:
    config.workdir = os.path.join('runs', name)
  return config


def refuse_unused(
  job: str, assignments: Sequence[str], unused: Mapping[str, str]
) -> None:
  """Raises for command-line keys that a job overwrites or ignores.

  Args:
    job: name of the job.
    assignments: `key.sub=value`, as in `override`.
    unused: pattern of keys -> the key to use instead, or the reason. The first
      matching pattern applies.

  Raises:
    ValueError: such a key is set.
  """
  for key in (assignment.partition('=')[0] for assignment in assignments):
    for pattern, remedy in unused.items():
      if fnmatch.fnmatchcase(key, pattern):
        raise ValueError(
          f'--config.{key}: the job {job!r} does not use this key; {remedy}'
        )


def _parse(text: str, old: Any, key: str) -> Any:
  """Parses a value to the type of the value it replaces."""
  kind = type(old)
  if kind is str:
    return text
  if kind is bool:
    words = {'true': True, '1': True, 'false': False, '0': False}
    if text.lower() not in words:
      raise ValueError(f'--config.{key}: found {text!r}, wanted True or False')
    return words[text.lower()]
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    value = text
  if kind is tuple and not isinstance(value, tuple):
    value = tuple(value) if isinstance(value, list) else (value,)
  if kind is float and type(value) is int:
    value = float(value)
  if kind is int and isinstance(value, float) and value.is_integer():
    value = int(value)
  if type(value) is not kind:
    raise ValueError(
      f'--config.{key}: found {text!r}, wanted '
      f'{"an" if kind is int else "a"} {kind.__name__} such as '
      f'{old!r}'
    )
  return value
