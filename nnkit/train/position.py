"""Where a run stands, and whether another process may go on from there."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from nnkit.types import PyTree, TrainState

__all__ = ["Position", "check_program", "check_settings", "data_digest", "program_digest"]


class Position(NamedTuple):
    """Where a run stands: with its trainer and its data, all that is needed to go on.

    Attributes:
      ts: the state, what early stopping remembers included.
      sums: of the metrics in the epoch that is not complete, as ``Means`` keeps them.
      rows: the history.
      rate_scale: by what updates are multiplied since roll-backs; None before the first.
      rollbacks: how often the run was rolled back.
    """

    ts: TrainState
    sums: dict[str, float]
    rows: list[dict[str, Any]]
    rate_scale: float | None = None
    rollbacks: int = 0

    def record(self) -> dict[str, Any]:
        """All but the state, in JSON's types."""
        return {name: value for name, value in self._asdict().items() if name != "ts"}

    @classmethod
    def restored(cls, ts: TrainState, record: Mapping[str, Any]) -> Position:
        """The inverse of :meth:`record`."""
        return cls(ts, **{name: record[name] for name in cls._fields if name != "ts"})


_WHOLE = 2**28
"""Arrays of so many bytes at most are digested whole, larger ones by some of their rows."""
_ROWS = 1024


def data_digest(arrays: PyTree) -> str:
    """A short digest of examples: shapes, dtypes and numbers.

    Of an array of more than 256 MiB 1,024 rows stand for the rest, evenly spread.

    >>> data_digest(np.arange(3)) == data_digest(np.arange(3)), data_digest(np.zeros(3))
    (True, '...')
    """
    digest = hashlib.sha256(str(jax.tree.structure(arrays)).encode())
    for leaf in jax.tree.leaves(arrays):
        digest.update(f"{leaf.shape} {np.dtype(leaf.dtype).name}".encode())
        rows = leaf
        if leaf.size * leaf.dtype.itemsize > _WHOLE:
            rows = leaf[np.linspace(0, len(leaf) - 1, _ROWS).astype(np.int64)]
        for part in _parts(rows):
            digest.update(zlib.crc32(part).to_bytes(4, "little"))
    return digest.hexdigest()[:16]


def _parts(rows: Any) -> Iterator[memoryview]:
    """The bytes in pieces, so that an array that is not contiguous is not copied whole."""
    step = max(1, 2**24 // max(1, rows[:1].size * rows.dtype.itemsize))
    for start in range(0, len(rows), step):
        part = np.ascontiguousarray(rows[start : start + step])
        yield part.reshape(-1).view(np.uint8).data


def program_digest(jaxpr: ClosedJaxpr) -> str:
    """A short digest of a traced step: another optimizer, rate, loss, activation or constant gives another one.

    Addresses of functions, which differ from process to process, have no part in it.
    """
    digest = hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", str(jaxpr)).encode())
    for constant in _constants(jaxpr):
        if jnp.issubdtype(jnp.result_type(constant), jax.dtypes.prng_key):
            constant = jax.random.key_data(constant)
        digest.update(data_digest(np.atleast_1d(np.asarray(constant))).encode())
    return digest.hexdigest()[:16]


def _constants(jaxpr: Any) -> Iterator[Any]:
    """The arrays that a program holds, which its text does not show, those of inner programs among them."""
    if isinstance(jaxpr, ClosedJaxpr):
        yield from jaxpr.consts
        jaxpr = jaxpr.jaxpr
    for equation in jaxpr.eqns:
        yield from (v.val for v in equation.invars if isinstance(v, Literal) and np.ndim(v.val))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            if _is_program(inner):
                yield from _constants(inner)


def _is_program(value: Any) -> bool:
    return isinstance(value, ClosedJaxpr | Jaxpr)


_SAYS = {
    "data": "other training data",
    "batch_size": "another batch size",
    "shuffle": "another setting of shuffle",
    "drop_last": "another setting of drop_last",
    "key": "another key",
    "early_stopping": "another rule of early stopping",
    "skips": "another guard: whether steps are skipped,",
    "validation": "other validation data",
}
_MAY_CHANGE = frozenset({"validation"})


def check_settings(saved: Mapping[str, Any], now: Mapping[str, Any], folder: str, *, anyway: bool) -> None:
    """Raises where a run was saved with other data or settings than it is to go on with."""
    for name, what in _SAYS.items():
        if saved.get(name) != now.get(name) and not (anyway and name in _MAY_CHANGE):
            raise ValueError(
                f"cannot resume the run in {folder!r}: it was saved with {what} ({name} {saved.get(name)!r}, now "
                f"{now.get(name)!r}); pass what it was started with, or choose another run_dir"
            )


def check_program(saved: Mapping[str, Any], now: Mapping[str, Any], folder: str, *, anyway: bool) -> None:
    """Raises where a run was saved with another training step.

    It is compared only between processes of one version of JAX, since versions write the same step in
    different words.
    """
    if not anyway and saved.get("jax") == now.get("jax") and saved.get("program") != now.get("program"):
        raise ValueError(
            f"cannot resume the run in {folder!r}: its training step was another program (another optimizer, rate, "
            "loss, layer or metric); pass what it was started with, or resume='anyway' if the change is meant"
        )
