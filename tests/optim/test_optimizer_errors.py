"""Bad input: each error, by its text."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from nnkit import optim

PARAMS = {"dense_0": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
ALL = {
    "sgd": optim.sgd,
    "momentum": optim.momentum,
    "nesterov": optim.nesterov,
    "adagrad": optim.adagrad,
    "rmsprop": optim.rmsprop,
    "adam": optim.adam,
    "adamw": optim.adamw,
    "nadam": optim.nadam,
    "nadamw": optim.nadamw,
    "nadam_of_pytorch": lambda rate: optim.nadam(rate, momentum_decay=4e-3),
    "adamax": optim.adamax,
    "adamaxw": optim.adamaxw,
    "amsgrad": optim.amsgrad,
    "radam": optim.radam,
    "lion": optim.lion,
    "adadelta": optim.adadelta,
    "lamb": optim.lamb,
    "muon": optim.muon,
}


def raises(kind: type[Exception], text: str) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(text)}$")


INTEGERS = "only floating-point parameters can be optimized, keep the rest out of the parameter tree"


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("sgd", "scale"),
        ("momentum", "scale"),
        ("nesterov", "scale"),
        ("adagrad", "scale_by_rss"),
        ("rmsprop", "scale_by_rms"),
        ("adam", "scale_by_adam"),
        ("adamw", "scale_by_adam"),
        ("nadam", "scale_by_adam"),
        ("nadam_of_pytorch", "scale_by_nadam"),
        ("adamax", "scale_by_adamax"),
        ("amsgrad", "scale_by_amsgrad"),
        ("radam", "scale_by_radam"),
        ("lion", "scale_by_lion"),
        ("adadelta", "add_decayed_weights"),
        ("lamb", "scale_by_adam"),
        ("muon", "scale_by_adam"),
    ],
)
def test_integer_parameters(name: str, where: str) -> None:
    params = {"w": jnp.ones(3), "block": {"steps": jnp.zeros(3, jnp.int32)}}
    with raises(TypeError, f"{where}: params has dtype int32 at block/steps: {INTEGERS}"):
        ALL[name](0.1).init(params)


@pytest.mark.parametrize(
    "part",
    [
        optim.trace(0.9),
        optim.scale_by_stddev(),
        optim.add_decayed_weights(0.1),
        optim.scale_by_adadelta(),
        optim.scale_by_trust_ratio(),
        optim.scale_by_muon(),
        optim.scale_by_shape(),
        optim.scale_by_schedule(optim.constant_schedule(0.1)),
    ],
)
def test_integer_parameters_of_the_parts(part: Any) -> None:
    with pytest.raises(TypeError, match=r"params has dtype int32 at the root: only floating-point"):
        part.init(jnp.zeros(3, jnp.int32))


def test_other_things_in_the_parameters() -> None:
    with pytest.raises(TypeError, match="params has a value of type str at name: only floating-point"):
        optim.adam(0.1).init({"name": "mlp"})
    with pytest.raises(TypeError, match="params has dtype key<fry> at key: only floating-point"):
        optim.adam(0.1).init({"key": jax.random.key(0)})


def test_gradients_of_integers() -> None:
    params = {"w": jnp.ones(3), "n": jnp.ones(3, jnp.int32)}
    grads = jax.grad(lambda p: (p["w"] * p["n"].astype(p["w"].dtype)).sum(), allow_int=True)(params)
    tx = optim.sgd(0.1)
    with raises(TypeError, f"scale: updates has dtype float0 (the gradient of an integer) at n: {INTEGERS}"):
        tx.update(grads, tx.init({"w": params["w"]}))
    with raises(TypeError, f"apply_updates: params has dtype int32 at n: {INTEGERS}"):
        optim.apply_updates(params, {"w": jnp.ones(3), "n": jnp.ones(3)})
    kept = optim.apply_updates(params, {"w": jnp.ones(3), "n": None})
    assert kept["n"].dtype == jnp.int32


FORM = "gradients, optimizer state and parameters must be trees of one form"


def _without(path: str) -> Any:
    return {"dense_0": {k: v for k, v in PARAMS["dense_0"].items() if k != path}}


@pytest.mark.parametrize(
    "name",
    [
        *("momentum", "adagrad", "rmsprop", "adam"),
        *("nadam_of_pytorch", "adamax", "amsgrad", "radam", "lion", "scale_by_adadelta"),
    ],
)
def test_gradients_of_another_form_than_the_state(name: str) -> None:
    """For each, the tree of its state is named."""
    tree, where = {
        "momentum": ("trace", "trace"),
        "adagrad": ("sum_of_squares", "scale_by_rss"),
        "rmsprop": ("nu", "scale_by_rms"),
        "adam": ("mu", "scale_by_adam"),
        "nadam_of_pytorch": ("mu", "scale_by_nadam"),
        "adamax": ("mu", "scale_by_adamax"),
        "amsgrad": ("mu", "scale_by_amsgrad"),
        "radam": ("mu", "scale_by_radam"),
        "lion": ("mu", "scale_by_lion"),
        "scale_by_adadelta": ("e_g", "scale_by_adadelta"),
    }[name]
    tx = optim.scale_by_adadelta() if name == "scale_by_adadelta" else ALL[name](0.1)
    with raises(ValueError, f"{where}: {tree} has dense_0/bias, which updates has not; {FORM}"):
        tx.update(_without("bias"), tx.init(PARAMS), PARAMS)
    with raises(ValueError, f"{where}: updates has dense_0/bias, which {tree} has not; {FORM}"):
        tx.update(PARAMS, tx.init(_without("bias")), PARAMS)
    grads = {"dense_0": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(4)}}
    text = f"{where}: updates has shape (4, 3) at dense_0/kernel, {tree} has shape (3, 4); {FORM}"
    with raises(ValueError, text):
        tx.update(grads, tx.init(PARAMS), PARAMS)


def test_shapes_that_would_broadcast() -> None:
    tx = optim.adam(0.1)
    text = f"scale_by_adam: updates has shape (1,) at the root, mu has shape (3,); {FORM}"
    with raises(ValueError, text):
        tx.update(jnp.ones(1), tx.init(jnp.ones(3)))
    with raises(
        ValueError, f"apply_updates: updates has shape (1,) at the root, params has shape (3,); {FORM}"
    ):
        optim.apply_updates(jnp.ones(3), jnp.ones(1))


def test_parameters_of_another_form() -> None:
    with raises(ValueError, f"apply_updates: params has dense_0/bias, which updates has not; {FORM}"):
        optim.apply_updates(PARAMS, _without("bias"))
    tx = optim.adamw(0.1)
    with raises(ValueError, f"add_decayed_weights: updates has dense_0/bias, which params has not; {FORM}"):
        tx.update(PARAMS, tx.init(PARAMS), _without("bias"))
    with pytest.raises(ValueError, match="hold the same paths in different containers") as error:
        optim.apply_updates({"0": jnp.ones(3)}, [jnp.ones(3)])
    assert "{'0': *}" in str(error.value)
    assert "[*]" in str(error.value)


def test_a_gradient_where_the_state_has_none() -> None:
    tx = optim.adam(0.1)
    text = f"scale_by_adam: updates has shape (3,) at b, mu has None; {FORM}"
    with raises(ValueError, text):
        tx.update({"a": jnp.ones(3), "b": jnp.ones(3)}, tx.init({"a": jnp.ones(3), "b": None}))


def test_weight_decay_without_parameters() -> None:
    text = "add_decayed_weights needs the parameters: call update(grads, opt_state, params) with params"
    for tx in (
        optim.adamw(0.1),
        optim.chain(optim.add_decayed_weights(0.1), optim.sgd(0.1)),
        *(make(0.1) for make in (optim.nadamw, optim.adamaxw, optim.lion, optim.adadelta, optim.lamb)),
    ):
        with raises(ValueError, text):
            tx.update(PARAMS, tx.init(PARAMS))


def test_the_trust_ratio_of_other_trees() -> None:
    tx = optim.scale_by_trust_ratio()
    text = "scale_by_trust_ratio needs the parameters: call update(grads, opt_state, params) with params"
    with raises(ValueError, text):
        tx.update(PARAMS, tx.init(PARAMS))
    text = f"scale_by_trust_ratio: params has dense_0/bias, which updates has not; {FORM}"
    with raises(ValueError, text):
        tx.update(_without("bias"), tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"updates has shape \(3, 4\) at kernel, params has shape \(4, 3\)"):
        tx.update({"kernel": jnp.ones((3, 4))}, tx.init(PARAMS), {"kernel": jnp.ones((4, 3))})


def test_masks_of_another_form() -> None:
    text = "the mask must be a tree of bools like the parameters or a prefix of them, got PyTreeDef"
    for mask in ({"dense_1": True}, {"dense_0": {"kernel": True}}, lambda p: [True]):
        tx = optim.add_decayed_weights(0.1, mask)
        with pytest.raises(ValueError, match=text):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    tx = optim.add_decayed_weights(0.1, {"dense_0": {"kernel": 1.0, "bias": 0.0}})
    with raises(TypeError, "add_decayed_weights: a mask must hold True and False, got float"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (None, TypeError, "a schedule must return a number, this one returned None"),
        ("0.1", TypeError, "a schedule must return a number, this one returned '0.1'"),
        (True, TypeError, "a schedule must return a number, this one returned True"),
        (jnp.ones(2), ValueError, "a schedule must return one number, this one returned shape (2,)"),
    ],
)
def test_schedules_that_return_no_number(value: Any, kind: Any, text: str) -> None:
    def schedule(step: Any) -> Any:
        return value

    for tx in (optim.scale_by_schedule(schedule), optim.sgd(schedule), optim.add_decayed_weights(schedule)):
        with raises(kind, text):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_a_number_for_a_schedule() -> None:
    with raises(TypeError, "step_size_fn must be a function of the step, got 0.1: scale takes numbers"):
        optim.scale_by_schedule(0.1)  # pyright: ignore[reportArgumentType]


def test_chains_of_other_things() -> None:
    text = (
        "chain: member 1 must have init and update, got float: pass transformations one by one, "
        "chain(scale_by_adam(), scale(-0.1))"
    )
    with raises(TypeError, text):
        optim.chain(optim.scale_by_adam(), 0.1)  # pyright: ignore[reportArgumentType]


def test_states_of_other_optimizers() -> None:
    tx = optim.adam(0.1)
    advice = "pass what its own init or update returned"
    with raises(ValueError, f"chain has 2 members and got 3 states: {advice}"):
        tx.update(PARAMS, optim.adamw(0.1).init(PARAMS), PARAMS)
    with raises(ValueError, f"chain has 2 members and got dict: {advice}"):
        tx.update(PARAMS, PARAMS, PARAMS)
    text = (
        "scale_by_adam got the state of another transformation: ScaleByRssState in place of "
        "ScaleByAdamState(count, mu, nu); pass what this optimizer's own init or update returned"
    )
    with raises(TypeError, text):
        tx.update(PARAMS, optim.adagrad(0.1).init(PARAMS), PARAMS)
    for name in ("momentum", "adagrad", "rmsprop"):
        other = ALL[name](0.1)
        n = len(other.init(PARAMS))
        state = (optim.adam(0.1).init(PARAMS)[0],) * n
        with pytest.raises(TypeError, match="got the state of another transformation: ScaleByAdamState"):
            other.update(PARAMS, state, PARAMS)


def test_look_ahead_without_a_velocity() -> None:
    text = "look_ahead needs a state with one velocity and got one with {}: pass the state of momentum or nesterov"
    with raises(ValueError, text.format(0)):
        optim.look_ahead(PARAMS, optim.adam(0.1).init(PARAMS), 0.9)
    two = optim.chain(optim.trace(0.9), optim.trace(0.9))
    with raises(ValueError, text.format(2)):
        optim.look_ahead(PARAMS, two.init(PARAMS), 0.9)


def test_errors_come_while_tracing() -> None:
    tx = optim.adam(0.1)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="dense_0/bias, which updates has not"):
        jax.eval_shape(tx.update, _without("bias"), state, PARAMS)
