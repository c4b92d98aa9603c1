"""Flax nnx and optax, in the three forms that its guide on performance and its API describe."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.task import Arrays, Task

__all__ = ["Functional", "Jitted", "Partial"]


class Net(nnx.Module):
    """The task's network."""

    def __init__(self, task: Task, rngs: nnx.Rngs):
        self.conv, self.dense, self.norm, self.drop = (nnx.List() for _ in range(4))
        self.side = task.side
        widths, dtype = (task.features, *task.hidden), task.x.dtype
        for n_in, n_out in itertools.pairwise((1, *task.channels)):
            self.conv.append(nnx.Conv(n_in, n_out, (3, 3), param_dtype=dtype, rngs=rngs))
        for n_in, n_out in itertools.pairwise(widths):
            self.dense.append(nnx.Linear(n_in, n_out, param_dtype=dtype, rngs=rngs))
            if task.batch_norm:
                self.norm.append(
                    nnx.BatchNorm(n_out, momentum=0.99, epsilon=1e-5, param_dtype=dtype, rngs=rngs)
                )
            if task.rate:
                self.drop.append(nnx.Dropout(task.rate, rngs=rngs))
        self.dense.append(nnx.Linear(widths[-1], task.classes, param_dtype=dtype, rngs=rngs))

    def __call__(self, x: Any) -> Any:
        if self.conv:
            x = x.reshape(-1, self.side, self.side, 1)
            for conv in self.conv:
                x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), (2, 2))
            x = x.reshape(len(x), -1)
        for i, dense in enumerate(self.dense[:-1]):
            x = dense(x)
            if self.norm:
                x = self.norm[i](x)
            x = nnx.relu(x)
            if self.drop:
                x = self.drop[i](x)
        return self.dense[-1](x)


class Total(nnx.Module):
    """The sum of the epoch's losses."""

    def __init__(self, dtype: Any):
        self.value = nnx.Variable(jnp.zeros((), dtype))


def step(model: Net, optimizer: nnx.Optimizer, total: Total, x: Any, y: Any, rows: Any) -> None:
    """One update on the examples ``rows``."""
    x, y = x[rows], y[rows]

    def loss_fn(model: Net) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    total.value[...] += loss


jitted = nnx.jit(step, donate_argnums=(0, 1, 2))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def functional(graphdef: Any, state: Any, x: Any, y: Any, rows: Any) -> Any:
    """The guide's functional training loop."""
    model, optimizer, total = nnx.merge(graphdef, state)
    step(model, optimizer, total, x, y, rows)
    return nnx.state((model, optimizer, total))


class Jitted:
    """``nnx.jit`` with donation."""

    def __init__(self, task: Task):
        self.x, self.y = task.on_device
        self.task, self.orders = task, task.orders()
        self.model = Net(task, nnx.Rngs(task.seed))
        self.model.train()
        for path, value in task.first_parameters().items():
            self._parameter(path)[...] = jnp.asarray(value)
        self.optimizer = nnx.Optimizer(self.model, optax.adam(task.learning_rate), wrt=nnx.Param)
        self.total = Total(task.x.dtype)

    def epoch(self, order: np.ndarray | None = None) -> float:
        rows = next(self.orders) if order is None else self.task.batched(order)
        self.total.value[...] = jnp.zeros((), self.x.dtype)
        self.train(rows)
        jax.block_until_ready(nnx.state((self.model, self.optimizer, self.total)))
        return float(self.total.value[...]) / self.task.steps

    def train(self, order: np.ndarray) -> None:
        for rows in order:
            jitted(self.model, self.optimizer, self.total, self.x, self.y, rows)

    def parameters(self) -> Arrays:
        return {path: np.array(self._parameter(path)[...]) for path in self.task.first_parameters()}

    def _parameter(self, path: str) -> Any:
        layer, name = path.split("/")
        kind, index = layer.rsplit("_", 1)
        layers = {"conv": self.model.conv, "dense": self.model.dense, "batch_norm": self.model.norm}
        return getattr(layers[kind][int(index)], name)


class Partial(Jitted):
    """``nnx.jit_partial``, which looks at the objects once."""

    def __init__(self, task: Task):
        super().__init__(task)
        self.step = nnx.jit_partial(
            step, self.model, self.optimizer, self.total, graph=False, donate_argnums=0
        )

    def train(self, order: np.ndarray) -> None:
        for rows in order:
            self.step(self.x, self.y, rows)


class Functional(Jitted):
    """``nnx.split`` once, then ``jax.jit`` on the state."""

    def train(self, order: np.ndarray) -> None:
        x, y = self.x, self.y
        graphdef, state = nnx.split((self.model, self.optimizer, self.total))
        for rows in order:
            state = functional(graphdef, state, x, y, rows)
        nnx.update((self.model, self.optimizer, self.total), state)
