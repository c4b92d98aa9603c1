"""reduce_on_plateau beside optax's, PyTorch's and a few lines of Python, and its metric from outside."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import pickle
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnkit import optim
from nnkit.optim.note import note_of

PARAMS = {"w": jnp.ones(3)}


def driven(tx: Any, values: Any, params: Any = PARAMS) -> Any:
    """The updates and the states after every value, in one compiled loop; a row of values a run."""

    def run(values: Any) -> Any:
        def body(state: Any, value: Any) -> Any:
            updates, state = tx.update(params, state, params, value=value)
            return state, (updates, state)

        return jax.lax.scan(body, tx.init(params), values)[1]

    with jax.numpy_dtype_promotion("standard"):
        return jax.tree.map(np.asarray, jax.jit(jax.vmap(run) if values.ndim == 2 else run)(values))


def reported(tx: Any, values: Any, params: Any = PARAMS) -> Any:
    """The same with the values reported; the metrics hold another that is nobody's."""
    name = "validation_loss"

    def body(state: Any, value: Any) -> Any:
        state = optim.report(state, {"loss": jnp.nan, name: value})
        return tx.update(params, state, params)[::-1]

    def step(state: Any, value: Any) -> Any:
        state, updates = body(state, value)
        return state, (updates, state)

    return jax.tree.map(np.asarray, jax.jit(lambda v: jax.lax.scan(step, tx.init(params), v)[1])(values))


def same(ours: Any, theirs: Any) -> None:
    """Every field of the state after every value, to the last bit."""
    for name in optim.ReduceLROnPlateauState._fields:
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert mine.dtype == other.dtype, name
        np.testing.assert_array_equal(mine, other, err_msg=name)


def series(seed: int, n: int = 150, offset: float = 1.5) -> np.ndarray:
    """A loss that falls, stalls, jumps, and repeats itself."""
    rng = np.random.default_rng(seed)
    fall = np.exp(-np.arange(n) / rng.uniform(5, 60)) + offset
    values = fall + rng.choice([0.0, 0.01, 0.3]) * rng.normal(size=n)
    stall = rng.integers(n)
    values[stall : stall + 20] = values[stall]
    return values


# --- optax ------------------------------------------------------------------------------------------------

NUMBERS = [
    {},
    {"patience": 3},
    {"factor": 0.5, "patience": 1},
    {"factor": 0.3, "patience": 2, "cooldown": 4},
    {"factor": 0.5, "patience": 2, "min_scale": 0.2},
    {"factor": 0.9, "patience": 4, "rtol": 0.0, "atol": 0.05},
    {"factor": 0.9, "patience": 4, "rtol": 0.01, "atol": 0.02, "cooldown": 1},
    {"factor": 0.5, "patience": 3, "accumulation_size": 5},
    {"factor": 0.7, "patience": 1, "accumulation_size": 3, "cooldown": 2, "min_scale": 0.1},
]


SERIES = np.stack([series(seed) for seed in range(4)])


def check_against_optax(ours: Any, numbers: dict[str, Any], dtype: Any = jnp.float32) -> None:
    with jax.enable_x64(dtype == jnp.float64):
        params = {"w": jnp.ones(3, dtype)}
        updates, state = driven(ours, jnp.asarray(SERIES, dtype), params)
        their_updates, their_state = _theirs(dtype, **numbers)
        same(state, their_state)
        np.testing.assert_array_equal(updates["w"], their_updates["w"])


@functools.cache
def _theirs(dtype: Any, **numbers: Any) -> Any:
    params = {"w": jnp.ones(3, dtype)}
    return driven(optax.contrib.reduce_on_plateau(**numbers), jnp.asarray(SERIES, dtype), params)


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
def test_it_is_optax(numbers: Any) -> None:
    check_against_optax(optim.reduce_on_plateau(**numbers), numbers)


@pytest.mark.parametrize("numbers", NUMBERS[::3], ids=str)
def test_it_is_optax_in_float64(numbers: Any) -> None:
    check_against_optax(optim.reduce_on_plateau(**numbers), numbers, jnp.float64)


def test_the_series_cut_and_improve() -> None:
    """Else the comparisons would show nothing."""
    for numbers in NUMBERS[1:]:
        state = _theirs(jnp.float32, **numbers)[1]
        assert (state.scale.min(axis=1) < 1).any(), numbers
        assert (state.best_value[:, -1] < state.best_value[:, 20]).any(), numbers


