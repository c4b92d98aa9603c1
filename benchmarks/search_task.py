"""The search that every implementation is given, and nnkit's: ``benchmarks.search`` says what it is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from benchmarks.task import Arrays
from nnkit import data, layers, losses, optim, search, train, tree
from nnkit.types import Trainer

__all__ = ["Implementation", "Nnkit", "Task", "Trial", "digits"]

Trial = tuple[float, float]
"""A learning rate and a weight decay."""


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What is searched.

    The network is dense, ReLU, dense; the loss softmax cross-entropy; the optimizer AdamW with betas 0.9 and
    0.999 and epsilon 1e-8, whose decay is multiplied by the rate, as in nnkit, optax and PyTorch. Examples that
    do not fill a batch are left out of an epoch. After each epoch comes the loss on the held-out data, in one
    batch. All trials have one seed: the same first parameters, the same orders.

    Attributes:
      x, y: training data; the inputs' dtype is that of all arithmetic.
      held_x, held_y: what the trials are judged by.
      rates: how many learning rates, evenly on a log scale from 1e-5 to 1.
      decays: the weight decays.
      hidden: width of the hidden layer.
      classes: width of the output.
      epochs: of a training.
      batch_size: examples in a step.
    """

    x: Float[np.ndarray, "n features"]
    y: Int[np.ndarray, " n"]
    held_x: Float[np.ndarray, "m features"]
    held_y: Int[np.ndarray, " m"]
    rates: int = 32
    decays: tuple[float, ...] = (1e-4, 1e-2)
    hidden: int = 64
    classes: int = 10
    epochs: int = 20
    batch_size: int = 64

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return len(self.x) // self.batch_size

    @functools.cached_property
    def space(self) -> search.Space:
        """Both are traced: one program for all trials."""
        decay = search.choice(list(self.decays), static=False)
        return search.as_space({"lr": search.log_uniform(1e-5, 1.0), "decay": decay})

    @functools.cached_property
    def trials(self) -> list[Trial]:
        """Every rate with every decay."""
        rates: list[Any] = self.space.dimensions["lr"].grid(self.rates)
        return [(float(rate), decay) for rate in rates for decay in self.decays]

    @functools.cached_property
    def on_device(self) -> tuple[Any, ...]:
        """``(x, y, held_x, held_y)`` as JAX arrays, one copy for all that take them."""
        return tuple(jnp.asarray(a) for a in (self.x, self.y, self.held_x, self.held_y))

    @functools.cached_property
    def first_parameters(self) -> Arrays:
        """What a training starts from: nnkit draws it in each trial, the others are given it."""
        ts = self.trainer({"lr": 0.1, "decay": 0.0}).init(jax.random.key(0), self.on_device[0][:1])
        return {path: np.array(value) for path, value in tree.flatten(ts.params).items()}

    @functools.cached_property
    def orders(self) -> Int[np.ndarray, "epochs steps batch"]:
        """The examples of each step: nnkit draws them in each trial, the others are given them."""
        key = self.trainer({"lr": 0.1, "decay": 0.0}).init(jax.random.key(0), self.on_device[0][:1]).key
        orders = [data.shuffled_indices(key, epoch, len(self.x)) for epoch in range(self.epochs)]
        full = np.asarray(orders, np.int32)[:, : self.steps * self.batch_size]
        return full.reshape(self.epochs, self.steps, self.batch_size)

    def trainer(self, hparams: Any) -> Trainer:
        """nnkit's trainer."""
        model = layers.serial(layers.dense(self.hidden), layers.relu, layers.dense(self.classes))
        optimizer = optim.adamw(hparams["lr"], weight_decay=hparams["decay"])
        return train.trainer(model, losses.softmax_cross_entropy, optimizer)


class Implementation(Protocol):
    """One library's way to train all trials."""

    def __init__(self, task: Task) -> None: ...

    def compile(self) -> None:
        """Makes its programs, anew at each call."""
        ...

    def run(self, trials: Sequence[Trial]) -> Float[np.ndarray, "trials 2 epochs"]:
        """Trains each; by epoch the mean of the steps' losses and the loss on the held-out data."""
        ...


class Nnkit:
    """nnkit's search: :meth:`run` is the Engine's part of it, :meth:`sweep` the whole call."""

    def __init__(self, task: Task, **options: Any):
        self.task, self.options = task, options
        x, y, held_x, held_y = task.on_device

        def train_fn(key: Any, hparams: Any) -> Any:
            how = {"epochs": task.epochs, "batch_size": task.batch_size, "drop_last": True}
            return train.run(task.trainer(hparams), key, (x, y), validation=(held_x, held_y), **how)

        self.train_fn = train_fn
        self.engine = self._engine()

    def compile(self) -> None:
        self.engine = self._engine()
        self.run(self.task.trials[:1])

    def run(self, trials: Sequence[Trial]) -> np.ndarray:
        finished = sorted(self.engine.run([{"lr": rate, "decay": decay} for rate, decay in trials]))
        return np.stack([_losses(found.history) for found in finished])

    def sweep(self, callback: Callable[[str, Any], Any] = lambda event, view: None) -> np.ndarray:
        """``search.sweep`` over all trials, in memory; its results in the trials' order."""
        task = self.task
        study = search.sweep(
            self.train_fn,
            task.space,
            sampler=search.grid(task.space, {"lr": task.rates}),
            trials=len(task.trials),
            progress=False,
            callbacks=callback,
            **self.options,
        )
        found = {(t.params["lr"], t.params["decay"]): _losses(t.history) for t in study.trials}
        return np.stack([found[trial] for trial in task.trials])

    def _engine(self) -> search.Engine:
        return search.Engine(self.train_fn, self.task.space, seeds=[0], **self.options)


def _losses(history: Any) -> np.ndarray:
    return np.stack([np.asarray(history["loss"])[0], np.asarray(history["val_loss"])[0]])


def digits(dtype: Any = np.float32, **changes: Any) -> Task:
    """The bundled digits, 1,438 to train on and 359 held out, from 0 to 1.

    >>> task = digits()
    >>> task.x.shape, task.held_x.shape, task.steps, len(task.trials), task.orders.shape
    ((1438, 64), (359, 64), 22, 64, (20, 22, 64))
    """
    parts = data.split(data.load("digits").train, (0.8, 0.2, 0.0), seed=0)
    assert parts.validation is not None
    (x, y), (held_x, held_y) = (part.arrays for part in (parts.train, parts.validation))
    flat: Callable[[Any], np.ndarray] = lambda images: (images.reshape(len(images), -1) / 16).astype(dtype)
    return Task(flat(x), y.astype(np.int32), flat(held_x), held_y.astype(np.int32), **changes)
