"""What the checks of an optimizer share: parameters, gradients, and each compiled function once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax

from nnkit.optim import apply_updates
from nnkit.testing.derivatives import Derivatives
from nnkit.testing.trees import random_tree, smooth_gradients, stack, sum_of_sines
from nnkit.types import GradientTransformation, PyTree

__all__ = ["OptimizerSubject"]


class OptimizerSubject:
    """A transformation with parameters and gradients to try it on; arguments as `check_optimizer`'s."""

    def __init__(
        self,
        transformation: GradientTransformation,
        reference: Any = None,
        *,
        params: PyTree = None,
        grads: Sequence[PyTree] | None = None,
        max_ulps: int = 2,
        factory: Callable[..., Any] | None = None,
        hyperparameters: Mapping[str, float] | None = None,
        rtol: float = 1e-5,
    ) -> None:
        if (factory is None) != (hyperparameters is None):
            raise TypeError(
                "factory= and hyperparameters= go together: factory(**hyperparameters) is an optimizer"
            )
        if params is not None and grads is None:
            raise TypeError("params= needs grads= as well: a list of trees of the parameters' form")
        self.tx, self.reference, self.max_ulps, self.rtol = transformation, reference, max_ulps, rtol
        self.given, self.params = params, random_tree() if params is None else params
        self.grads = list(smooth_gradients(steps=4) if grads is None else grads)
        self.factory, self.hyperparameters = factory, dict(hyperparameters or {})
        self.traces = 0

    @cached_property
    def state(self) -> PyTree:
        return self.tx.init(self.params)

    def step(self, params: PyTree, state: PyTree, grads: PyTree) -> dict[str, PyTree]:
        updates, state = self.tx.update(grads, state, params)
        return {"updates": updates, "state": state, "params": apply_updates(params, updates)}

    @cached_property
    def compiled(self) -> Callable[..., dict[str, PyTree]]:
        def step(params: PyTree, state: PyTree, grads: PyTree) -> dict[str, PyTree]:
            self.traces += 1
            return self.step(params, state, grads)

        return jax.jit(step)

    def scanned(self, tx: Any, params: PyTree, grads: PyTree) -> PyTree:
        """Parameters and state after all gradients, in one scan."""

        def step(carry: Any, grad: PyTree) -> Any:
            params, state = carry
            updates, state = tx.update(grad, state, params)
            return (apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), grads)
        return {"params": params, "state": state}

    @cached_property
    def trajectory(self) -> dict[str, PyTree]:
        """The same step by step, compiled."""
        found = {"params": self.params, "state": self.state}
        for grads in self.grads:
            found = self.compiled(found["params"], found["state"], grads)
        return {"params": found["params"], "state": found["state"]}

    @cached_property
    def derivatives(self) -> Derivatives:
        def value(tree: Any) -> jax.Array:
            return sum_of_sines(self.scanned(self.tx, tree["params"], tree["grads"])["params"])

        return Derivatives(value, lambda: {"params": self.params, "grads": stack(self.grads)})
