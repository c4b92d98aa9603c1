"""Optimizers beside optax's: a row of OPTAX is one with its options, ``OPTAX[name](optim)`` or ``(optax)``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit import optim, tree
from nnkit.optim.radam import rectification
from nnkit.testing.equivalent import Distance, compare_steps, of_transformation
from nnkit.testing.table.row import Bound, Row
from nnkit.testing.trees import random_tree, rough_gradients

__all__ = ["IGNORE", "LOW", "OPTAX", "measure", "rows"]

STEPS = 100


def _decay(m: Any) -> Any:
    return m.exponential_decay(0.1, 10, 0.9, transition_begin=3)


def _noise(states: Any) -> Any:
    """Where the centered variance is rounding noise: with bias correction the first step always."""
    state = states[0]
    weight = 1 - 0.9 ** np.asarray(state.count, np.float64)

    def small(mu: Any, nu: Any) -> Any:
        w = weight.reshape((-1,) + (1,) * (mu.ndim - 1))
        mu, nu = np.asarray(mu, np.float64) / w, np.asarray(nu, np.float64) / w
        with np.errstate(invalid="ignore"):
            return ~(nu - mu**2 > 1e-2 * nu)

    return [
        small(mu, nu) for mu, nu in zip(jax.tree.leaves(state.mu), jax.tree.leaves(state.nu), strict=True)
    ]


def _radam(
    rate: Any,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    threshold: float = 5.0,
    nesterov: bool = False,
) -> Any:
    """RAdam from optax's parts, with nnkit's r, which the tests hold against exact arithmetic.

    optax's r is made of float32 powers of b2 near 1 and is 0.6% off at the sixth step.
    """
    import optax

    adaptive: Any = optax.scale_by_adam(b1, b2, eps, eps_root, nesterov=nesterov)
    plain = optax.scale_by_radam(b1, b2, eps, eps_root, np.inf, nesterov=nesterov)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        early, _ = plain.update(updates, state)
        late, new = adaptive.update(updates, state)
        known, r = rectification(b2, new.count, threshold)
        return jax.tree.map(lambda a, b: jnp.where(known, r.astype(a.dtype) * a, b), late, early), new

    return optax.chain(
        optax.GradientTransformation(adaptive.init, update), optax.scale_by_learning_rate(rate)
    )


def _radams(m: Any) -> Any:
    return optim.radam if m is optim else _radam


OPTAX: dict[str, Any] = {
    "sgd": lambda m: m.sgd(0.1),
    "sgd_momentum": lambda m: m.sgd(0.1, 0.9),
    "sgd_nesterov": lambda m: m.sgd(_decay(m), 0.9, nesterov=True),
    "adagrad": lambda m: m.adagrad(0.1),
    "adagrad_from_0": lambda m: m.adagrad(_decay(m), 0.0, 1e-5),
    "rmsprop": lambda m: m.rmsprop(0.1),
    "rmsprop_eps_outside": lambda m: m.rmsprop(0.1, 0.99, 1e-6, 0.5, eps_in_sqrt=False),
    "rmsprop_momentum": lambda m: m.rmsprop(_decay(m), momentum=0.9),
    "rmsprop_nesterov": lambda m: m.rmsprop(0.1, momentum=0.9, nesterov=True),
    "rmsprop_unbiased": lambda m: m.rmsprop(0.1, bias_correction=True),
    "rmsprop_unbiased_eps_outside": lambda m: m.rmsprop(0.1, bias_correction=True, eps_in_sqrt=False),
    "rmsprop_centered": lambda m: m.rmsprop(0.1, centered=True),
    "rmsprop_centered_eps_outside": lambda m: m.rmsprop(0.1, centered=True, eps_in_sqrt=False),
    "rmsprop_centered_unbiased": lambda m: m.rmsprop(0.1, centered=True, bias_correction=True),
    "adam": lambda m: m.adam(1e-3),
    "adam_arguments": lambda m: m.adam(_decay(m), 0.8, 0.99, 1e-6, 1e-6),
    "adam_nesterov": lambda m: m.adam(1e-3, nesterov=True),
    "adamw": lambda m: m.adamw(1e-3, weight_decay=0.1),
    "adamw_mask": lambda m: m.adamw(1e-3, weight_decay=_decay(m), mask=tree.decayed),
    "adamw_nesterov": lambda m: m.adamw(_decay(m), weight_decay=0.1, nesterov=True),
    "decayed_sgd": lambda m: m.chain(
        m.add_decayed_weights(0.1, {"dense_0": True, "more": False}), m.sgd(0.1, 0.9)
    ),
    "parts": lambda m: m.chain(
        m.identity(),
        m.trace(0.5),
        m.scale(0.5),
        m.scale_by_learning_rate(None),
        m.scale_by_learning_rate(0.5, flip_sign=False),
        m.scale_by_learning_rate(_decay(m), flip_sign=False),
        m.scale_by_schedule(_decay(m)),
    ),
    "nadam": lambda m: m.nadam(1e-3),
    "nadam_arguments": lambda m: m.nadam(_decay(m), 0.8, 0.99, 1e-6, 1e-6),
    "nadamw": lambda m: m.nadamw(_decay(m), weight_decay=0.1),
    "adamax": lambda m: m.adamax(1e-3),
    "adamax_arguments": lambda m: m.adamax(_decay(m), 0.8, 0.95, 1e-4),
    "adamaxw": lambda m: m.adamaxw(1e-3, weight_decay=_decay(m)),
    "amsgrad": lambda m: m.amsgrad(1e-3),
    "amsgrad_arguments": lambda m: m.amsgrad(_decay(m), 0.8, 0.99, 1e-6, 1e-6),
    "amsgrad_of_the_paper": lambda m: m.amsgrad(1e-3, bias_correction_mu=False, bias_correction_nu=False),
    "amsgrad_mu_corrected": lambda m: m.amsgrad(1e-3, bias_correction_nu=False),
    "amsgrad_nu_corrected": lambda m: m.amsgrad(1e-3, bias_correction_mu=False),
    "radam": lambda m: _radams(m)(1e-3),
    "radam_arguments": lambda m: _radams(m)(_decay(m), 0.8, 0.99, 1e-6, 1e-6, 12.0),
    "radam_nesterov": lambda m: _radams(m)(1e-3, b2=0.9995, nesterov=True),
    "radam_never_adaptive": lambda m: m.radam(1e-3, b2=0.5),
    "lion": lambda m: m.lion(1e-3),
    "lion_arguments": lambda m: m.lion(_decay(m), 0.8, 0.95, None, _decay(m)),
    "lion_smooth": lambda m: m.scale_by_lion(mode="smooth", smooth_beta=0.5),
    "lion_refined": lambda m: m.scale_by_lion(0.8, 0.95, mode="refined"),
    "adadelta": lambda m: m.adadelta(1.0),
    "adadelta_arguments": lambda m: m.adadelta(_decay(m), 0.95, 1e-3, 0.1),
    "lamb": lambda m: m.lamb(1e-3),
    "lamb_arguments": lambda m: m.lamb(_decay(m), 0.8, 0.99, 1e-3, 1e-6, 0.1),
    "trust_ratio": lambda m: m.chain(
        m.scale_by_adam(), m.scale_by_trust_ratio(min_norm=2.0, trust_coefficient=0.5, eps=0.1)
    ),
}
IGNORE: dict[str, Any] = {"rmsprop_centered_unbiased": _noise}
LOW = [
    *("sgd_nesterov", "adagrad", "rmsprop", "rmsprop_centered", "adam", "adam_nesterov", "adamw"),
    *("nadamw", "adamax", "amsgrad", "radam", "radam_nesterov", "lion", "lion_smooth", "adadelta"),
]


def measure(name: str, dtype: Any, steps: int = STEPS) -> Distance:
    """float64: each goes its own way; else each step starts from optax's own state."""
    import optax

    own = dtype == jnp.float64
    with jax.enable_x64(own):
        return compare_steps(
            of_transformation(OPTAX[name](optim), strict=not own),
            of_transformation(OPTAX[name](optax), strict=False),
            random_tree(dtype),
            rough_gradients(dtype, steps),
            from_theirs=not own,
            ignore=partial(_skipped, name) if name in IGNORE else None,
        )


def _skipped(name: str, run: Any) -> list[Any]:
    """For each leaf of what is compared, state first: IGNORE speaks of the updates."""
    (_, state), seen = run
    stacked: Any = jax.tree.map(lambda a: np.asarray(a)[None], state)
    return [False] * len(seen["state"]) + [mask[0] for mask in IGNORE[name](stacked)]


def rows() -> Iterator[Row]:
    """Every optimizer in float32 and float64, and some in bfloat16."""
    row = partial(Row, "optimizers")
    for name in OPTAX:
        yield row(name, "optax", "float32", Bound(ulps=2), partial(measure, name, jnp.float32))
        if name not in IGNORE:
            # 1e-12 of each number.
            yield row(name, "optax", "float64", Bound(ulps=4500), partial(measure, name, jnp.float64))
        if name in LOW:
            yield row(name, "optax", "bfloat16", Bound(ulps=2), partial(measure, name, jnp.bfloat16))
