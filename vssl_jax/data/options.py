"""The keys of `config.data`, and what is built from them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from vssl_jax.data import clip as clip_lib
from vssl_jax.data import loading, scenes, sources

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


def default() -> ml_collections.ConfigDict:
  """Every key of `config.data`."""
  return ml_collections.ConfigDict(
    dict(
      # --- where the videos are
      # A folder (folders inside it name classes), a manifest (csv, tsv,
      # space separated, jsonl), ArrayRecord shards, a TFDS directory; or
      # several of these, separated by commas.
      source='',
      examples=0,  # videos that --plan counts with where the source is not
      weights=(),  # shares of the sources in each batch; (): by their sizes
      # Rows of a manifest: 'fold=0,1' or 'fold!=3'; of frames with depth those
      # of these numbers: 'frames=0-699'.
      where='',
      path_column='',  # of a manifest; '': found by its name
      label_column='',
      split='train',  # of a TFDS directory
      classes=(),  # names in the order of their labels; (): found out
      # Fraction of the videos that no training batch holds, by their numbers;
      # the job 'finetune' chooses by them.
      holdout=0.0,
      # Whether a resumed run may go on with other videos than it was started
      # with (added, missing, other labels or sizes); run.json records it.
      # False: refused, with counts and names.
      allow_change=False,
      # --- frames with depth
      # Units per metre of the 16-bit depth pictures beside the pictures: 1000
      # for millimetres (ScanNet, 7-Scenes), 5000 for TUM. 0: no depth is read,
      # and the source is videos.
      depth_units=0.0,
      depth_range=(1e-3, 10.0),  # metres that are believed; 0 and 65535 never
      stretch=0,  # frames of a scene that make one example; 0: all
      # --- what a clip is
      frames=16,
      stride=4,  # frames from one to the next
      fps=0.0,  # frames per second instead, by time stamps (then stride=1)
      size=(224, 224),  # height, width in pixels
      channels=3,  # 1: grey
      # 'window': T neighbours anywhere; 'middle': those in the middle, always;
      # 'parts': repeat r anywhere in the r-th of `repeats` equal parts, or, in
      # shorter videos, repeats at equal distances;
      # 'scattered': a frame from each of T parts
      sampling='window',
      min_frames=1,  # videos with fewer are bad; others repeat the last frame
      # --- how it is augmented
      crop='random_resized',  # or 'multi_scale', 'centre'
      crop_scale=(0.3, 1.0),  # area of random_resized, of the picture
      crop_aspect=(0.75, 4 / 3),  # width / height of random_resized
      crop_part=1.0,  # side of centre crops, of the largest that fits
      flip=True,  # left-right; off where direction is the label
      # For training with labels; each clip as a whole, after its crop.
      # RandAugment as papers write it, 'rand-m7-n4-mstd0.5-inc1'; '': none. A
      # clip of 16 x 224 x 224 takes some 28 ms of a core more (22 without).
      auto_augment='',
      erase=0.0,  # probability of a box of noise
      repeats=1,  # clips per video in a batch, for one opening of the file
      repeat_frames='own',  # 'shared': same frames, other crops (cheaper)
      # --- how it is read
      workers=0,  # processes that build batches; 0: threads of this one
      decode_processes=0,  # readers in each of these; 0: one per core
      isolate=True,  # readers are child processes, killed when they hang
      prefetch=2,  # batches ready in advance, per worker
      deadline_s=20.0,  # for the clips of one video
      memory_limit_mb=1024,  # of a reader
      max_pixels=2**26,  # of a picture; larger ones are refused unread
      # --- when a video cannot be read
      retries=2,  # of errors of the disk
      max_bad_fraction=0.05,  # stop above this share of unreadable videos
    )
  )


def find(config: Options) -> sources.Joined:
  """Lists the videos that `config.data` names."""
  source = config['source']
  source = source.split(',') if isinstance(source, str) else tuple(source)
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
  for name in ('crop_scale', 'crop_aspect', 'depth_range'):
    values[name] = tuple(values[name])
  return clip_lib.Spec(**{**values, **overrides})


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
