"""The work that every implementation is given: one network, one data set, one optimizer."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int

__all__ = ["VARIANTS", "Arrays", "Implementation", "Task", "mnist", "random_data"]

Arrays = dict[str, np.ndarray]
"""Parameters by nnkit's paths (``dense_0/kernel``), kernels of shape (in, out)."""

VARIANTS: dict[str, dict[str, Any]] = {
    "mlp": {"batch_norm": False, "rate": 0.0},
    "mlp_bn_dropout": {"batch_norm": True, "rate": 0.5},
    "cnn": {"channels": (32, 64), "hidden": (128,), "batch_size": 128},
}
"""By name, what a network has that the plain 784-256-128-10 in batches of 64 has not."""


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What is trained on what.

    The network is, for each number of channels, a 3×3 convolution padded to the size of its input, ReLU
    and 2×2 max pooling; dense, [batch norm], ReLU, [dropout] for each hidden width; then dense. The loss is
    softmax cross-entropy; the optimizer Adam with the betas 0.9, 0.999 and epsilon 1e-8 on which
    all libraries agree. Batch norm keeps 0.99 of its running statistics and has epsilon 1e-5. The
    last examples that do not fill a batch are left out.

    Attributes:
      x: inputs, in rows; their dtype is that of all arithmetic.
      y: labels.
      channels: of the convolutions; with some, a row of ``x`` is a square image of one channel.
      hidden: widths of the hidden layers.
      classes: width of the output.
      batch_norm: whether there is batch norm.
      rate: the probability of dropping; 0 for no dropout layers.
      learning_rate: Adam's.
      batch_size: examples in a step.
      seed: of the first parameters, the shuffling and the dropout.
    """

    x: Float[np.ndarray, "n features"]
    y: Int[np.ndarray, " n"]
    channels: tuple[int, ...] = ()
    hidden: tuple[int, ...] = (256, 128)
    classes: int = 10
    batch_norm: bool = False
    rate: float = 0.0
    learning_rate: float = 1e-3
    batch_size: int = 64
    seed: int = 0

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return len(self.x) // self.batch_size

    @property
    def side(self) -> int:
        """Height and width of an image."""
        return math.isqrt(self.x.shape[1])

    @property
    def features(self) -> int:
        """How many numbers the first dense layer takes."""
        if not self.channels:
            return self.x.shape[1]
        return (self.side >> len(self.channels)) ** 2 * self.channels[-1]

    @functools.cached_property
    def on_device(self) -> tuple[Any, Any]:
        """``(x, y)`` as JAX arrays, one copy for all implementations that take them."""
        import jax.numpy as jnp

        return jnp.asarray(self.x), jnp.asarray(self.y)

    def orders(self) -> Iterator[Int[np.ndarray, "steps batch"]]:
        """Each epoch's examples, shuffled by numpy: the fastest way to shuffle on a CPU's host side."""
        rng = np.random.default_rng(self.seed)
        while True:
            yield self.batched(rng.permutation(len(self.x)))

    def channels_first(self, path: str, value: np.ndarray) -> np.ndarray:
        """A parameter as libraries keep it that have channels and output features first."""
        if not path.endswith("kernel"):
            return value
        if path.startswith("conv"):
            return value.transpose(3, 2, 0, 1)
        if path == "dense_0/kernel" and self.channels:
            value = np.swapaxes(value.reshape(-1, self.channels[-1], value.shape[1]), 0, 1)
        return value.reshape(-1, value.shape[-1]).T

    def channels_last(self, path: str, value: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`channels_first`."""
        if not path.endswith("kernel"):
            return value
        if path.startswith("conv"):
            return value.transpose(2, 3, 1, 0)
        value = value.T
        if path == "dense_0/kernel" and self.channels:
            value = np.swapaxes(value.reshape(self.channels[-1], -1, value.shape[1]), 0, 1)
        return value.reshape(-1, value.shape[-1])

    def batched(self, order: Int[np.ndarray, " n"]) -> Int[np.ndarray, "steps batch"]:
        """``order`` cut into the steps' examples."""
        full = order[: self.steps * self.batch_size]
        return full.reshape(self.steps, self.batch_size).astype(np.int32)

    def first_parameters(self) -> Arrays:
        """What every implementation starts from: uniform kernels of variance 1/in, biases of 0."""
        dtype = self.x.dtype
        rng = np.random.default_rng(self.seed)
        found: Arrays = {}
        for i, (n_in, n_out) in enumerate(itertools.pairwise((1, *self.channels))):
            limit = math.sqrt(3 / (9 * n_in))
            found[f"conv_{i}/kernel"] = rng.uniform(-limit, limit, (3, 3, n_in, n_out)).astype(dtype)
            found[f"conv_{i}/bias"] = np.zeros(n_out, dtype)
        widths = (self.features, *self.hidden, self.classes)
        for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
            limit = math.sqrt(3 / n_in)
            found[f"dense_{i}/kernel"] = rng.uniform(-limit, limit, (n_in, n_out)).astype(dtype)
            found[f"dense_{i}/bias"] = np.zeros(n_out, dtype)
            if self.batch_norm and i < len(self.hidden):
                found[f"batch_norm_{i}/scale"] = np.ones(n_out, dtype)
                found[f"batch_norm_{i}/bias"] = np.zeros(n_out, dtype)
        return found


class Implementation(Protocol):
    """One library's way to train the task's network, the fastest that its users would write."""

    def __init__(self, task: Task) -> None: ...

    def epoch(self, order: Int[np.ndarray, " n"] | None = None) -> float:
        """Trains for one more epoch and waits until it is done; returns the mean of the steps' losses.

        The examples come in ``order`` if one is given, else in an order of the library's own.
        """
        ...

    def parameters(self) -> Arrays:
        """A copy of the parameters, in the form of :data:`Arrays`."""
        ...


def random_data(
    n: int = 60_000, features: int = 784, classes: int = 10, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of MNIST's shape and range, and labels that can be learned but not all of them.

    A class is a faint picture under uniform noise. Some pictures cannot be told apart, so gradients
    stay alive however long the training: where they vanish, Adam's averages sink to denormal numbers,
    which are slow.

    >>> x, y = random_data(3, 4)
    >>> x.shape, x.dtype, y.shape, y.dtype
    ((3, 4), dtype('float32'), (3,), dtype('int32'))
    """
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n, dtype=np.int32)
    pictures = rng.random((classes, features), np.float32)
    x = rng.random((n, features), np.float32)
    x *= 0.9
    x += 0.1 * pictures[y]
    return x, y


def mnist(data_dir: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """MNIST's training images from a folder of IDX files, flat, scaled to 0..1."""
    from nnkit import data

    images, labels = data.load("mnist", data_dir=data_dir).train.arrays
    return images.reshape(len(images), -1).astype(np.float32) / 255, labels.astype(np.int32)