def test_arguments_defaults_and_fields_are_optax() -> None:
    ours = [*inspect.signature(optim.reduce_on_plateau).parameters.values()]
    theirs = [*inspect.signature(optax.contrib.reduce_on_plateau).parameters.values()]
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
    state: Any = optax.contrib.reduce_on_plateau().init(PARAMS)
    assert optim.ReduceLROnPlateauState._fields == state._fields
    assert type(state).__name__ == "ReduceLROnPlateauState"
    tx = optim.reduce_on_plateau()
    same(tx.init(PARAMS), state)
    _, new = tx.update(PARAMS, state, value=1.0)
    assert isinstance(new, type(state))


def _shifted(tx: Any, change: Callable[[Any], Any]) -> Any:
    """``tx`` whose state is changed after every update."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        updates, state = tx.update(updates, state, params, **extra)
        return updates, change(state)

    return optim.GradientTransformation(tx.init, update)


def _late(tx: Any) -> Any:
    """``tx`` that multiplies by the scale from before the value."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        _, new = tx.update(updates, state, params, **extra)
        return jax.tree.map(lambda u: u * state.scale, updates), new

    return optim.GradientTransformation(tx.init, update)


_ROW: dict[str, Any] = {"factor": 0.5, "patience": 2, "cooldown": 3, "min_scale": 0.2, "accumulation_size": 2}


def _row(**changed: Any) -> dict[str, Any]:
    return _ROW | changed


MUTANTS = {
    "patience one more": optim.reduce_on_plateau(**_ROW, counting="pytorch"),
    "patience one less": optim.reduce_on_plateau(**_row(patience=1)),
    "no cooldown": optim.reduce_on_plateau(**_row(cooldown=0)),
    "cooldown one longer": optim.reduce_on_plateau(**_row(cooldown=4)),
    "no minimum": optim.reduce_on_plateau(**_row(min_scale=0.0)),
    "no average": optim.reduce_on_plateau(**_row(accumulation_size=1)),
    "a sum for an average": _shifted(
        optim.reduce_on_plateau(**_ROW), lambda s: s._replace(avg_value=2 * s.avg_value)
    ),
    "the other direction": optim.reduce_on_plateau(**_ROW, mode="max"),
    "no threshold": optim.reduce_on_plateau(**_ROW, rtol=0.0),
    "an absolute threshold": optim.reduce_on_plateau(**_ROW, rtol=0.0, atol=1e-4),
    "another factor": optim.reduce_on_plateau(**_row(factor=0.25)),
    "the scale an update late": _late(optim.reduce_on_plateau(**_ROW)),
    "the best value forgotten": _shifted(
        optim.reduce_on_plateau(**_ROW), lambda s: s._replace(best_value=jnp.full_like(s.best_value, jnp.inf))
    ),
    "a count that is never reset": _shifted(
        optim.reduce_on_plateau(**_ROW), lambda s: s._replace(plateau_count=s.plateau_count + 1)
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str) -> None:
    with pytest.raises(AssertionError):
        check_against_optax(MUTANTS[name], _ROW)


def test_the_original_passes_the_same_check() -> None:
    check_against_optax(optim.reduce_on_plateau(**_ROW), _ROW)


# --- PyTorch ----------------------------------------------------------------------------------------------


MODES = [*itertools.product(("min", "max"), ("rel", "abs"))]


def in_torch(values: Any, **arguments: Any) -> dict[str, list[Any]]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, eps=0.0, **arguments)
    rows: dict[str, list[Any]] = {
        name: [] for name in ("scale", "best_value", "plateau_count", "cooldown_count")
    }
    for value in values:
        scheduler.step(float(value))
        rows["scale"].append(optimizer.param_groups[0]["lr"])
        rows["best_value"].append(scheduler.best)
        rows["plateau_count"].append(scheduler.num_bad_epochs)
        rows["cooldown_count"].append(scheduler.cooldown_counter)
    return rows


@functools.cache
def _traced(**choices: Any) -> Any:
    """Compiled once for all numbers."""

    @jax.jit
    def run(values: Any, numbers: Any) -> Any:
        tx, updates = optim.reduce_on_plateau(**numbers, **choices), jnp.ones(1)
        return jax.lax.scan(lambda s, v: (tx.update(updates, s, value=v)[1],) * 2, tx.init(updates), values)[
            1
        ]

    return run


