"""Derivatives of any function of a tree against differences, in float64, of both orders and modes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.testing.report import NotApplicable, fail, raised
from nnkit.testing.shared import FAST
from nnkit.testing.trees import cast, is_float, map_floats, size_of
from nnkit.tree import flatten, map_with_path
from nnkit.types import PyTree

__all__ = ["ALL", "Derivatives"]

ALL = "all leaves at once"

STEP = 1e-6
"""Central differences are then off by 1e-12 of a third derivative and by 1e-10 of the value's rounding."""


class Derivatives:
    """``value(tree)`` and its derivatives along a line through each floating leaf, and through all at once.

    Args:
      value: a scalar function of the tree.
      tree: makes the tree at which to differentiate, under float64; floating leaves are cast.
      held: top-level names that stay as they are.
    """

    def __init__(
        self, value: Callable[[PyTree], jax.Array], tree: Callable[[], PyTree], *, held: Collection[str] = ()
    ):
        self._value, self._tree, self._held = value, tree, held
        self._found: dict[str, dict[str, np.ndarray]] | None = None
        self._forward: Exception | None = None

    def found(self) -> dict[str, dict[str, np.ndarray]]:
        """By path, and of all at once: value, slopes and second derivatives at -STEP, 0 and STEP of a line."""
        if self._found is None:
            with jax.enable_x64(True):
                self._found = self._measure()
        return self._found

    def _measure(self) -> dict[str, dict[str, np.ndarray]]:
        tree = cast(self._tree(), jnp.float64)
        zeros = map_floats(np.zeros_like, tree)
        flat = {
            path: leaf
            for path, leaf in flatten(tree).items()
            if is_float(leaf) and leaf.size and path.split("/")[0] not in self._held
        }
        if not flat:
            raise NotApplicable("nothing here is floating, so nothing can be differentiated")

        def along(t: Any, direction: PyTree) -> jax.Array:
            return self._value(map_floats(lambda a, d: a + t * d, tree, direction))

        def derivatives(t: Any, direction: PyTree, forward: bool) -> dict[str, Any]:
            line = lambda t: along(t, direction)
            slope = jax.grad(line)
            found = {"value": line(t), "reverse": slope(t), "second": jax.grad(slope)(t)}
            return found | ({"forward": jax.jvp(line, (t,), (jnp.ones_like(t),))[1]} if forward else {})

        def compiled(forward: bool) -> Any:
            run = jax.jit(partial(derivatives, forward=forward), compiler_options=FAST)
            return run.lower(zero, zeros).compile()

        zero = jnp.zeros(())
        try:
            run = compiled(forward=True)
        except TypeError as error:
            # A function with a hand-written reverse rule only (jax.custom_vjp) has no forward mode.
            self._forward, run = error, compiled(forward=False)
        measured = {}
        # A line through one leaf does not see how another leaf moves its slope: the last goes through all.
        lines = [(path, (path,)) for path in flat] + ([(ALL, tuple(flat))] if len(flat) > 1 else [])
        for seed, (path, through) in enumerate(lines):
            direction = _direction(tree, through, seed)
            points = [run(zero + t, direction) for t in (-STEP, 0.0, STEP)]
            measured[path] = {name: np.array([float(p[name]) for p in points]) for name in points[0]}
        return measured

    def check_reverse(self, likely: str) -> None:
        """``jax.grad`` against differences of values."""
        self._check("reverse", "value", "the gradient (reverse mode)", likely)

    def check_forward(self, likely: str) -> None:
        """``jax.jvp`` against differences of values."""
        self.found()
        if self._forward is not None:
            failure = raised("", self._forward)
            fail(
                "jax.jvp raises",
                expected="a derivative in forward mode",
                arrived=failure.arrived,
                likely="a rule written with jax.custom_vjp: write it with jax.custom_jvp, or skip this check",
            )
        self._check("forward", "value", "the derivative in forward mode", likely)

    def check_second(self, likely: str) -> None:
        """``jax.grad`` of ``jax.grad`` against differences of gradients."""
        self._check("second", "reverse", "the second derivative", likely)

    def _check(self, name: str, of: str, what: str, likely: str) -> None:
        for path, numbers in self.found().items():
            before, _, after = numbers[of]
            expected, arrived = (after - before) / (2 * STEP), numbers[name][1]
            # The value's own size bounds the rounding error of the difference, 1e-16 of it over STEP.
            size = max(1.0, abs(expected), 1e-3 * float(np.abs(numbers[of]).max()))
            if not abs(arrived - expected) <= 1e-6 * size:
                fail(
                    f"{what} along a random direction of {'all leaves' if path == ALL else 'one leaf'} differs from "
                    "the central difference",
                    expected=f"{expected:.10g} within {1e-6 * size:.1g}",
                    arrived=f"{arrived:.10g}",
                    path=path,
                    likely=likely,
                )


def _direction(tree: PyTree, through: Collection[str], seed: int) -> PyTree:
    """A random direction through the leaves at these paths, as long in each as its numbers are large; 0 in others."""
    rng = np.random.default_rng(seed)

    def fill(at: str, leaf: Any) -> Any:
        if at not in through:
            return np.zeros_like(leaf) if is_float(leaf) else leaf
        d = rng.normal(size=leaf.shape)
        return d / np.linalg.norm(d) * size_of(leaf)

    return map_with_path(fill, tree)
