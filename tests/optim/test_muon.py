"""Muon beside optax.contrib's, its iteration beside the singular value decomposition, and its errors."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib
import pytest
from optax.contrib import _muon as theirs_module

from nnkit import optim
from nnkit.optim.newton_schulz import COEFFICIENTS
from tests.optim.oracle import beside, fields_of, ulps
from tests.optim.test_optimizer_errors import raises

STEPS = 4


SHAPES = {
    "dense_0": {"kernel": (5, 7), "bias": (7,)},
    "more": [(9, 4), (), {"convolution": (2, 3, 4), "none": None}],
}
FEW = {"kernel": (5, 7), "bias": (7,), "scale": (5,)}


def tree_of(dtype: Any, seed: int, shapes: Any = None) -> Any:
    rng = np.random.default_rng(seed)

    def make(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * 10.0 ** rng.uniform(-2, 2, size=shape), dtype)

    return jax.tree.map(make, shapes or SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def decay(step: Any) -> Any:
    return 0.1 * 0.9 ** (step / 10)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "default": {},
    "dion": {"ns_coeffs": "dion"},
    "rows": {"ns_coeffs": COEFFICIENTS["dion"][:3], "ns_steps": 3},
    "numbers": {"ns_coeffs": (2.0, -1.5, 0.5), "ns_steps": 3, "beta": 0.8, "eps": 1e-3},
    "without_nesterov": {"nesterov": False},
    "adaptive": {"adaptive": True},
    "spectral": {"preconditioning": "spectral"},
    "aol": {"preconditioning": "aol"},
    "schatten": {"preconditioning": "schatten"},
    "decay": {"weight_decay": 0.1, "adam_weight_decay": 0.2, "adam_learning_rate": decay},
    "adam": {"adam_b1": 0.8, "adam_b2": 0.99, "adam_eps_root": 1e-6},
    "consistent_rms": {"consistent_rms": 0.2},
}


def build(module: Any, arguments: dict[str, Any]) -> Any:
    return module.muon(decay, **arguments)


@functools.cache
def of_optax(row: str) -> Any:
    """One object a row: compiled once, whatever is compared with it."""
    return build(optax.contrib, ARGUMENTS[row])


def check(ours: Any, theirs: Any, dtype: Any, shapes: Any = None) -> None:
    """States and Adam's updates to 2 ulp, matrices to 485 half ulp of their largest entry.

    Mostly they are equal to the last bit. But where XLA rounds one number of the momentum otherwise,
    five steps multiply that in the direction of a small singular value by up to 3.4445⁵ = 485.
    """
    params, grads = tree_of(dtype, 0, shapes), [tree_of(dtype, i + 1, shapes) for i in range(STEPS)]
    assert ulps(ours.init(params), theirs.init(params)) == 0
    updates, their_updates, states, their_states = beside(ours, theirs, params, grads)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert ulps(states, their_states) <= 2, "states"
    for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(their_updates), strict=True):
        assert x.dtype == y.dtype
        if x.ndim < 3:  # the steps are the first axis
            assert ulps(x, y) <= 2
        else:
            np.testing.assert_allclose(x, y, rtol=0, atol=485 * np.finfo(dtype).eps / 2 * np.abs(y).max())


@pytest.mark.parametrize("name", ARGUMENTS)
def test_float32_as_optax(name: str) -> None:
    check(build(optim, ARGUMENTS[name]), of_optax(name), jnp.float32, FEW)


@pytest.mark.parametrize("name", ["default", "dion"])
def test_float64_as_optax(name: str) -> None:
    with jax.enable_x64(True):
        check(build(optim, ARGUMENTS[name]), of_optax(name), jnp.float64, FEW)


@pytest.mark.parametrize("name", ["default", "aol"])
def test_states_and_signatures_as_in_optax(name: str) -> None:
    params = tree_of(jnp.float32, 0)
    ours, theirs = build(optim, ARGUMENTS[name]), of_optax(name)
    assert fields_of(ours.init(params)) == fields_of(theirs.init(params))
    for function in ("muon", "scale_by_muon", "MuonDimensionNumbers", "MuonState"):
        a, b = (inspect.signature(getattr(m, function)).parameters for m in (optim, optax.contrib))
        assert [(p.name, p.kind, p.default) for p in a.values()] == [
            (p.name, p.kind, p.default) for p in b.values()
        ]
    a, b = optim.orthogonalize_via_newton_schulz, theirs_module.orthogonalize_via_newton_schulz
    assert list(inspect.signature(a).parameters) == list(inspect.signature(b).parameters)


MUTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "without Nesterov": ("default", {"nesterov": False}),
    "one step less": ("default", {"ns_steps": 4}),
    "other coefficients": ("default", {"ns_coeffs": "dion"}),
    "another beta": ("default", {"beta": 0.9}),
    "the largest eps": ("numbers", {**ARGUMENTS["numbers"], "eps": 1e-2}),
    "another normalisation": ("default", {"preconditioning": "spectral"}),
    "Schatten for Frobenius": ("default", {"preconditioning": "schatten"}),
    "rows for columns": ("aol", {"preconditioning": "schatten"}),
    "the dual norm": ("default", {"adaptive": True}),
    "no decay": ("decay", {"adam_weight_decay": 0.2, "adam_learning_rate": decay}),
    "the rest without decay": ("decay", {"weight_decay": 0.1, "adam_learning_rate": decay}),
    "one rate for all": ("decay", {"weight_decay": 0.1, "adam_weight_decay": 0.2, "adam_learning_rate": 0.1}),
    "steps of another size": ("consistent_rms", {}),
    "Adam with Muon's beta": ("default", {"adam_b1": 0.95}),
    "matrices for Adam": (
        "default",
        {"muon_weight_dimension_numbers": {"kernel": None, "bias": None, "scale": None}},
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str) -> None:
    row, arguments = MUTANTS[name]
    with pytest.raises(AssertionError):
        check(build(optim, arguments), of_optax(row), jnp.float32, FEW)


N = optim.MuonDimensionNumbers
FORMS: dict[str, Any] = {
    "prefix": {"dense_0": {"kernel": N(), "bias": None}, "more": None},
    "every_axis": {
        "dense_0": {"kernel": N(1, 0), "bias": None},
        "more": [N(), None, {"convolution": N((0, 1), 2), "none": None}],
    },
    "batches": {"dense_0": None, "more": [N(-2, -1), None, {"convolution": N(-1, 1), "none": None}]},
}


@pytest.mark.parametrize(
    ("form", "as_function"), [("prefix", False), ("every_axis", False), ("batches", True)]
)
def test_dimension_numbers_as_optax(form: str, as_function: bool) -> None:
    def arguments(kind: Any) -> dict[str, Any]:
        given = jax.tree.map(
            lambda n: None if n is None else kind(*n),
            FORMS[form],
            is_leaf=lambda x: x is None or isinstance(x, N),
        )
        return {"muon_weight_dimension_numbers": (lambda params: given) if as_function else given}

    of_optax = arguments(optax.contrib.MuonDimensionNumbers)
    check(build(optim, arguments(N)), build(optax.contrib, of_optax), jnp.float32)


def _spectrum(x: Any) -> np.ndarray:
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


@pytest.mark.parametrize("preconditioning", ["frobenius", "spectral", "aol", "schatten"])
@pytest.mark.parametrize("shape", [(6, 6), (3, 40), (40, 3)])
def test_the_iteration_is_the_polynomial_of_the_singular_values(preconditioning: Any, shape: Any) -> None:
    """And keeps the singular vectors, but for "aol", which scales rows first. In float64."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=shape))
        coefficients = jnp.asarray(COEFFICIENTS["dion"])
        y = optim.orthogonalize_via_newton_schulz(x, coefficients, 5, preconditioning, 0.0)
        near = _spectrum(y)
        assert (near > 0.6).all()
        assert (near < 1.3).all()
        if preconditioning == "aol":
            return
        left, values, right = np.linalg.svd(np.asarray(x), full_matrices=False)
        norm = {"frobenius": 2, "schatten": 4, "spectral": np.inf}[preconditioning]
        values = values / np.linalg.norm(values, ord=norm)
        for a, b, c in COEFFICIENTS["dion"]:
            values = a * values + b * values**3 + c * values**5
        np.testing.assert_allclose(y, left * values @ right, rtol=0, atol=1e-12)