def check_against_torch(
    seed: int, mode: str, threshold_mode: str, values: Any = None, changed: Any = None
) -> None:
    rng = np.random.default_rng(seed)
    numbers = {
        "factor": rng.uniform(0.1, 0.9),
        "patience": int(rng.integers(0, 6)),
        "cooldown": int(rng.integers(0, 4)),
    }
    threshold, low = rng.choice([0.0, 1e-4, 0.05]), rng.choice([0.0, 0.01, 0.3])
    if values is None:
        values = series(seed, 100, offset=rng.choice([-2.0, -0.5, 1.5]))
    theirs = in_torch(
        values, **numbers, mode=mode, threshold_mode=threshold_mode, threshold=threshold, min_lr=low
    )
    rtol, atol = (threshold, 0.0) if threshold_mode == "rel" else (0.0, threshold)
    choices = {"relative_to": "value", "counting": "pytorch", "mode": mode} | (changed or {})
    with jax.enable_x64(True):
        numbers |= {"rtol": rtol, "atol": atol, "min_scale": low}
        state = _traced(**choices)(jnp.asarray(values), {k: jnp.asarray(v) for k, v in numbers.items()})
    for name, column in theirs.items():
        np.testing.assert_array_equal(getattr(state, name), column, err_msg=name)


@pytest.mark.parametrize(("mode", "threshold_mode"), MODES)
@pytest.mark.parametrize("seed", range(6))
def test_it_is_pytorch(seed: int, mode: str, threshold_mode: str) -> None:
    check_against_torch(seed, mode, threshold_mode)


@pytest.mark.parametrize(("mode", "threshold_mode"), MODES)
def test_it_is_pytorch_with_nan_and_infinities(mode: str, threshold_mode: str) -> None:
    values = series(0, 100)
    values[::7], values[40], values[60] = np.nan, np.inf, -np.inf
    check_against_torch(1, mode, threshold_mode, values)


@pytest.mark.parametrize(
    "changed",
    [{"counting": "optax"}, {"mode": "max"}, {"relative_to": "magnitude"}],
    ids=str,
)
def test_mutants_of_pytorch_are_caught(changed: Any) -> None:
    def check() -> None:
        for seed in range(6):
            check_against_torch(seed, "min", "rel", changed=changed)

    with pytest.raises(AssertionError):
        check()


def test_a_flat_metric_is_cut_at_call_4_and_5() -> None:
    flat = jnp.ones(8)
    cuts = {
        counting: int(
            np.argmax(driven(optim.reduce_on_plateau(patience=3, counting=counting), flat)[1].scale < 1)
        )
        for counting in ("optax", "pytorch")
    }
    assert cuts == {"optax": 3, "pytorch": 4}


# --- a few lines of Python --------------------------------------------------------------------------------


def by_hand(
    values: Any, factor: float, patience: int, rtol: float, atol: float, cooldown: int, mode: str
) -> list[tuple[float, float, int, int]]:
    sign = 1 if mode == "min" else -1
    scale, best, bad, rest, rows = 1.0, math.inf, 0, 0, []
    for value in values:
        value = sign * value
        if math.isinf(best):
            better = value < best
        else:
            better = value < best - (rtol * abs(best) + atol)
        best, bad = (value, 0) if better else (best, bad + 1)
        if rest:
            rest, bad = rest - 1, 0
        elif bad >= max(patience, 1):
            scale, bad, rest = scale * factor, 0, cooldown
        rows.append((scale, sign * best, bad, rest))
    return rows


# Eighths: all sums and products below are exact, so that no rounding decides what is better.
EIGHTHS = st.integers(-64, 64).map(lambda n: n / 8)
VALUES = st.lists(
    st.one_of(EIGHTHS, st.sampled_from([math.nan, math.inf, -math.inf])), min_size=25, max_size=25
)
ROWS = st.tuples(
    st.integers(0, 4),
    st.sampled_from([0.0, 0.125, 0.5, 1.0]),
    st.sampled_from([0.0, 0.25]),
    st.integers(0, 3),
)


@jax.jit
def _driven_all(values: Any, rtol: Any, atol: Any, patience: Any, cooldown: Any) -> Any:
    """Traced numbers: compiled once for all the examples."""
    states = {}
    for mode in ("min", "max"):
        tx = optim.reduce_on_plateau(0.5, patience, rtol, atol, cooldown, mode=mode)
        state, rows = tx.init(jnp.ones(1)), []
        rows = jax.lax.scan(lambda s, v, tx=tx: (tx.update(jnp.ones(1), s, value=v)[1],) * 2, state, values)[
            1
        ]
        states[mode] = rows
    return states


