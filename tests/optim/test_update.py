"""apply_updates: optax's sums, and stochastic rounding against exact arithmetic in float64."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnkit import optim
from nnkit.optim.update import round_stochastically
from tests.optim.oracle import parameters, rough_gradients, ulps

KEY = jax.random.key(0)
HALF = [jnp.bfloat16, jnp.float16]


def raises(kind: type[Exception], text: str) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(text)}$")


def floats(dtype: Any) -> np.ndarray:
    """All of a half precision, as float64, by value; without NaN and without what XLA flushes to 0."""
    with np.errstate(invalid="ignore"):
        values = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float64)
    tiny = 2.0**-126 if dtype == jnp.bfloat16 else 0.0
    return np.unique(values[~np.isnan(values) & ((np.abs(values) >= tiny) | (values == 0))])


def neighbours(x: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The floats below and above, and the probability of the upper one; inf counts as the next power."""
    all_of_them = floats(dtype)
    largest = all_of_them[-2]
    finite = np.concatenate([[-2 * 2.0 ** np.floor(np.log2(largest))], all_of_them[1:-1], [0.0]])
    finite[-1] = -finite[0]
    i = np.searchsorted(finite, x, side="right") - 1
    i = np.minimum(i, len(finite) - 2)
    low, high = finite[i], finite[i + 1]
    return low, high, (x - low) / (high - low)


def draws(round_: Any, x: float, dtype: Any, n: int = 4096) -> np.ndarray:
    got = round_(KEY, jnp.full(n, x, jnp.float32), dtype)
    assert got.dtype == dtype
    return np.asarray(got).astype(np.float64)


SUMS = [
    *(1 + 2.0**-9, -1 - 2.0**-9, 1 + 2.0**-8 * 0.1, 3.1415927, -100.3, 65504.0 - 3.3, 1.9999, 1 - 2.0**-12),
    *(6.2e-5, 6.0e-5, 3.1e-6, -(2.0**-24) * 1.25, 2.0**-25, 0.1, 1e-3),
]


def check_rounding(round_: Any, dtype: Any) -> None:
    """Only the two neighbours, each as often as it should: the mean within 5 deviations of the sum."""
    for x in SUMS:
        x = float(np.float32(x))
        low, high, chance = (float(v) for v in neighbours(np.array(x), dtype))
        got = draws(round_, x, dtype)
        assert set(got) <= {low, high}, (x, low, high)
        deviation = np.sqrt(chance * (1 - chance) / got.size)
        assert abs((got == high).mean() - chance) <= 5 * deviation, (x, chance, (got == high).mean())
        assert abs(got.mean() - x) <= 5 * deviation * (high - low) + 1e-9 * abs(x)


