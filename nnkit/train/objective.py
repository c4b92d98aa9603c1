"""``supervised``: what a model and a loss minimise, with or without mixing of examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.checks import is_static_number
from nnkit.losses import check_targets
from nnkit.optim.scalars import Scalar, as_scalar
from nnkit.train.preflight import number_of_examples, specs
from nnkit.tree import wide
from nnkit.types import Array, Layer, LossFn, Objective, Params, PyTree, State, TrainState

__all__ = ["Penalty", "check_supervised", "supervised"]

MIXING = np.uint32(0xFFFFFFFC)
"""What is folded into a step's key for mixup."""

Penalty = Callable[[Params], Array]


def supervised(
    model: Layer,
    loss: LossFn,
    *,
    metrics: Mapping[str, LossFn] | None = None,
    regularizer: Penalty | None = None,
    mixup: Scalar | None = None,
) -> Objective:
    """The objective mean(loss(model(x), y)) + regularizer(params) on batches (x, y).

    With ``mixup``, in training only, each example is mixed with another of its batch, the p-th:

        x̃ = λ x + (1 − λ) x[p]        loss = λ loss(model(x̃), y) + (1 − λ) loss(model(x̃), y[p])

    for one λ ~ Beta(mixup, mixup) and one random permutation p a call. The losses are mixed and not
    the targets, so that any loss and integer labels do; for a cross-entropy it is the same. Training
    metrics are mixed as the loss is, and so are not those of the examples as they are: an accuracy of
    mixed examples cannot reach 1. Validation metrics are not affected.

    Args:
      model: the network.
      loss: one value for each example.
      metrics: by name, further functions of (predictions, targets) with one value for each example.
      regularizer: a penalty on the parameters; it is reported as ``penalty`` and not in ``loss``.
      mixup: Beta's parameter, in [0, inf), may be traced; the paper's range is 0.1 to 0.4 on ImageNet, 1 on
        CIFAR. 0 and None mix nothing. A step's other random numbers are the same with and without.

    Raises:
      ValueError: for a metric called ``loss`` or ``penalty``; a negative mixup. In a call: where the
        loss or a metric is not one value for each example.
      TypeError: in a call, for a batch that is no pair, or inputs of mixup that are not floating-point.

    Source of mixup: Zhang et al. 2018, "mixup: Beyond empirical risk minimization".

    >>> objective = train.supervised(layers.dense(1), losses.mean_squared_error)
    >>> params = {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}
    >>> batch = jnp.ones((4, 2)), jnp.ones((4, 1))
    >>> value, (state, metrics) = objective(params, {}, batch, key=None, train=True)
    >>> float(value)
    1.0
    """
    metrics = dict(metrics or {})
    reserved = {"loss", "penalty"} & set(metrics)
    if reserved:
        raise ValueError(f"metrics: the names {sorted(reserved)} are taken, choose others")
    if mixup is not None:
        mixup = as_scalar(mixup, "mixup", "[0, inf)", "it is the parameter of Beta(mixup, mixup)")
    mixes = mixup is not None and not (is_static_number(mixup) and mixup == 0)

    def objective(
        params: Params, state: State, batch: Any, *, key: Array | None, train: bool
    ) -> tuple[Array, tuple[State, dict[str, Array]]]:
        x, y = _pair(batch)
        mixed = None
        if mixes and train:
            x, mixed = _mixed(x, y, mixup, key)
        predictions, state = model.apply(params, state, x, key=key, train=train)

        def mean_to(targets: Any, what: str, f: LossFn) -> Array:
            _check_columns(predictions, targets)
            return jnp.mean(_per_example(what, f(predictions, targets), predictions, targets))

        def mean(what: str, f: LossFn) -> Array:
            ours = mean_to(y, what, f)
            if mixed is None:
                return ours
            weight = mixed[0].astype(ours.dtype)
            return weight * ours + (1 - weight) * mean_to(mixed[1], what, f)

        value = mean("the loss", loss)
        found = {"loss": value}
        for name, metric in metrics.items():
            found[name] = mean(f"the metric {name!r}", metric)
        if regularizer is not None:
            found["penalty"] = jnp.asarray(regularizer(params), value.dtype)
            value = value + found["penalty"]
        return value, (state, found)

    return objective


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        got = f"{len(batch)} of them" if isinstance(batch, tuple | list) else type(batch).__name__
        raise TypeError(f"a supervised step takes a batch (x, y), got {got}")
    return batch[0], batch[1]


