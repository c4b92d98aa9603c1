"""``ensemble``: many runs that differ in their key alone, as one program, and what they predict together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nnkit.checks import check_key, unknown_name
from nnkit.train.epochs import compiler_options, platform_of
from nnkit.train.job import Plan, prepare
from nnkit.train.predict import predict
from nnkit.train.preflight import whole
from nnkit.train.run import train_epochs
from nnkit.train.stopping import EarlyStopping
from nnkit.train.uncertainty import Outputs, Uncertain, check_sampling, distribution, entropy_of
from nnkit.types import Array, Layer, Params, PyTree, State, Trainer, TrainState

__all__ = ["ensemble", "predict_ensemble"]


def ensemble(
    trainer: Trainer,
    keys: Array,
    data: Any,
    epochs: int,
    *,
    n: int | None = None,
    members: Literal["exact", "mapped"] = "exact",
    batch_size: int = 64,
    validation: Any = None,
    shuffle: bool = True,
    drop_last: bool = False,
    early_stopping: EarlyStopping | None = None,
    remat: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
    """Trains n members in one program: each is ``train.run`` with a key of its own.

    Members differ in initial parameters, order of examples and dropout, which is what makes deep ensembles
    (Lakshminarayanan et al. 2017). Pure, as :func:`run` is.

    Args:
      trainer: from :func:`trainer`.
      keys: an array of keys (n,), one for each member; or one key, and ``n``.
      data: as for :func:`run`, the same for all members; so are the arguments that are not described here.
      epochs: likewise.
      n: how many members; their keys are ``jax.random.split(keys, n)``.
      members: "exact", one after another, each bit for bit what ``run`` gives it alone; or "mapped", side by
        side by ``jax.vmap``, equal to rounding and faster where one member does not fill the device: an
        accelerator, or small networks. A mapped member that has stopped early is computed on, and thrown
        away, until all have.
      batch_size: see :func:`run`.
      validation: see :func:`run`.
      shuffle: see :func:`run`.
      drop_last: see :func:`run`.
      early_stopping: each member stops by itself.
      remat: see :func:`run`.

    Returns:
      The members' states stacked, each leaf (n, ...), and the histories, arrays of (n, epochs).

    Raises:
      ValueError, TypeError: as :func:`run`; one key without ``n``, an array of keys with it, another ``members``.

    >>> x = np.linspace(-1, 1, 100, dtype="f")[:, None]
    >>> model = layers.serial(layers.dense(8), layers.relu, layers.dense(1))
    >>> trainer = train.trainer(model, losses.mean_squared_error, optim.adam(1e-2))
    >>> ts, history = train.ensemble(trainer, jax.random.key(0), (x, x**2), epochs=3, n=4)
    >>> history["loss"].shape, ts.params["dense_0"]["kernel"].shape
    ((4, 3), (4, 1, 8))
    """
    if members not in _MAPS:
        raise unknown_name("members", members, _MAPS)
    keys = _keys(keys, n)
    options = {
        "batch_size": batch_size,
        "validation": validation,
        "shuffle": shuffle,
        "drop_last": drop_last,
        "early_stopping": early_stopping,
        "remat": remat,
    }
    job = prepare("ensemble", trainer, keys[0], data, epochs, **options)
    static: dict[str, Any] = {"trainer": trainer, "members": members}
    if not job.alone:
        ts = _start(keys, job.example, **static)
        return _train(ts, job.arrays, job.held_out, job.numbers, rule=job.rule, plan=job.plan, **static)
    ts = _started(keys, job.example, **static)
    program = _compiled(platform_of(job.arrays))
    return program(ts, job.arrays, job.held_out, job.numbers, rule=job.rule, plan=job.plan, **static)


def _keys(keys: Any, n: int | None) -> Array:
    is_array = getattr(keys, "ndim", None) == 1 and jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    if not is_array:
        check_key(keys, "ensemble")
        if n is None:
            raise TypeError("ensemble needs to know how many members: pass ensemble(..., n=5)")
        return jax.random.split(keys, whole(n, "ensemble(n=...)"))
    if n is not None:
        raise TypeError(
            f"ensemble got {len(keys)} keys and n={n}: pass an array of keys, one for each member, or one key and n"
        )
    if not len(keys):
        raise ValueError("ensemble got no keys: pass one for each member")
    return keys


def _one_by_one(f: Callable[[Any], Any], xs: Any) -> Any:
    return jax.lax.map(f, xs)


def _side_by_side(f: Callable[[Any], Any], xs: Any) -> Any:
    return jax.vmap(f)(xs)


_MAPS = {"exact": _one_by_one, "mapped": _side_by_side}


def _start(keys: Array, x: PyTree, *, trainer: Trainer, members: str) -> TrainState:
    return _MAPS[members](lambda key: trainer.init(key, x), keys)


_started = jax.jit(_start, static_argnames=("trainer", "members"))


def _train(
    ts: TrainState,
    arrays: PyTree,
    held_out: PyTree,
    numbers: Any,
    *,
    trainer: Trainer,
    members: str,
    rule: EarlyStopping | None,
    plan: Plan,
) -> tuple[TrainState, dict[str, Array]]:
    def one(ts: TrainState) -> tuple[TrainState, dict[str, Array]]:
        return train_epochs(trainer, ts, arrays, held_out, numbers, rule=rule, plan=plan)

    return _MAPS[members](one, ts)


@functools.cache
def _compiled(platform: str) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    return jax.jit(
        _train,
        static_argnames=("trainer", "members", "rule", "plan"),
        compiler_options=compiler_options(platform),
    )


def predict_ensemble(
    model: Layer,
    params: Params,
    state: State,
    x: Any,
    *,
    batch_size: int = 1000,
    outputs: Outputs = "logits",
) -> Uncertain:
    """The mean and spread of the members' predictions, as :func:`predict` has them of dropout's samples.

    Of logits it is the members' probabilities that are averaged. ``entropy`` is all there is to doubt, and
    ``mutual_information`` the part of it on which the members disagree: see :class:`Uncertain`.

    Args:
      model: the network of one member.
      params: the members' parameters, stacked, as :func:`ensemble` returns them.
      state: their layer states, likewise.
      x: any number of inputs, as for :func:`predict`.
      batch_size: examples at a time.
      outputs: what the model gives: "logits", "probabilities", or "values" of a regression.

    Raises:
      ValueError: for parameters that are not stacked, or a single member, which has no spread.

    >>> x = np.linspace(-1, 1, 100, dtype="f")[:, None]
    >>> model = layers.serial(layers.dense(8), layers.relu, layers.dense(1))
    >>> trainer = train.trainer(model, losses.mean_squared_error, optim.adam(1e-2))
    >>> ts, _ = train.ensemble(trainer, jax.random.key(0), (x, x**2), epochs=3, n=4)
    >>> sure = train.predict_ensemble(model, ts.params, ts.state, x, outputs="values")
    >>> sure.mean.shape, sure.spread.shape, sure.entropy
    ((100, 1), (100, 1), None)
    """
    check_sampling(None, None, outputs, 1)
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves((params, state))}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            "predict_ensemble takes the members' parameters stacked on a first axis, and got leaves with first "
            f"axes of {sorted(length[0] if length else 0 for length in lengths)}: pass the state of train.ensemble"
        )
    if lengths == {(1,)}:
        raise ValueError("predict_ensemble got one member, which has no spread: use train.predict")
    return predict(_together(model, outputs), params, state, x, batch_size=batch_size)


@functools.lru_cache(maxsize=32)  # a model each, since programs are compiled for the model they are given
def _together(model: Layer, outputs: Outputs) -> Layer:
    """The layer that has all members' parameters and gives an :class:`Uncertain` for each example."""

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Uncertain, State]:
        def one(params: Params, state: State) -> PyTree:
            y = model.apply(params, state, x, key=key, train=train)[0]
            return jax.tree.map(functools.partial(distribution, outputs), y)

        ys = jax.vmap(one)(params, state)
        mean = jax.tree.map(lambda y: jnp.mean(y, axis=0), ys)
        spread = jax.tree.map(lambda y: jnp.std(y, axis=0, ddof=1), ys)
        if outputs == "values":
            return Uncertain(mean, spread, None, None), state
        doubt = jax.tree.map(entropy_of, mean)
        # Rounding may take what is left below 0.
        disagreement = jax.tree.map(
            lambda total, y: jnp.maximum(total - jnp.mean(entropy_of(y), axis=0), 0), doubt, ys
        )
        return Uncertain(mean, spread, doubt, disagreement), state

    return Layer(model.init, apply, model.name)
