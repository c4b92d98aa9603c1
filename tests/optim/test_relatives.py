"""The relatives of Adam where optax is no oracle: masks, wider second moments, edges, what differs from optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnkit import optim, tree
from tests.optim.oracle import optax_jit, parameters, smooth_gradients, trajectory, ulps

PARAMS = parameters(jnp.float32)
MAKE: dict[str, Any] = {
    "adam": optim.adam,
    "nadam": optim.nadam,
    "nadam_of_pytorch": lambda rate, **more: optim.nadam(rate, momentum_decay=4e-3, **more),
    "adamax": optim.adamax,
    "amsgrad": optim.amsgrad,
    "amsgrad_of_pytorch": lambda rate, **more: optim.amsgrad(rate, correct_after_max=True, **more),
    "radam": optim.radam,
    "radam_of_pytorch": lambda rate, **more: optim.radam(rate, bias_correction_eps=True, **more),
    "lamb": optim.lamb,
}


@pytest.mark.parametrize(
    ("make", "kernel"),
    [
        (lambda mask: optim.nadamw(0.1, weight_decay=0.5, mask=mask), 0.95),
        (lambda mask: optim.adamaxw(0.1, weight_decay=0.5, mask=mask), 0.95),
        (lambda mask: optim.lion(0.1, weight_decay=0.5, mask=mask), 0.95),
        # ‖θ‖/‖λθ‖·λθ is θ
        (lambda mask: optim.lamb(0.1, weight_decay=0.5, mask=mask), 0.9),
        # g = 0.5·2, s = 0.1·g², a step of 0.1·√1e-6/√(s + 1e-6)
        (lambda mask: optim.adadelta(0.1, weight_decay=0.5, weight_decay_mask=mask), 1 - 0.05e-3 / 0.1**0.5),
    ],
)
def test_only_what_the_mask_says_decays(make: Any, kernel: float) -> None:
    params = {"kernel": jnp.full(3, 2.0), "bias": jnp.full(3, 2.0)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    for mask, bias in ((tree.decayed, 1.0), (None, kernel)):
        after, _ = trajectory(make(mask), optim.apply_updates, params, [zeros])
        np.testing.assert_allclose(after["kernel"], 2 * kernel, rtol=1e-6)
        np.testing.assert_allclose(after["bias"], 2 * bias, rtol=1e-6)


def _low(tree_of_arrays: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree_of_arrays)


def _high(tree_of_arrays: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree_of_arrays)


@pytest.mark.parametrize("name", sorted(MAKE.keys() - {"lamb"}))
def test_float32_moments_of_bfloat16_parameters(name: str) -> None:
    """The update is the float32 optimizer's of the same gradients; with mu in bfloat16 the first one is."""
    low = [_low(g) for g in smooth_gradients(jnp.float32, 12)]
    high = [_high(g) for g in low]
    plain, tx = MAKE[name](0.1), MAKE[name](0.1, nu_dtype=jnp.float32)
    state, expected = tx.init(_low(PARAMS)), plain.init(_high(_low(PARAMS)))
    assert {x.dtype for x in jax.tree.leaves(state[0].nu)} == {jnp.dtype(jnp.float32)}
    assert {x.dtype for x in jax.tree.leaves(state[0].mu)} == {jnp.dtype(jnp.bfloat16)}
    updates, after = jax.jit(tx.update)(low[0], state, _low(PARAMS))
    wanted, _ = jax.jit(plain.update)(high[0], expected, _high(_low(PARAMS)))
    assert ulps(updates, wanted) <= 2
    assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(state)]
    if name in ("adamax", "radam", "radam_of_pytorch"):  # without a mu_dtype
        return
    tx = MAKE[name](0.1, mu_dtype=jnp.float32, nu_dtype=jnp.float32)
    state = tx.init(_low(PARAMS))
    for g, h in zip(low, high, strict=True):
        updates, state = jax.jit(tx.update)(g, state, _low(PARAMS))
        wanted, expected = jax.jit(plain.update)(h, expected, PARAMS)
        for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(wanted), strict=True):
            assert x.dtype == y.dtype
            # Sums cancel, with or without a fused multiply-add; bfloat16 squares would be off by 1e-3.
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * 0.1)


def test_a_product_of_bfloat16_squares_would_be_told_apart() -> None:
    """optax's second moment of bfloat16 gradients, cast to float32 too late."""
    low = _low(smooth_gradients(jnp.float32, 1)[0])
    late = jax.tree.map(lambda g: (g * g).astype(jnp.float32), low)
    early = jax.tree.map(lambda g: g.astype(jnp.float32) ** 2, low)
    assert ulps(late, early) > 1000


@pytest.mark.parametrize("name", MAKE)
def test_bfloat16_moments_of_float32_parameters(name: str) -> None:
    tx = MAKE[name](0.1, nu_dtype=jnp.bfloat16)
    state = tx.init(PARAMS)
    updates, after = tx.update(PARAMS, state, PARAMS)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}
    assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(state)]
    exact, _ = MAKE[name](0.1).update(PARAMS, MAKE[name](0.1).init(PARAMS), PARAMS)
    for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)  # from a zero state nothing has been rounded yet


def test_a_second_moment_in_float16_overflows_and_in_float32_does_not() -> None:
    params = {"w": jnp.ones(3, jnp.float16)}
    grads = {"w": jnp.full(3, 1e4, jnp.float16)}
    for make in (optim.adam, optim.amsgrad):
        lost, _ = make(0.1).update(grads, make(0.1).init(params), params)
        kept = make(0.1, nu_dtype=jnp.float32)
        updates, _ = kept.update(grads, kept.init(params), params)
        assert lost["w"].tolist() == [0, 0, 0]
        np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-3)


