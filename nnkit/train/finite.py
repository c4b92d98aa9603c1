"""Whether a run's numbers are finite, and the same run with smaller updates: what compiled steps need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from nnkit.checks import is_static_number
from nnkit.optim import loss_scale
from nnkit.optim.conditional import ApplyIfFiniteState, all_finite
from nnkit.types import PyTree, StepFn, Trainer, TrainState

__all__ = ["chunk_is_finite", "scaled"]


def chunk_is_finite(ts: TrainState, metrics: Mapping[str, Array]) -> Bool[Array, ""]:
    """Whether the losses of the steps that led to ``ts`` and the parameters and layer state in it are finite.

    For the end of a compiled chunk: one pass over the parameters a chunk and none a step, since what has
    once become inf or NaN stays so. Where the optimizer drops such updates itself (``apply_if_finite``,
    ``dynamic_loss_scale``), or the step does (the metric ``skipped``), losses do not count.

    Args:
      ts: the state after the steps.
      metrics: with each step's ``loss``, of any shape; zeros for steps that were not taken.

    >>> trainer = train.trainer(layers.dense(1), losses.mean_squared_error, optim.sgd(0.1))
    >>> ts = trainer.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> [bool(train.chunk_is_finite(ts, {"loss": jnp.array([1.0, x])})) for x in (2.0, jnp.nan)]
    [True, False]
    """
    leaves = jax.tree.leaves((ts.params, ts.state))
    found = all_finite([leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)])
    if "skipped" in metrics or _drops(ts.opt_state):
        return found
    return found & all_finite(metrics["loss"])


def _drops(opt_state: PyTree) -> bool:
    """Whether the optimizer itself drops updates that are not finite."""
    if not isinstance(loss_scale(opt_state), float):
        return True
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, ApplyIfFiniteState))
    return any(isinstance(node, ApplyIfFiniteState) for node in leaves)


def scaled(trainer: Trainer, scale: Any) -> Trainer:
    """The same trainer with each step's change of the parameters times ``scale``.

    new = old + scale · (step(old) - old), whatever the optimizer: with gradient descent it is a rate
    times ``scale``. The optimizer's state is that of the whole step, so one that keeps copies of the
    parameters there (``lookahead``, schedule-free ones) sees those unscaled. A scale of 1 changes no bit.

    Args:
      trainer: whose steps are scaled; ``init`` and ``evaluate`` stay.
      scale: more than 0; it may be traced, so one program serves for any.

    Raises:
      ValueError: for a scale that is not a finite number above 0.

    >>> trainer = train.trainer(layers.dense(1, use_bias=False), losses.mean_squared_error, optim.sgd(0.5))
    >>> ts = trainer.init(jax.random.key(0), jnp.zeros((1, 1)))
    >>> ts = ts._replace(params={"kernel": jnp.zeros((1, 1))})
    >>> batch = jnp.ones((4, 1)), jnp.ones((4, 1))
    >>> [float(t.step(ts, batch)[0].params["kernel"][0, 0]) for t in (trainer, train.scaled(trainer, 0.25))]
    [1.0, 0.25]
    """
    if is_static_number(scale) and not 0 < scale < float("inf"):
        raise ValueError(f"scaled(scale=...) must be a finite number above 0, got {scale}")

    def smaller(step: StepFn) -> StepFn:
        def scaled_step(ts: TrainState, batch: Any, /) -> tuple[TrainState, dict[str, Array]]:
            new, metrics = step(ts, batch)
            params = jax.tree.map(lambda old, new: _between(old, new, scale), ts.params, new.params)
            return new._replace(params=params), metrics

        return scaled_step

    skipping = trainer.skipping
    return trainer._replace(
        step=smaller(trainer.step), skipping=None if skipping is None else smaller(skipping)
    )


def _between(old: Array, new: Array, scale: Any) -> Array:
    if not jnp.issubdtype(new.dtype, jnp.inexact):
        return new
    scale = jnp.asarray(scale, new.real.dtype)
    # old + 1 * (new - old) would be rounded.
    return jnp.where(scale == 1, new, old + scale * (new - old))
