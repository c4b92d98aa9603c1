"""The first inf or NaN of a run is found at exactly its step, layer and rows, and said to be there."""

from __future__ import annotations

import importlib
import pickle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import layers, losses, optim, train
from nnkit.layers.children import visiting
from nnkit.train import guard
from nnkit.train.explain import Report, Statistics
from nnkit.train.feed import Chunk, Resident
from nnkit.types import Layer

KEY = jax.random.key(0)
N, WIDTH = 6, 6  # as many rows as features, so that axes cannot be told apart by their lengths
X = np.asarray(jax.random.normal(jax.random.key(1), (N, WIDTH)))
Y = np.zeros((N, WIDTH), np.float32)
dense, serial, stateless, named = layers.dense, layers.serial, layers.stateless, layers.named


def _trainer(model, optimizer=None, loss=losses.mean_squared_error, **options):
    return train.trainer(model, loss, optimizer or optim.sgd(0.1), **options)


def _explained(trainer, x=X, y=Y, change=lambda ts: ts, **options):
    ts = change(trainer.init(KEY, jax.ShapeDtypeStruct((1, *np.shape(x)[1:]), jnp.result_type(x))))
    return train.explain(trainer, ts, (x, y), **options)


def _with(x, rows, value):
    return np.asarray(jnp.asarray(x).at[np.asarray(rows)].set(value))


log = stateless(jnp.log, name="log_")
root = stateless(lambda x: jnp.sqrt(jnp.abs(x)), name="root_")
standard = stateless(lambda x: (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True), name="standard_")


class Case(NamedTuple):
    """A model, a batch, and what is to be said of them."""

    model: Layer
    kind: str
    path: str
    operation: str | None = None
    rows: tuple[int, ...] | None = None
    x: Any = X
    y: Any = Y
    change: Any = None
    turns: tuple[int, ...] = ()

    def start(self):
        ts = _trainer(self.model).init(KEY, X[:1])
        return ts if self.change is None else self.change(ts)


def _wired(net, x):
    h = net.stem(x)
    return net.head(h) + net.body(net.body(h))


ZEROS = _with(np.abs(X) + 0.5, [1, 4], 0.0)  # two rows of zeros
HUGE = _with(X, [2, 5], 1e20)
SAME = _with(X, [0, 3], 2.0)  # rows without spread
linear = dense(WIDTH, use_bias=False)  # zeros stay zeros
out = dense(WIDTH)


def half(*children):
    return layers.policy(named("half", serial(*children)), compute_dtype=jnp.float16)


def _logs(model, path):
    return Case(model, "forward", path, "log", (1, 4), ZEROS)


def _roots(model, path, **more):
    return Case(model, "gradient", path, "div", (1, 4), ZEROS, **more)


def _set(names, value):
    """The change of a state that makes a kernel 0.5, and one number of it ``value``."""

    def change(path, leaf):
        if [k.key for k in path] == [*names.split("/"), "kernel"]:
            return jnp.full_like(leaf, 0.5).at[..., 0, 1].set(value)
        return leaf

    return lambda ts: ts._replace(params=jax.tree_util.tree_map_with_path(change, ts.params))


CASES = {
    "nan in the data": Case(out, "batch", "batch/0", None, (2, 5), _with(X, [2, 5], np.nan)),
    "inf in the targets": Case(out, "batch", "batch/1", None, (1,), y=_with(Y, [1], np.inf)),
    "a NaN parameter": Case(
        serial(out, out), "params", "dense_1/kernel", change=_set("dense_1", np.nan)
    ),
    "log in serial": _logs(serial(log, out), "log_0"),
    "the first of three": _logs(serial(log, serial(log, named("b", log)), out), "log_0"),
    "log deep in serial": _logs(serial(named("a", serial(layers.relu, named("b", serial(log))))), "a/b/log_0"),
    "log in wire": _logs(layers.wire(_wired, stem=layers.identity, body=log, head=out), "body"),
    "log in residual": _logs(layers.residual(serial(layers.relu, log)), "body/log_0"),
    "log in remat": _logs(serial(layers.remat(named("r", serial(layers.relu, log)))), "r/log_0"),
    "log in frozen": _logs(serial(layers.frozen(named("r", serial(log))), out), "r/log_0"),
    "log in repeat": _logs(layers.repeat(log, 3), "block")._replace(turns=(0,)),
    "std of 0": Case(serial(standard, out), "forward", "standard_0", "div", (0, 3), SAME),
    "overflow of a square": Case(
        serial(out, named("square", stateless(jnp.square))), "forward", "square", "square", (2, 5), HUGE
    ),
    "overflow in a dense layer": Case(
        serial(out, named("head", out)), "forward", "head", "dot_general", (5,), change=_set("head", 2e38)
    ),
    "overflow in float16": Case(
        serial(half(out, named("wide", dense(4))), out),
        "forward",
        "half/wide",
        "convert_element_type",
        (3, 4, 5),
        change=_set("half/wide", 5e4),
    ),
    "a parameter too large for float16": Case(
        serial(half(out)), "forward", "half/dense_0", "convert_element_type", change=_set("half/dense_0", 1e6)
    ),
    "a row too large for float16": Case(
        serial(half(out)), "forward", "half", "convert_element_type", (2, 5), HUGE
    ),
    "no gradient of sqrt at 0 is asked for": Case(serial(root, out), "finite", "", x=ZEROS),
    "the gradient of sqrt at 0": _roots(serial(linear, root, out), "root_0"),
    "the gradient in remat": _roots(serial(linear, layers.remat(named("r", serial(root))), out), "r/root_0"),
    "the first of two backwards": _roots(serial(linear, root, root, out), "root_1"),
    "the gradient in repeat": _roots(layers.repeat(serial(linear, root), 3), "block/root_0", turns=(2,)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_first_non_finite_number_is_found(name):
    case = CASES[name]
    report = train.explain(_trainer(case.model), case.start(), (case.x, case.y))
    assert (report.kind, report.path, report.rows) == (case.kind, case.path, case.rows)
    assert report.operation == (case.operation or "")
    assert tuple(turn.number for turn in report.turns) == case.turns


@pytest.mark.parametrize(
    "name", [n for n, case in CASES.items() if case.kind == "forward" and "too large" not in n]
)
def test_it_is_the_first_layer_that_an_observer_sees_give_what_is_not_finite(name):
    case = CASES[name]
    ts, bad = case.start(), []

    def visit(call):
        rows = np.unique(np.nonzero(~np.isfinite(call.y))[0])
        if len(rows):
            bad.append((call.path, tuple(rows)))

    with visiting(visit):
        case.model.apply(ts.params, ts.state, jnp.asarray(case.x), train=True)
    assert bad[0] == (case.path, case.rows)
