"""Bringing the inputs to a common scale, by numbers taken from the training part alone."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Num

from nnkit.data.dataset import Dataset, Normalization, Splits, chunks

__all__ = ["channel_range", "channel_statistics", "rescale", "standardize"]


def standardize(splits: Splits) -> Splits:
    """Every part with the training part's mean 0 and standard deviation 1 in each channel, as float32.

    z = (x - mean) / std over all axes but the last: a number per colour of an image, per column of
    a table. The standard deviation is the biased one, as in scikit-learn's ``StandardScaler``; a
    channel that does not vary becomes 0.

    Raises:
      ValueError: the training part is empty, holds NaN or Inf, has no channel axis, or is normalised
        already.

    >>> train = Dataset(np.array([[0, 7], [2, 7]], np.uint8), np.array([0, 1]))
    >>> standardize(Splits(train)).train.x
    array([[-1.,  0.],
           [ 1.,  0.]], dtype=float32)
    """
    return _normalized(splits, channel_statistics(_raw(splits).x))


def rescale(splits: Splits) -> Splits:
    """Every part with the training part's range brought to [0, 1] in each channel, as float32.

    z = (x - min) / (max - min), so 0..255 becomes 0..1; as scikit-learn's ``MinMaxScaler``. Other
    parts can reach a little beyond. A channel that does not vary becomes 0.

    Raises:
      ValueError: as :func:`standardize`.

    >>> train = Dataset(np.array([[0], [51], [255]], np.uint8), np.array([0, 1, 2]))
    >>> rescale(Splits(train)).train.x.ravel()
    array([0. , 0.2, 1. ], dtype=float32)
    """
    return _normalized(splits, channel_range(_raw(splits).x))


def _raw(splits: Splits) -> Dataset:
    train = splits.train
    if train.normalization is not None:
        raise ValueError(
            f"{train.name} is normalised already: normalise the splits as they were loaded, once"
        )
    if len(train) == 0:
        raise ValueError(f"{train.name} has an empty training part: there is nothing to take the scale from")
    if train.x.ndim < 2:
        raise ValueError(
            f"{train.name} has x of shape {train.x.shape}, without a channel axis: pass x[:, None]"
        )
    return train


def _normalized(splits: Splits, normalization: Normalization) -> Splits:
    if not (np.isfinite(normalization.mean).all() and np.isfinite(normalization.std).all()):
        raise ValueError(
            f"the training part of {splits.train.name} holds NaN or Inf: data.check_data says where, "
            "drop or fill those examples first"
        )
    return splits.map(
        lambda part: dataclasses.replace(part, x=normalization.apply(part.x), normalization=normalization)
    )


def channel_statistics(x: Num[np.ndarray, "n ... channels"]) -> Normalization:
    """The mean and the biased standard deviation of each channel, (channels,), in float64.

    Two passes over the data in pieces: first the mean, then the mean square about it, since
    E[x²] - E[x]² loses everything when the mean is large beside the deviation. The first pass is
    taken about the first example, so that a constant channel comes out with exactly 0.

    >>> statistics = channel_statistics(np.array([[1.0, 0.1], [3.0, 0.1]]))
    >>> print(statistics.mean, statistics.std)
    [2.  0.1] [1. 0.]
    """
    channels = x.shape[-1]
    count = x.size // channels
    origin = np.asarray(x[0]).reshape(-1, channels)[0].astype(np.float64)

    def total(center: np.ndarray, power: int) -> np.ndarray:
        across = np.resize(center, x[0].size)
        result = np.zeros(channels)
        for _, block in chunks(x):
            away = block.reshape(len(block), -1).astype(np.float64)
            away -= across
            # Examples first: numpy sums long rows ten times as fast as columns of 3 channels.
            result += (away if power == 1 else np.square(away, out=away)).sum(0).reshape(-1, channels).sum(0)
        return result

    mean = origin + total(origin, 1) / count
    return Normalization(mean, np.sqrt(total(mean, 2) / count))


def channel_range(x: Num[np.ndarray, "n ... channels"]) -> Normalization:
    """The map that brings each channel's range to [0, 1]: ``mean`` is its minimum, ``std`` its width.

    >>> limits = channel_range(np.array([[1, 5], [3, 5]]))
    >>> print(limits.mean, limits.std)
    [1. 5.] [2. 0.]
    """
    channels = x.shape[-1]
    blocks = [
        (block.min(0).reshape(-1, channels).min(0), block.max(0).reshape(-1, channels).max(0))
        for _, block in chunks(x)
    ]
    low = np.min([low for low, _ in blocks], axis=0).astype(np.float64)
    high = np.max([high for _, high in blocks], axis=0).astype(np.float64)
    return Normalization(low, high - low)