def test_complex_parameters_with_a_real_second_moment() -> None:
    rng = np.random.default_rng(0)
    draw = lambda: {"w": jnp.asarray(rng.normal(size=5) + 1j * rng.normal(size=5), jnp.complex64)}
    params, grads = draw(), [draw() for _ in range(5)]
    for name in ("adam", "amsgrad", "radam", "adamax", "nadam"):
        full, real = MAKE[name](0.1), MAKE[name](0.1, nu_dtype=jnp.float32)
        a, b = full.init(params), real.init(params)
        assert b[0].nu["w"].dtype == jnp.float32
        for g in grads:
            x, a = full.update(g, a, params)
            y, b = real.update(g, b, params)
            assert y["w"].dtype == jnp.complex64
            np.testing.assert_allclose(x["w"], y["w"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("name", [*MAKE, "adadelta"])
def test_no_gradient_no_step(name: str, eps: float, dtype: Any) -> None:
    """Also where eps is 0, or becomes 0 in float16, where optax gives NaN."""
    make = optim.adadelta if name == "adadelta" else MAKE[name]
    params = parameters(dtype)
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = make(0.1, eps=eps)
    state = tx.init(params)
    for _ in range(7):  # RAdam is rectified at the fifth
        updates, state = jax.jit(tx.update)(zeros, state, params)
    assert not any(np.asarray(u).any() for u in jax.tree.leaves(updates))


def test_adadelta_without_a_rate_descends() -> None:
    """As in the paper; optax leaves the sign of the gradient there."""
    params = {"w": jnp.array(1.0)}
    ours, theirs = optim.adadelta(), optax.adadelta()
    step, _ = ours.update(params, ours.init(params), params)
    climb, _ = theirs.update(params, theirs.init(params), params)
    assert float(step["w"]) == -float(climb["w"]) < 0


def test_amsgrad_never_takes_longer_steps_than_its_largest_mean_square_allows() -> None:
    tx = optim.amsgrad(1.0, b1=0.0, b2=0.5, bias_correction_nu=False)
    params = {"w": jnp.array(0.0)}
    state = tx.init(params)
    sizes = []
    for grad in (8.0, 1.0, 1.0, 1.0, 1.0):
        updates, state = tx.update({"w": jnp.array(grad)}, state)
        sizes.append(-float(updates["w"]))
    assert sizes[1:] == sizes[1:2] * 4


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_the_trust_ratio_in_half_precision(dtype: Any) -> None:
    """Against float64, to one rounding of the ratio and one of the product; optax's norm overflows."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(300 * rng.normal(size=500), dtype)}
    updates = {"w": jnp.asarray(rng.normal(size=500), dtype)}
    tx = optim.scale_by_trust_ratio()
    u, p = (np.asarray(x["w"], np.float64) for x in (updates, params))
    expected = u * np.linalg.norm(p) / np.linalg.norm(u)
    ours, _ = tx.update(updates, tx.init(params), params)
    assert ours["w"].dtype == dtype
    np.testing.assert_allclose(
        np.asarray(ours["w"], np.float64), expected, rtol=1.5 * float(jnp.finfo(dtype).eps)
    )
    theirs, _ = optax_jit(optax.scale_by_trust_ratio().update)(updates, optax.EmptyState(), params)
    assert bool(jnp.isfinite(theirs["w"]).all()) == (dtype == jnp.bfloat16)


@pytest.mark.parametrize("zero", ["params", "updates", "both"])
def test_the_trust_ratio_of_zeros_and_its_derivatives(zero: str) -> None:
    params = {"w": jnp.zeros(3) if zero in ("params", "both") else jnp.ones(3)}
    updates = {"w": jnp.zeros(3) if zero in ("updates", "both") else jnp.full(3, 2.0)}
    tx = optim.scale_by_trust_ratio()

    def total(updates: Any, params: Any) -> Any:
        return tx.update(updates, tx.init(params), params)[0]["w"].sum()

    assert float(total(updates, params)) == float(updates["w"].sum())
    for derivative in jax.grad(total, argnums=(0, 1))(updates, params):
        assert np.isfinite(np.asarray(derivative["w"])).all()


@pytest.mark.parametrize("name", [*MAKE, "adadelta", "lion", "muon"])
def test_a_parameter_without_a_gradient_stays(name: str) -> None:
    make = MAKE.get(name) or getattr(optim, name)
    params = {"used": jnp.ones((3, 3)), "frozen": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    grads = {"used": jnp.ones((3, 3)), "frozen": {"kernel": None, "bias": None}}
    tx = make(0.1)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(grads, state, params)
    new = optim.apply_updates(params, updates)
    assert ulps(new["frozen"], params["frozen"]) == 0
    assert ulps(new["used"], params["used"]) > 0
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize("name", [*MAKE, "adadelta", "lion", "muon"])
def test_many_small_leaves_one_by_one(name: str) -> None:
    """A tree large enough for shared buffers gets what its parts get alone."""
    make = MAKE.get(name) or getattr(optim, name)
    rng = np.random.default_rng(0)
    draw = lambda: {f"{i:03}": jnp.asarray(rng.normal(size=(2, 3 + i % 2)), jnp.float32) for i in range(80)}
    params, grads = draw(), [draw() for _ in range(2)]
    few = sorted(params)[:3]
    part = lambda tree_of_80: {k: tree_of_80[k] for k in few}
    if name == "muon":  # eighty iterations would take seconds to compile
        make = lambda rate: optim.muon(rate, ns_steps=1)
    whole, _ = trajectory(make(0.1), optim.apply_updates, params, grads)
    alone, _ = trajectory(make(0.1), optim.apply_updates, part(params), [part(g) for g in grads])
    for k in few:
        np.testing.assert_allclose(whole[k], alone[k], rtol=0, atol=1e-6)