def test_newtons_own_coefficients_give_the_nearest_orthogonal_matrix() -> None:
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9)))
        y = optim.orthogonalize_via_newton_schulz(x, jnp.asarray([1.875, -1.25, 0.375]), 30)
        left, _, right = np.linalg.svd(np.asarray(x), full_matrices=False)
        np.testing.assert_allclose(y, left @ right, rtol=0, atol=1e-12)


def test_bfloat16_as_near_to_the_truth_as_optax() -> None:
    """Both lose two digits in five steps; which two depends on the norm's last bit."""
    params, grads = tree_of(jnp.bfloat16, 0), tree_of(jnp.bfloat16, 1)

    def run(m: Any, dtype: Any) -> np.ndarray:
        cast = [jax.tree.map(lambda x: x.astype(dtype), t) for t in (params, grads)]
        tx = build(m, {})
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = jax.jit(tx.update)(cast[1], tx.init(cast[0]), cast[0])
        return np.concatenate([np.asarray(u, np.float32).ravel() for u in jax.tree.leaves(updates)])

    truth = run(optim, jnp.float32)
    mine, theirs = (np.abs(run(m, jnp.bfloat16) - truth).max() for m in (optim, optax.contrib))
    assert mine < 1.2 * theirs


def test_no_gradient_an_empty_matrix_and_a_missing_gradient() -> None:
    """In float16, where eps is 0; an empty matrix is an error in optax."""
    params = {"empty": jnp.ones((0, 3), jnp.float16), **tree_of(jnp.float16, 0)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    zeros["dense_0"]["kernel"] = None
    for preconditioning in ("frobenius", "spectral", "aol", "schatten"):
        tx = optim.muon(0.1, preconditioning=preconditioning, eps=0.0)
        updates, state = jax.jit(tx.update)(zeros, tx.init(params), params)
        assert updates["dense_0"]["kernel"] is None
        assert not any(np.asarray(u).any() for u in jax.tree.leaves(updates))
        assert all(np.isfinite(np.asarray(s, np.float32)).all() for s in jax.tree.leaves(state))


def test_the_mask_of_the_decay() -> None:
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2)), "c": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = optim.muon(0.1, weight_decay=0.5, weight_decay_mask={"a": True, "b": False, "c": False})
    updates, _ = tx.update(zeros, tx.init(params), params)
    assert {k: round(float(u.ravel()[0]), 6) for k, u in updates.items()} == {"a": -0.05, "b": 0, "c": 0}


