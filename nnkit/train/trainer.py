"""``trainer``: a model, a loss and an optimizer become three pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.checks import check_key
from nnkit.optim import apply_updates, loss_scale
from nnkit.optim.combine import tolerant
from nnkit.optim.conditional import all_finite
from nnkit.optim.loss_scale import unscale
from nnkit.optim.scalars import Scalar
from nnkit.train.gradients import StepLoss
from nnkit.train.objective import Penalty, check_supervised, supervised
from nnkit.train.preflight import whole
from nnkit.train.skipping import all_but_scales, is_finite, keep_unless, with_skipped
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

__all__ = ["EVALUATION", "trainer"]

EVALUATION = np.uint32(0xFFFFFFFE)
"""What is folded into a run's key for evaluation; steps, which are int32, never get there."""

ROUNDING = np.uint32(0xFFFFFFFD)
"""What is folded into a step's key for the rounding of its parameters."""


def trainer(
    model_or_objective: Layer | Objective,
    loss: LossFn | None = None,
    optimizer: GradientTransformation | None = None,
    *,
    init: InitFn | None = None,
    metrics: Mapping[str, LossFn] | None = None,
    regularizer: Penalty | None = None,
    mixup: Scalar | None = None,
    micro_batches: int = 1,
    stochastic_rounding: bool = False,
) -> Trainer:
    """A training run as three pure functions: ``init``, ``step``, ``evaluate``.

    Two forms. Supervised: a layer, a loss of (predictions, targets) and an optimizer; batches are
    pairs (x, y), and what is minimised is mean(loss) + regularizer(params). General: an objective
    ``f(params, state, batch, *, key, train) -> (loss, (state, metrics))``, an optimizer and the
    ``init`` of what it trains; batches are whatever the objective takes.

    ``skipping`` is ``step``, but leaves parameters, layer state and optimizer state as they were where
    the loss or a gradient is inf or NaN, and says so in the metric ``skipped``; a loss scale falls then.

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
      mixup: the parameter of Beta for mixing examples in training, see :func:`supervised`; only with a
        layer.
      micro_batches: into how many parts a step cuts its batch, one after the other, so that memory
        holds the activations of one: part i is every ``micro_batches``-th example from the i-th on, with
        the key ``fold_in(key, i)``. Loss, gradients and metrics are the parts' means, weighted by their
        sizes where those differ: for objectives that are means over examples those of the whole batch, to
        rounding. Batch normalisation and mixup see one part at a time, and running statistics
        move with each. A batch of fewer examples is cut into as many parts as those.
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
    micro_batches = whole(micro_batches, "trainer(micro_batches=...)")
    if isinstance(model_or_objective, Layer):
        if init is not None:
            raise TypeError("trainer(init=...) goes with an objective; a layer has its own init")
        if loss is None:
            raise TypeError(
                "trainer needs a loss for a layer: pass trainer(model, losses.softmax_cross_entropy, ...)"
            )
        objective = supervised(
            model_or_objective, loss, metrics=metrics, regularizer=regularizer, mixup=mixup
        )
        run = _trainer(objective, optimizer, model_or_objective.init, micro_batches, stochastic_rounding)
        return run._replace(check=check_supervised(model_or_objective, loss))
    if not callable(model_or_objective):
        raise TypeError(f"trainer takes a layer or an objective and got {type(model_or_objective).__name__}")
    given = {"loss": loss, "metrics": metrics, "regularizer": regularizer, "mixup": mixup}
    wrong = [name for name, value in given.items() if value is not None]
    if wrong:
        raise TypeError(f"trainer: {wrong} go with a layer; an objective computes its own loss and metrics")
    if init is None:
        raise TypeError(
            "trainer needs init= with an objective: pass trainer(objective, init=model.init, ...)"
        )
    return _trainer(model_or_objective, optimizer, init, micro_batches, stochastic_rounding)


def _trainer(
    objective: Objective,
    optimizer: GradientTransformation,
    init_params: InitFn,
    micro_batches: int,
    stochastic_rounding: bool,
) -> Trainer:
    optimizer = tolerant("the optimizer", optimizer)

    def init(key: Array, x: Spec, /) -> TrainState:
        check_key(key, "trainer.init")
        params_key, run_key = jax.random.split(key)
        params, state = init_params(params_key, x)
        step = jnp.zeros((), jnp.int32)
        return TrainState(params, state, optimizer.init(params), run_key, step)

    def take(ts: TrainState, batch: Any, may_skip: bool) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(ts.key, ts.step)
        loss = StepLoss(objective, ts.state, batch, key, micro_batches)
        scale = loss_scale(ts.opt_state)
        is_scaled = not isinstance(scale, float)
        value, state, metrics, grads = loss.gradients(ts.params, scale)
        metrics = {"loss": value, **metrics}
        plain = unscale(grads, scale) if is_scaled else grads
        finite = jnp.array(True)
        if may_skip:
            finite = is_finite(value, plain)
        elif is_scaled:
            finite = all_finite(plain)
        if is_scaled:
            # The optimizer skips a step that is not finite, and statistics of inf would stay so for good.
            state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), state, ts.state)
            if may_skip:  # of a loss that is not finite it is told by the gradients, so that its scale falls
                grads = jax.tree.map(lambda g: jnp.where(finite, g, jnp.nan), grads)

        def updated() -> tuple[Params, State, PyTree]:
            updates, opt_state = optimizer.update(
                grads, ts.opt_state, ts.params, value=value, grad=plain, value_fn=loss.value
            )
            rounding = jax.random.fold_in(key, ROUNDING) if stochastic_rounding else None
            return apply_updates(ts.params, updates, key=rounding), state, opt_state

        if may_skip and not is_scaled:
            new = keep_unless(finite, updated, (ts.params, ts.state, ts.opt_state))
        else:
            new = updated()
        params, state, opt_state = new
        if may_skip and is_scaled:  # what stands behind the scale in a chain may have moved them
            params = jax.tree.map(lambda new, old: jnp.where(finite, new, old), params, ts.params)
            opt_state = all_but_scales(finite, opt_state, ts.opt_state)
        ts = ts._replace(params=params, state=state, opt_state=opt_state, step=ts.step + 1)
        return ts, with_skipped(metrics, finite) if may_skip else metrics

    def step(ts: TrainState, batch: Any, /) -> tuple[TrainState, dict[str, Array]]:
        return take(ts, batch, may_skip=False)

    def skipping(ts: TrainState, batch: Any, /) -> tuple[TrainState, dict[str, Array]]:
        return take(ts, batch, may_skip=True)

    def evaluate(ts: TrainState, batch: Any, /) -> dict[str, Array]:
        key = jax.random.fold_in(ts.key, EVALUATION)
        value, (_, metrics) = objective(ts.params, ts.state, batch, key=key, train=False)
        return {"loss": value, **metrics}

    return Trainer(init, step, evaluate, skipping=skipping)
