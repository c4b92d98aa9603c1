"""Wrong optimizers, each of which the comparison with optax must catch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from nnkit import optim, tree
from nnkit.optim import scalars
from tests.optim.oracle import check_against_optax, parameters
from tests.optim.rows import ROWS


@functools.cache
def _theirs(row: str) -> Any:
    """One object a row: compiled once, whatever is compared with it."""
    return ROWS[row](optax)


def _shifted(tx: Any, by: int) -> Any:
    """``tx`` with its counts off by so many."""

    def moved(state: Any, amount: int) -> Any:
        return jax.tree.map(lambda x: x + amount if x.dtype == jnp.int32 else x, state)

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        updates, state = tx.update(updates, moved(state, by), params)
        return updates, moved(state, -by)

    return optim.GradientTransformation(tx.init, update)


def _with_init(tx: Any, value: float) -> Any:
    """``tx`` whose averages start at ``value``."""
    return optim.GradientTransformation(
        lambda params: jax.tree.map(lambda x: x + value if x.dtype == jnp.float32 else x, tx.init(params)),
        tx.update,
    )


def _gradients(tx: Any, change: Callable[[Any], Any]) -> Any:
    """``tx`` that sees changed gradients."""
    return optim.GradientTransformation(
        tx.init, lambda u, s, p=None, **_: tx.update(jax.tree.map(change, u), s, p)
    )


def _forgetful(tx: Any) -> Any:
    """AMSGrad whose largest mean square is that of the last step."""

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        emptied = jax.tree.map(jnp.zeros_like, state[0].nu_max)
        return tx.update(updates, (state[0]._replace(nu_max=emptied), *state[1:]), params)

    return optim.GradientTransformation(tx.init, update)


def _exchanged(tx: Any) -> Any:
    """Adadelta that divides by its steps and multiplies by its gradients."""

    def exchange(state: Any) -> Any:
        return (state[0], state[1]._replace(e_g=state[1].e_x, e_x=state[1].e_g), *state[2:])

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        updates, state = tx.update(updates, exchange(state), params)
        return updates, exchange(state)

    return optim.GradientTransformation(tx.init, update)


def _decay(step: Any) -> Any:
    return optim.exponential_decay(0.1, 10, 0.9, transition_begin=3)(step)


MUTANTS: dict[str, tuple[str, Any]] = {
    "no bias correction": ("adam", optim.adam(1e-3, bias_correction=False)),
    "eps inside the root": ("adam", optim.adam(1e-3, eps=0.0, eps_root=1e-8)),
    "no eps": ("adam_arguments", optim.adam(_decay, 0.8, 0.99, 0.0, 1e-6)),
    "eps_root outside": ("adam_arguments", optim.adam(_decay, 0.8, 0.99, 2e-6)),
    "the count one ahead": ("adam", _shifted(optim.adam(1e-3), 1)),
    "the count one behind": ("adam", _shifted(optim.adam(1e-3), -1)),
    "b1 and b2 exchanged": ("adam", optim.adam(1e-3, 0.999, 0.9)),
    "averages not from 0": ("adam", _with_init(optim.adam(1e-3), 1e-3)),
    "the gradient's sign": ("adam", _gradients(optim.adam(1e-3), jnp.negative)),
    "Adam without Nesterov": ("adam_nesterov", optim.adam(1e-3)),
    "Nesterov in plain Adam": ("adam", optim.adam(1e-3, nesterov=True)),
    "no weight decay": ("adamw", optim.adam(1e-3)),
    "coupled weight decay": ("adamw", optim.chain(optim.add_decayed_weights(0.1), optim.adam(1e-3))),
    "weight decay not times the rate": (
        "adamw",
        optim.chain(optim.adam(1e-3), optim.add_decayed_weights(-0.1)),
    ),
    "biases decayed": ("adamw_mask", optim.adamw(1e-3, weight_decay=_decay)),
    "only biases decayed": (
        "adamw_mask",
        optim.adamw(
            1e-3, weight_decay=_decay, mask=lambda p: jax.tree.map(lambda keep: not keep, tree.decayed(p))
        ),
    ),
    "the decay's schedule a step late": (
        "adamw_mask",
        optim.adamw(1e-3, weight_decay=lambda step: _decay(step - 1), mask=tree.decayed),
    ),
    "no extra momentum": ("sgd_nesterov", optim.sgd(_decay, 0.9)),
    "the schedule a step late": ("sgd_nesterov", optim.sgd(lambda step: _decay(step - 1), 0.9, True)),
    "the schedule a step early": ("sgd_nesterov", optim.sgd(lambda step: _decay(step + 1), 0.9, True)),
    "an average for a sum": (
        "sgd_momentum",
        optim.chain(optim.scale(0.1), optim.trace(0.9), optim.scale(-0.1)),
    ),
    "AdaGrad from 0": ("adagrad", optim.adagrad(0.1, 0.0)),
    "AdaGrad with eps outside": ("adagrad_from_0", optim.adagrad(_decay, 0.0, 1e-5, eps_in_sqrt=False)),
    "AdaGrad that forgets": ("adagrad", optim.rmsprop(0.1)),
    "RMSProp with eps outside": ("rmsprop", optim.rmsprop(0.1, eps_in_sqrt=False)),
    "RMSProp with PyTorch's decay": ("rmsprop", optim.rmsprop(0.1, 0.99)),
    "RMSProp biased": ("rmsprop_unbiased", _shifted(optim.rmsprop(0.1, bias_correction=True), 10**6)),
    "centered RMSProp with eps outside": (
        "rmsprop_centered",
        optim.rmsprop(0.1, centered=True, eps_in_sqrt=False),
    ),
    "the momentum without Nesterov": ("rmsprop_nesterov", optim.rmsprop(0.1, momentum=0.9)),
    "NAdam without Nesterov": ("nadam", optim.nadam(1e-3, nesterov=False)),
    "NAdam with the count one ahead": ("nadam", _shifted(optim.nadam(1e-3), 1)),
    "NAdamW without decay": ("nadamw", optim.nadam(_decay)),
    "Adamax as Adam": ("adamax", optim.adam(1e-3)),
    "Adamax without bias correction": ("adamax", _shifted(optim.adamax(1e-3), 10**6)),
    "Adamax with the count one ahead": ("adamax", _shifted(optim.adamax(1e-3), 1)),
    "Adamax with another decay of the maximum": ("adamax", optim.adamax(1e-3, b2=0.9999)),
    "Adamax without eps": ("adamax_arguments", optim.adamax(_decay, 0.8, 0.95, 0.0)),
    "Adamax of squares": ("adamax", _gradients(optim.adamax(1e-3), lambda g: g * jnp.abs(g))),
    "AdamaxW with the decay a step late": (
        "adamaxw",
        optim.adamaxw(1e-3, weight_decay=lambda step: _decay(step - 1)),
    ),
    "AMSGrad that forgets": ("amsgrad", _forgetful(optim.amsgrad(1e-3))),
    "AMSGrad corrected after the maximum": ("amsgrad", optim.amsgrad(1e-3, correct_after_max=True)),
    "AMSGrad of the paper": ("amsgrad", optim.amsgrad(1e-3, bias_correction_nu=False)),
    "AMSGrad with a biased mean": ("amsgrad", optim.amsgrad(1e-3, bias_correction_mu=False)),
    "AMSGrad with eps inside the root": ("amsgrad", optim.amsgrad(1e-3, eps=0.0, eps_root=1e-8)),
    "RAdam never rectified": ("radam", optim.radam(1e-3, threshold=1e9)),
    "RAdam rectified a step late": ("radam", optim.radam(1e-3, threshold=6.0)),
    "RAdam rectified a step early": ("radam", optim.radam(1e-3, threshold=4.0)),
    "RAdam with the count one ahead": ("radam", _shifted(optim.radam(1e-3), 1)),
    "RAdam as Adam": ("radam", optim.adam(1e-3)),
    "RAdam with its bias left in eps": (
        "radam_arguments",
        optim.radam(_decay, 0.8, 0.99, 1e-6, 1e-6, 12.0, bias_correction_eps=True),
    ),
    "RAdam without Nesterov": ("radam_nesterov", optim.radam(1e-3, b2=0.9995)),
    "Lion as signs": ("lion", optim.chain(_gradients(optim.lion(1e-3), jnp.sign))),
    "Lion with b1 and b2 exchanged": ("lion", optim.lion(1e-3, 0.99, 0.9)),
    "Lion without decay": ("lion", optim.lion(1e-3, weight_decay=0.0)),
    "Lion with a hard sign": ("lion_smooth", optim.scale_by_lion()),
    "Lion less steep": ("lion_smooth", optim.scale_by_lion(mode="smooth")),
    "Lion refined by a tanh": ("lion_refined", optim.scale_by_lion(0.8, 0.95, mode="smooth")),
    "Adadelta with the decay outside": (
        "adadelta_arguments",
        optim.chain(optim.scale_by_adadelta(0.95, 1e-3), optim.add_decayed_weights(0.1), optim.sgd(_decay)),
    ),
    "Adadelta with another eps": ("adadelta", optim.adadelta(1.0, eps=1e-7)),
    "Adadelta that climbs": ("adadelta", _gradients(optim.adadelta(1.0), jnp.negative)),
    "Adadelta with its averages exchanged": ("adadelta", _exchanged(optim.adadelta(1.0))),
    "LAMB without the ratio": ("lamb", optim.adam(1e-3, eps=1e-6)),
    "LAMB with Adam's eps": ("lamb", optim.lamb(1e-3, eps=1e-8)),
    "LAMB with the decay after the ratio": (
        "lamb_arguments",
        optim.chain(
            optim.scale_by_adam(0.8, 0.99, 1e-3, 1e-6),
            optim.scale_by_trust_ratio(),
            optim.add_decayed_weights(0.1),
            optim.scale_by_learning_rate(_decay),
        ),
    ),
    "the trust ratio of small norms": (
        "trust_ratio",
        optim.chain(optim.scale_by_adam(), optim.scale_by_trust_ratio(0.0, 0.5, 0.1)),
    ),
    "the trust ratio without eps": (
        "trust_ratio",
        optim.chain(optim.scale_by_adam(), optim.scale_by_trust_ratio(2.0, 0.5)),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str) -> None:
    row, mutant = MUTANTS[name]
    params = parameters(jnp.float32)
    shapes = [[leaf.shape for leaf in jax.tree.leaves(tx.init(params))] for tx in (mutant, ROWS[row](optim))]
    assert shapes[0] == shapes[1], "must be caught by its numbers"
    with pytest.raises(AssertionError):
        check_against_optax(mutant, _theirs(row), jnp.float32, steps=20)


@pytest.mark.parametrize("row", sorted({row for row, _ in MUTANTS.values()}))
def test_the_originals_pass_the_same_check(row: str) -> None:
    check_against_optax(ROWS[row](optim), _theirs(row), jnp.float32, steps=20)


DIVIDERS: dict[str, Any] = {
    # 1/divisor rounded to float32: up to 5 ulp in the end.
    "a rounded reciprocal": lambda d, dtype: lambda x: x * (1 / d),
    # The nearest float and what is missing to it, which may be negative: inf - inf for an overflowed x.
    "a correction of either sign": lambda d, dtype: (
        lambda x: x * (1 / d) + x * jnp.where(d > 0.5, -1e-30, 1e-30)
    ),
    "no division": lambda d, dtype: lambda x: x,
    "the same weight for both": lambda d, dtype: lambda x: x / (d * 1.0001),
}


@pytest.mark.parametrize("name", DIVIDERS)
def test_wrong_divisions_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scalars, "divider", DIVIDERS[name])
    with pytest.raises(AssertionError):
        check_against_optax(optim.adam(1e-3), _theirs("adam"), jnp.float32)