def test_complex_matrices_become_unitary() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 7)) + 1j * rng.normal(size=(4, 7)), jnp.complex64)
    for preconditioning in ("frobenius", "spectral", "aol", "schatten"):
        y = optim.orthogonalize_via_newton_schulz(x, jnp.asarray(COEFFICIENTS["dion"]), 5, preconditioning)
        values = np.linalg.svd(np.asarray(y), compute_uv=False)
        assert (np.abs(values - 1) < 0.4).all()


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"ns_steps": 0}, ValueError, "ns_steps must be a positive integer, got 0"),
        ({"ns_steps": 2.0}, ValueError, "ns_steps must be a positive integer, got 2.0"),
        (
            {"ns_coeffs": (1.0, 2.0)},
            ValueError,
            "ns_coeffs must be (a, b, c) or rows of that, got the shape (2,): pass 'standard' for Muon's own",
        ),
        (
            {"ns_coeffs": "muon"},
            ValueError,
            "ns_coeffs must be 'standard', 'dion' or numbers (a, b, c), got 'muon'",
        ),
        ({"ns_coeffs": None}, TypeError, "ns_coeffs must be numbers (a, b, c) or rows of them, got None"),
        (
            {"preconditioning": "none"},
            ValueError,
            "preconditioning must be one of 'frobenius', 'spectral', 'aol', 'schatten', got 'none'",
        ),
        ({"eps": -1.0}, ValueError, "eps must be in [0, inf), got -1.0"),
        ({"beta": 1.0}, ValueError, "beta must be in [0, 1), got 1.0: it is the decay of an average"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be in [0, inf), got -1.0"),
        ({"consistent_rms": -1.0}, ValueError, "consistent_rms must be in [0, inf), got -1.0"),
    ],
)
def test_bad_arguments(arguments: Any, kind: Any, text: str) -> None:
    with raises(kind, text):
        optim.muon(0.1, **arguments)


def test_parameters_that_are_no_matrices() -> None:
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    text = (
        "scale_by_muon: bias has the shape (2,) and is not for Muon: pass its MuonDimensionNumbers, or "
        "leave it to Adam with muon(...)"
    )
    for given in (None, {"kernel": N(), "bias": None}):
        tx = optim.scale_by_muon(weight_dimension_numbers=given)
        with raises(ValueError, text):
            tx.update(params, tx.init(params))
    tx = optim.scale_by_shape({"kernel": N(0, 2), "bias": N(0, 0)})
    with pytest.raises(ValueError, match=r"does not name distinct axes of the shape \(2,\)"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match=r"only matrices can be orthogonalized, got the shape \(2,\)"):
        optim.orthogonalize_via_newton_schulz(params["bias"], jnp.ones(3))
    with pytest.raises(ValueError, match="muon: the dimension numbers must be a tree like the parameters"):
        optim.muon(0.1, muon_weight_dimension_numbers={"kernel": N()}).init(params)
    with raises(TypeError, "muon: dimension numbers must be MuonDimensionNumbers or None, got 0"):
        optim.muon(0.1, muon_weight_dimension_numbers={"kernel": 0, "bias": None}).init(params)