@settings(max_examples=100)
@given(VALUES, ROWS)
def test_it_is_what_it_says(values: Any, row: Any) -> None:
    patience, rtol, atol, cooldown = row
    states = _driven_all(
        jnp.asarray(values, jnp.float32),
        *(jnp.float32(x) for x in (rtol, atol)),
        *(jnp.int32(x) for x in (patience, cooldown)),
    )
    for mode, state in states.items():
        expected = by_hand(values, 0.5, patience, rtol, atol, cooldown, mode)
        for name, column in zip(
            ("scale", "best_value", "plateau_count", "cooldown_count"),
            zip(*expected, strict=True),
            strict=True,
        ):
            np.testing.assert_array_equal(getattr(state, name), column, err_msg=f"{mode} {name}")
        assert (np.diff(state.scale) <= 0).all()
        assert not np.isnan(state.best_value).any()


def test_negative_metrics_improve_when_they_fall() -> None:
    """With rtol 0.1, −1.05 is not 10% better than −1; optax and PyTorch take −0.95 for better."""
    flat = jnp.full(5, -1.0)
    ours = driven(optim.reduce_on_plateau(patience=2, rtol=0.1), flat)[1]
    theirs = driven(optax.contrib.reduce_on_plateau(patience=2, rtol=0.1), flat)[1]
    assert ours.scale.min() < 0.11
    assert theirs.scale.min() == 1.0
    for mode, values in (("min", [-1.0, -1.05, -1.2]), ("max", [-1.0, -0.95, -0.8])):
        best = driven(optim.reduce_on_plateau(rtol=0.1, mode=mode), jnp.array(values))[1].best_value
        assert best.tolist() == [np.float32(x) for x in (values[0], values[0], values[2])]


def test_a_patience_of_0_cuts_at_values_that_are_no_better_and_only_there() -> None:
    state = driven(optim.reduce_on_plateau(0.5, 0), jnp.array([3.0, 2.0, 2.0, 1.0, 5.0]))[1]
    assert state.scale.tolist() == [1.0, 1.0, 0.5, 0.5, 0.25]
    theirs = driven(optax.contrib.reduce_on_plateau(0.5, 0), jnp.array([3.0, 2.0, 2.0, 1.0, 5.0]))[1]
    assert theirs.scale.tolist() == [0.5, 0.25, 0.25, 0.125, 0.125]


def test_nan_is_never_better() -> None:
    values = jnp.array([jnp.nan, 1.0, jnp.nan, jnp.nan, jnp.nan])
    for mode in ("min", "max"):
        state = driven(optim.reduce_on_plateau(0.5, 3, mode=mode), values)[1]
        assert state.plateau_count.tolist() == [1, 0, 1, 2, 0]
        assert state.best_value[-1] == 1.0
        assert state.scale.tolist() == [1.0, 1.0, 1.0, 1.0, 0.5]
    averaged = driven(optim.reduce_on_plateau(0.5, 3, accumulation_size=2), jnp.array([1, jnp.nan, 2, 2]))[1]
    assert averaged.best_value[-1] == 2.0


# --- the metric from outside ------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", NUMBERS[::2], ids=str)
def test_reported_values_mean_the_same(numbers: Any) -> None:
    values = jnp.asarray(series(1), jnp.float32)
    updates, state = driven(optim.reduce_on_plateau(**numbers), values)
    their_updates, reports = reported(optim.reduce_on_plateau(**numbers, monitor="validation_loss"), values)
    same(reports, state)
    np.testing.assert_array_equal(updates["w"], their_updates["w"])


def test_an_update_of_a_monitored_plateau_only_multiplies() -> None:
    tx = optim.reduce_on_plateau(0.5, 1, monitor="loss")
    state = tx.init(PARAMS)
    for _ in range(4):
        updates, new = tx.update(PARAMS, state, PARAMS, value=jnp.nan)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        same(new, state)
        np.testing.assert_array_equal(updates["w"], 1.0)
    state = optim.report(optim.report(state, {"loss": 1.0}), {"loss": 1})
    assert tx.update(PARAMS, state)[0]["w"].tolist() == [0.5] * 3