@pytest.mark.parametrize("dtype", HALF)
def test_the_mean_is_the_sum(dtype: Any) -> None:
    check_rounding(round_stochastically, dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_chances_are_exact(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the random bits, rounding is a comparison: up from exactly the right one on."""
    x = np.float32(1 + 2.0**-7 * 0.625 if dtype == jnp.bfloat16 else 1 + 2.0**-10 * 0.625)
    for sign in (1, -1):
        for step, up in ((0, None), (1, None)):
            size = 2**16 if dtype == jnp.bfloat16 else 2**32
            # bfloat16 carries from the largest bits on, float16 compares with the smallest.
            bits = size * 3 // 8 - 1 + step if dtype == jnp.bfloat16 else size * 5 // 8 - 1 + step
            up = (step == 1) == (dtype == jnp.bfloat16)
            fixed = lambda key, shape, kind, bits=bits: jnp.full(shape, bits, kind)
            monkeypatch.setattr(jax.random, "bits", fixed)
            got = float(round_stochastically(KEY, jnp.float32(sign * x), dtype))
            low, high, _ = neighbours(np.abs(np.array(x, np.float64)), dtype)
            assert got == sign * (high if up else low)


@pytest.mark.parametrize("dtype", HALF)
def test_all_floats_are_themselves(dtype: Any) -> None:
    """Also -0, inf, the largest and float16's subnormals, whatever the random bits."""
    values = floats(dtype)
    x = jnp.asarray(values.astype(np.float32))
    for seed in range(4):
        got = round_stochastically(jax.random.key(seed), x, dtype)
        np.testing.assert_array_equal(np.asarray(got).astype(np.float64), values)
    zero = round_stochastically(KEY, jnp.array([-0.0, 0.0]), dtype)
    assert np.signbit(np.asarray(zero).astype(np.float32)).tolist() == [True, False]
    nan = round_stochastically(KEY, jnp.array([jnp.nan, -jnp.nan]), dtype)
    assert jnp.isnan(nan).all()


@pytest.mark.parametrize("dtype", HALF)
def test_beyond_the_largest_is_inf(dtype: Any) -> None:
    largest = float(jnp.finfo(dtype).max)
    got = draws(round_stochastically, float(np.float32(largest * (1 + 2.0**-13))), dtype)
    assert set(got) == {largest, np.inf}
    if dtype == jnp.float16:
        assert set(draws(round_stochastically, 1e6, dtype)) == {np.inf}
        assert set(draws(round_stochastically, -1e6, dtype)) == {-np.inf}


@given(st.floats(-(2.0**15), 2.0**15, width=32), st.sampled_from(HALF))
def test_to_a_neighbour(x: float, dtype: Any) -> None:
    if dtype == jnp.bfloat16 and abs(x) < 2.0**-126:
        return
    low, high, _ = (float(v) for v in neighbours(np.array(x), dtype))
    got = set(np.asarray(ROUND[dtype](jnp.float32(x))).astype(np.float64).tolist())
    assert got <= {low, high}
    assert (x in (low, high)) <= (got == {x})


ROUND = {
    dtype: jax.jit(lambda x, dtype=dtype: round_stochastically(KEY, jnp.broadcast_to(x, 8), dtype))
    for dtype in HALF
}


def _bits(key: Any, x: Any) -> Any:
    return jax.lax.bitcast_convert_type(x, jnp.uint32), jax.random.bits(key, x.shape, jnp.uint16).astype(
        jnp.uint32
    )


def _from_bits(bits: Any) -> Any:
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


MUTANTS: dict[str, Any] = {
    "to nearest": lambda key, x, dtype: x.astype(dtype),
    "always down": lambda key, x, dtype: _from_bits(_bits(key, x)[0]),
    "up or down by halves": lambda key, x, dtype: _from_bits(
        _bits(key, x)[0] + jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 0xFFFF, 0).astype(jnp.uint32)
    ),
    "one bit short": lambda key, x, dtype: _from_bits(_bits(key, x)[0] + (_bits(key, x)[1] >> 1)),
    "noise before rounding to nearest": lambda key, x, dtype: _from_bits(sum(_bits(key, x)) + 0x8000),
    "one number for all": lambda key, x, dtype: _from_bits(_bits(key, x)[0] + _bits(key, x)[1][0]),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str) -> None:
    with pytest.raises(AssertionError):
        check_rounding(MUTANTS[name], jnp.bfloat16)


@pytest.mark.parametrize("dtype", HALF)
def test_small_updates_are_not_lost(dtype: Any) -> None:
    """A thousand of a hundredth of the gap each: to nearest nothing moves."""
    gap = float(jnp.finfo(dtype).eps)
    updates = {"w": jnp.full(256, gap / 100)}

    def run(key: Any) -> Any:
        def step(params: Any, i: Any) -> Any:
            k = None if key is None else jax.random.fold_in(key, i)
            return optim.apply_updates(params, updates, key=k), None

        return jax.lax.scan(step, {"w": jnp.ones(256, dtype)}, jnp.arange(1000))[0]["w"]

    assert set(np.asarray(jax.jit(lambda: run(None))()).tolist()) == {1.0}
    got = np.asarray(jax.jit(run)(KEY)).astype(np.float64)
    # 1000 chances of 1/100: a mean of 10 gaps, a deviation of 3.15/16.
    assert abs((got.mean() - 1) / gap - 10) < 1


def test_the_sum_is_taken_in_float32() -> None:
    """Of bfloat16 and float32, bfloat16 and bfloat16, and of what would be lost before rounding."""
    for kind in (jnp.float32, jnp.bfloat16):
        update = jnp.full(4096, 2.0**-9, kind)  # a quarter of the gap
        got = optim.apply_updates(jnp.ones(4096, jnp.bfloat16), update, key=KEY)
        assert abs(float((got > 1).astype(jnp.float32).mean()) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 4096)
    with jax.enable_x64(True):
        got = optim.apply_updates(jnp.ones(8, jnp.bfloat16), jnp.full(8, 0.5, jnp.float64), key=KEY)
        assert (got.dtype, set(got.tolist())) == (jnp.bfloat16, {1.5})


def test_wider_parameters_and_those_without_updates_are_as_without_a_key() -> None:
    params = {
        "single": jnp.array([1.0, 2.0]),
        "complex": jnp.array([1 + 1j]),
        "low": jnp.array([1.0, -2.0], jnp.bfloat16),
        "frozen": jnp.array([1.0], jnp.bfloat16),
        "steps": jnp.array(3),
        "none": None,
        "number": 1.0,
    }
    updates = {
        "single": jnp.array([1e-9, 1e-3]),
        "complex": jnp.array([1e-3j]),
        "low": jnp.array([0.5, 0.25]),
        "frozen": None,
        "steps": None,
        "none": None,
        "number": 0.5,
    }
    with_key, without = optim.apply_updates(params, updates, key=KEY), optim.apply_updates(params, updates)
    assert jax.tree.structure(with_key) == jax.tree.structure(params)
    assert ulps(with_key, without) == 0
    assert (with_key["low"].dtype, with_key["steps"].dtype) == (jnp.bfloat16, jnp.int32)
    with jax.enable_x64(True):
        wide = jnp.array([1.0, 1e-300])
        assert ulps(optim.apply_updates(wide, wide, key=KEY), 2 * wide) == 0


def test_each_parameter_has_its_own_key() -> None:
    params = {name: jnp.ones(64, jnp.bfloat16) for name in ("a", "b")}
    updates = {name: jnp.full(64, 2.0**-8) for name in params}
    new = jax.jit(lambda key: optim.apply_updates(params, updates, key=key))(KEY)
    assert new["a"].tolist() != new["b"].tolist()
    for i, name in enumerate(params):
        expected = round_stochastically(jax.random.fold_in(KEY, i), jnp.full(64, 1 + 2.0**-8), jnp.bfloat16)
        assert new[name].tolist() == expected.tolist()
    again = optim.apply_updates(params, updates, key=KEY)
    assert again["a"].tolist() == new["a"].tolist()
    assert optim.apply_updates(params, updates, key=jax.random.key(1))["a"].tolist() != new["a"].tolist()
    keys = jax.random.split(KEY, 3)
    mapped = jax.vmap(lambda key: optim.apply_updates(params, updates, key=key))(keys)
    assert mapped["b"][2].tolist() == optim.apply_updates(params, updates, key=keys[2])["b"].tolist()


@pytest.mark.parametrize("dtype", [jnp.float32, *HALF])
def test_without_a_key_as_in_optax(dtype: Any) -> None:
    params = parameters(dtype)
    for grad in rough_gradients(jnp.float32, 3):
        ours = jax.jit(optim.apply_updates)(params, grad)
        with jax.numpy_dtype_promotion("standard"):
            assert ulps(ours, jax.jit(optax.apply_updates)(params, grad)) == 0


def test_bad_keys() -> None:
    params = {"w": jnp.ones(2)}
    with raises(TypeError, "apply_updates got the number 3 for a key: pass jax.random.key(3)"):
        optim.apply_updates(params, params, key=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="apply_updates got an old-style uint32 key"):
        optim.apply_updates(params, params, key=jax.random.PRNGKey(0))
    with pytest.raises(
        ValueError, match=r"apply_updates takes one key and got an array of keys of shape \(2,\)"
    ):
        optim.apply_updates(params, params, key=jax.random.split(KEY))
    form = "gradients, optimizer state and parameters must be trees of one form"
    with raises(ValueError, f"apply_updates: params has w, which updates has not; {form}"):
        optim.apply_updates(params, {}, key=KEY)
