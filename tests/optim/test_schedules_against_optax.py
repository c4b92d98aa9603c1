"""Every schedule that optax has, beside optax's: compiled and not, in float32 and float64."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnkit import optim
from nnkit.testing.table.schedules import OPTAX as CASES
from nnkit.testing.table.schedules import STEPS, compiled, truth

ROWS = [(name, arguments) for name, rows in CASES.items() for arguments in rows]


def check(schedule: Any, name: str, arguments: Any) -> None:
    """Tolerances in units of the largest value: what a sum of terms of that size may be rounded by.

    2.5 units were seen at most in either precision. The power of exponential_decay adds what 20/47·log 1.1
    and the power itself are rounded by; with int32 steps it is float32 always, as optax's is.
    """
    expected = truth(name, arguments)
    told = np.isfinite(expected) & (np.abs(expected) < 1e6)
    size = np.abs(expected[told]).max()

    def near(values: Any, at: Any = slice(None)) -> None:
        unit = np.finfo(values.dtype).eps if values.dtype == np.float64 else np.float64(2.0**-23)
        off = np.abs(values.astype(np.float64)[told[at]] - expected[at][told[at]]).max()
        assert off <= (6 if "exponential" in name else 4) * unit * size, off / unit / size

    near(compiled(schedule))
    near(np.broadcast_to(np.asarray(schedule(STEPS)), STEPS.shape))
    one_by_one = [schedule(7), schedule(np.int64(53)), schedule(np.uint8(97)), schedule(jnp.int32(120))]
    near(np.array([float(value) for value in one_by_one], np.float32), [7, 53, 97, 120])
    with jax.enable_x64(True):
        wide = compiled(schedule)
        assert wide.dtype == np.float64 or "exponential" in name or isinstance(schedule(0), int | float)
        near(wide)


@pytest.mark.parametrize(("name", "arguments"), ROWS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(ROWS)])
def test_values(name: str, arguments: Any) -> None:
    check(getattr(optim, name)(**arguments), name, arguments)


@pytest.mark.parametrize("name", CASES)
def test_signatures_are_optax(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (optim, optax))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