class _Held(NamedTuple):
    inner: Any
    other: Any


def test_reports_find_every_plateau() -> None:
    loss, accuracy = (
        optim.reduce_on_plateau(0.5, 1, monitor="loss"),
        optim.reduce_on_plateau(0.25, 1, monitor="accuracy", mode="max"),
    )
    tx = optim.chain(optim.adam(0.1), loss, optim.chain(accuracy, optim.scale(2.0)), optax.trace(0.9), loss)  # pyright: ignore[reportArgumentType]
    opt_state = {"a": [_Held(tx.init(PARAMS), None)], "b": (accuracy.init(PARAMS), jnp.ones(2), "text")}
    new = opt_state
    for _ in range(2):
        new = optim.report(new, {"loss": 1.0, "accuracy": 0.5, "other": jnp.ones(3)})
    assert jax.tree.structure(new) == jax.tree.structure(opt_state)
    chained = new["a"][0].inner
    assert [float(s.scale) for s in (chained[1], chained[2][0], chained[4], new["b"][0])] == [
        0.5,
        0.25,
        0.5,
        0.25,
    ]
    for part in (0, 3):
        assert jax.tree.all(jax.tree.map(jnp.array_equal, chained[part], opt_state["a"][0].inner[part]))
    assert new["b"][1] is opt_state["b"][1]


def test_states_without_a_monitor_come_back_as_they_are() -> None:
    for tx in (optim.adam(0.1), optim.chain(optim.sgd(0.1), optim.reduce_on_plateau()), optax.adam(0.1)):
        state = tx.init(PARAMS)
        new = optim.report(state, {})
        assert jax.tree.structure(new) == jax.tree.structure(state)
        assert all(a is b for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True))


def test_a_compiled_report_tells_optimizers_apart() -> None:
    """The numbers are leaves and the name is compared: no rule is taken from the cache."""
    report: Any = jax.jit(optim.report)
    rows = [(0.5, 1, "loss"), (0.25, 1, "loss"), (0.5, 2, "loss"), (0.5, 1, "accuracy")]
    for (factor, patience, monitor), expected in zip(rows, (0.5, 0.25, 1.0, 1.0), strict=True):
        state = optim.reduce_on_plateau(factor, patience, monitor=monitor).init(PARAMS)
        for accuracy in (0.1, 0.01):
            state = report(state, {"loss": 1.0, "accuracy": accuracy})
        assert float(state.scale) == expected
    assert report._cache_size() == 2


def test_a_new_rule_takes_over_an_old_state() -> None:
    old, new = (optim.reduce_on_plateau(0.5, patience, monitor="loss") for patience in (1, 5))
    state = optim.report(old.init(PARAMS), {"loss": 1.0})

    @jax.jit
    def run(state: Any) -> Any:
        return jax.lax.scan(lambda s, _: (new.update(PARAMS, s)[1], None), state, None, 3)[0]

    state = run(state)
    assert int(note_of(state).limit) == 5
    for _ in range(4):
        state = optim.report(state, {"loss": 1.0})
    assert float(state.scale) == 1.0


@pytest.mark.parametrize("monitor", [None, "validation_loss"])
def test_a_grid_is_a_vmap(monitor: str | None) -> None:
    """Every number traced, the state passed through separately mapped and compiled functions."""
    grid = {
        "factor": jnp.array([0.5, 0.25, 0.5, 0.7]),
        "patience": jnp.array([1, 2, 3, 1]),
        "rtol": jnp.array([0.0, 0.1, 1e-4, 1.0]),
        "atol": jnp.array([0.01, 0.0, 0.0, 0.1]),
        "cooldown": jnp.array([0, 1, 0, 2]),
        "accumulation_size": jnp.array([1, 1, 2, 3]),
        "min_scale": jnp.array([0.0, 0.1, 0.0, 0.3]),
    }
    values = jnp.asarray(series(2, 40), jnp.float32)

    def tx(numbers: Any) -> Any:
        return optim.reduce_on_plateau(**numbers, monitor=monitor)

    def step(numbers: Any, state: Any, value: Any) -> Any:
        if monitor is None:
            return tx(numbers).update(PARAMS, state, PARAMS, value=value)[1]
        return optim.report(tx(numbers).update(PARAMS, state, PARAMS)[1], {monitor: value})

    states = jax.vmap(lambda numbers: tx(numbers).init(PARAMS))(grid)
    scales = []
    mapped: Any = jax.jit(jax.vmap(step, in_axes=(0, 0, None)))
    for value in values:
        states = mapped(grid, states, value)
        scales.append(states.scale)
    assert mapped._cache_size() == 1
    for i, column in enumerate(np.stack(scales).T):
        numbers = {name: x[i].item() for name, x in grid.items()}
        run = driven if monitor is None else reported
        alone = run(optim.reduce_on_plateau(**numbers, monitor=monitor), values)[1]
        np.testing.assert_allclose(column, alone.scale, rtol=1e-6)
    if monitor is not None:
        again = jax.vmap(optim.report, in_axes=(0, None))(states, {monitor: 0.0})
        assert jax.tree.structure(again) == jax.tree.structure(states)


