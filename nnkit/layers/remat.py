"""``remat``: a layer whose activations are computed again for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from nnkit.layers.children import Window, check_child
from nnkit.types import Array, Layer, Params, State

__all__ = ["remat"]


def remat(layer: Layer, policy: Callable[..., Any] | None = None, *, prevent_cse: bool = True) -> Layer:
    """The same layer; what is inside is computed a second time for the backward pass instead of kept.

    Values and gradients stay, memory falls to the layer's input, and a step takes up to a third longer.
    Paths, parameters and state are those of ``layer``. ``repeat(remat(block), n)`` keeps n inputs.

    Args:
      layer: any layer; the larger, the more is saved.
      policy: which intermediate values are kept all the same, one of ``jax.checkpoint_policies``, for
        instance ``jax.checkpoint_policies.dots_with_no_batch_dims_saveable``. None keeps nothing.
      prevent_cse: whether XLA is kept from finding that the second computation repeats the first. Inside
        :func:`repeat` it does not look, and False is faster.

    Raises:
      TypeError: for a policy that is no function.

    Source: ``jax.checkpoint``; Flax's ``nn.remat``; Chen et al. 2016, "Training deep nets with sublinear
    memory cost".

    >>> block = layers.serial(layers.dense(8), layers.tanh, layers.dense(4))
    >>> model = layers.remat(block)
    >>> params, state = model.init(jax.random.key(0), jnp.zeros((1, 4)))
    >>> y, _ = model.apply(params, state, jnp.ones((2, 4)), train=True)
    >>> bool((y == block.apply(params, state, jnp.ones((2, 4)), train=True)[0]).all())
    True
    """
    check_child("remat", layer)
    if policy is not None and not callable(policy):
        raise TypeError(
            f"remat(policy=...) must be a function, got {policy!r}: pass one of jax.checkpoint_policies, "
            "jax.checkpoint_policies.dots_saveable for instance"
        )

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        def run(params: Params, state: State, x: Any, key: Array | None) -> tuple[Any, State]:
            return layer.apply(params, state, x, key=key, train=train)

        window = Window(run)
        checkpointed = jax.checkpoint(window.run, policy=policy, prevent_cse=prevent_cse)
        (y, state), seen = checkpointed(window.added, params, state, x, key)
        window.tell(seen, params, state)
        return y, state

    return layer._replace(apply=apply)
