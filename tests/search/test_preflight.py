"""What is said before anything is trained, word for word where it helps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from nnkit import layers, losses, optim, search, train
from nnkit.search import Engine

LR = {"lr": search.uniform(0, 1)}


def _said(f, space, metric=None):
    with pytest.raises((TypeError, ValueError, KeyError)) as caught:
        Engine(f, space, seeds=[0]).check(metric)
    return str(caught.value)


def test_a_width_that_is_traced():
    def f(key, hparams):
        width = hparams["width"]
        return {"loss": jnp.ones(width).sum() * hparams["lr"]}

    said = _said(f, LR | {"width": search.integer(1, 8, static=False)})
    assert said.startswith("'width' is traced, and train_fn needs its value: ")
    assert "in test_preflight.py, line " in said
    assert 'return {"loss": jnp.ones(width).sum() * hparams["lr"]}' in said
    assert said.endswith(
        "Write width=search.integer(1, 8, static=True) in the space, and a program is compiled for each value"
    )
    assert "'lr'" not in said


def test_a_decision_of_pythons_by_a_traced_number():
    def f(key, hparams):
        return {"loss": hparams["lr"] if hparams["lr"] > 0.5 else 0.0}

    said = _said(f, LR)
    assert "'lr' is traced, and train_fn needs its value: Python decides by it (if, while" in said
    # Of a continuous one hardly two trials would share a program.
    assert "Write lr=search.choice([0.0, 0.5, 1.0]) in the space" in said


def test_a_batch_size_that_is_traced():
    def f(key, hparams):
        trainer = train.trainer(layers.dense(1), losses.mean_squared_error, optim.sgd(0.1))
        data = jnp.ones((8, 2)), jnp.ones((8, 1))
        return train.run(trainer, key, data, epochs=1, batch_size=hparams["batch"])

    said = _said(f, {"batch": search.integer(1, 8, static=False)})
    assert "'batch' is traced, and train_fn needs its value" in said
    assert "batch=search.integer(1, 8, static=True)" in said


def test_each_of_several_is_named():
    def f(key, hparams):
        return {"loss": jnp.ones((hparams["m"], hparams["n"])).sum()}

    whole = search.integer(1, 3, static=False)
    said = _said(f, {"m": whole, "n": whole}).splitlines()
    assert [line.split()[0] for line in said] == ["'m'", "'n'"]


def test_an_error_of_ones_own_is_raised_as_it_is():
    def f(key, hparams):
        raise LookupError("no data here")

    with pytest.raises(LookupError, match="no data here") as caught:
        Engine(f, LR, seeds=[0]).check()
    assert caught.value.__notes__[-1] == "train_fn was traced with {'lr': 0.5}"


@pytest.mark.parametrize(
    ("f", "text"),
    [
        (lambda key, hparams: {"loss": 1.0}, "the space has 'lr', which train_fn does not read: use hparams['lr']"),
        (lambda key, hparams: {"loss": hparams["lr"] * hparams["lrr"]}, "'lrr'"),
        (lambda key, hparams: hparams["lr"], "and no history: return a dict of metrics by name"),
        (lambda key, hparams: None, "returned None and no history"),
        (lambda key, hparams: {"los": hparams["lr"]}, "train_fn's history has no 'loss': "),
        (lambda key, hparams: ({}, {}), "a history without metrics"),
        (lambda key, hparams: {"loss": hparams["lr"] * jnp.ones((2, 2))}, "array of shape (2, 2) for 'loss'"),
        (lambda key, hparams: {"loss": [hparams["lr"]]}, "the history has a list for 'loss'"),
        (lambda key, hparams: {1: hparams["lr"]}, "the name 1: metrics are named by strings"),
        (lambda key, hparams: ("a", {"loss": hparams["lr"]}), "train_fn's result has a str at its root"),
    ],
)  # fmt: skip
def test_what_a_training_function_may_not_do(f, text):
    assert text in _said(f, LR, "loss")


def test_a_hyperparameter_that_one_kind_alone_reads_is_read():
    space = {
        "optimizer": search.conditional(
            {"sgd": {"m": search.uniform(0, 1)}, "adam": {"b": search.uniform(0, 1)}}
        )
    }

    def f(key, hparams):
        o = hparams["optimizer"]
        return {"loss": jnp.asarray(o["m"] if o["kind"] == "sgd" else o["b"])}

    Engine(f, space, seeds=[0]).check("loss")

    def forgetful(key, hparams):
        o = hparams["optimizer"]
        return {"loss": jnp.asarray(o["m"] if o["kind"] == "sgd" else 0.0)}

    assert "the space has 'optimizer/adam/b', which train_fn does not read" in _said(forgetful, space)

    def with_four(key, hparams):  # what is read with another static value is read
        return {"loss": hparams["lr"] * 1.0 if hparams["n"] == 4 else 0.0}

    Engine(with_four, LR | {"n": search.choice([1, 2, 4])}, seeds=[0]).check()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"seeds": 3}, r"seeds must be a list of whole numbers, got 3: write seeds=range\(3\)"),
        ({"seeds": [0.5]}, "seeds must be whole numbers, got 0.5"),
        ({"seeds": [True]}, "seeds must be whole numbers, got True"),
        ({"seeds": [-1]}, r"seeds must be from 0 to 2\*\*32 - 1, got -1"),
        ({"seeds": [2**32]}, "got 4294967296"),
        ({"seeds": [1, 1]}, "seeds has 1 twice"),
        ({"seeds": []}, "seeds is empty"),
        ({"members": "vmap"}, "unknown members 'vmap'"),
        ({"members": "mapped", "workers": 2}, "workers=2 are threads, and mapped members run side by side"),
        (
            {"devices": "cpu"},
            r"devices must be a list of devices of JAX, got 'cpu': write jax.devices\(\)\[:1\]",
        ),
        ({"devices": [0]}, "devices must be devices of JAX, got 0"),
        ({"devices": jax.devices() * 2}, "devices has one twice"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_meant(options, text):
    with pytest.raises((ValueError, TypeError), match=text):
        Engine(lambda key, hparams: {"loss": hparams["lr"]}, LR, **{"seeds": [0], **options})


def test_what_was_chosen_is_said():
    def choice(**options):
        return Engine(lambda key, hparams: {"loss": hparams["lr"]}, LR, seeds=[0], **options).choice

    assert choice(workers=2).startswith(
        "exact (a default for CPUs, where small products are slower side by side): 2 "
    )
    assert choice(workers=1, members="exact").startswith(
        "exact (as asked): 1 thread calls a compiled training"
    )
    assert choice(members="mapped").startswith(
        "mapped (as asked): members side by side by vmap on 1 cpu device"
    )
