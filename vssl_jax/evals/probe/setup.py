"""Set-up of an evaluation: encoder, tap, and training and test videos."""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from vssl_jax import encoder as encoder_lib
from vssl_jax import sharding
from vssl_jax.checkpoint import provenance
from vssl_jax.data import eval_epoch, options, pipeline
from vssl_jax.evals import (
  clips,
  feature_memory,
  features,
  split_overlap,
  splits,
)
from vssl_jax.evals.probe import train_heads
from vssl_jax.masks import tubelets
from vssl_jax.models import vit

Videos = pipeline.Clips | eval_epoch.Pass


@dataclasses.dataclass
class Job:
  """Encoder, devices and videos of one evaluation.

  Attributes:
    config: the whole config.
    encoder: the evaluated encoder.
    encode: clips -> tokens.
    mesh: devices that the rows are sharded over.
    train: `config.data` of the training videos.
    test: `config.data` of the test videos.
    shared: test videos that are among the training videos.
  """

  config: ml_collections.ConfigDict
  encoder: encoder_lib.Encoder
  encode: features.Encode
  mesh: jax.sharding.Mesh
  train: dict[str, Any]
  test: dict[str, Any]
  shared: split_overlap.Overlap

  @property
  def clip(self) -> tuple[int, int, int, int]:
    """(T, H, W, C) of the clips that are encoded."""
    return options.spec(self.test).shape

  @property
  def grid(self) -> tubelets.Grid:
    """Token grid (t, h, w) of these clips."""
    return tubelets.grid_of((1, *self.clip), self.encoder.module.patch)

  @property
  def held_out_fraction(self) -> float:
    """Fraction of the training videos that no head is trained on."""
    return train_heads.Settings.of(self.config.probe).held_out_fraction

  def trained_on(self, videos: int) -> int:
    """Returns how many of the training videos heads are trained on."""
    held = train_heads.held_out(np.arange(videos), self.held_out_fraction)
    return int((~held & splits.labelled(self.train)).sum())

  def tokens(self) -> tuple[int, ...]:
    """Returns the shape (N, D) of a clip's tokens, without computing them."""
    clip = jax.ShapeDtypeStruct((1, *self.clip), np.uint8)
    return jax.eval_shape(self.encode, clip).shape[1:]

  def tap(self) -> str:
    """Returns where the encoder is tapped, and its compute dtype."""
    module = self.encoder.module
    return f'{tap(module, self.config.probe.depth)}, in {module.dtype}'

  def passes(
    self, data: Mapping[str, Any], batch_size: int, segments: int, views: int
  ) -> eval_epoch.Pass:
    """Opens one pass over videos, `batch_size` of them at once."""
    return pipeline.evaluation(
      data,
      batch_size=batch_size * segments * views,
      segments=segments,
      views=views,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      folder=self.config.workdir,
    )

  def stream(self) -> pipeline.Clips:
    """Opens the endless stream of new crops of the training videos."""
    config = self.config.probe
    return pipeline.make(
      self.train | {'repeats': config.segments},
      batch_size=config.batch_size * config.segments,
      seed=self.config.seed,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      folder=self.config.workdir,
    )

  def encoded(self, batches: features.Batches) -> Iterator[features.Tokens]:
    """Encodes clips; the segments of a view are joined."""
    segments = self.config.probe.segments
    return features.encode_batches(
      self.encode, batches, segments=segments, mesh=self.mesh
    )

  @contextlib.contextmanager
  def epochs(
    self, along: int, *, seed: Sequence[int], pool: bool = False
  ) -> Iterator[tuple[train_heads.Epochs, Videos]]:
    """Opens the training rows, and closes their readers on exit.

    With `probe.augment` the rows are new crops, encoded again in every epoch.
    Without it they are centre crops that are encoded once and kept in memory.

    Args:
      along: clips along each video, for rows in memory and held-out rows.
      seed: seed of the order of rows in memory.
      pool: keep the mean of the tokens only.

    Yields:
      The rows, and the videos that they come from.
    """
    config = self.config.probe
    size, fraction = config.test_batch_size, self.held_out_fraction
    splits.check_share('probe', self.train, fraction, may_be_none=True)
    if config.augment:
      with contextlib.closing(self.stream()) as stream:
        yield self._streamed(stream, along), stream
      return
    videos = self.passes(self.train, size, along, 1)
    with contextlib.closing(videos):
      features.check_room(self._bytes(along, pool) * videos.num_examples)
      table = features.table(
        self.encode,
        videos,
        segments=config.segments,
        pool=pool,
        mesh=self.mesh,
      )
    epochs = train_heads.kept(
      table, fraction, config.batch_size, seed=seed, mesh=self.mesh
    )
    yield epochs, videos

  def _streamed(self, videos: pipeline.Clips, along: int) -> train_heads.Epochs:
    config, fraction = self.config.probe, self.held_out_fraction
    steps = max(videos.num_examples // config.batch_size, 1)
    stream = videos.iterator()

    def train(_: int) -> Iterator[features.Tokens]:
      return self.encoded(itertools.islice(stream, steps))

    def held() -> Iterator[features.Tokens]:
      batches = self.passes(self.train, config.test_batch_size, along, 1)
      # Only held-out videos need to be encoded. Several processes must agree
      # on the number of batches, so they encode all and ignore the others.
      if jax.process_count() == 1:
        keep = functools.partial(train_heads.held_out, fraction=fraction)
        batches = features.only(batches, keep)
      return self.encoded(batches)

    is_held_out = train_heads.held_out(np.arange(videos.num_examples), fraction)
    return train_heads.Epochs(train, steps, held if is_held_out.any() else None)

  def _bytes(self, along: int, pool: bool) -> int:
    """Returns the bytes that one video takes in memory."""
    segments = self.config.probe.segments
    count, width = self.tokens()
    row = (1 if pool else count * segments) * width
    if self.train['depth_units']:
      row += math.prod(self.clip[:3])
    return 4 * row * (along // segments)

  def describe(self) -> dict[str, Any]:
    """Returns the report entries on the protocol."""
    config = self.config
    return {
      'encoder': self.encoder.name,
      'protocol': config.probe.protocol,
      'tap': self.tap(),
      **clips.report(self.test, self.encoder.clip),
      'segments': config.probe.segments,
      'clips': config.probe.clips,
      'views': config.probe.views,
      'probe': config.probe.to_dict(),
      'seed': config.seed,
      'overlap': dataclasses.asdict(self.shared),
      **provenance.describe(),
    }


def make(
  config: ml_collections.ConfigDict,
  encoder: encoder_lib.Encoder | None = None,
) -> Job:
  """Builds the job of an evaluation.

  Args:
    config: with `encoder`, `data` and `probe`.
    encoder: evaluated in place of `config.encoder`.

  Raises:
    ValueError: no encoder, or invalid options.
  """
  if encoder is None and not config.encoder:
    raise ValueError(
      'config.encoder is empty; give --config.encoder=<run folder, folder with '
      'published weights, or hub id>'
    )
  encoder = encoder or encoder_lib.load(config.encoder)
  config = clips.follow(config, encoder.clip)
  options.check_colours(config.data, encoder.module)
  clips.check_patches(config, encoder.module.patch)
  encoder = encoder.at(options.spec(config.data).shape)
  mesh = sharding.make_mesh(data=-1, fsdp=1)
  params = jax.device_put(encoder.params, sharding.replicated(mesh))
  encoder = dataclasses.replace(encoder, params=params)
  probe_config = config.probe
  for name in ('batch_size', 'test_batch_size'):
    if probe_config[name] % jax.device_count():
      raise ValueError(
        f'probe.{name}: found {probe_config[name]}, wanted a multiple of the '
        f'{jax.device_count()} devices'
      )
  train, test = (splits.of(config, 'probe', name) for name in ('train', 'test'))
  shared = splits.check('probe', train, probe_config.allow_overlap, test=test)
  encode = feature_memory.Encode(
    encoder,
    probe_config.depth or None,
    'smaller --config.probe.test_batch_size and --config.probe.batch_size, or '
    'smaller clips (--config.data.frames, --config.data.size)',
  )
  if jax.process_index() == 0:
    clip_report = clips.report(config.data.to_dict(), encoder.clip)
    print(f'clips: {clips.describe(clip_report)}', flush=True)
  return Job(config, encoder, encode, mesh, train, test, shared['test'])


def tap(module: Any, fraction: float) -> str:
  """Returns the tap of an encoder as text: block number and blocks in all.

  Args:
    module: the encoder's network.
    fraction: fraction of the blocks, as 4DS counts; 0 for the encoder's
      default.
  """
  total, norm = module.depth, getattr(module, 'final_norm', False)
  if fraction:
    block = vit.tap(total, fraction)
    return f'after block {block} of {total} ({fraction:g})'
  decoder = getattr(module, 'decoder_blocks', 0)
  if decoder:
    block = total - decoder
    return f'after block {block} of {total}, before those that decode'
  return f'after block {total} of {total}' + (', final norm' if norm else '')


def number_views(
  batches: Iterable[Mapping[str, Any]], segments: int, clips: int
) -> Iterator[Mapping[str, Any]]:
  """Numbers views so that each clip along a video counts as a view.

  Args:
    batches: of a pass over segments x clips clips along each video.
    segments: successive clips that a head reads at once.
    clips: predictions along a video.
  """
  for batch in batches:
    if clips == 1:
      yield batch
      continue
    number = np.asarray(batch['segment']) // segments
    view = np.asarray(batch['view']) * clips + number
    yield dict(batch) | {'view': view.astype(np.int32)}
