"""One member of a cohort: how far it is, and the pure functions that take it on."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnkit.types import Array

__all__ = ["Member", "advance", "begin", "history_of", "one_epoch"]


class Member(NamedTuple):
    """A training on its way, a pytree of arrays.

    Attributes:
      carry: what goes from epoch to epoch.
      history: the rows so far in arrays of (epochs,); where there is none yet, NaN or 0.
      had: how many epochs it has had.
    """

    carry: Any
    history: dict[str, Array]
    had: Array


def begin(training: Any, key: Array, hparams: Any, **fold: Any) -> Member:
    """A member before its first epoch.

    Raises:
      TypeError, ValueError: where an epoch does not return the carry that it was given, or rows of scalars.
    """
    carry = training.start(key, hparams, **fold)
    like, row = jax.eval_shape(lambda c: training.epoch(c, hparams, jnp.int32(0)), carry)
    _check_row(row)
    _check_carry(carry, like)
    return Member(jax.tree.map(_typed, carry, like), _room(row, training.epochs), jnp.int32(0))


def one_epoch(training: Any, member: Member, hparams: Any) -> Member:
    """The member after one more epoch."""
    carry, row = training.epoch(member.carry, hparams, member.had)
    history = {name: member.history[name].at[member.had].set(value) for name, value in row.items()}
    return Member(carry, history, member.had + 1)


def advance(training: Any, member: Member, hparams: Any, until: Any) -> Member:
    """The member after ``until`` epochs, or fewer where it ends by itself; ``until`` may be traced.

    One loop with traced bounds is the whole run as well as any part of it, so that what a run gives does
    not depend on where it was held up.
    """

    def due(member: Member) -> Array:
        return (member.had < until) & ~training.ended(member.carry)

    return jax.lax.while_loop(due, lambda member: one_epoch(training, member, hparams), member)


def history_of(member: Member) -> dict[str, Array]:
    """The history as a training function returns it: after the end whole numbers stay as they were."""
    epochs = len(next(iter(member.history.values())))
    last = jnp.minimum(jnp.arange(epochs), jnp.maximum(member.had - 1, 0))

    def filled(rows: Array) -> Array:
        return rows if jnp.issubdtype(rows.dtype, jnp.inexact) else rows[last]

    history = {name: filled(rows) for name, rows in member.history.items()}
    number = jnp.arange(1, epochs + 1, dtype=jnp.int32)
    # Without steps it is by this that one sees in which epochs it was trained.
    return {"epoch": number if "step" in history else jnp.minimum(number, member.had)} | history


def _room(row: dict[str, Any], epochs: int) -> dict[str, Array]:
    def room(value: Any) -> Array:
        nothing = jnp.nan if jnp.issubdtype(value.dtype, jnp.inexact) else 0
        return jnp.full(epochs, nothing, value.dtype)

    return {name: room(value) for name, value in row.items()}


def _typed(x: Any, like: Any) -> Any:
    """``x`` with the dtype that an epoch leaves; a number that was made from Python's may have a weak one."""
    return x if jnp.issubdtype(like.dtype, jax.dtypes.extended) else jnp.asarray(x, like.dtype)


def _check_row(row: Any) -> None:
    if not isinstance(row, dict) or not row:
        raise TypeError(
            f"Training.epoch must return (carry, row) with a dict of scalars as row, got {type(row).__name__}: "
            "return carry, {'loss': loss}"
        )
    for name, value in row.items():
        if value.shape:
            raise ValueError(f"Training.epoch's row has {name!r} of shape {value.shape}: return its mean")


def _check_carry(carry: Any, like: Any) -> None:
    before, after = (jax.tree_util.tree_flatten_with_path(tree) for tree in (carry, like))
    if before[1] != after[1]:
        raise TypeError(
            f"Training.epoch must return the carry in the structure that start gave it: {before[1]} became {after[1]}"
        )
    for (path, x), (_, y) in zip(before[0], after[0], strict=True):
        if jnp.shape(x) != y.shape or jnp.result_type(x) != y.dtype:
            raise TypeError(
                f"Training.epoch must return the carry with the shapes and dtypes that start gave it: "
                f"{jax.tree_util.keystr(path)} was {jnp.result_type(x)}{list(jnp.shape(x))} and became "
                f"{y.dtype}{list(y.shape)}"
            )
