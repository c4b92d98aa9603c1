"""Every optimizer with the hyper-parameters that may be traced, at two settings."""

from __future__ import annotations

from typing import Any, NamedTuple

from nnkit import optim, tree


class Row(NamedTuple):
    make: Any
    low: dict[str, float]
    """The hyper-parameters that may be traced, all of them."""
    high: dict[str, float]


ROWS = {
    "sgd": Row(
        lambda learning_rate, momentum: optim.sgd(learning_rate, momentum, nesterov=True),
        {"learning_rate": 0.01, "momentum": 0.5},
        {"learning_rate": 0.1, "momentum": 0.9},
    ),
    "momentum": Row(
        optim.momentum, {"learning_rate": 0.01, "decay": 0.5}, {"learning_rate": 0.1, "decay": 0.9}
    ),
    "nesterov": Row(
        optim.nesterov, {"learning_rate": 0.01, "decay": 0.5}, {"learning_rate": 0.1, "decay": 0.9}
    ),
    "adagrad": Row(
        optim.adagrad,
        {"learning_rate": 0.01, "initial_accumulator_value": 0.0, "eps": 0.0},
        {"learning_rate": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3},
    ),
    "rmsprop": Row(
        lambda **numbers: optim.rmsprop(**numbers, bias_correction=True),
        {"learning_rate": 0.01, "decay": 0.9, "eps": 0.0, "initial_scale": 0.0, "momentum": 0.1},
        {"learning_rate": 0.1, "decay": 0.99, "eps": 1e-3, "initial_scale": 0.5, "momentum": 0.9},
    ),
    "rmsprop_centered": Row(
        lambda **numbers: optim.rmsprop(**numbers, centered=True, eps_in_sqrt=False),
        {"learning_rate": 0.01, "decay": 0.9, "eps": 1e-6, "initial_scale": 0.1, "momentum": 0.1},
        {"learning_rate": 0.1, "decay": 0.99, "eps": 1e-3, "initial_scale": 0.5, "momentum": 0.9},
    ),
    "adam": Row(
        optim.adam,
        {"learning_rate": 0.01, "b1": 0.5, "b2": 0.9, "eps": 0.0, "eps_root": 0.0},
        {"learning_rate": 0.1, "b1": 0.9, "b2": 0.999, "eps": 1e-3, "eps_root": 1e-6},
    ),
    "adamw": Row(
        lambda **numbers: optim.adamw(**numbers, nesterov=True, mask=tree.decayed),
        {"learning_rate": 0.01, "b1": 0.5, "b2": 0.9, "eps": 1e-8, "weight_decay": 0.0},
        {"learning_rate": 0.1, "b1": 0.9, "b2": 0.999, "eps": 1e-3, "weight_decay": 0.1},
    ),
    "scheduled": Row(
        lambda init_value, decay_rate: optim.sgd(optim.exponential_decay(init_value, 3, decay_rate), 0.9),
        {"init_value": 0.01, "decay_rate": 0.5},
        {"init_value": 0.1, "decay_rate": 0.9},
    ),
    "nadam": Row(
        optim.nadam,
        {"learning_rate": 0.01, "b1": 0.5, "b2": 0.9, "eps": 0.0, "momentum_decay": 0.0},
        {"learning_rate": 0.1, "b1": 0.9, "b2": 0.99, "eps": 1e-3, "momentum_decay": 0.5},
    ),
    "adamax": Row(
        optim.adamax,
        {"learning_rate": 0.01, "b1": 0.5, "b2": 0.9, "eps": 0.0},
        {"learning_rate": 0.1, "b1": 0.9, "b2": 0.99, "eps": 1e-3},
    ),
    "amsgrad": Row(
        lambda **numbers: optim.amsgrad(**numbers, correct_after_max=True),
        {"learning_rate": 0.01, "b1": 0.5, "b2": 0.9, "eps": 0.0, "eps_root": 0.0},
        {"learning_rate": 0.1, "b1": 0.9, "b2": 0.99, "eps": 1e-3, "eps_root": 1e-6},
    ),
    "radam": Row(
        lambda **numbers: optim.radam(**numbers, bias_correction_eps=True),
        {"learning_rate": 0.01, "b1": 0.5, "b2": 0.9, "eps": 1e-8, "eps_root": 0.0},
        {"learning_rate": 0.1, "b1": 0.9, "b2": 0.99, "eps": 1e-3, "eps_root": 1e-3},
    ),
    "lion": Row(
        lambda **numbers: optim.chain(
            optim.scale_by_lion(
                numbers["b1"], numbers["b2"], mode="smooth", smooth_beta=numbers["smooth_beta"]
            ),
            optim.scale_by_learning_rate(numbers["learning_rate"]),
        ),
        {"learning_rate": 0.01, "b1": 0.5, "b2": 0.9, "smooth_beta": 0.5},
        {"learning_rate": 0.1, "b1": 0.9, "b2": 0.99, "smooth_beta": 2.0},
    ),
    "adadelta": Row(
        lambda learning_rate, rho, eps: optim.adadelta(learning_rate, rho, eps),
        {"learning_rate": 0.5, "rho": 0.5, "eps": 1e-3},
        {"learning_rate": 1.0, "rho": 0.9, "eps": 1e-1},
    ),
    "lamb": Row(
        optim.lamb,
        {"learning_rate": 0.01, "b1": 0.5, "b2": 0.9, "eps": 1e-6},
        {"learning_rate": 0.1, "b1": 0.9, "b2": 0.99, "eps": 1e-3},
    ),
    "muon": Row(
        lambda **numbers: optim.muon(**numbers, ns_coeffs=(1.5, -0.5, 0.0), ns_steps=3),
        {"learning_rate": 0.01, "beta": 0.5, "eps": 1e-6, "adam_b1": 0.5, "adam_b2": 0.9},
        {"learning_rate": 0.1, "beta": 0.9, "eps": 1e-3, "adam_b1": 0.9, "adam_b2": 0.99},
    ),
}
