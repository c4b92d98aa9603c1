"""The loss of a batch and its gradients: of the whole batch at once, or of one part after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnkit.optim.conditional import of_dtype
from nnkit.train.preflight import number_of_examples
from nnkit.tree import wide
from nnkit.types import Array, Objective, Params, PyTree, State

__all__ = ["StepLoss"]


class StepLoss(NamedTuple):
    """A step's objective on its batch, taken in ``parts`` micro-batches.

    The means over micro-batches are weighted by their sizes, so what an objective gives as a mean over
    examples is that over the batch, and what does not depend on the examples counts once. Each
    micro-batch has its own key, and the state that the one before it left.

    Attributes:
      objective: see :class:`nnkit.types.Objective`.
      state: the layers' state before the step.
      batch: the batch; cut into parts it must be arrays with one leading axis.
      key: the step's key.
      parts: how many micro-batches; a batch of fewer examples has as many as those.
    """

    objective: Objective
    state: State
    batch: Any
    key: Array
    parts: int

    def gradients(self, params: Params, scale: Any) -> tuple[Array, State, dict[str, Array], PyTree]:
        """Loss, state, metrics, and the gradients of scale · loss."""
        if self.parts == 1:
            (value, (state, metrics)), grads = self._value_and_grad(
                params, self.state, self.batch, self.key, scale
            )
            return value, state, metrics, grads

        def of_part(state: State, batch: Any, key: Array) -> tuple[State, Any]:
            (value, (state, metrics)), grads = self._value_and_grad(params, state, batch, key, scale)
            return state, (value, metrics, grads)

        state, (value, metrics, grads) = self._mean(of_part)
        return value, state, metrics, grads

    def value(self, params: Params) -> Array:
        """The loss as a function of the parameters."""
        if self.parts == 1:
            return self.objective(params, self.state, self.batch, key=self.key, train=True)[0]

        # Recomputed where it is differentiated: what is stored is then that of one micro-batch.
        @jax.checkpoint
        def of_part(state: State, batch: Any, key: Array) -> tuple[State, Any]:
            value, (state, _) = self.objective(params, state, batch, key=key, train=True)
            return state, value

        return self._mean(of_part)[1]

    def _value_and_grad(self, params: Params, state: State, batch: Any, key: Array, scale: Any) -> Any:
        """``jax.value_and_grad(loss, has_aux=True)``, the gradients of the loss times the scale, where there is one."""

        def loss(params: Params) -> tuple[Array, tuple[State, dict[str, Array]]]:
            value, (new, metrics) = self.objective(params, state, batch, key=key, train=True)
            _check_state(state, new)
            return value, (new, metrics)

        if isinstance(scale, float):
            return jax.value_and_grad(loss, has_aux=True)(params)

        def scaled(params: Params) -> Any:
            value, aux = loss(params)
            dtype = wide(jnp.result_type(value))
            return jnp.asarray(value, dtype) * scale.astype(dtype), (value, aux)

        (_, value), grads = jax.value_and_grad(scaled, has_aux=True)(params)
        return value, grads

    def _mean(self, of_part: Callable[[State, Any, Array], tuple[State, Any]]) -> tuple[State, Any]:
        """The last state of ``of_part(state, micro_batch, key) -> (state, results)``, and the results' means."""
        try:
            n = number_of_examples(self.batch)
        except ValueError as error:
            error.add_note(f"trainer(micro_batches={self.parts}) cuts each batch along that axis")
            raise
        k = min(self.parts, n)
        size, more = divmod(n, k)

        def part(i: Any, with_one_more: bool) -> Any:
            """Every k-th example, so that a batch that is spread over devices is cut on each of them."""

            def rows(a: Any) -> Array:
                a = jnp.asarray(a)
                by_part = a[: size * k].reshape(size, k, *a.shape[1:])
                own = jax.lax.dynamic_index_in_dim(by_part, i, axis=1, keepdims=False)
                if not with_one_more:
                    return own
                rest = a[size * k :]
                return jnp.concatenate([own, jax.lax.dynamic_slice_in_dim(rest, i, 1)])

            return jax.tree.map(rows, self.batch)

        def run(state: State, i: Any, with_one_more: bool) -> tuple[State, Any]:
            return of_part(state, part(i, with_one_more), jax.random.fold_in(self.key, i))

        def add(carry: Any, i: Any, with_one_more: bool) -> tuple[Any, None]:
            state, sums = carry
            new, found = run(state, i, with_one_more)
            weight = (size + with_one_more) / n
            sums = jax.tree.map(
                lambda s, f: s + jnp.asarray(f, s.dtype) * jnp.asarray(weight, s.dtype), sums, found
            )
            return (jax.tree.map(of_dtype, new, state), sums), None

        _, shapes = jax.eval_shape(lambda state: run(state, 0, False), self.state)
        sums = jax.tree.map(lambda f: jnp.zeros(f.shape, _sum_dtype(f.dtype)), shapes)
        carry: Any = (self.state, sums)
        for first, last, with_one_more in ((0, more, True), (more, k, False)):
            if last > first:
                body = lambda carry, i, with_one_more=with_one_more: add(carry, i, with_one_more)
                carry, _ = jax.lax.scan(body, carry, jnp.arange(first, last))
        state, sums = carry
        return state, jax.tree.map(lambda s, f: s.astype(f.dtype) if _is_inexact(f) else s, sums, shapes)


def _sum_dtype(dtype: Any) -> Any:
    return wide(dtype) if jnp.issubdtype(dtype, jnp.inexact) else jnp.float32


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _check_state(before: PyTree, after: PyTree) -> None:
    old, new = jax.tree.structure(before), jax.tree.structure(after)
    if old != new:
        raise ValueError(
            f"the objective returned a state of structure {new} where it was given {old}: return the "
            "state that apply returns"
        )