def _mixed(x: Any, y: Any, alpha: Any, key: Array | None) -> tuple[Any, tuple[Array, Any]]:
    """The mixed inputs; λ, and the targets that weigh 1 − λ."""
    for leaf in jax.tree.leaves(x):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"mixup mixes inputs and got {leaf.dtype}, of which there is nothing in between: convert images to "
                "floating-point numbers, or leave mixup out"
            )
    if key is None:
        raise TypeError("mixup draws random numbers: pass objective(..., key=key)")
    of_weight, of_order = jax.random.split(jax.random.fold_in(key, MIXING))
    alpha = jnp.asarray(alpha, jnp.result_type(float))
    some = alpha > 0  # Beta(0, 0) is NaN here; its limit, 0 or 1, mixes nothing
    at = jnp.where(some, alpha, 1)
    weight = jnp.where(some, jax.random.beta(of_weight, at, at), 1)
    order = jax.random.permutation(of_order, number_of_examples(x))

    def mix(a: Any) -> Array:
        a = jnp.asarray(a)
        ours = weight.astype(wide(a.dtype))
        return (ours * a.astype(ours.dtype) + (1 - ours) * a[order].astype(ours.dtype)).astype(a.dtype)

    return jax.tree.map(mix, x), (weight, jax.tree.map(lambda t: jnp.asarray(t)[order], y))


def _per_example(what: str, values: Any, predictions: Any, targets: Any) -> Array:
    """Guards against the silent broadcast of (n, 1) against (n,) to (n, n)."""
    shape = getattr(values, "shape", ())
    if not shape:
        raise ValueError(f"{what} returned one number: return one value for each example, of shape (batch,)")
    whole = getattr(predictions, "shape", None)
    if whole is not None and shape != whole[: len(shape)]:
        raise ValueError(
            f"{what} returned shape {shape} for predictions of shape {whole} and targets of shape "
            f"{jnp.shape(targets)}: give them equal shapes, for instance targets[:, None]"
        )
    return values


def _check_columns(predictions: Any, targets: Any) -> None:
    """The same guard where the loss averages the (n, n) matrix away before anyone sees it."""
    p, t = getattr(predictions, "shape", None), getattr(targets, "shape", None)
    if p is None or t is None or not jnp.issubdtype(targets.dtype, jnp.floating):
        return
    if p == (*t, 1) or t == (*p, 1):
        write = "targets[..., None]" if p == (*t, 1) else "predictions[..., None]"
        raise ValueError(
            f"predictions have shape {p} and targets {t}, which would broadcast against each other: give them "
            f"equal shapes, {write}"
        )


def check_supervised(model: Layer, loss: LossFn) -> Callable[[TrainState, Any], None]:
    """A trainer's check of data on the host: whether the values of the targets suit the loss."""

    def check(ts: TrainState, data: Any, /) -> None:
        x, y = _pair(data)
        n = jax.tree.leaves(x)[0].shape[0]

        def predict(ts: TrainState, x: Any) -> Any:
            return model.apply(ts.params, ts.state, x, key=ts.key, train=False)[0]

        one = jax.eval_shape(predict, ts, specs(x, 1))
        predictions: PyTree = jax.tree.map(lambda a: jax.ShapeDtypeStruct((n, *a.shape[1:]), a.dtype), one)
        check_targets(loss, predictions, y)
        _try_loss(loss, predictions, y)

    return check


def _try_loss(loss: LossFn, predictions: Any, targets: Any) -> None:
    """Calls the loss on the host with predictions of 0, for what only values can tell.

    A loss of the user's may call one of ours, which raises for a label out of range when it is not
    compiled. In pieces, so that predictions of many classes do not fill the memory.
    """
    if not isinstance(predictions, jax.ShapeDtypeStruct):
        return
    n, *rest = predictions.shape
    step = max(1, 2**22 // max(1, math.prod(rest)))
    for start in range(0, n, step):
        part = jnp.asarray(targets[start : start + step])
        loss(jnp.zeros((len(part), *rest), predictions.dtype), part)
