"""Predictions for any number of inputs, by one compiled program of one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from nnkit.train.preflight import checked_batch_size, number_of_examples
from nnkit.train.uncertainty import Outputs, Uncertain, check_sampling, sample
from nnkit.types import Array, Layer, Params, PyTree, State

__all__ = ["predict"]

_Program = Callable[[PyTree, Any], PyTree]
"""``program(batch, number_of_the_batch) -> outputs``, rows first."""


@overload
def predict(
    model: Layer,
    params: Params,
    state: State,
    x: Any,
    *,
    batch_size: int = 1000,
    samples: None = None,
    key: None = None,
    outputs: Outputs = "logits",
    samples_at_once: int = 1,
) -> Any: ...


@overload
def predict(
    model: Layer,
    params: Params,
    state: State,
    x: Any,
    *,
    batch_size: int = 1000,
    samples: int,
    key: Array,
    outputs: Outputs = "logits",
    samples_at_once: int = 1,
) -> Uncertain: ...


def predict(
    model: Layer,
    params: Params,
    state: State,
    x: Any,
    *,
    batch_size: int = 1000,
    samples: int | None = None,
    key: Array | None = None,
    outputs: Outputs = "logits",
    samples_at_once: int = 1,
) -> Any:
    """``model.apply(..., train=False)`` on any number of inputs, or the mean and spread of dropout's samples.

    One program for ``batch_size`` rows is compiled and serves any number of inputs: a batch that is not full
    is filled up with copies of its last row, whose outputs are left out. So an input's prediction
    has the same bits however many come after it, and two inputs cost as much as ``batch_size``: pass a
    small one where a few inputs meet a large network. Layers must treat each example by itself, as they do
    at test time, and each output must have one row for each example; one with as many rows by chance, a table
    of ``batch_size`` rows, is not told apart.

    Where x is on the device, XLA compiles two small programs, which cut the batches out and join the outputs,
    for each new length of x; the network is not compiled again. Arrays of numpy need no such programs.

    With ``samples`` (Monte-Carlo dropout, Gal & Ghahramani 2016) dropout draws as in training and everything
    else is as at test time; see :class:`Uncertain` for what is returned. Sample s of batch b draws from
    ``fold_in(fold_in(key, b), s)``: the same key and batch size give the same numbers, to rounding for any
    ``samples_at_once``, and more samples begin with the same ones.

    Args:
      model: the network.
      params: its parameters; the layers' state is ``state``, and neither changes.
      state: see above.
      x: a pytree of arrays with one leading axis, as the model takes it. Arrays of numpy, memory-mapped ones
        too, go to the device batch by batch and at most two batches are there at a time; arrays of JAX stay
        where they are.
      batch_size: examples at a time.
      samples: how many to draw, at least 2; None for the plain prediction.
      key: where the samples come from; only with ``samples``.
      outputs: what the model gives, of which ``samples`` makes a mean: "logits" (softmax is taken of
        them over the last axis), "probabilities", which are taken as they are, or "values" of a regression.
      samples_at_once: how many samples of a batch are computed together, memory in exchange for speed: worth it
        for small batches.

    Returns:
      The model's output for all rows of x, or an :class:`Uncertain`. Arrays of numpy where x has numpy's, of
      JAX where all of x is on the device.

    Raises:
      ValueError, TypeError: for x without one leading axis, sizes below 1, ``samples`` without ``key`` or for a
        model that draws nothing, "logits" of one class, an output that has not one row for each example.

    >>> model = layers.serial(layers.dense(8), layers.dropout(0.5), layers.dense(3))
    >>> params, state = model.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> x = np.ones((7, 2), "f")
    >>> train.predict(model, params, state, x, batch_size=3).shape
    (7, 3)
    >>> sure = train.predict(model, params, state, x, batch_size=3, samples=10, key=jax.random.key(1))
    >>> sure.mean.shape, sure.spread.shape, sure.entropy.shape, sure.mutual_information.shape
    ((7, 3), (7, 3), (7,), (7,))
    """
    n = number_of_examples(x)
    at_most_n = checked_batch_size(batch_size, n)
    batch_size = int(batch_size)
    check_sampling(samples, key, outputs, samples_at_once)
    # Once, and not with each batch, where they come from the host.
    params, state = jax.tree.map(jnp.asarray, (params, state))
    if samples is None:
        program: _Program = lambda rows, _: _by_row(_plain(model, params, state, rows), rows)
    else:
        number = jnp.int32(samples)
        drawn = partial(sample, at_once=samples_at_once, outputs=outputs)
        program = lambda rows, i: _by_row(drawn(model, params, state, rows, key, i, number), rows)
    leaves = jax.tree.leaves(x)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((params, state, x, key, samples))):
        return _traced(program, jax.tree.map(jnp.asarray, x), n, at_most_n)
    if all(isinstance(leaf, jax.Array) for leaf in leaves):
        return _on_device(program, x, n, batch_size)
    return _from_host(program, x, n, batch_size)


@partial(jax.jit, static_argnames="model")
def _plain(model: Layer, params: Params, state: State, x: Any) -> Any:
    return model.apply(params, state, x, train=False)[0]


def _by_row(y: PyTree, rows: PyTree) -> PyTree:
    """The outputs of a batch, of which each must have a row for each of its rows."""
    count = number_of_examples(rows)
    for path, leaf in jax.tree_util.tree_leaves_with_path(y):
        if leaf.shape[:1] != (count,):
            raise ValueError(
                f"predict: the output{jax.tree_util.keystr(path)} has shape {leaf.shape} for a batch of {count} "
                f"examples, and must have one row for each, ({count}, ...): return the examples' own outputs from "
                "the model, and take means or add tables after predict"
            )
    return y


def _traced(program: _Program, x: PyTree, n: int, batch_size: int) -> PyTree:
    """Within a function that is being transformed: all batches in one loop."""

    def one(i: Array) -> PyTree:
        return program(_rows(x, i * batch_size, batch_size), i)

    y = jax.lax.map(one, jnp.arange(-(-n // batch_size), dtype=jnp.int32))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], y)


def _on_device(program: _Program, x: PyTree, n: int, batch_size: int) -> PyTree:
    pieces: list[PyTree] = []
    for i, start in enumerate(range(0, n, batch_size)):
        pieces.append(program(_rows(x, start, batch_size), np.int32(i)))
        # Batches are cut out of x as they are needed: run ahead, and all of them lie there a second time.
        jax.block_until_ready(pieces[-2:-1])
    return _joined(pieces, n)


_rows_of = jax.jit(
    lambda x, start, count: jax.tree.map(
        lambda a: jnp.take(a, jnp.minimum(start + jnp.arange(count), a.shape[0] - 1), axis=0), x
    ),
    static_argnums=2,
)


def _rows(x: PyTree, start: Any, count: int) -> PyTree:
    """So many rows of arrays on the device; the last one again where they end."""
    return _rows_of(x, start, count)


def _joined(pieces: list[PyTree], n: int) -> PyTree:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[:n], *pieces)


def _from_host(program: _Program, x: PyTree, n: int, batch_size: int) -> PyTree:
    whole: PyTree = None
    for start, y in _one_behind(program, x, n, batch_size):
        if whole is None:
            whole = jax.tree.map(lambda a: np.empty((n, *a.shape[1:]), a.dtype), y)
        jax.tree.map(partial(_write, start), whole, y)
    return whole


def _one_behind(program: _Program, x: PyTree, n: int, batch_size: int) -> Iterator[tuple[int, PyTree]]:
    """Each batch's outputs when the next one is on its way, so that the device does not wait for the host."""
    before: tuple[int, PyTree] | None = None
    for i, start in enumerate(range(0, n, batch_size)):
        y = program(jax.tree.map(partial(_read, start, batch_size), x), np.int32(i))
        if before is not None:
            yield before
        before = start, y
    assert before is not None
    yield before


def _read(start: int, count: int, a: Any) -> np.ndarray:
    """So many rows of a host array, the last one again where they end; only these are read."""
    rows = np.asarray(a[start : start + count])
    missing = count - len(rows)
    return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing else rows


def _write(start: int, to: np.ndarray, rows: Array) -> None:
    to[start : start + len(rows)] = np.asarray(rows)[: len(to) - start]
