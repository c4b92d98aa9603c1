"""Bad input to the relatives of Adam: each error, by its text."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest

from nnkit import optim
from tests.optim.test_optimizer_errors import ALL, PARAMS, raises

AVERAGE = "it is the decay of an average"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: optim.nadam(0.1, b1=1.0), f"b1 must be in [0, 1), got 1.0: {AVERAGE}"),
        (lambda: optim.nadam(0.1, momentum_decay=-1.0), "momentum_decay must be in [0, inf), got -1.0"),
        (
            lambda: optim.nadam(0.1, nesterov=False, momentum_decay=4e-3),
            "momentum_decay needs nesterov=True: it is the schedule of Nesterov's momentum",
        ),
        (lambda: optim.nadamw(0.1, weight_decay=-1.0), "weight_decay must be in [0, inf), got -1.0"),
        (lambda: optim.adamax(0.1, b2=1.0), f"b2 must be in [0, 1), got 1.0: {AVERAGE}"),
        (lambda: optim.adamax(0.1, eps=-1.0), "eps must be in [0, inf), got -1.0"),
        (lambda: optim.adamaxw(0.1, weight_decay=-1.0), "weight_decay must be in [0, inf), got -1.0"),
        (lambda: optim.amsgrad(0.1, b2=1.5), f"b2 must be in [0, 1), got 1.5: {AVERAGE}"),
        (lambda: optim.amsgrad(0.1, eps_root=-1.0), "eps_root must be in [0, inf), got -1.0"),
        (
            lambda: optim.amsgrad(0.1, bias_correction_nu=False, correct_after_max=True),
            "correct_after_max needs bias_correction_nu=True: it says when nu is corrected",
        ),
        (lambda: optim.radam(0.1, b1=-0.1), f"b1 must be in [0, 1), got -0.1: {AVERAGE}"),
        (
            lambda: optim.radam(0.1, threshold=3.0),
            "threshold must be in [4, inf), got 3.0: beneath, the rectification is the root of a negative number",
        ),
        (lambda: optim.lion(0.1, b2=1.0), f"b2 must be in [0, 1), got 1.0: {AVERAGE}"),
        (lambda: optim.lion(0.1, weight_decay=-1.0), "weight_decay must be in [0, inf), got -1.0"),
        (lambda: optim.scale_by_lion(smooth_beta=-1.0), "smooth_beta must be in [0, inf), got -1.0"),
        (
            lambda: optim.scale_by_lion(mode="soft"),  # pyright: ignore[reportArgumentType]
            "mode must be 'hard', 'smooth' or 'refined', got 'soft'",
        ),
        (lambda: optim.adadelta(0.1, rho=1.0), f"rho must be in [0, 1), got 1.0: {AVERAGE}"),
        (lambda: optim.adadelta(0.1, eps=-1.0), "eps must be in [0, inf), got -1.0"),
        (lambda: optim.adadelta(0.1, weight_decay=-1.0), "weight_decay must be in [0, inf), got -1.0"),
        (lambda: optim.lamb(0.1, eps=-1.0), "eps must be in [0, inf), got -1.0"),
        (lambda: optim.lamb(0.1, weight_decay=-1.0), "weight_decay must be in [0, inf), got -1.0"),
        (lambda: optim.scale_by_trust_ratio(-1.0), "min_norm must be in [0, inf), got -1.0"),
        (
            lambda: optim.scale_by_trust_ratio(trust_coefficient=-1.0),
            "trust_coefficient must be in [0, inf), got -1.0",
        ),
        (lambda: optim.scale_by_trust_ratio(eps=-1.0), "eps must be in [0, inf), got -1.0"),
    ],
)
def test_numbers_of_the_relatives_of_adam(make: Any, text: str) -> None:
    with raises(ValueError, text):
        make()


@pytest.mark.parametrize("name", sorted(ALL.keys() - {"sgd", "momentum", "nesterov", "adagrad", "rmsprop"}))
def test_learning_rates_of_the_relatives_of_adam(name: str) -> None:
    text = "learning_rate must be in [0, inf), got -0.1: the sign of the step is already the optimizer's"
    with raises(ValueError, text):
        ALL[name](-0.1)
    with pytest.raises(TypeError, match=r"^learning_rate must be a number or a scalar array, got '0.1'"):
        ALL[name]("0.1")


@pytest.mark.parametrize(
    "make",
    [
        *(optim.adam, optim.adamw, optim.nadam, optim.nadamw, optim.adamax, optim.adamaxw),
        *(optim.amsgrad, optim.radam, optim.lamb),
        lambda rate, nu_dtype: optim.nadam(rate, momentum_decay=4e-3, nu_dtype=nu_dtype),
    ],
)
def test_second_moments_that_are_not_floating(make: Any) -> None:
    with raises(TypeError, "nu_dtype must be a floating-point dtype, got int8"):
        make(0.1, nu_dtype=jnp.int8)


@pytest.mark.parametrize("make", [optim.nadam, optim.nadamw, optim.amsgrad, optim.lion, optim.muon])
def test_first_moments_that_are_not_floating(make: Any) -> None:
    with raises(TypeError, "mu_dtype must be a floating-point dtype, got int8"):
        make(0.1, mu_dtype=jnp.int8)


def test_states_of_the_relatives_of_adam() -> None:
    for name in ("nadam_of_pytorch", "amsgrad", "lion"):
        other = ALL[name](0.1)
        state = (optim.adam(0.1).init(PARAMS)[0],) * len(other.init(PARAMS))
        with pytest.raises(TypeError, match="got the state of another transformation: ScaleByAdamState"):
            other.update(PARAMS, state, PARAMS)
    for tx in (
        optim.scale_by_adamax(),
        optim.scale_by_radam(),
        optim.scale_by_adadelta(),
        optim.scale_by_muon(),
    ):
        with pytest.raises(TypeError, match="got the state of another transformation: EmptyState"):
            tx.update(PARAMS, optim.EmptyState(), PARAMS)
