"""What holds for whole families of schedules, where ours part from optax's, and wrong schedules."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnkit import optim
from tests.optim.oracle import optax_jit
from tests.optim.test_schedules_against_optax import CASES, check, compiled

RATES = st.floats(2.0**-10, 2.0, width=32)
COUNTS = st.integers(1, 50)


def at(make: Any, steps: Any, **numbers: Any) -> np.ndarray:
    """The values at ``steps``, compiled once for all numbers of one kind."""
    return np.asarray(_run(make, {k: jnp.asarray(v) for k, v in numbers.items()}, jnp.asarray(steps)))


def _values(make: Any, numbers: Any, steps: Any) -> Any:
    return jax.vmap(lambda step: jnp.asarray(make(**numbers)(step)))(steps)


_run = jax.jit(_values, static_argnums=0)
ALL = np.arange(-3, 120)


@given(RATES, RATES, st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0]), COUNTS, st.integers(0, 40))
def test_polynomials_are_exact_at_the_ends_and_monotone(
    first: Any, last: Any, power: Any, n: Any, begin: Any
) -> None:
    values = at(
        optim.polynomial_schedule,
        ALL,
        init_value=np.float32(first),
        end_value=np.float32(last),
        power=np.float32(power),
        transition_steps=n,
        transition_begin=begin,
    )
    assert (values[begin + 3 :: -1] == np.float32(first)).all()
    assert (values[begin + n + 3 :] == np.float32(last)).all()
    # start·(1 - w) + end·w of neighbouring w may be a rounding the other way.
    assert (np.diff(values) * np.sign(last - first) >= -(2.0**-22) * max(first, last)).all()


@given(RATES, st.floats(0, 1, width=32), COUNTS, st.sampled_from([0.5, 1.0, 2.0]))
def test_cosines_fall_from_the_first_value_to_alpha_times_it(
    first: Any, alpha: Any, n: Any, exponent: Any
) -> None:
    values = at(
        optim.cosine_decay_schedule,
        ALL,
        init_value=np.float32(first),
        decay_steps=n,
        alpha=np.float32(alpha),
        exponent=np.float32(exponent),
    )
    assert (values[:4] == np.float32(first)).all()
    assert (values[n + 3 :] == np.float32(alpha) * np.float32(first)).all()
    assert (np.diff(values) <= 2.0**-22 * first).all()


@given(RATES, RATES, COUNTS, COUNTS)
def test_warm_ups_reach_the_peak(first: Any, peak: Any, warmup: Any, more: Any) -> None:
    numbers = {"init_value": np.float32(first), "peak_value": np.float32(peak), "warmup_steps": warmup}
    rows = [
        at(optim.warmup_constant_schedule, ALL, **numbers),
        at(optim.inverse_square_root_schedule, ALL, **numbers),
        at(optim.warmup_cosine_decay_schedule, ALL, **numbers, decay_steps=warmup + more),
        at(optim.warmup_exponential_decay_schedule, ALL, **numbers, transition_steps=more, decay_rate=0.5),
    ]
    for values in rows:
        assert (values[:4] == np.float32(first)).all()
        assert values[warmup + 3] == np.float32(peak)
        np.testing.assert_array_equal(values[: warmup + 4], rows[0][: warmup + 4])


@given(RATES, RATES, COUNTS, COUNTS)
def test_cycles_repeat_themselves(low: Any, high: Any, up: Any, down: Any) -> None:
    numbers = {
        "init_value": np.float32(low),
        "peak_value": np.float32(high),
        "step_size_up": up,
        "step_size_down": down,
    }
    steps = np.arange(200)
    values = at(optim.cyclic_triangular_schedule, steps, **numbers)
    np.testing.assert_array_equal(values[: 200 - up - down], values[up + down :])
    assert values[up] == np.float32(high)
    assert values[0] == values[up + down] == np.float32(low)
    assert values.min() >= min(low, high) * (1 - 2.0**-22)
    assert values.max() <= max(low, high) * (1 + 2.0**-22)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=4, unique=True), RATES)
def test_pieces_meet_at_the_boundaries(boundaries: Any, rate: Any) -> None:
    pairs = {b: 0.5 + i for i, b in enumerate(boundaries)}
    constant = optim.piecewise_constant_schedule(rate, pairs)
    for kind in ("linear", "cosine"):
        drawn = optim.piecewise_interpolate_schedule(kind, rate, pairs)
        marks = np.array([*boundaries, 61, 100])
        np.testing.assert_allclose(drawn(marks), constant(marks), rtol=1e-6)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(-2, 90))
def test_joined_schedules_are_each_asked_for_its_own_steps(lengths: Any, step: int) -> None:
    """As one would look it up: and never for a step before its first."""
    asked: list[list[int]] = [[] for _ in range(len(lengths) + 1)]

    def member(i: int) -> Any:
        def schedule(count: Any) -> Any:
            asked[i].append(int(count))
            return 1000.0 * i + count

        return schedule

    boundaries = np.cumsum(lengths).tolist()
    joined = optim.join_schedules([member(i) for i in range(len(asked))], boundaries)
    i = int(np.searchsorted(boundaries, step, side="right"))
    assert float(joined(step)) == 1000.0 * i + step - ([0, *boundaries][i])
    assert all(count >= 0 for counts in asked[1:] for count in counts)


# --- where ours part from optax's -------------------------------------------------------------------------


def test_polynomials_with_fractional_powers_end() -> None:
    """Compiled, optax 0.2.8 gives NaN from the end on, for most lengths."""
    ends = []
    for module in (optim, optax):
        schedules = [module.polynomial_schedule(1.0, 0.25, 0.5, n) for n in range(40, 60)]
        run = optax_jit(lambda step, schedules=schedules: jnp.stack([s(step) for s in schedules]))
        ends.append(np.asarray(run(jnp.int32(60))))
    assert (ends[0] == 0.25).all()
    assert np.isnan(ends[1]).any()


def test_a_warm_up_of_no_steps() -> None:
    assert float(optim.warmup_constant_schedule(0.0, 0.5, 0)(0)) == 0.5
    assert np.asarray(optax.warmup_constant_schedule(0.0, 0.5, 0)(10)) == 0.0
    assert float(optim.warmup_exponential_decay_schedule(0.0, 0.5, 0, 10, 0.5)(10)) == 0.25


def test_a_cycle_too_short_for_its_phases() -> None:
    """optax holds the phases in a dict by step, and loses the factor of one that ends where it began."""
    ours, theirs = (optax_jit(m.linear_onecycle_schedule(1, 1.0, div_factor=10.0)) for m in (optim, optax))
    assert [round(float(ours(step)), 6) for step in (0, 1)] == [0.1, 1e-5]
    assert round(float(theirs(0)), 6) == 0.01
    ours = optim.linear_onecycle_schedule(10, 1.0, 0.5, 0.5, div_factor=10.0)
    assert [round(float(ours(step)), 6) for step in (0, 4, 5)] == [0.1, 0.82, 0.1]


def test_before_the_start() -> None:
    schedules = [m.piecewise_interpolate_schedule("linear", 0.5, {10: 0.1}) for m in (optim, optax)]
    assert [float(optax_jit(s)(-1)) for s in schedules] == [0.5, 0.0]
    schedules = [m.cosine_decay_schedule(0.5, 10) for m in (optim, optax)]
    assert [float(s(-10)) for s in schedules] == [0.5, 0.0]


# --- wrong schedules --------------------------------------------------------------------------------------


def _moved(name: str, by: int) -> Any:
    def make(**arguments: Any) -> Any:
        return lambda step: getattr(optim, name)(**arguments)(
            jnp.maximum(jnp.asarray(step, jnp.int32) + by, 0)
        )

    return make


def _without(name: str, **changed: Any) -> Any:
    return lambda **arguments: getattr(optim, name)(**arguments | changed)


def _strict(init_value: Any, boundaries_and_scales: Any = None) -> Any:
    return optim.piecewise_constant_schedule(
        init_value, {b + 1: s for b, s in (boundaries_and_scales or {}).items()}
    )


def _raw_scales(interpolate_type: str, init_value: Any, boundaries_and_scales: Any = None) -> Any:
    pairs, product = {}, 1.0
    for step, scale in sorted((boundaries_and_scales or {}).items()):
        pairs[step] = scale / product if product else 0.0
        product = scale
    return optim.piecewise_interpolate_schedule(interpolate_type, init_value, pairs)


def _by_steps_since_the_start(cosine_kwargs: Any) -> Any:
    """Restarts that go on counting."""
    members = [optim.warmup_cosine_decay_schedule(**cycle) for cycle in cosine_kwargs]
    ends = np.cumsum([cycle["decay_steps"] for cycle in cosine_kwargs])[:-1].tolist()
    begins = [0, *ends]
    return optim.join_schedules(
        [lambda step, m=m, b=b: m(step + b) for m, b in zip(members, begins, strict=True)], ends
    )


MUTANTS: dict[str, tuple[str, Any]] = {
    **{f"{name} a step late": (name, _moved(name, -1)) for name in CASES if name != "constant_schedule"},
    **{f"{name} a step early": (name, _moved(name, 1)) for name in CASES if name != "constant_schedule"},
    "the boundary not included": ("piecewise_constant_schedule", _strict),
    "a cosine without alpha": ("cosine_decay_schedule", _without("cosine_decay_schedule", alpha=0.0)),
    "a cosine without its exponent": (
        "cosine_decay_schedule",
        _without("cosine_decay_schedule", exponent=1.0),
    ),
    "a warm-up from 0": (
        "warmup_cosine_decay_schedule",
        _without("warmup_cosine_decay_schedule", init_value=0.0),
    ),
    "no warm-up": ("warmup_cosine_decay_schedule", _without("warmup_cosine_decay_schedule", warmup_steps=0)),
    "no warm-up before the exponential": (
        "warmup_exponential_decay_schedule",
        lambda warmup_steps, init_value, peak_value, **more: optim.exponential_decay(peak_value, **more),
    ),
    "the warm-up's steps on top": (
        "warmup_cosine_decay_schedule",
        lambda warmup_steps, decay_steps, **more: optim.warmup_cosine_decay_schedule(
            **more, warmup_steps=warmup_steps, decay_steps=warmup_steps + decay_steps
        ),
    ),
    "a line for every power": ("polynomial_schedule", _without("polynomial_schedule", power=1)),
    "a schedule that begins at once": (
        "polynomial_schedule",
        _without("polynomial_schedule", transition_begin=0),
    ),
    "no staircase": ("exponential_decay", _without("exponential_decay", staircase=False)),
    "no end": ("exponential_decay", _without("exponential_decay", end_value=None)),
    "lines for cosines": (
        "piecewise_interpolate_schedule",
        _without("piecewise_interpolate_schedule", interpolate_type="linear"),
    ),
    "scales that are not multiplied up": ("piecewise_interpolate_schedule", _raw_scales),
    "one cycle's phases": ("linear_onecycle_schedule", _without("linear_onecycle_schedule", pct_final=0.8)),
    "one cycle's last value": (
        "cosine_onecycle_schedule",
        _without("cosine_onecycle_schedule", final_div_factor=1.0),
    ),
    "restarts that go on": ("sgdr_schedule", _by_steps_since_the_start),
}


def _check_all(name: str, make: Any) -> None:
    for arguments in CASES[name]:
        check(make(**arguments), name, arguments)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant: str) -> None:
    name, make = MUTANTS[mutant]
    with pytest.raises(AssertionError):
        _check_all(name, make)


JOINED = ([optim.constant_schedule(1.0), lambda step: 2.0 + step, optim.constant_schedule(3.0)], [3, 6])


def _check_join(join: Any) -> None:
    expected = optax.join_schedules(*JOINED)
    np.testing.assert_array_equal(compiled(join(*JOINED), np.arange(10)), compiled(expected, np.arange(10)))


@pytest.mark.parametrize(
    "mutant",
    [
        lambda schedules, boundaries: optim.join_schedules(schedules, [b + 1 for b in boundaries]),
        lambda schedules, boundaries: optim.join_schedules(schedules[:2], boundaries[:1]),
        lambda schedules, boundaries: (
            lambda step: jnp.where(step < 3, 1.0, jnp.where(step < 6, 2.0 + step, 3.0))
        ),
    ],
)
def test_wrong_joins_are_caught(mutant: Any) -> None:
    _check_join(optim.join_schedules)
    with pytest.raises(AssertionError), jax.numpy_dtype_promotion("standard"):
        _check_join(mutant)
