"""The gradients of activations: what a loss changes by when a layer's output does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnkit.layers.children import Added, Visit, floating, visiting
from nnkit.types import Array, Layer, Params, State

__all__ = ["activation_gradients"]


def activation_gradients(
    model: Layer,
    params: Params,
    state: State,
    x: Any,
    loss: Callable[[Any], Array],
    *,
    key: Array | None = None,
    train: bool,
) -> dict[str, Any]:
    """The gradient of ``loss(model(x))`` with respect to the output of every layer inside, by path.

    Of shape and dtype of that output, so that :func:`observe`'s outputs and these go together: their
    product summed is the first-order effect of removing a unit; a path whose gradients vanish is where
    learning stops. Under :func:`repeat` they are stacked, (n, batch, ...). For a layer that is called
    twice it is the gradient of its last output. An output without floating-point arrays has none; of one
    that has others too, those are None.

    Pure: it may be jitted, mapped and differentiated.

    Args:
      model: a layer made of layers.
      params: its parameters.
      state: its state.
      x: its input.
      loss: a function of the model's output with one number.
      key: as for ``model.apply``.
      train: likewise.

    Raises:
      ValueError: for a loss that is not one number.

    Source: Flax's ``Module.perturb``.

    >>> model = layers.serial(layers.dense(3), layers.relu, head=layers.dense(1))
    >>> params, state = model.init(jax.random.key(0), jnp.zeros((1, 2)))
    >>> grads = layers.activation_gradients(model, params, state, jnp.ones((5, 2)), jnp.sum, train=True)
    >>> {path: grad.shape for path, grad in grads.items()}
    {'dense_0': (5, 3), 'relu_0': (5, 3), 'head': (5, 1)}
    """

    order: list[tuple[str, int]] = []

    def forward(added: Added) -> tuple[Any, dict[tuple[str, int], Any]]:
        outputs: dict[tuple[str, int], Any] = {}

        def visit(call: Visit) -> None:
            outputs[call.path, call.number] = call.y

        with visiting(visit, added):
            y, _ = model.apply(params, state, x, key=key, train=train)
        order[:] = outputs
        return y, outputs

    def value(added: Added) -> Array:
        result = loss(forward(added)[0])
        if jnp.shape(result) != ():
            raise ValueError(
                f"activation_gradients(loss=...) must give one number and gave shape {jnp.shape(result)}: "
                "take its mean or sum"
            )
        return result

    outputs = jax.eval_shape(lambda: forward({})[1])
    last = {path: outputs[path, number] for path, number in order}
    # Zeros are added to what the layers give, and it is those that are differentiated.
    leaves = {path: [leaf for leaf in jax.tree.leaves(y) if floating(leaf)] for path, y in last.items()}
    numbers = dict(order)
    zeros = {
        (path, numbers[path]): [jnp.zeros(leaf.shape, leaf.dtype) for leaf in some]
        for path, some in leaves.items()
        if some
    }
    grads = jax.grad(value)(zeros)
    return {path: _in_place(grads[path, numbers[path]], last[path]) for path, some in leaves.items() if some}


def _in_place(grads: Sequence[Array], y: Any) -> Any:
    """The gradients where the floating leaves of ``y`` are, None elsewhere."""
    leaves, structure = jax.tree.flatten(y)
    rest = iter(grads)
    return structure.unflatten([next(rest) if floating(leaf) else None for leaf in leaves])
