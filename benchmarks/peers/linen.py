"""Flax linen and optax: a jitted step on a donated ``TrainState``, as in Flax's own examples."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util
from flax.training.train_state import TrainState

from benchmarks.task import Arrays, Task

__all__ = ["Linen", "Scanned"]


class Net(nn.Module):
    """The task's network."""

    side: int
    channels: tuple[int, ...]
    hidden: tuple[int, ...]
    classes: int
    batch_norm: bool
    rate: float

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        if self.channels:
            x = x.reshape(-1, self.side, self.side, 1)
            for features in self.channels:
                x = nn.relu(nn.Conv(features, (3, 3))(x))
                x = nn.max_pool(x, (2, 2), (2, 2))
            x = x.reshape(len(x), -1)
        for width in self.hidden:
            x = nn.Dense(width)(x)
            if self.batch_norm:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.99, epsilon=1e-5)(x)
            x = nn.relu(x)
            if self.rate:
                x = nn.Dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(self.classes)(x)


class State(TrainState):
    """Flax's train state with what else a step carries."""

    batch_stats: Any
    dropout_key: Any
    total: Any  # of the epoch's losses


def step(state: State, x: Any, y: Any, rows: Any) -> State:
    """One update on the examples ``rows``."""
    x, y = x[rows], y[rows]

    def loss_fn(params: Any) -> Any:
        rngs = {}
        if state.dropout_key is not None:
            rngs["dropout"] = jax.random.fold_in(state.dropout_key, state.step)
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            x,
            train=True,
            rngs=rngs,
            mutable=["batch_stats"],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, updates.get("batch_stats", {})

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=grads)
    return state.replace(batch_stats=batch_stats, total=state.total + loss)


train_step = jax.jit(step, donate_argnums=0)


@partial(jax.jit, donate_argnums=0)
def train_epoch(state: State, x: Any, y: Any, order: Any) -> State:
    """All steps in one scan, which Flax leaves to its users."""
    return jax.lax.scan(lambda state, rows: (step(state, x, y, rows), None), state, order)[0]


class Linen:
    """A Python loop over the jitted step."""

    def __init__(self, task: Task):
        self.x, self.y = task.on_device
        self.task, self.orders = task, task.orders()
        model = Net(task.side, task.channels, task.hidden, task.classes, task.batch_norm, task.rate)
        # Shapes alone: the parameters are the task's.
        variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), self.x[:1])
        given = {_to_flax(path): jnp.asarray(value) for path, value in task.first_parameters().items()}
        params = traverse_util.unflatten_dict(given, sep="/")
        assert jax.tree.structure(params) == jax.tree.structure(variables["params"])
        stats = {
            name: {
                "mean": jnp.zeros_like(self.x, shape=s["mean"].shape),
                "var": jnp.ones_like(self.x, shape=s["var"].shape),
            }
            for name, s in variables.get("batch_stats", {}).items()
        }
        self.state = State.create(
            apply_fn=model.apply,
            params=params,
            tx=optax.adam(task.learning_rate),
            batch_stats=stats,
            dropout_key=jax.random.key(task.seed) if task.rate else None,
            total=self.zero(),
        )

    def epoch(self, order: np.ndarray | None = None) -> float:
        rows = next(self.orders) if order is None else self.task.batched(order)
        self.state = self.train(self.state.replace(total=self.zero()), rows)
        jax.block_until_ready(self.state)
        return float(self.state.total) / self.task.steps

    def zero(self) -> Any:
        return jnp.zeros((), self.x.dtype)

    def train(self, state: State, order: np.ndarray) -> State:
        x, y = self.x, self.y
        for rows in order:
            state = train_step(state, x, y, rows)
        return state

    def parameters(self) -> Arrays:
        flat = traverse_util.flatten_dict(self.state.params, sep="/")
        return {_from_flax(path): np.array(value) for path, value in flat.items()}


class Scanned(Linen):
    """The scan that a user can write around the step: what nnkit's ``fit`` does for its users."""

    def train(self, state: State, order: np.ndarray) -> State:
        return train_epoch(state, self.x, self.y, order)


def _to_flax(path: str) -> str:
    for ours, theirs in _NAMES.items():
        path = path.replace(ours, theirs)
    return path


def _from_flax(path: str) -> str:
    for ours, theirs in _NAMES.items():
        path = path.replace(theirs, ours)
    return path


_NAMES = {"conv_": "Conv_", "dense_": "Dense_", "batch_norm_": "BatchNorm_"}
