"""Equinox and optax, with ``filter_jit`` and donation, and with the trick of its page on tricks."""

from __future__ import annotations

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.task import Arrays, Task

__all__ = ["Filtered", "Flat"]


class Net(eqx.Module):
    """The task's network for one example."""

    side: int = eqx.field(static=True)
    conv: list[eqx.nn.Conv2d]
    pool: eqx.nn.MaxPool2d
    dense: list[eqx.nn.Linear]
    norm: list[eqx.nn.BatchNorm]
    drop: list[eqx.nn.Dropout]

    def __init__(self, task: Task, key: Any):
        self.side = task.side
        self.conv = [
            eqx.nn.Conv2d(m, n, 3, padding=1, key=key) for m, n in itertools.pairwise((1, *task.channels))
        ]
        self.pool = eqx.nn.MaxPool2d(2, 2)
        widths = (task.features, *task.hidden, task.classes)
        keys = jax.random.split(key, len(widths))
        self.dense = [
            eqx.nn.Linear(m, n, key=k) for m, n, k in zip(widths[:-1], widths[1:], keys, strict=False)
        ]
        self.norm = [
            eqx.nn.BatchNorm(n, "batch", momentum=0.99, eps=1e-5, mode="batch")
            for n in task.hidden
            if task.batch_norm
        ]
        self.drop = [eqx.nn.Dropout(task.rate) for _ in task.hidden if task.rate]

    def __call__(self, x: Any, state: Any, key: Any) -> Any:
        keys = jax.random.split(key, len(self.drop)) if self.drop else None
        if self.conv:
            x = x.reshape(1, self.side, self.side)
            for conv in self.conv:
                x = self.pool(jax.nn.relu(conv(x)))
            x = x.reshape(-1)
        for i, dense in enumerate(self.dense[:-1]):
            x = dense(x)
            if self.norm:
                x, state = self.norm[i](x, state)
            x = jax.nn.relu(x)
            if keys is not None:
                x = self.drop[i](x, key=keys[i])
        return self.dense[-1](x), state


class Carry(eqx.Module):
    """What goes from step to step."""

    model: Net
    state: Any
    opt_state: Any
    key: Any
    total: Any


class Filtered:
    """``filter_jit`` that donates all but the data."""

    def __init__(self, task: Task):
        self.task, self.orders = task, task.orders()
        self.x, self.y = task.on_device
        self.optimizer = optax.adam(task.learning_rate)
        model, state = eqx.nn.make_with_state(Net)(task, jax.random.key(0))
        for path, value in task.first_parameters().items():
            value = jnp.asarray(_stored(task, path, value))
            model = eqx.tree_at(lambda m, path=path: _parameter(m, path), model, value)
        self.carry = Carry(
            model,
            state,
            self.optimizer.init(eqx.filter(model, eqx.is_inexact_array)),
            jax.random.key(task.seed) if task.rate else None,
            jnp.zeros((), self.x.dtype),
        )
        self.compile()

    def step(self, data: Any, carry: Carry) -> Carry:
        """One update on the examples ``rows``."""
        x, y, rows = data
        x, y = x[rows], y[rows]
        key, keys = carry.key, None
        if key is not None:
            key, subkey = jax.random.split(key)
            keys = jax.random.split(subkey, len(x))

        def loss_fn(model: Net, state: Any) -> Any:
            forward = jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
            logits, state = forward(x, state, keys)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), state

        (loss, state), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(carry.model, carry.state)
        updates, opt_state = self.optimizer.update(grads, carry.opt_state)
        return Carry(eqx.apply_updates(carry.model, updates), state, opt_state, key, carry.total + loss)

    def compile(self) -> None:
        self.compiled = eqx.filter_jit(self.step, donate="all-except-first")

    def epoch(self, order: np.ndarray | None = None) -> float:
        rows = next(self.orders) if order is None else self.task.batched(order)
        self.carry = eqx.tree_at(lambda c: c.total, self.carry, jnp.zeros((), self.x.dtype))
        self.carry = self.train(self.carry, rows)
        jax.block_until_ready(eqx.filter(self.carry, eqx.is_array))
        return float(self.carry.total) / self.task.steps

    def train(self, carry: Carry, order: np.ndarray) -> Carry:
        x, y = self.x, self.y
        for rows in order:
            carry = self.compiled((x, y, rows), carry)
        return carry

    def parameters(self) -> Arrays:
        found = {path: np.array(_parameter(self.carry.model, path)) for path in self.task.first_parameters()}
        return {
            path: self.task.channels_last(
                path, value.reshape(value.shape[0]) if _is_conv_bias(path) else value
            )
            for path, value in found.items()
        }


class Flat(Filtered):
    """Arrays alone go through the jitted step, flattened once: Equinox's low-overhead training loop."""

    def compile(self) -> None:
        arrays, self.static = eqx.partition(self.carry, eqx.is_array)
        self.treedef = jax.tree.structure(arrays)

        def flat_step(leaves: Any, x: Any, y: Any, rows: Any) -> Any:
            carry = eqx.combine(jax.tree.unflatten(self.treedef, leaves), self.static)
            return jax.tree.leaves(eqx.filter(self.step((x, y, rows), carry), eqx.is_array))

        self.compiled = jax.jit(flat_step, donate_argnums=0)

    def train(self, carry: Carry, order: np.ndarray) -> Carry:
        x, y = self.x, self.y
        leaves = jax.tree.leaves(eqx.filter(carry, eqx.is_array))
        for rows in order:
            leaves = self.compiled(leaves, x, y, rows)
        return eqx.combine(jax.tree.unflatten(self.treedef, leaves), self.static)


def _is_conv_bias(path: str) -> bool:
    return path.startswith("conv") and path.endswith("bias")


def _stored(task: Task, path: str, value: np.ndarray) -> np.ndarray:
    return value.reshape(-1, 1, 1) if _is_conv_bias(path) else task.channels_first(path, value)


def _parameter(model: Net, path: str) -> Any:
    layer, name = path.split("/")
    kind, index = layer.rsplit("_", 1)
    if kind in ("conv", "dense"):
        return getattr(getattr(model, kind)[int(index)], {"kernel": "weight", "bias": "bias"}[name])
    return getattr(model.norm[int(index)], {"scale": "weight", "bias": "bias"}[name])
