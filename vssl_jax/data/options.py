"""Config keys of `config.data`, and builders that read them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from vssl_jax.data import batching
from vssl_jax.data.clips import augment
from vssl_jax.data.clips import clip_spec as clip_spec_lib
from vssl_jax.data.sources import scenes
from vssl_jax.data.sources import source as source_lib
from vssl_jax.utils import colours, ranges

Options = Mapping[str, Any] | ml_collections.ConfigDict

BATCH_SIZE = 3072  # clips per step over all devices, of SALT
# With these values every read of a video yields the same clip.
FIXED = {
  'sampling': 'middle',
  'crop': 'centre',
  'flip': False,
  'auto_augment': '',
  'erase': 0.0,
  'repeats': 1,
}


KEYS = ranges.Section(
  # --- sources
  # A folder (its subfolders name the classes), a manifest (csv, tsv, space
  # separated, jsonl, json), one video, ArrayRecord shards or a TFDS directory;
  # or several of these, separated by commas.
  source=('', ranges.Text()),
  # number of videos that --plan assumes if the source is not available
  examples=(0, ranges.Whole(0, ranges.MANY)),
  # shares of the sources in each batch; (): in proportion to their sizes
  weights=((), ranges.Tuple(ranges.Real(above=0))),
  # Rows of a manifest: 'fold=0,1' or 'fold!=3'. For RGB-D scenes ranges of
  # frame numbers: 'frames=0-699'.
  where=('', ranges.Text()),
  path_column=('', ranges.Text()),  # of a manifest; '': by usual names
  label_column=('', ranges.Text()),
  split=('train', ranges.Text()),  # of a TFDS directory
  # Class names in the order of their labels; (): the names that occur, sorted.
  # '' and -1 mean no label.
  classes=((), ranges.Tuple(ranges.Text(), unique=True)),
  # Fraction of the videos that is held out of training, by their indices. The
  # job 'finetune' uses them for model selection.
  holdout=(0.0, ranges.Real(0, below=1)),
  # Whether a resumed run may continue with other videos than it was started
  # with (added, missing, other labels or sizes); run.json records the change.
  # False: an error with counts and names.
  allow_change=(False, ranges.Flag()),
  # --- RGB-D scenes
  # Units per metre of the 16-bit depth images: 1000 for millimetres (ScanNet,
  # 7-Scenes), 5000 for TUM. 0: the source is videos, without depth.
  depth_units=(0.0, ranges.Real(0, 1e9)),
  # valid depths in metres; stored values 0 and 65535 are never valid
  depth_range=(
    (1e-3, 10.0),
    ranges.Tuple(ranges.Real(0), lengths=(2,), rising=True),
  ),
  # frames of a scene per example; 0: all
  stretch=(0, ranges.Whole(0, ranges.MANY)),
  # --- clips. In the jobs 'probe', 'depth' and 'finetune' the value 0, for the
  # size (0, 0), means the value of the encoder's pretraining clips.
  frames=(16, ranges.Whole(0, 2**14)),
  stride=(4, ranges.Whole(0, 2**14)),  # distance of neighbours, in frames
  # frames per second instead, by time stamps (then stride=1)
  fps=(0.0, ranges.Real(0, 1e4)),
  # height, width in pixels
  size=((224, 224), ranges.Tuple(ranges.Whole(0, 2**14), lengths=(1, 2))),
  channels=(3, ranges.Choice((0, 1, 3))),  # 1: grey
  # Of pixels in [0, 1], one number per channel or one for all. They hold for
  # all encoders of the run, except for loaded encoders with their own values.
  # (): ImageNet's; for grey the means over its three channels, (0.449,) and
  # (0.226,).
  mean=((), ranges.Tuple(ranges.Real(-1e3, 1e3))),
  std=((), ranges.Tuple(ranges.Real(1e-6, 1e3))),
  # 'window': T frames from a random start; 'middle': always the T frames in
  # the middle; 'linspace': as 'window', but spread over all stride * T frames
  # (as in the code of VideoMAE and MVD: 0, 4, 8, 12, 17, ... 63 for stride 4);
  # 'parts': repeat r has a random start in the r-th of `repeats` equal parts;
  # in shorter videos the repeats start at equal distances;
  # 'scattered': one random frame from each of T equal parts
  sampling=(
    'window',
    ranges.Choice(('window', 'middle', 'linspace', 'parts', 'scattered')),
  ),
  # shorter videos are bad files; other short videos repeat the last frame
  min_frames=(1, ranges.Whole(1, ranges.MANY)),
  # --- augmentation
  # 'random_resized', 'multi_scale' or 'centre'
  crop=('random_resized', ranges.Choice(clip_spec_lib.CROPS)),
  # area of random_resized crops as a fraction of the frame
  crop_scale=(
    (0.3, 1.0),
    ranges.Tuple(ranges.Real(high=1, above=0), lengths=(2,), rising=True),
  ),
  # width / height of random_resized crops
  crop_aspect=(
    (0.75, 4 / 3),
    ranges.Tuple(ranges.Real(1e-3, 1e3), lengths=(2,), rising=True),
  ),
  # side of centre crops as a fraction of the largest crop that fits
  crop_part=(1.0, ranges.Real(high=1, above=0)),
  # left-right; set to False if labels depend on the direction of motion
  flip=(True, ranges.Flag()),
  # For training with labels; the same for all frames of a clip, after the
  # crop. RandAugment as written in papers, 'rand-m7-n4-mstd0.5-inc1'; '': none.
  # It adds about 28 ms of one core to the 22 ms of a clip of 16 x 224 x 224.
  auto_augment=('', ranges.Text(augment.parse)),
  erase=(0.0, ranges.Real(0, 1)),  # probability of random erasing
  # clips per video in a batch; the file is opened once for all of them
  repeats=(1, ranges.Whole(1, 2**10)),
  # 'own': each repeat has its own frames; 'shared': the same frames with
  # other crops (cheaper)
  repeat_frames=('own', ranges.Choice(('own', 'shared'))),
  # --- reading
  # worker processes that build batches; 0: threads of this process
  workers=(0, ranges.Whole(0, 2**10)),
  # readers per worker process; 0: all cores, divided among the workers
  decode_processes=(0, ranges.Whole(0, 2**10)),
  # whether readers are worker processes, which are killed when they hang
  isolate=(True, ranges.Flag()),
  # batches loaded in advance, per worker process
  prefetch=(2, ranges.Whole(1, 2**10)),
  # time limit for the clips of one video, in seconds
  deadline_s=(20.0, ranges.Real(high=3600, above=0)),
  # memory limit of a reader in MiB, beyond its size at its start
  memory_limit_mb=(1024, ranges.Whole(64, 2**24)),
  # largest number of pixels of a frame; larger ones are not decoded
  max_pixels=(2**26, ranges.Whole(1, 2**40)),
  # --- bad files
  retries=(2, ranges.Whole(0, 100)),  # after I/O errors
  # the run stops above this fraction of bad files
  max_bad_fraction=(0.05, ranges.Real(0, 1)),
)

default = KEYS.defaults


def find(config: Options) -> source_lib.Joined:
  """Lists the videos of the sources in `config.data`."""
  source = config['source']
  source = (
    source_lib.split(source) if isinstance(source, str) else tuple(source)
  )
  if config['depth_units']:
    where, stretch = config['where'], config['stretch']
    return source_lib.Joined(scenes.find(source, where=where, stretch=stretch))
  return source_lib.find(
    tuple(source),
    where=config['where'],
    classes=tuple(config['classes']),
    path_column=config['path_column'],
    label_column=config['label_column'],
    split=config['split'],
  )


def spec(config: Options, **overrides: Any) -> clip_spec_lib.Spec:
  """Builds the clip specification of `config.data`.

  Args:
    config: `config.data`.
    **overrides: fields of `clip_spec.Spec` that replace those of the config.

  Raises:
    ValueError: an option is out of range.
  """
  names = {field.name for field in dataclasses.fields(clip_spec_lib.Spec)}
  values = {name: config[name] for name in config if name in names}
  size = config['size']
  size = (size,) if isinstance(size, int) else tuple(size)
  if len(size) not in (1, 2):
    raise ValueError(
      f'data.size: found {size}, wanted (height, width), or one number for both'
    )
  size = (size[0], size[-1])
  values.update(height=size[0], width=size[1])
  for name in ('crop_scale', 'crop_aspect', 'depth_range', 'mean', 'std'):
    values[name] = tuple(values[name])
  return clip_spec_lib.Spec(**{**values, **overrides})


def colours_of(config: Options) -> colours.Colours:
  """Returns pixel means and standard deviations of `config.data`."""
  return colours.of(config['channels'], config['mean'], config['std'])


def check_colours(config: Options, encoder: Any) -> None:
  """Checks that `config.data` has the channels, mean and std of an encoder.

  Args:
    config: `config.data`.
    encoder: the module of a loaded encoder with its own mean and std.

  Raises:
    ValueError: data.channels, data.mean or data.std differs from the encoder.
  """
  network = getattr(encoder, 'image', encoder)
  colours.check(config['channels'], network.mean, 'config.encoder')
  for name, value in colours_of(config)._asdict().items():
    fixed = tuple(getattr(network, name))
    if config[name] and value != fixed:
      raise ValueError(
        f'data.{name}: found {value}, and config.encoder has its own, {fixed}; '
        f'set --config.data.{name}=() or leave it out'
      )


def unfixed(config: Options) -> dict[str, tuple[Any, Any]]:
  """Returns key -> (found, wanted) of options that make clips random."""
  return {
    key: (config[key], fixed)
    for key, fixed in FIXED.items()
    if config[key] != fixed
  }


def policy(config: Options, seed: int, **overrides: Any) -> batching.Policy:
  """Builds the read policy of `config.data`.

  Args:
    config: `config.data`.
    seed: seed of the choice of substitute clips.
    **overrides: fields of `batching.Policy` that replace those of the config.

  Raises:
    ValueError: a number of processes is negative.
  """
  workers = config['workers']
  if workers < 0 or config['decode_processes'] < 0:
    raise ValueError('data.workers and data.decode_processes are 0 or more')
  cores_per_worker = max(1, batching.cores() // max(workers, 1))
  names = ('retries', 'isolate', 'deadline_s', 'memory_limit_mb')
  values = {name: config[name] for name in names}
  values['processes'] = config['decode_processes'] or cores_per_worker
  return batching.Policy(seed=seed, **{**values, **overrides})
