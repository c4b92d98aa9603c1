"""``trainer``: a model, a loss and an optimizer become three pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.checks import check_key
from nnkit.losses import check_targets
from nnkit.optim import apply_updates, loss_scale
from nnkit.optim.combine import tolerant
from nnkit.optim.conditional import all_finite
from nnkit.optim.loss_scale import unscale
from nnkit.train.preflight import specs
from nnkit.tree import wide
from nnkit.types import (
    Array,
    GradientTransformation,
    InitFn,
    Layer,
    LossFn,
    Objective,
    Params,
    PyTree,
    Spec,
    State,
    Trainer,
    TrainState,
)

__all__ = ["EVALUATION", "supervised", "trainer"]

EVALUATION = np.uint32(0xFFFFFFFE)
"""What is folded into a run's key for evaluation; steps, which are int32, never get there."""

ROUNDING = np.uint32(0xFFFFFFFD)
"""What is folded into a step's key for the rounding of its parameters."""

Penalty = Callable[[Params], Array]


def trainer(
    model_or_objective: Layer | Objective,
    loss: LossFn | None = None,
    optimizer: GradientTransformation | None = None,
    *,
    init: InitFn | None = None,
    metrics: Mapping[str, LossFn] | None = None,
    regularizer: Penalty | None = None,
    stochastic_rounding: bool = False,
) -> Trainer:
    """A training run as three pure functions: ``init``, ``step``, ``evaluate``.

    Two forms. Supervised: a layer, a loss of (predictions, targets) and an optimizer; batches are
    pairs (x, y), and what is minimised is mean(loss) + regularizer(params). General: an objective
    ``f(params, state, batch, *, key, train) -> (loss, (state, metrics))``, an optimizer and the
    ``init`` of what it trains; batches are whatever the objective takes.

    ``step`` draws from ``fold_in(key, step)`` alone, so a step's randomness is a function of the
    seed and of its number. Nothing here is jitted: wrap ``step`` in ``jax.jit``, a ``lax.scan`` or
    a ``vmap`` as suits, or hand the trainer to :func:`fit`.

    Args:
      model_or_objective: a layer, or an objective.
      loss: one value for each example; only with a layer.
      optimizer: nnkit's or optax's. An update that takes them gets the loss as ``value``, the gradients
        as ``grad`` and the loss as a function of the parameters as ``value_fn``. Under
        ``optim.dynamic_loss_scale`` the loss is scaled before it is differentiated, which no metric and
        none of these three shows, and a step that it skips leaves the layers' state as it was.
      init: makes the parameters and state of an objective, ``model.init`` for instance.
      metrics: by name, further functions of (predictions, targets) with one value for each
        example; only with a layer. An objective returns its own.
      regularizer: a penalty on the parameters, as ``nnkit.regularizers.l2`` gives; only with a
        layer. It is reported as ``penalty`` and is not part of the reported ``loss``.
      stochastic_rounding: whether parameters of half precision are rounded up or down at random, in
        proportion to the distance, so that updates smaller than half a unit in the last place are not
        lost but right on average (``optim.apply_updates(..., key=...)``). Give the optimizer float32
        averages, ``adam(1e-3, mu_dtype=jnp.float32, nu_dtype=jnp.float32)``, for updates in float32.

    Raises:
      TypeError: where an argument of one form is given with the other, or one is missing.

    >>> model = layers.dense(1)
    >>> trainer = train.trainer(model, losses.mean_squared_error, optim.sgd(0.1))
    >>> ts = trainer.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> ts, metrics = jax.jit(trainer.step)(ts, (jnp.ones((4, 2)), jnp.ones((4, 1))))
    >>> int(ts.step), sorted(metrics)
    (1, ['loss'])
    """
    if optimizer is None or not callable(getattr(optimizer, "update", None)):
        got = "none" if optimizer is None else f"{type(optimizer).__name__} {optimizer!r}"
        raise TypeError(
            f"trainer needs an optimizer and got {got}: pass trainer(..., optimizer=optim.adam(1e-3))"
        )
    if isinstance(model_or_objective, Layer):
        if init is not None:
            raise TypeError("trainer(init=...) goes with an objective; a layer has its own init")
        if loss is None:
            raise TypeError(
                "trainer needs a loss for a layer: pass trainer(model, losses.softmax_cross_entropy, ...)"
            )
        objective = supervised(model_or_objective, loss, metrics=metrics, regularizer=regularizer)
        run = _trainer(objective, optimizer, model_or_objective.init, stochastic_rounding)
        return run._replace(check=_check_supervised(model_or_objective, loss))
    if not callable(model_or_objective):
        raise TypeError(f"trainer takes a layer or an objective and got {type(model_or_objective).__name__}")
    given = {"loss": loss, "metrics": metrics, "regularizer": regularizer}
    wrong = [name for name, value in given.items() if value is not None]
    if wrong:
        raise TypeError(f"trainer: {wrong} go with a layer; an objective computes its own loss and metrics")
    if init is None:
        raise TypeError(
            "trainer needs init= with an objective: pass trainer(objective, init=model.init, ...)"
        )
    return _trainer(model_or_objective, optimizer, init, stochastic_rounding)


