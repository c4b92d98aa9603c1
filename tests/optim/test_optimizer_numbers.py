"""Hyper-parameters out of range: each error, by its text."""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import optim

ALL = {
    "sgd": optim.sgd,
    "momentum": optim.momentum,
    "nesterov": optim.nesterov,
    "adagrad": optim.adagrad,
    "rmsprop": optim.rmsprop,
    "adam": optim.adam,
    "adamw": optim.adamw,
}
nan, inf = float("nan"), float("inf")


def raises(kind: type[Exception], text: str) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(text)}$")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rate", [-0.1, nan, inf, np.float32(-1), -1])
def test_bad_learning_rates(name: str, rate: Any) -> None:
    text = f"learning_rate must be in [0, inf), got {rate}: the sign of the step is already the optimizer's"
    with raises(ValueError, text):
        ALL[name](rate)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rate", ["0.1", True, [0.1], 1j])
def test_learning_rates_that_are_no_numbers(name: str, rate: Any) -> None:
    with pytest.raises(TypeError, match=r"^learning_rate must be a number or a scalar array, got "):
        ALL[name](rate)


@pytest.mark.parametrize("name", ALL)
def test_a_grid_of_learning_rates_needs_vmap(name: str) -> None:
    text = "learning_rate must be a scalar, got an array of shape (3,): map over its values with jax.vmap"
    for rates in (jnp.ones(3), np.ones(3)):
        with raises(ValueError, text):
            ALL[name](rates)


AVERAGE = "it is the decay of an average"
KEPT = "it is the part of the velocity that is kept"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: optim.adam(0.1, b1=1.0), f"b1 must be in [0, 1), got 1.0: {AVERAGE}"),
        (lambda: optim.adam(0.1, b2=1), f"b2 must be in [0, 1), got 1: {AVERAGE}"),
        (lambda: optim.adam(0.1, b1=-0.5), f"b1 must be in [0, 1), got -0.5: {AVERAGE}"),
        (lambda: optim.adamw(0.1, b2=nan), f"b2 must be in [0, 1), got nan: {AVERAGE}"),
        (lambda: optim.adam(0.1, eps=-1e-8), "eps must be in [0, inf), got -1e-08"),
        (lambda: optim.adam(0.1, eps_root=nan), "eps_root must be in [0, inf), got nan"),
        (lambda: optim.adamw(0.1, weight_decay=-1.0), "weight_decay must be in [0, inf), got -1.0"),
        (lambda: optim.add_decayed_weights(nan), "weight_decay must be in (-inf, inf), got nan"),
        (lambda: optim.sgd(0.1, 1.0), f"momentum must be in (-1, 1), got 1.0: {KEPT}"),
        (lambda: optim.rmsprop(0.1, momentum=-1.5), f"momentum must be in (-1, 1), got -1.5: {KEPT}"),
        (lambda: optim.momentum(0.1, 1.0), f"decay must be in (-1, 1), got 1.0: {KEPT}"),
        (lambda: optim.nesterov(0.1, nan), f"decay must be in (-1, 1), got nan: {KEPT}"),
        (
            lambda: optim.trace(1.1),
            "decay must be in [-1, 1], got 1.1: beyond, the sum grows without bound",
        ),
        (lambda: optim.rmsprop(0.1, decay=1.0), f"decay must be in [0, 1), got 1.0: {AVERAGE}"),
        (lambda: optim.rmsprop(0.1, eps=-1.0), "eps must be in [0, inf), got -1.0"),
        (lambda: optim.rmsprop(0.1, initial_scale=-1.0), "initial_scale must be in [0, inf), got -1.0"),
        (
            lambda: optim.rmsprop(0.1, centered=True, decay=1.0),
            f"decay must be in [0, 1), got 1.0: {AVERAGE}",
        ),
        (
            lambda: optim.adagrad(0.1, -0.1),
            "initial_accumulator_value must be in [0, inf), got -0.1",
        ),
        (lambda: optim.adagrad(0.1, eps=nan), "eps must be in [0, inf), got nan"),
        (lambda: optim.scale(inf), "step_size must be in (-inf, inf), got inf"),
        (lambda: optim.constant_schedule(nan), "value must be in (-inf, inf), got nan"),
        (lambda: optim.exponential_decay(nan, 1, 0.9), "init_value must be in (-inf, inf), got nan"),
        (lambda: optim.exponential_decay(0.1, 1, -0.9), "decay_rate must be in [0, inf), got -0.9"),
    ],
)
def test_numbers_out_of_range(make: Any, text: str) -> None:
    with raises(ValueError, text):
        make()


def test_edges_of_the_ranges_are_accepted() -> None:
    optim.sgd(0.0, 0.0)
    optim.sgd(0.0, -0.99)
    optim.trace(1.0)
    optim.adam(0.0, 0.0, 0.0, 0.0, 0.0)
    optim.rmsprop(0.0, 0.0, 0.0, 0.0)
    optim.adagrad(0.0, 0.0, 0.0)
    optim.scale(-1.0)
    optim.add_decayed_weights(-0.1)


@pytest.mark.parametrize("name", ["mu_dtype", "accumulator_dtype"])
def test_dtypes_that_are_not_floating(name: str) -> None:
    make = optim.adam if name == "mu_dtype" else optim.sgd
    momentum = {} if name == "mu_dtype" else {"momentum": 0.9}
    with raises(TypeError, f"{name} must be a floating-point dtype, got int8"):
        make(0.1, **momentum, **{name: jnp.int8})
