"""The keys of `config.data`, and what is built from them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from vssl_jax import colours, ranges
from vssl_jax.data import augment, loading, scenes, sources
from vssl_jax.data import clip as clip_lib

Options = Mapping[str, Any] | ml_collections.ConfigDict

# With these a video always gives the same clip.
FIXED = {
  'sampling': 'middle',
  'crop': 'centre',
  'flip': False,
  'auto_augment': '',
  'erase': 0.0,
  'repeats': 1,
}


KEYS = ranges.Section(
  # --- where the videos are
  # A folder (folders inside it name classes), a manifest (csv, tsv,
  # space separated, jsonl, json), one video, ArrayRecord shards, a TFDS
  # directory; or several of these, separated by commas.
  source=('', ranges.Text()),
  # videos that --plan counts with where the source is not
  examples=(0, ranges.Whole(0, ranges.MANY)),
  # shares of the sources in each batch; (): by their sizes
  weights=((), ranges.Tuple(ranges.Real(above=0))),
  # Rows of a manifest: 'fold=0,1' or 'fold!=3'; of frames with depth those
  # of these numbers: 'frames=0-699'.
  where=('', ranges.Text()),
  path_column=('', ranges.Text()),  # of a manifest; '': found by its name
  label_column=('', ranges.Text()),
  split=('train', ranges.Text()),  # of a TFDS directory
  # Names in the order of their labels; (): those that occur, sorted. '' and
  # -1 are no label.
  classes=((), ranges.Tuple(ranges.Text(), unique=True)),
  # Fraction of the videos that no training batch holds, by their numbers;
  # the job 'finetune' chooses by them.
  holdout=(0.0, ranges.Real(0, below=1)),
  # Whether a resumed run may go on with other videos than it was started
  # with (added, missing, other labels or sizes); run.json records it.
  # False: refused, with counts and names.
  allow_change=(False, ranges.Flag()),
  # --- frames with depth
  # Units per metre of the 16-bit depth pictures beside the pictures: 1000
  # for millimetres (ScanNet, 7-Scenes), 5000 for TUM. 0: no depth is read,
  # and the source is videos.
  depth_units=(0.0, ranges.Real(0, 1e9)),
  # metres that are believed; 0 and 65535 never
  depth_range=(
    (1e-3, 10.0),
    ranges.Tuple(ranges.Real(0), lengths=(2,), rising=True),
  ),
  # frames of a scene that make one example; 0: all
  stretch=(0, ranges.Whole(0, ranges.MANY)),
  # --- what a clip is. In the jobs 'probe', 'depth' and 'finetune' 0, of the
  # size (0, 0), is the value of the clips that the encoder was trained on.
  frames=(16, ranges.Whole(0, 2**14)),
  stride=(4, ranges.Whole(0, 2**14)),  # frames from one to the next
  # frames per second instead, by time stamps (then stride=1)
  fps=(0.0, ranges.Real(0, 1e4)),
  # height, width in pixels
  size=((224, 224), ranges.Tuple(ranges.Whole(0, 2**14), lengths=(1, 2))),
  channels=(3, ranges.Choice((0, 1, 3))),  # 1: grey
  # Of pixels in [0, 1], a number per channel or one for all, for all encoders
  # of the run; one that comes from elsewhere keeps its own. (): ImageNet's; of
  # grey (0.449,) and (0.226,), the means of its three channels.
  mean=((), ranges.Tuple(ranges.Real(-1e3, 1e3))),
  std=((), ranges.Tuple(ranges.Real(1e-6, 1e3))),
  # 'window': T neighbours anywhere; 'middle': those in the middle, always;
  # 'linspace': as 'window', but over all stride * T frames (the code of
  # VideoMAE and MVD: 0, 4, 8, 12, 17, ... 63 with stride 4);
  # 'parts': repeat r anywhere in the r-th of `repeats` equal parts, or, in
  # shorter videos, repeats at equal distances;
  # 'scattered': a frame from each of T parts
  sampling=(
    'window',
    ranges.Choice(('window', 'middle', 'linspace', 'parts', 'scattered')),
  ),
  # videos with fewer are bad; others repeat the last frame
  min_frames=(1, ranges.Whole(1, ranges.MANY)),
  # --- how it is augmented
  # or 'multi_scale', 'centre'
  crop=('random_resized', ranges.Choice(clip_lib.CROPS)),
  # area of random_resized, of the picture
  crop_scale=(
    (0.3, 1.0),
    ranges.Tuple(ranges.Real(high=1, above=0), lengths=(2,), rising=True),
  ),
  # width / height of random_resized
  crop_aspect=(
    (0.75, 4 / 3),
    ranges.Tuple(ranges.Real(1e-3, 1e3), lengths=(2,), rising=True),
  ),
  # side of centre crops, of the largest that fits
  crop_part=(1.0, ranges.Real(high=1, above=0)),
  flip=(True, ranges.Flag()),  # left-right; off where direction is the label
  # For training with labels; each clip as a whole, after its crop.
  # RandAugment as papers write it, 'rand-m7-n4-mstd0.5-inc1'; '': none. A
  # clip of 16 x 224 x 224 takes some 28 ms of a core more (22 without).
  auto_augment=('', ranges.Text(augment.parse)),
  erase=(0.0, ranges.Real(0, 1)),  # probability of a box of noise
  # clips per video in a batch, for one opening of the file
  repeats=(1, ranges.Whole(1, 2**10)),
  # 'shared': same frames, other crops (cheaper)
  repeat_frames=('own', ranges.Choice(('own', 'shared'))),
  # --- how it is read
  # processes that build batches; 0: threads of this one
  workers=(0, ranges.Whole(0, 2**10)),
  # readers in each of these; 0: one per core
  decode_processes=(0, ranges.Whole(0, 2**10)),
  # readers are child processes, killed when they hang
  isolate=(True, ranges.Flag()),
  prefetch=(2, ranges.Whole(1, 2**10)),  # batches ready in advance, per worker
  # seconds for the clips of one video
  deadline_s=(20.0, ranges.Real(high=3600, above=0)),
  # MiB of a reader, beyond its start
  memory_limit_mb=(1024, ranges.Whole(64, 2**24)),
  # of a picture; larger ones are refused unread
  max_pixels=(2**26, ranges.Whole(1, 2**40)),
  # --- when a video cannot be read
  retries=(2, ranges.Whole(0, 100)),  # of errors of the disk
  # stop above this share of unreadable videos
  max_bad_fraction=(0.05, ranges.Real(0, 1)),
)

default = KEYS.defaults


def find(config: Options) -> sources.Joined:
  """Lists the videos that `config.data` names."""
  source = config['source']
  source = sources.split(source) if isinstance(source, str) else tuple(source)
  if config['depth_units']:
    where, stretch = config['where'], config['stretch']
    return sources.Joined(scenes.find(source, where=where, stretch=stretch))
  return sources.find(
    tuple(source),
    where=config['where'],
    classes=tuple(config['classes']),
    path_column=config['path_column'],
    label_column=config['label_column'],
    split=config['split'],
  )


def spec(config: Options, **overrides: Any) -> clip_lib.Spec:
  """The clip that `config.data` describes."""
  names = {field.name for field in dataclasses.fields(clip_lib.Spec)}
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
  return clip_lib.Spec(**{**values, **overrides})


def colours_of(config: Options) -> colours.Colours:
  """Returns mean and deviation of the pixels that `config.data` describes."""
  return colours.of(config['channels'], config['mean'], config['std'])


def check_colours(config: Options, encoder: Any) -> None:
  """Raises where `config.data` names other colours than an encoder has.

  Args:
    config: `config.data`.
    encoder: the network of an encoder that comes with its own.

  Raises:
    ValueError: data.channels, data.mean or data.std differs from it.
  """
  network = getattr(encoder, 'image', encoder)
  colours.check(config['channels'], network.mean, 'config.encoder')
  for name, given in colours_of(config)._asdict().items():
    own = tuple(getattr(network, name))
    if config[name] and given != own:
      raise ValueError(
        f'data.{name}: found {given}, and config.encoder has its own, {own}; '
        f'set --config.data.{name}=() or leave it out'
      )


def unfixed(config: Options) -> dict[str, tuple[Any, Any]]:
  """Returns key -> (found, wanted) of what lets the clips of a video differ."""
  return {
    key: (config[key], wanted)
    for key, wanted in FIXED.items()
    if config[key] != wanted
  }


def policy(config: Options, seed: int, **overrides: Any) -> loading.Policy:
  """How `config.data` wants files to be read."""
  workers = config['workers']
  if workers < 0 or config['decode_processes'] < 0:
    raise ValueError('data.workers and data.decode_processes are 0 or more')
  even = max(1, loading.cores() // max(workers, 1))
  names = ('retries', 'isolate', 'deadline_s', 'memory_limit_mb')
  values = {name: config[name] for name in names}
  values['processes'] = config['decode_processes'] or even
  return loading.Policy(seed=seed, **{**values, **overrides})
