"""Trees compared leaf by leaf, with a failure that shows where they part and by how much."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.testing.report import fail
from nnkit.testing.trees import is_float
from nnkit.testing.ulp import ulp_distance
from nnkit.tree import flatten
from nnkit.types import PyTree

__all__ = ["bound_of", "check_close", "check_form", "check_same_bits", "numbers_of", "show"]


def check_form(what: str, expected: PyTree, arrived: PyTree, likely: str = "", weak: bool = False) -> None:
    """Fails unless both trees have the same structure and their leaves the same shapes and dtypes.

    Args:
      what, likely: for the failure's text.
      expected, arrived: trees of arrays or of ``jax.ShapeDtypeStruct``.
      weak: whether ``weak_type``, which makes jit compile again, must agree as well.
    """
    if jax.tree.structure(expected) != jax.tree.structure(arrived):
        left, right = _paths(expected), _paths(arrived)
        missing, extra = [p for p in left if p not in right], [p for p in right if p not in left]
        parts = [f"without {', '.join(missing)}"] if missing else []
        parts += [f"with {', '.join(extra)} added"] if extra else []
        structure = str(jax.tree.structure(arrived))
        fail(
            f"{what} has another structure",
            expected=jax.tree.structure(expected),
            arrived=structure + (f" ({', '.join(parts)})" if parts else ""),
            path=(extra or missing or [""])[0],
            likely=likely,
        )
    right = flatten(arrived)
    for path, leaf in flatten(expected).items():
        if (want := _type(leaf, weak)) != (got := _type(right[path], weak)):
            fail(
                f"{what} has another shape or dtype",
                expected=want,
                arrived=got,
                path=path,
                likely=likely,
            )


def check_same_bits(what: str, expected: PyTree, arrived: PyTree, likely: str = "") -> None:
    """Fails unless both trees agree in form and in every bit that counts (0 is -0, NaN is NaN)."""
    check_close(what, expected, arrived, likely, rtol=0.0, atol=0.0)


def bound_of(expected: np.ndarray, rtol: float, atol: float) -> np.ndarray:
    """What a number may be off by: ``rtol`` of itself and ``atol`` of the largest, or of 1.

    Numbers that are small beside the largest came about by cancellation, whose rounding errors have
    the size of what was cancelled.
    """
    size = np.abs(expected)
    finite = size[np.isfinite(size)]
    return rtol * np.where(np.isfinite(size), size, 0) + atol * max(1.0, float(finite.max(initial=0)))


def check_close(
    what: str,
    expected: PyTree,
    arrived: PyTree,
    likely: str = "",
    *,
    rtol: float = 1e-5,
    atol: float = 2e-6,
) -> None:
    """Fails unless both trees agree in form and their numbers within ``bound_of``.

    2e-6 are 32 roundings of half a unit in the last place of float32. Integers, bools and keys must
    be equal.
    """
    check_form(what, expected, arrived, likely)
    right = flatten(arrived)
    worst: tuple[float, str] | None = None
    for path, leaf in flatten(expected).items():
        a, b = numbers_of(leaf), numbers_of(right[path])
        excess = _excess(a, b, rtol, atol)
        if excess > 1 and (worst is None or excess > worst[0]):
            worst = excess, path
    if worst is None:
        return
    path = worst[1]
    a, b = numbers_of(flatten(expected)[path]), numbers_of(right[path])
    index, text = _difference(a, b, rtol, atol)
    where = f"{path}{list(index)}" if index else path
    fail(
        f"{what} differs",
        expected=f"{a[index]!s}{_within(rtol, atol)}",
        arrived=f"{b[index]!s}: {text}",
        path=where or "the output",
        likely=likely,
    )


def show(leaf: Any, limit: int = 6) -> str:
    """The first few numbers of an array with its dtype and shape."""
    a = np.asarray(leaf)
    flat = ", ".join(str(v) for v in a.reshape(-1)[:limit])
    more = ", ..." if a.size > limit else ""
    return f"{a.dtype}{list(a.shape)} [{flat}{more}]"


def _within(rtol: float, atol: float) -> str:
    return f" within {rtol:g} of it and {atol:g} of the largest" if rtol or atol else " to the bit"


def _paths(tree: PyTree) -> list[str]:
    return list(flatten(tree))


def _type(leaf: Any, weak: bool) -> str:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return f"a Python {type(leaf).__name__}"
    text = f"{dtype}{list(leaf.shape)}"
    return f"weakly typed {text}" if weak and getattr(leaf, "weak_type", False) else text


def numbers_of(leaf: Any) -> np.ndarray:
    """A leaf as numpy's array; of a key its data."""
    if jnp.issubdtype(getattr(leaf, "dtype", np.dtype(bool)), jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _excess(a: np.ndarray, b: np.ndarray, rtol: float, atol: float) -> float:
    """The largest difference as a multiple of what is allowed; above 1 fails."""
    if not is_float(a) and not np.iscomplexobj(a):
        return 0.0 if np.array_equal(a, b) else np.inf
    x, y = (v.astype(np.complex128 if np.iscomplexobj(v) else np.float64) for v in (a, b))
    with np.errstate(invalid="ignore"):
        off = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0, np.abs(x - y))
        bound = bound_of(x, rtol, atol) if rtol or atol else np.zeros(x.shape)
        ratio = np.where(off == 0, 0, np.where(bound > 0, off / np.where(bound > 0, bound, 1), np.inf))
    return float(np.where(np.isnan(ratio), np.inf, ratio).max(initial=0))


def _difference(a: np.ndarray, b: np.ndarray, rtol: float, atol: float) -> tuple[tuple[int, ...], str]:
    """Where the two part most, and how far, in words."""
    if not is_float(a):
        wrong = a != b
        index = tuple(int(i) for i in np.unravel_index(np.argmax(wrong), a.shape))
        return index, f"{np.count_nonzero(wrong)} of {a.size} numbers differ"
    x, y = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        off = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0, np.abs(x - y))
    off = np.where(np.isnan(off), np.inf, off)
    wrong = off > (bound_of(x, rtol, atol) if rtol or atol else 0)
    index = tuple(int(i) for i in np.unravel_index(np.argmax(np.where(wrong, off, -1)), a.shape))
    distance = int(ulp_distance(a[index], b[index]))
    far = f"{distance} ulp, " if distance < 2**63 else ""
    return index, f"{far}{off[index]:.3g} apart; {np.count_nonzero(wrong)} of {a.size} numbers differ"
