"""What an evaluation works with: an encoder, its tap, two lists of videos."""

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

from vssl_jax import encoders, sharding
from vssl_jax.data import options, passes, pipeline
from vssl_jax.evals import (
  clips,
  features,
  lists,
  memory,
  overlap,
  probe,
)
from vssl_jax.models import layers, vit
from vssl_jax.train import provenance

Videos = pipeline.Clips | passes.Pass


@dataclasses.dataclass
class Job:
  """What one evaluation works with.

  Attributes:
    config: the whole config.
    encoder: what is measured.
    encode: clips -> tokens.
    mesh: devices that split the rows.
    train: `config.data` of the training videos.
    test: `config.data` of the test videos.
    shared: test videos that are among the training videos.
  """

  config: ml_collections.ConfigDict
  encoder: encoders.Encoder
  encode: features.Encode
  mesh: jax.sharding.Mesh
  train: dict[str, Any]
  test: dict[str, Any]
  shared: overlap.Overlap

  @property
  def clip(self) -> tuple[int, int, int, int]:
    """(T, H, W, C) of the clips that are encoded."""
    return options.spec(self.test).shape

  @property
  def grid(self) -> layers.Grid:
    """Tokens (t, h, w) of such a clip."""
    return layers.grid_of((1, *self.clip), self.encoder.module.patch)

  @property
  def held_out_fraction(self) -> float:
    """Fraction of the training videos that no head is trained on."""
    return probe.Settings.of(self.config.probe).held_out_fraction

  def trained_on(self, videos: int) -> int:
    """Returns how many of the training videos heads are trained on."""
    held = probe.held_out(np.arange(videos), self.held_out_fraction)
    return int((~held & lists.labelled(self.train)).sum())

  def tokens(self) -> tuple[int, ...]:
    """Returns the shape (N, D) of a clip's tokens, without computing them."""
    clip = jax.ShapeDtypeStruct((1, *self.clip), np.uint8)
    return jax.eval_shape(self.encode, clip).shape[1:]

  def tap(self) -> str:
    """Returns where the encoder is tapped, and the type it computes in."""
    module = self.encoder.module
    return f'{tap(module, self.config.probe.depth)}, in {module.dtype}'

  def passes(
    self, data: Mapping[str, Any], batch_size: int, segments: int, views: int
  ) -> passes.Pass:
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
  ) -> Iterator[tuple[probe.Epochs, Videos]]:
    """Opens the training rows, and closes what reads them.

    With `probe.augment` these are new crops, encoded again in every epoch;
    without, centre crops that are encoded once and kept.

    Args:
      along: clips along each video, of those that are kept or held out.
      seed: of the order of what is kept.
      pool: keep the mean of the tokens only.

    Yields:
      The rows, and the videos that they come from.
    """
    config = self.config.probe
    size, fraction = config.test_batch_size, self.held_out_fraction
    lists.check_share('probe', self.train, fraction, may_be_none=True)
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
    epochs = probe.kept(
      table, fraction, config.batch_size, seed=seed, mesh=self.mesh
    )
    yield epochs, videos

  def _streamed(self, videos: pipeline.Clips, along: int) -> probe.Epochs:
    config, fraction = self.config.probe, self.held_out_fraction
    steps = max(videos.num_examples // config.batch_size, 1)
    stream = videos.iterator()

    def train(_: int) -> Iterator[features.Tokens]:
      return self.encoded(itertools.islice(stream, steps))

    def held() -> Iterator[features.Tokens]:
      batches = self.passes(self.train, config.test_batch_size, along, 1)
      # Encoding the others would be wasted. Several processes must agree on
      # the number of batches, so there they all are encoded, not counted.
      if jax.process_count() == 1:
        keep = functools.partial(probe.held_out, fraction=fraction)
        batches = features.only(batches, keep)
      return self.encoded(batches)

    out = probe.held_out(np.arange(videos.num_examples), fraction)
    return probe.Epochs(train, steps, held if out.any() else None)

  def _bytes(self, along: int, pool: bool) -> int:
    """Returns what keeping one video takes."""
    segments = self.config.probe.segments
    count, width = self.tokens()
    row = (1 if pool else count * segments) * width
    if self.train['depth_units']:
      row += math.prod(self.clip[:3])
    return 4 * row * (along // segments)

  def describe(self) -> dict[str, Any]:
    """Returns what a report says of how was measured."""
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
  encoder: encoders.Encoder | None = None,
) -> Job:
  """Returns what an evaluation works with.

  Args:
    config: with `encoder`, `data` and `probe`.
    encoder: measured in place of `config.encoder`.

  Raises:
    ValueError: no encoder, or knobs that do not fit.
  """
  if encoder is None and not config.encoder:
    raise ValueError(
      'config.encoder is empty; give --config.encoder=<run folder, folder with '
      'published weights, or hub id>'
    )
  encoder = encoder or encoders.load(config.encoder)
  config = clips.follow(config, encoder.clip)
  options.check_colours(config.data, encoder.module)
  clips.check_patches(config, encoder.module.patch)
  encoder = encoder.at(options.spec(config.data).shape)
  mesh = sharding.make_mesh(data=-1, fsdp=1)
  params = jax.device_put(encoder.params, sharding.replicated(mesh))
  encoder = dataclasses.replace(encoder, params=params)
  wanted = config.probe
  for name in ('batch_size', 'test_batch_size'):
    if wanted[name] % jax.device_count():
      raise ValueError(
        f'probe.{name}: found {wanted[name]}, wanted a multiple of the '
        f'{jax.device_count()} devices'
      )
  train, test = (lists.of(config, 'probe', name) for name in ('train', 'test'))
  shared = lists.check('probe', train, wanted.allow_overlap, test=test)
  encode = memory.Encode(
    encoder,
    wanted.depth or None,
    'smaller --config.probe.test_batch_size and --config.probe.batch_size, or '
    'smaller clips (--config.data.frames, --config.data.size)',
  )
  if jax.process_index() == 0:
    found = clips.report(config.data.to_dict(), encoder.clip)
    print(f'clips: {clips.describe(found)}', flush=True)
  return Job(config, encoder, encode, mesh, train, test, shared['test'])


def tap(module: Any, fraction: float) -> str:
  """Returns where an encoder is tapped: after how many of how many blocks.

  Args:
    module: the encoder's network.
    fraction: of the blocks, as 4DS counts; 0 for the encoder's own choice.
  """
  total, norm = module.depth, getattr(module, 'final_norm', False)
  if fraction:
    ran = vit.tap(total, fraction)
    return f'after block {ran} of {total} ({fraction:g})'
  decoder = getattr(module, 'decoder_blocks', 0)
  if decoder:
    ran = total - decoder
    return f'after block {ran} of {total}, before those that decode'
  return f'after block {total} of {total}' + (', final norm' if norm else '')


def voting(
  batches: Iterable[Mapping[str, Any]], segments: int, clips: int
) -> Iterator[Mapping[str, Any]]:
  """Numbers views so that each of the clips along a video has its own vote.

  Args:
    batches: of a pass over segments x clips clips along each video.
    segments: successive clips that a head sees at once.
    clips: votes along a video.
  """
  for batch in batches:
    if clips == 1:
      yield batch
      continue
    number = np.asarray(batch['segment']) // segments
    view = np.asarray(batch['view']) * clips + number
    yield dict(batch) | {'view': view.astype(np.int32)}
