"""The peers of ``benchmarks.search``: Flax linen with optax step by step and scanned, and PyTorch eager."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import traverse_util
from torch.nn import functional as F

from benchmarks.peers.linen import Net
from benchmarks.search_task import Implementation, Task, Trial

__all__ = ["PEERS", "Linen", "PyTorch", "Scanned"]


class _Flax:
    def __init__(self, task: Task):
        self.task, self.tx = task, optax.adamw(0.1)
        self.model = Net(0, (), (task.hidden,), task.classes, batch_norm=False, rate=0.0)
        given = {
            path.replace("dense_", "Dense_"): jnp.asarray(a) for path, a in task.first_parameters.items()
        }
        self.first = traverse_util.unflatten_dict(given, sep="/")

    def loss(self, params: Any, x: Any, y: Any) -> Any:
        logits = self.model.apply({"params": params}, x, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), y).mean()

    def update(self, params: Any, state: Any, x: Any, y: Any, rate: Any, decay: Any) -> Any:
        """One step; ``(parameters, optimizer state), loss``."""
        loss, grads = jax.value_and_grad(self.loss)(params, x, y)
        updates, state = optax.adamw(rate, weight_decay=decay).update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    def numbers(self, trial: Trial) -> tuple[Any, Any]:
        """The trial's rate and decay on the device, once for all of its steps."""
        return jnp.asarray(trial[0], self.task.x.dtype), jnp.asarray(trial[1], self.task.x.dtype)


class Linen(_Flax):
    """A Python loop over a jitted, donated step with rate and decay as arguments, compiled once for all trials.

    Faster than ``optax.inject_hyperparams``, whose numbers go through each step as a part of the state. Nothing
    waits for the device before a trial's end.
    """

    def compile(self) -> None:
        @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
        def step(
            params: Any, state: Any, total: Any, rows: Any, rate: Any, decay: Any, x: Any, y: Any
        ) -> Any:
            (params, state), loss = self.update(params, state, x[rows], y[rows], rate, decay)
            return params, state, total + loss

        # JAX knows a function by its identity: new ones are compiled anew.
        self.step, self.evaluate = step, jax.jit(lambda params, x, y: self.loss(params, x, y))
        jax.block_until_ready(self.epochs(self.task.trials[0], self.task.orders[:1, :1]))

    def run(self, trials: Sequence[Trial]) -> np.ndarray:
        found = [jax.device_get(self.epochs(trial, self.task.orders)) for trial in trials]
        losses = np.asarray(found).swapaxes(1, 2)
        losses[:, 0] /= self.task.steps
        return losses

    def epochs(self, trial: Trial, orders: np.ndarray) -> list[Any]:
        x, y, held_x, held_y = self.task.on_device
        rate, decay = self.numbers(trial)
        params = jax.tree.map(jnp.copy, self.first)
        state, rows = self.tx.init(params), []
        for order in orders:
            total = jnp.zeros((), x.dtype)
            for examples in order:
                params, state, total = self.step(params, state, total, examples, rate, decay, x, y)
            rows.append((total, self.evaluate(params, held_x, held_y)))
        return rows


class Scanned(_Flax):
    """A whole training in one jitted function, scans in a scan, called trial by trial.

    Waiting for each trial is as fast as handing all of them to the device first, or faster.
    """

    def compile(self) -> None:
        @jax.jit
        def trained(params: Any, orders: Any, rate: Any, decay: Any, x: Any, y: Any, *held: Any) -> Any:
            def step(carry: Any, rows: Any) -> Any:
                params, state = carry
                return self.update(params, state, x[rows], y[rows], rate, decay)

            def epoch(carry: Any, order: Any) -> Any:
                carry, losses = jax.lax.scan(step, carry, order)
                return carry, jnp.stack([losses.mean(), self.loss(carry[0], *held)])

            return jax.lax.scan(epoch, (params, self.tx.init(params)), orders)[1]

        self.trained, self.orders = trained, jnp.asarray(self.task.orders)
        self.run(self.task.trials[:1])

    def run(self, trials: Sequence[Trial]) -> np.ndarray:
        found = [
            np.asarray(self.trained(self.first, self.orders, *self.numbers(trial), *self.task.on_device))
            for trial in trials
        ]
        return np.stack(found).swapaxes(1, 2)


class PyTorch:
    """Eager mode, in one thread or all, with Adam fused, foreach or in a loop: what is fastest here for a trial."""

    def __init__(self, task: Task, form: tuple[int, str] | None = None):
        self.task = task
        arrays = (task.x, task.y.astype(np.int64), task.held_x, task.held_y.astype(np.int64))
        self.x, self.y, *self.held = map(torch.from_numpy, arrays)
        self.orders = torch.from_numpy(task.orders.astype(np.int64))
        self.form = self.fastest() if form is None else form
        self.label = "PyTorch, {} thread{}, {}".format(self.form[0], "s" * (self.form[0] > 1), self.form[1])

    def fastest(self) -> tuple[int, str]:
        """Of all forms that which trains a few epochs fastest; each is tried three times, for other programs' sake."""

        def seconds(form: tuple[int, str]) -> float:
            torch.set_num_threads(form[0])
            begun = time.perf_counter()
            self.train(self.task.trials[0], form[1], self.orders[:3])
            return time.perf_counter() - begun

        forms = [(n, how) for n in dict.fromkeys((1, torch.get_num_threads())) for how in _ADAM]
        seconds(forms[0])  # the first training of a process is slower
        return min(forms, key=lambda form: min(seconds(form) for _ in range(3)))

    def compile(self) -> None:
        """There is nothing to compile."""

    def run(self, trials: Sequence[Trial]) -> np.ndarray:
        torch.set_num_threads(self.form[0])
        found = [self.train(trial, self.form[1], self.orders) for trial in trials]
        return np.asarray(found).swapaxes(1, 2)

    def train(self, trial: Trial, how: str, orders: torch.Tensor) -> list[tuple[float, float]]:
        model, rows = self.model(), []
        adam = torch.optim.AdamW(model.parameters(), lr=trial[0], weight_decay=trial[1], **_ADAM[how])
        for order in orders:
            total = torch.zeros((), dtype=self.x.dtype)
            for examples in order:
                x, y = self.x.index_select(0, examples), self.y.index_select(0, examples)
                loss = F.cross_entropy(model(x), y)
                adam.zero_grad(set_to_none=True)
                loss.backward()
                adam.step()
                total += loss.detach()
            with torch.inference_mode():
                held = F.cross_entropy(model(self.held[0]), self.held[1])
            rows.append((float(total) / len(order), float(held)))
        return rows

    def model(self) -> torch.nn.Module:
        first = self.task.first_parameters
        kernels = [torch.from_numpy(first[f"dense_{i}/kernel"].T.copy()) for i in (0, 1)]
        biases = [torch.from_numpy(first[f"dense_{i}/bias"].copy()) for i in (0, 1)]
        widths = [kernel.shape[::-1] for kernel in kernels]
        linear = [torch.nn.utils.skip_init(torch.nn.Linear, *width, dtype=self.x.dtype) for width in widths]
        for layer, kernel, bias in zip(linear, kernels, biases, strict=True):
            layer.weight, layer.bias = torch.nn.Parameter(kernel), torch.nn.Parameter(bias)
        return torch.nn.Sequential(linear[0], torch.nn.ReLU(), linear[1])


_ADAM: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "loop": {"foreach": False, "fused": False},
}

PEERS: dict[str, type[Implementation]] = {"linen": Linen, "pytorch": PyTorch, "linen.scan": Scanned}
"""By name; the targets are in ``benchmarks.search``."""
