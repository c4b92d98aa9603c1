"""Every optimizer with its options, to be built of nnkit or of optax: ``ROWS[name](optim)``."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from nnkit import tree


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


ROWS: dict[str, Any] = {
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
}
IGNORE = {"rmsprop_centered_unbiased": _noise}
LOW = ["sgd_nesterov", "adagrad", "rmsprop", "rmsprop_centered", "adam", "adam_nesterov", "adamw"]
