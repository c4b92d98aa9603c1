"""What the checks of a layer share: its parameters, and each compiled function once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from nnkit.testing.derivatives import Derivatives
from nnkit.testing.report import NotApplicable, Unusable
from nnkit.testing.trees import cast, is_float, map_floats, noise, off_ties, sum_of_sines
from nnkit.types import Layer, Params, State

__all__ = ["LayerSubject", "floats_of", "moved", "with_floats"]


def moved(params: Params, seed: int) -> Params:
    """The floating leaves off their values, which may be all zeros or ones: no special case."""
    return map_floats(jnp.add, params, noise(params, seed, 0.1))


def floats_of(tree: Any) -> list[jax.Array]:
    """The floating leaves of a tree, with respect to which alone there are gradients."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_float(leaf)]


def with_floats(tree: Any, floats: list[Any]) -> Any:
    """``tree`` with other floating leaves."""
    rest = iter(floats)
    return map_floats(lambda _: next(rest), tree)


class LayerSubject:
    """A layer, an input for it and what it promises.

    Args:
      layer: the layer.
      x: its input, an array or a tree of arrays; the leading axis of the first is the batch.
      random: whether training draws random numbers; None to find out by asking without a key.
      mixes_batch: whether an example's output depends on the others in training.
      factory: makes the layer of the numbers in ``hyperparameters``.
      hyperparameters: those that may be traced.
      rtol: relative tolerance in float32 where two programs do the same sums in another order.
    """

    def __init__(
        self,
        layer: Layer,
        x: Any,
        *,
        random: bool | None = None,
        mixes_batch: bool = False,
        factory: Callable[..., Layer] | None = None,
        hyperparameters: Mapping[str, float] | None = None,
        rtol: float = 1e-5,
    ) -> None:
        if not isinstance(layer, Layer):
            hint = (
                "of a function that makes layers call it, layers.dense(3); of a function of x make one, "
                "layers.stateless(f)"
                if callable(layer)
                else "write layers.dense(3), or one's own as nnkit.Layer(init, apply, 'name_')"
            )
            raise TypeError(f"check_layer takes a nnkit.Layer first, got {type(layer).__name__}: {hint}")
        if (factory is None) != (hyperparameters is None):
            raise TypeError(
                "factory= and hyperparameters= go together: factory(**hyperparameters) is a layer"
            )
        self.layer, self.x, self.mixes_batch, self.rtol = (
            layer,
            jax.tree.map(jnp.asarray, x),
            mixes_batch,
            rtol,
        )
        self.factory, self.hyperparameters = factory, dict(hyperparameters or {})
        self._told_random = random
        self.traces = {True: 0, False: 0}
        self._compiled: dict[bool, Any] = {}
        self._eager: dict[bool, Any] = {}

    @property
    def key(self) -> jax.Array:
        return jax.random.key(7)

    @cached_property
    def initial(self) -> tuple[Params, State]:
        """What ``init`` gives, untouched."""
        try:
            return self.layer.init(jax.random.key(0), self.x)
        except Exception as error:
            raise Unusable("init raises") from error

    @cached_property
    def params(self) -> Params:
        """Parameters that are no special case: zeros and ones are moved off their values."""
        params, _ = self.initial
        return moved(params, 100)

    @property
    def state(self) -> State:
        return self.initial[1]

    def member(self, seed: int) -> tuple[Params, State]:
        """Other parameters and state, of another seed."""
        params, state = self.layer.init(jax.random.key(seed), self.x)
        return moved(params, 100 + seed), state

    @cached_property
    def needs_key(self) -> bool:
        """Whether the layer refuses to train without a key."""
        try:
            self.shapes(train=True, key=None)
        except Exception:
            self.shapes(train=True, key=self.key)  # raises where the key was not what was missing
            return True
        return False

    @property
    def random(self) -> bool:
        return self.needs_key if self._told_random is None else self._told_random

    @cached_property
    def modes(self) -> tuple[bool, ...]:
        """Both modes, or one where they are the same program, so that it is compiled once."""

        def program(train: bool) -> Any:
            return jax.make_jaxpr(partial(self.call, train=train))(*self.initial, self.x, self.key)

        return (True,) if _same_program(program(True), program(False)) else (True, False)

    def shapes(self, *, train: bool, key: Any) -> Any:
        """``jax.eval_shape`` of the layer."""
        return jax.eval_shape(partial(self.call, train=train), *self.initial, self.x, key)

    def call(self, params: Params, state: State, x: Any, key: Any, train: bool) -> dict[str, Any]:
        """``apply``'s output and state under names that make readable paths."""
        y, state = self.layer.apply(params, state, x, key=key, train=train)
        return {"y": y, "state": state}

    def eager(self, train: bool) -> Any:
        """Output and state, not compiled."""
        if train not in self._eager:
            self._eager[train] = self.call(self.params, self.state, self.x, self.key, train)
        return self._eager[train]

    def compiled(self, train: bool) -> Callable[[Params, State, Any, Any], Any]:
        """``apply`` in a mode under ``jax.jit``; ``traces`` counts how often it was traced."""
        if train not in self._compiled:

            def run(params: Params, state: State, x: Any, key: Any) -> Any:
                self.traces[train] += 1
                return self.call(params, state, x, key, train)

            self._compiled[train] = jax.jit(run)
        return self._compiled[train]

    def jitted(self, train: bool) -> Any:
        """Output and state, compiled."""
        return self.compiled(train)(self.params, self.state, self.x, self.key)

    @cached_property
    def derivatives(self) -> Derivatives:
        """Of the output, in every mode, with respect to parameters and input."""

        sizes = [self.jitted(train)["y"] for train in self.modes]

        def value(tree: Any) -> jax.Array:
            outputs = [
                self.call(tree["params"], tree["state"], tree["x"], self.key, train)["y"]
                for train in self.modes
            ]
            return sum_of_sines(outputs, sizes)

        def tree() -> Any:
            x = off_ties(cast(self.x, jnp.float64), 200)
            params, state = self.layer.init(jax.random.key(0), x)
            return {"params": moved(params, 100), "state": state, "x": x}

        return Derivatives(value, tree, held={"state"})

    def floating(self, what: str) -> None:
        """Raises NotApplicable where neither parameters nor input have a floating leaf."""
        if not any(map(is_float, jax.tree.leaves((self.initial[0], self.x)))):
            raise NotApplicable(f"neither parameters nor input are floating: {what}")


def _same_program(a: Any, b: Any) -> bool:
    """Whether two jaxprs are alike to the letter and to the bit of their constants, which the letters leave out."""
    consts = [_constants(p) for p in (a, b)]
    return str(a) == str(b) and len(consts[0]) == len(consts[1]) and all(map(_same_constant, *consts))


def _constants(program: Any) -> list[Any]:
    inner = [
        v for eqn in program.jaxpr.eqns for v in jax.tree.leaves(list(eqn.params.values()), is_leaf=_closed)
    ]
    return [*program.consts, *(c for p in inner if _closed(p) for c in _constants(p))]


def _closed(value: Any) -> bool:
    return isinstance(value, jax.extend.core.ClosedJaxpr)


def _same_constant(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if any(jnp.issubdtype(getattr(v, "dtype", np.dtype(bool)), jax.dtypes.prng_key) for v in (a, b)):
        return False
    return np.array_equal(np.asarray(a), np.asarray(b), equal_nan=is_float(a))
