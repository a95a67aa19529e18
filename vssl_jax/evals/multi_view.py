"""Averages class probabilities over views and counts each video once."""

import numpy as np
from jaxtyping import Float, Int


class Predictions:
  """Collects the class probabilities of all views of each video.

  Args:
    views: number of views per video.
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
      probabilities: class probabilities of each head.
      label: true class.
      index: index of the video.
      view: index of the view.
      weight: 0 for padding.

    Raises:
      ValueError: a view is repeated, or the label of a video differs.
    """
    for row in np.flatnonzero(weight > 0):
      video, number = int(index[row]), int(view[row])
      by_view = self._open.setdefault(video, {})
      if number in by_view or video in self._done:
        raise ValueError(
          f'view {number} of video {video} occurred twice; the evaluation data '
          'must yield every clip once'
        )
      if self._labels.setdefault(video, int(label[row])) != label[row]:
        raise ValueError(
          f'video {video} has labels {self._labels[video]} and {label[row]}'
        )
      # Probabilities are averaged, not logits: large logits of one view would
      # outweigh the other views.
      by_view[number] = probabilities[row].astype(np.float64)
      if len(by_view) == self._views:
        self._close(video)

  def _close(self, video: int) -> None:
    # Summed in view order: the result does not depend on the batches.
    views = self._open.pop(video)
    mean = sum(views[v] for v in sorted(views)) / self._views
    label = self._labels[video]
    # NaN predictions of a diverged head count as wrong.
    mean = np.where(np.isfinite(mean).all(axis=1, keepdims=True), mean, -1)
    true_probability = mean[:, label]
    rank = (mean > true_probability[:, None]).sum(axis=1)
    # Ties go to the lower class, as in argmax.
    rank += (mean[:, :label] == true_probability[:, None]).sum(axis=1)
    rank[true_probability < 0] = mean.shape[1]
    self._done[video] = (rank, mean.argmax(axis=1), true_probability)

  def check(self) -> None:
    """Checks that all views of all videos were added.

    Raises:
      ValueError: views are missing.
    """
    if self._open:
      video, views = next(iter(self._open.items()))
      raise ValueError(
        f'{len(self._open)} videos are incomplete: video {video} has views '
        f'{sorted(views)}, wanted {self._views}'
      )

  @property
  def total(self) -> int:
    """Number of complete videos."""
    return len(self._done)

  def correct(self, top: int = 1) -> Int[np.ndarray, 'H']:
    """Returns, per head, the videos whose class is in the `top` likeliest."""
    self.check()
    ranks = np.stack([rank for rank, _, _ in self._done.values()])
    return (ranks < top).sum(axis=0)

  def loss(self) -> Float[np.ndarray, 'H']:
    """Returns the mean negative log probability of the true class."""
    self.check()
    true_probability = np.stack(
      [true_probability for _, _, true_probability in self._done.values()]
    )
    return -np.log(np.maximum(true_probability, 1e-30)).mean(axis=0)

  def predictions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns videos [n], true classes [n] and predicted classes [n, H]."""
    self.check()
    videos = np.asarray(sorted(self._done))
    labels = np.asarray([self._labels[v] for v in videos])
    return videos, labels, np.stack([self._done[v][1] for v in videos])
