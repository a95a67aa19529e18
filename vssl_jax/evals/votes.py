"""Exact counting: each video once, its views averaged as probabilities."""

import numpy as np
from jaxtyping import Float, Int


class Votes:
  """Collects the class probabilities of views until a video is complete.

  Args:
    views: wanted of each video.
  """

  def __init__(self, views: int = 1) -> None:
    self._views = views
    self._open: dict[int, dict[int, np.ndarray]] = {}
    self._labels: dict[int, int] = {}
    self._done: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

  def add(
    self,
    probabilities: Float[np.ndarray, 'R H K'],
    label: Int[np.ndarray, 'R'],
    index: Int[np.ndarray, 'R'],
    view: Int[np.ndarray, 'R'],
    weight: Float[np.ndarray, 'R'],
  ) -> None:
    """Adds views of videos; rows of weight 0 are padding.

    Args:
      probabilities: of each head.
      label: true class.
      index: number of the video.
      view: number of the view.
      weight: 0 for padding.

    Raises:
      ValueError: a view came twice, or its label changed.
    """
    for row in np.flatnonzero(weight > 0):
      video, number = int(index[row]), int(view[row])
      seen = self._open.setdefault(video, {})
      if number in seen or video in self._done:
        raise ValueError(
          f'view {number} of video {video} came twice; the evaluation data '
          'must yield every clip once'
        )
      if self._labels.setdefault(video, int(label[row])) != label[row]:
        raise ValueError(
          f'video {video} has labels {self._labels[video]} and {label[row]}'
        )
      # Softmax is averaged, not logits: a view that is sure does not outvote
      # the others by the size of its logits.
      seen[number] = probabilities[row].astype(np.float64)
      if len(seen) == self._views:
        self._close(video)

  def _close(self, video: int) -> None:
    # In the order of the views: the sum does not depend on the batches.
    views = self._open.pop(video)
    mean = sum(views[v] for v in sorted(views)) / self._views
    label = self._labels[video]
    # A head that diverged says nan, and is wrong.
    mean = np.where(np.isfinite(mean).all(axis=1, keepdims=True), mean, -1)
    chance = mean[:, label]
    rank = (mean > chance[:, None]).sum(axis=1)
    # Of equals the lower class is predicted, as argmax does.
    rank += (mean[:, :label] == chance[:, None]).sum(axis=1)
    rank[chance < 0] = mean.shape[1]
    self._done[video] = (rank, mean.argmax(axis=1), chance)

  def check(self) -> None:
    """Checks that all views of all videos came.

    Raises:
      ValueError: some did not.
    """
    if self._open:
      video, views = next(iter(self._open.items()))
      raise ValueError(
        f'{len(self._open)} videos are not complete: of video {video} came '
        f'views {sorted(views)}, wanted {self._views}'
      )

  @property
  def total(self) -> int:
    """Videos counted."""
    return len(self._done)

  def correct(self, top: int = 1) -> Int[np.ndarray, 'H']:
    """Returns how many videos have their class among the `top` likeliest."""
    self.check()
    ranks = np.stack([rank for rank, _, _ in self._done.values()])
    return (ranks < top).sum(axis=0)

  def loss(self) -> Float[np.ndarray, 'H']:
    """Returns the mean negative log probability of the true class."""
    self.check()
    chance = np.stack([chance for _, _, chance in self._done.values()])
    return -np.log(np.maximum(chance, 1e-30)).mean(axis=0)

  def predictions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns videos [n], true classes [n] and predicted ones [n, H]."""
    self.check()
    videos = np.asarray(sorted(self._done))
    labels = np.asarray([self._labels[v] for v in videos])
    return videos, labels, np.stack([self._done[v][1] for v in videos])