def supervised(
    model: Layer,
    loss: LossFn,
    *,
    metrics: Mapping[str, LossFn] | None = None,
    regularizer: Penalty | None = None,
) -> Objective:
    """The objective mean(loss(model(x), y)) + regularizer(params) on batches (x, y).

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

    def objective(
        params: Params, state: State, batch: Any, *, key: Array | None, train: bool
    ) -> tuple[Array, tuple[State, dict[str, Array]]]:
        x, y = _pair(batch)
        predictions, state = model.apply(params, state, x, key=key, train=train)
        _check_columns(predictions, y)
        value = jnp.mean(_per_example("the loss", loss(predictions, y), predictions, y))
        found = {"loss": value}
        for name, metric in metrics.items():
            values = _per_example(f"the metric {name!r}", metric(predictions, y), predictions, y)
            found[name] = jnp.mean(values)
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


def _trainer(
    objective: Objective, optimizer: GradientTransformation, init_params: InitFn, stochastic_rounding: bool
) -> Trainer:
    optimizer = tolerant("the optimizer", optimizer)

    def init(key: Array, x: Spec, /) -> TrainState:
        check_key(key, "trainer.init")
        params_key, run_key = jax.random.split(key)
        params, state = init_params(params_key, x)
        step = jnp.zeros((), jnp.int32)
        return TrainState(params, state, optimizer.init(params), run_key, step)

    def step(ts: TrainState, batch: Any, /) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(ts.key, ts.step)

        def loss(params: Params) -> tuple[Array, tuple[State, dict[str, Array]]]:
            return objective(params, ts.state, batch, key=key, train=True)

        scale = loss_scale(ts.opt_state)
        (value, (state, metrics)), grads = _value_and_grad(loss, ts.params, scale)
        _check_state(ts.state, state)
        plain = grads
        if not isinstance(scale, float):
            plain = unscale(grads, scale)
            # The optimizer skips a step that is not finite, and statistics of inf would stay so for good.
            finite = all_finite(plain)
            state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), state, ts.state)
        updates, opt_state = optimizer.update(
            grads,
            ts.opt_state,
            ts.params,
            value=value,
            grad=plain,
            value_fn=lambda params: loss(params)[0],
        )
        rounding = jax.random.fold_in(key, ROUNDING) if stochastic_rounding else None
        params = apply_updates(ts.params, updates, key=rounding)
        return TrainState(params, state, opt_state, ts.key, ts.step + 1), {"loss": value, **metrics}

    def evaluate(ts: TrainState, batch: Any, /) -> dict[str, Array]:
        key = jax.random.fold_in(ts.key, EVALUATION)
        value, (_, metrics) = objective(ts.params, ts.state, batch, key=key, train=False)
        return {"loss": value, **metrics}

    return Trainer(init, step, evaluate)


def _value_and_grad(loss: Callable[[Params], Any], params: Params, scale: Any) -> Any:
    """``jax.value_and_grad(loss, has_aux=True)``, the gradients of the loss times the scale, where there is one."""
    if isinstance(scale, float):
        return jax.value_and_grad(loss, has_aux=True)(params)

    def scaled(params: Params) -> Any:
        value, aux = loss(params)
        dtype = wide(jnp.result_type(value))
        return jnp.asarray(value, dtype) * scale.astype(dtype), (value, aux)

    (_, value), grads = jax.value_and_grad(scaled, has_aux=True)(params)
    return value, grads


def _check_state(before: PyTree, after: PyTree) -> None:
    old, new = jax.tree.structure(before), jax.tree.structure(after)
    if old != new:
        raise ValueError(
            f"the objective returned a state of structure {new} where it was given {old}: return the "
            "state that apply returns"
        )


def _check_supervised(model: Layer, loss: LossFn) -> Callable[[TrainState, Any], None]:
    def check(ts: TrainState, data: Any, /) -> None:
        x, y = _pair(data)
        n = jax.tree.leaves(x)[0].shape[0]

        def predict(ts: TrainState, x: Any) -> Any:
            return model.apply(ts.params, ts.state, x, key=ts.key, train=False)[0]

        one = jax.eval_shape(predict, ts, specs(x, 1))
        predictions = jax.tree.map(lambda a: jax.ShapeDtypeStruct((n, *a.shape[1:]), a.dtype), one)
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