def test_a_monitored_state_is_saved_and_copied() -> None:
    tx = optim.reduce_on_plateau(0.5, 1, monitor="loss")
    state = optim.report(tx.init(PARAMS), {"loss": 1.0})
    restored = pickle.loads(pickle.dumps(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert float(optim.report(restored, {"loss": 1.0}).scale) == 0.5
    paths = [
        jax.tree_util.keystr(p, simple=True, separator="/")
        for p, _ in jax.tree_util.tree_leaves_with_path(state)
    ]
    assert paths[:6] == [*optim.ReduceLROnPlateauState._fields]
    assert all(path.startswith("note/") for path in paths[6:])


# --- chains, dtypes, errors -------------------------------------------------------------------------------


def test_the_value_passes_through_a_chain() -> None:
    tx = optim.chain(optim.sgd(1.0), optim.reduce_on_plateau(0.5, 1))
    state = tx.init(PARAMS)
    for expected in (-1.0, -0.5, -0.25):
        updates, state = jax.jit(tx.update)(PARAMS, state, PARAMS, value=jnp.float32(1.0))
        assert updates["w"].tolist() == [expected] * 3


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64),
        (jnp.complex64, jnp.float32),
    ],
)
def test_dtypes(dtype: Any, expected: Any) -> None:
    with jax.enable_x64(dtype == jnp.float64):
        params = {"w": jnp.ones((2, 0, 3), dtype), "b": jnp.ones((), dtype), "none": None}
        for monitor in (None, "loss"):
            tx = optim.reduce_on_plateau(0.5, 1, monitor=monitor)
            state, updates = tx.init(params), params
            for _ in range(3):
                state = optim.report(state, {"loss": 1})
                updates, new = jax.jit(tx.update)(params, state, params, value=np.int32(1))
                assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), new) == jax.tree.map(
                    lambda x: (x.shape, x.dtype, x.weak_type), state
                )
                state = new
            assert state.scale.dtype == state.best_value.dtype == state.avg_value.dtype == expected
            assert updates["b"].dtype == dtype
            assert updates["b"] == 0.25
            assert updates["none"] is None


def test_no_parameters() -> None:
    assert optim.reduce_on_plateau().init({}).scale.dtype == jnp.float32


def raises(kind: type[Exception], text: str) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(text)}$")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"factor": 1.0}, "factor must be in (0, 1), got 1.0: the scale is multiplied by it"),
        ({"factor": 0.0}, "factor must be in (0, 1), got 0.0: the scale is multiplied by it"),
        ({"rtol": 1.5}, "rtol must be in [0, 1], got 1.5: it is a part of the best value"),
        ({"atol": -1.0}, "atol must be in [0, inf), got -1.0"),
        ({"patience": -1}, "patience must be in [0, 2147483647), got -1: it counts values of the metric"),
        ({"patience": 2.5}, "patience must be a whole number, got 2.5: it counts values of the metric"),
        ({"cooldown": -1}, "cooldown must be in [0, 2147483647), got -1: it counts values of the metric"),
        (
            {"accumulation_size": 0},
            "accumulation_size must be in [1, 2147483647), got 0: it counts values of the metric",
        ),
        ({"min_scale": 2.0}, "min_scale must be in [0, 1], got 2.0: the scale begins at 1"),
        ({"mode": "maximum"}, "unknown mode 'maximum'; did you mean 'max'? Known: max, min"),
        ({"relative_to": "best"}, "unknown relative_to 'best'. Known: magnitude, value"),
        ({"counting": "torch"}, "unknown counting 'torch'; did you mean 'pytorch'? Known: optax, pytorch"),
    ],
)
def test_bad_arguments(arguments: Any, text: str) -> None:
    with raises(ValueError, text):
        optim.reduce_on_plateau(**arguments)


