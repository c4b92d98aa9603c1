"""Averages of parameters over the steps of a run, and running statistics that belong to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnkit import tree
from nnkit.optim.conditional import check_count
from nnkit.optim.scalars import Scalar, as_scalar
from nnkit.train.evaluate import rows_of
from nnkit.train.preflight import checked_batch_size, number_of_examples
from nnkit.types import Array, Layer, Params, PyTree, Spec, State, StepFn, Trainer, TrainState

__all__ = ["AveragedState", "average_params", "averaged", "reestimate"]


class AveragedState(NamedTuple):
    """The optimizer's state of a trainer made by :func:`averaged`.

    Attributes:
      inner_state: the optimizer's own.
      average: the average of the parameters so far, in float32 at least.
      weight: the sum of the weights in it, relative to that of the last parameters; 0 before the first.
    """

    inner_state: PyTree
    average: PyTree
    weight: Any


def averaged(
    trainer: Trainer,
    decay: Scalar = 0.999,
    *,
    debias: bool = True,
    start: int | Array = 0,
    every: int | Array = 1,
    evaluate_average: bool = True,
) -> Trainer:
    """The trainer, with an average of its parameters in the optimizer's state.

    The steps are the same to the last bit. After each, the average moves towards the parameters θ:

        a <- a + (θ − a) / W        with W <- decay · W + 1, from W = 0

    So a is the exponential average with weights decay^age, divided by their sum W: unbiased from the
    first step on, where it is θ itself. decay = 1 is the plain mean of all (Polyak, SWA). Without debias
    it is PyTorch's ``get_ema_multi_avg_fn``, a <- decay · a + (1 − decay) · θ from a copy of the first θ,
    which for the first 1/(1 − decay) steps weighs too much.

    :func:`average_params` reads the average off a state. Layer state is not averaged: running statistics
    are those of θ, and with batch normalisation :func:`reestimate` makes those that belong to a.
    ``optim.learning_rate``, ``optim.report``, ``optim.set_hyperparams`` and ``optim.loss_scale`` find the
    optimizer's state inside. A step that ``skipping`` leaves out is not averaged.

    Args:
      trainer: any trainer.
      decay: in [0, 1]; may be traced.
      debias: see above.
      start: the number of the last step that is not averaged; may be traced.
      every: of how many steps one is averaged, at least 1: the steps of an epoch, for stochastic weight
        averaging as in its paper.
      evaluate_average: whether ``evaluate`` takes the average in place of the parameters.

    Raises:
      ValueError: for a decay outside [0, 1], a negative start, an every below 1.
      TypeError: for a start or an every that is no whole number.

    Polyak and Juditsky, 1992, https://doi.org/10.1137/0330046; Izmailov et al., 2018,
    https://arxiv.org/abs/1803.05407; PyTorch's ``torch.optim.swa_utils.AveragedModel``.

    >>> model = layers.dense(1, use_bias=False)
    >>> trainer = train.averaged(train.trainer(model, losses.mean_squared_error, optim.sgd(0.25)), decay=0.5)
    >>> ts = trainer.init(jax.random.key(0), jnp.zeros((1, 1)))
    >>> ts = ts._replace(params={"kernel": jnp.zeros((1, 1))})
    >>> for _ in range(2):
    ...     ts, _ = trainer.step(ts, (jnp.ones((4, 1)), jnp.ones((4, 1))))
    ...     print(ts.params["kernel"].item(), round(train.average_params(ts)["kernel"].item(), 6))
    0.5 0.5
    0.75 0.666667
    """
    decay = as_scalar(
        decay, "decay", "[0, 1]", "it is the decay of an average, and 1 makes it the plain mean"
    )
    start, every = check_count(start, "start", 0), check_count(every, "every", 1)

    def init(key: Array, x: Spec, /) -> TrainState:
        ts = trainer.init(key, x)
        dtypes = [tree.wide(p.dtype) for p in jax.tree.leaves(ts.params)]
        with jax.numpy_dtype_promotion("standard"):
            weight = jnp.zeros((), jnp.finfo(jnp.result_type(jnp.float32, *dtypes)).dtype)
        # Copies: a buffer that is twice in a state cannot be donated.
        average = jax.tree.map(lambda p: jnp.array(p, tree.wide(p.dtype), copy=True), ts.params)
        return ts._replace(opt_state=AveragedState(ts.opt_state, average, weight))

    def with_average(step: StepFn) -> StepFn:
        def averaging(ts: TrainState, batch: Any, /) -> tuple[TrainState, dict[str, Array]]:
            inner, average, weight = _state_of(ts)
            new, metrics = step(ts._replace(opt_state=inner), batch)
            with jax.numpy_dtype_promotion("standard"):  # start and every may be of other integer dtypes
                counts = (new.step > start) & ((new.step - start) % every == 0)
            if "skipped" in metrics:
                counts &= metrics["skipped"] == 0
            factor = jnp.asarray(decay, weight.dtype)
            next_weight = factor * weight + 1
            part = 1 / next_weight if debias else jnp.where(weight > 0, 1 - factor, 1)

            def move(a: Array, p: Array) -> Array:
                p = p.astype(a.dtype)
                # The first is taken as it is: a sum would be rounded, and show what the average was before.
                moved = jnp.where(weight > 0, a + (p - a) * part.astype(a.dtype), p)
                return jnp.where(counts, moved, a)

            average = jax.tree.map(move, average, new.params)
            weight = jnp.where(counts, next_weight, weight)
            return new._replace(opt_state=AveragedState(new.opt_state, average, weight)), metrics

        return averaging

    def evaluate(ts: TrainState, batch: Any, /) -> dict[str, Array]:
        params = average_params(ts) if evaluate_average else ts.params
        return trainer.evaluate(ts._replace(params=params, opt_state=_state_of(ts).inner_state), batch)

    def check(ts: TrainState, data: Any, /) -> None:
        trainer.check(ts._replace(opt_state=_state_of(ts).inner_state), data)

    skipping = None if trainer.skipping is None else with_average(trainer.skipping)
    return Trainer(init, with_average(trainer.step), evaluate, check, skipping)


def average_params(ts: TrainState) -> Params:
    """The average of the parameters in the state of an :func:`averaged` trainer, in the parameters' dtypes.

    Before the first step that is averaged it is the parameters.

    Raises:
      TypeError: for the state of a trainer without an average.

    >>> trainer = train.averaged(train.trainer(layers.dense(1), losses.mean_squared_error, optim.sgd(0.1)))
    >>> ts = trainer.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> jax.tree.map(jnp.shape, train.average_params(ts))
    {'bias': (1,), 'kernel': (2, 1)}
    """
    state = _state_of(ts)

    def leaf(a: Array, p: Array) -> Array:
        begun = state.weight > 0
        begun = begun.reshape(begun.shape + (1,) * (a.ndim - begun.ndim))  # of a population, one for each
        return jnp.where(begun, a.astype(p.dtype), p)

    return jax.tree.map(leaf, state.average, ts.params)


def _state_of(ts: TrainState) -> AveragedState:
    if not isinstance(ts.opt_state, AveragedState):
        raise TypeError(
            f"the optimizer's state is {type(ts.opt_state).__name__} and has no average of the parameters: take the "
            "state of train.averaged(trainer)"
        )
    return ts.opt_state


def reestimate(
    model: Layer,
    params: Params,
    state: State,
    x: Any,
    *,
    batch_size: int = 1000,
    key: Array | None = None,
    where: str | Callable[[str], bool] = r"(.*/)?(mean|var)",
) -> State:
    """Running statistics for given parameters: the mean of the batches' own over a whole data set.

    For parameters that were not trained as they are, an average of them for instance. One pass in training
    mode; each batch weighs as many as it has examples. As PyTorch's ``update_bn``, for which all
    batches weigh the same, with ``momentum=None``.

    A running statistic r of layers is taken to move by r <- m r + (1 − m) s, whatever the momentum m. Each
    batch is run from r = 0, which gives (1 − m) s, and from a huge r, which gives m; all that does
    not depend on r, in training mode the network, is computed once. Statistics that do not move
    (``frozen``, ``use_running_average``) stay, and so does all other state. In float32 the
    result is right to some 1e-7/(1 − m) of itself, like any running statistic. A batch whose statistics are
    NaN or overflow makes the result NaN or inf.

    Args:
      model: the network.
      params: its parameters.
      state: its state, for the form and for all that is not re-estimated.
      x: inputs as the model takes them, any number.
      batch_size: how many at a time: that of training, where batches are to be normalised as there.
      key: for layers that draw random numbers in training; batch i gets ``fold_in(key, i)``.
      where: which leaves of the state are running statistics, by a regular expression of their whole path or
        a predicate of it; those whose last name is ``mean`` or ``var`` by default.

    Raises:
      LayerError: of a layer without a key that it needs, and of batch normalisation where the last batch
        has a single example.
      ValueError: where no leaf is a running statistic.

    >>> model = layers.batch_norm(momentum=0.9)
    >>> x = np.array([[1.0], [3.0], [5.0], [7.0]], "f")
    >>> params, state = model.init(jax.random.key(0), x[:1])
    >>> state = train.reestimate(model, params, state, x, batch_size=2)
    >>> state["mean"].round(4).tolist(), state["var"].round(4).tolist()
    ([4.0], [1.0])
    """
    flags = tree.mask(state, where)
    if not any(jax.tree.leaves(flags)):
        raise ValueError(
            f"reestimate: no path of the state matches where={where!r}, there are "
            f"{', '.join(tree.flatten(state)) or 'none'}"
        )
    x = jax.tree.map(jnp.asarray, x)
    n = number_of_examples(x)
    batch_size = checked_batch_size(batch_size, n)
    chosen = tuple(jax.tree.leaves(flags))
    return _reestimate(model, params, state, x, key, batch_size=batch_size, chosen=chosen)


@partial(jax.jit, static_argnames=("model", "batch_size", "chosen"))
def _reestimate(
    model: Layer,
    params: Params,
    state: State,
    x: Any,
    key: Array | None,
    *,
    batch_size: int,
    chosen: tuple[bool, ...],
) -> State:
    n = number_of_examples(x)
    full, tail = divmod(n, batch_size)
    leaves, structure = jax.tree.flatten(state)
    statistics = [leaf for leaf, flag in zip(leaves, chosen, strict=True) if flag]

    def run(values: list[Array], i: Any, batch: Any) -> list[Array]:
        rest = iter(values)
        start = [next(rest) if flag else leaf for leaf, flag in zip(leaves, chosen, strict=True)]
        at = None if key is None else jax.random.fold_in(key, i)
        _, new = model.apply(params, structure.unflatten(start), batch, key=at, train=True)
        return [leaf for leaf, flag in zip(jax.tree.leaves(new), chosen, strict=True) if flag]

    def probe(still: list[Array], i: Any, batch: Any) -> tuple[list[Array], list[Array]]:
        """(1 − m) s and m of each statistic; one that is still is run as it is, its m is 1."""
        pairs = [
            jnp.stack([jnp.where(fixed, r, 0), jnp.where(fixed, r, _huge(r))])
            for fixed, r in zip(still, statistics, strict=True)
        ]
        # Mapped, what does not depend on the statistics is computed once: in training mode, the network.
        moved = jax.vmap(lambda values: run(values, i, batch))(pairs)
        keep = [
            jnp.where(fixed, 1, (high - low) / _huge(low))
            for fixed, (low, high) in zip(still, moved, strict=True)
        ]
        # NaN is neither still nor moving by a known momentum: it goes into the sum, to be seen there.
        return [jnp.where(k == 1, 0, low) for k, (low, _) in zip(keep, moved, strict=True)], keep

    first = rows_of(x, 0, batch_size)
    moving = [jnp.array(False)] * len(statistics)
    still = [(keep == 1).all() for keep in probe(moving, 0, first)[1]]

    def add(i: Any, sums: Any, batch: Any) -> Any:
        taken, keep = probe(still, i, batch)
        size = number_of_examples(batch)
        total, weight = sums
        total = [t + size * new for t, new in zip(total, taken, strict=True)]
        return total, [w + size * (1 - k) for w, k in zip(weight, keep, strict=True)]

    zeros = jax.tree.map(jnp.zeros_like, statistics)
    sums = jax.lax.fori_loop(
        0, full, lambda i, sums: add(i, sums, rows_of(x, i * batch_size, batch_size)), (zeros, zeros)
    )
    if tail:
        try:
            sums = add(full, sums, jax.tree.map(lambda a: a[full * batch_size :], x))
        except ValueError as error:
            error.add_note(f"in the last batch, of {tail} examples: give reestimate another batch_size")
            raise
    found = iter(
        jnp.where(weight == 0, old, total / jnp.where(weight == 0, 1, weight))
        for total, weight, old in zip(*sums, statistics, strict=True)
    )
    return structure.unflatten(
        [next(found) if flag else leaf for leaf, flag in zip(leaves, chosen, strict=True)]
    )


def _huge(r: Array) -> Any:
    """A power of 2 that no statistic hides, and whose product with a momentum is exact."""
    return 2.0 ** (jnp.finfo(r.dtype).maxexp - 2)