def test_bad_types() -> None:
    text = "patience must be a number or a scalar array, got '3': it counts values of the metric"
    with raises(TypeError, text):
        optim.reduce_on_plateau(patience="3")  # pyright: ignore[reportArgumentType]
    with raises(TypeError, "monitor must be a metric's name, got 3: write monitor='validation_loss'"):
        optim.reduce_on_plateau(monitor=3)  # pyright: ignore[reportArgumentType]


def test_bad_values() -> None:
    tx = optim.reduce_on_plateau()
    state = tx.init(PARAMS)
    text = (
        "reduce_on_plateau needs the metric's value: call update(grads, opt_state, params, value=loss), or "
        "name a monitor"
    )
    with raises(ValueError, text):
        tx.update(PARAMS, state, PARAMS)
    text = "reduce_on_plateau: value must be a scalar, got shape (3,): reduce it to one number, the mean say"
    with raises(ValueError, text):
        tx.update(PARAMS, state, PARAMS, value=jnp.ones(3))
    with raises(TypeError, "reduce_on_plateau: value must be a number, got '0.1'"):
        tx.update(PARAMS, state, PARAMS, value="0.1")


def test_bad_states() -> None:
    plain, monitored = optim.reduce_on_plateau(), optim.reduce_on_plateau(monitor="loss")
    text = "reduce_on_plateau got the state of one with {}: pass what its own init or update returned"
    with raises(TypeError, text.format("a monitor")):
        plain.update(PARAMS, monitored.init(PARAMS), value=1.0)
    with raises(TypeError, text.format("no monitor")):
        monitored.update(PARAMS, plain.init(PARAMS))
    with pytest.raises(TypeError, match="reduce_on_plateau got the state of another transformation"):
        plain.update(PARAMS, optim.adam(0.1).init(PARAMS), value=1.0)
    with pytest.raises(TypeError, match="reduce_on_plateau: params has dtype int32 at the root"):
        plain.init(jnp.ones(2, jnp.int32))


def test_bad_reports() -> None:
    state = optim.chain(optim.sgd(0.1), optim.reduce_on_plateau(monitor="validation_loss")).init(PARAMS)
    text = "reduce_on_plateau monitors 'validation_loss', which report did not get: the metrics are {}"
    with raises(ValueError, text.format("loss, accuracy")):
        optim.report(state, {"loss": 1.0, "accuracy": 0.5})
    with raises(ValueError, text.format("none")):
        optim.report(state, {})
    with pytest.raises(ValueError, match="which report did not get: the metrics are loss"):
        jax.jit(optim.report)(state, {"loss": 1.0})
    with raises(TypeError, "metrics must be a mapping from names to scalars, got float"):
        optim.report(state, 1.0)  # pyright: ignore[reportArgumentType]
    text = (
        "reduce_on_plateau: the metric 'validation_loss' must be a scalar, got shape (2,): one state takes "
        "one number, map with jax.vmap(report)"
    )
    with raises(ValueError, text):
        optim.report(state, {"validation_loss": jnp.ones(2)})
    with raises(TypeError, "reduce_on_plateau: the metric 'validation_loss' must be a number, got None"):
        optim.report(state, {"validation_loss": None})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("monitor", [None, "loss"])
def test_a_fresh_state_can_be_donated(monitor: str | None) -> None:
    factor = jnp.float32(0.5)
    tx = optim.chain(optim.sgd(0.1), optim.reduce_on_plateau(factor, 2, monitor=monitor))
    params = {"w": jnp.ones(2)}
    extra = {} if monitor else {"value": jnp.float32(1.0)}
    update = jax.jit(lambda g, s: tx.update(g, s, **extra), donate_argnums=1)
    updates, _ = update(params, tx.init(params))
    np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-6)
    assert float(factor) == 0.5


def test_the_state_of_another_monitor() -> None:
    params = {"w": jnp.ones(2)}
    state = optim.reduce_on_plateau(monitor="val_loss").init(params)
    with pytest.raises(TypeError, match=r"monitor='loss'\) got the state of one with 'min', .*'val_loss'"):
        optim.reduce_on_plateau(monitor="loss").update(params, state)
