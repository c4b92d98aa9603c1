"""Layers and modules of Flax and PyTorch as :class:`Steps`: a call is a step, with its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.testing.equivalent import Steps
from nnkit.testing.trees import is_float
from nnkit.types import Layer, PyTree

__all__ = ["of_flax", "of_function", "of_layer", "of_torch_module", "of_torch_optimizer", "weights_like"]


def weights_like(y: Any) -> np.ndarray:
    """Unequal numbers of the output's shape: what is differentiated is sum(y * weights)."""
    shape = tuple(y.shape)
    return np.cos(np.arange(np.prod(shape, dtype=int)).reshape(shape))


def of_function(call: Callable[..., tuple[PyTree, PyTree]]) -> Steps:
    """``call(params, state, x) -> (y, state)`` of JAX with the gradients of parameters and input.

    ``start`` is ``(params, state)``; a step takes ``x`` and sees output, state and both gradients.
    """

    def step(params: PyTree, state: PyTree, x: PyTree) -> Any:
        floats, structure = jax.tree.flatten(x)

        def loss(params: PyTree, floats: list[Any]) -> Any:
            y, new = call(params, state, jax.tree.unflatten(structure, floats))
            outputs = [leaf for leaf in jax.tree.leaves(y) if is_float(leaf)]
            terms = [jnp.sum(leaf * jnp.asarray(weights_like(leaf), leaf.dtype)) for leaf in outputs]
            return sum(terms[1:], terms[0]), (y, new)

        grads, (y, new) = jax.grad(loss, (0, 1), has_aux=True, allow_int=True)(params, floats)
        slopes = [g for g, leaf in zip(grads[1], floats, strict=True) if is_float(leaf)]
        return new, {"y": y, "state": new, "gradient": {"params": grads[0], "x": slopes}}

    compiled = jax.jit(step)

    def run(carry: Any, x: PyTree) -> Any:
        params, state = carry
        with jax.numpy_dtype_promotion("standard"):
            state, seen = compiled(params, state, x)
        return (params, state), seen

    return Steps(lambda start: start, run)


def of_layer(layer: Layer, *, train: bool, key: Any = None) -> Steps:
    """An nnkit layer: ``start`` is what its ``init`` gave, a step takes ``x``.

    >>> from nnkit import testing
    >>> layer = layers.dense(2)
    >>> steps = testing.of_layer(layer, train=False)
    >>> start = layer.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> _, seen = steps.step(steps.init(start), jnp.ones((1, 3)))
    >>> sorted(seen)
    ['gradient', 'state', 'y']
    """
    return of_function(lambda params, state, x: layer.apply(params, state, x, key=key, train=train))


def of_flax(
    module: Any,
    *,
    train: bool | None = None,
    params: Callable[[PyTree], PyTree] = lambda params: params,
    collection: str = "batch_stats",
    **call: Any,
) -> Steps:
    """A Flax linen module in the form of :func:`of_layer`, on our parameters and state.

    Args:
      module: its parameters have our layer's names, or ``params`` says which are which.
      train: passed as ``use_running_average=not train`` where it is not None.
      params: from our tree of parameters to Flax's.
      collection: where its state lies.
      call: further arguments of the call.
    """
    if train is not None:
        call["use_running_average"] = not train

    def run(p: PyTree, state: PyTree, x: PyTree) -> Any:
        variables = {"params": params(p)} | ({collection: state} if state else {})
        y, new = module.apply(variables, *_arguments(x), **call, mutable=[collection])
        return y, dict(new.get(collection, state))

    return of_function(run)


def of_torch_module(call: Callable[[Any, Any, Any], Any]) -> Steps:
    """``call(params, state, x)`` on torch tensors in the form of :func:`of_layer`.

    ``call`` gets our trees with a tensor for each array and returns the output, or the output and
    the new state; gradients come from its backward pass and are those of the arrays.

    >>> from nnkit import testing
    >>> steps = testing.of_torch_module(lambda p, s, x: x @ p["kernel"])
    """

    def run(carry: Any, x: PyTree) -> Any:
        params, state = (jax.tree.map(_tensor, tree) for tree in carry)
        inputs = jax.tree.map(_tensor, x)
        leaves = [t for t in jax.tree.leaves((params, inputs)) if t.is_floating_point()]
        for t in leaves:
            t.requires_grad_(True)
        found = call(params, state, inputs)
        y, new = found if isinstance(found, tuple) else (found, state)
        import torch

        outputs = [t for t in jax.tree.leaves(y) if t.is_floating_point()]
        total = torch.stack([(t * torch.tensor(weights_like(t), dtype=t.dtype)).sum() for t in outputs]).sum()
        slopes = iter(torch.autograd.grad(total, leaves, allow_unused=True))

        def slope(t: Any) -> Any:
            if not t.is_floating_point():
                return np.zeros(tuple(t.shape), jax.dtypes.float0)
            g = next(slopes)
            return _array(torch.zeros_like(t) if g is None else g)

        grads = {"params": jax.tree.map(slope, params)}
        grads["x"] = [slope(t) for t in jax.tree.leaves(inputs) if t.is_floating_point()]
        new = jax.tree.map(_array, new)
        seen = {"y": jax.tree.map(_array, y), "state": new, "gradient": grads}
        return (carry[0], new), seen

    return Steps(lambda start: start, run)


def of_torch_optimizer(
    make: Callable[[list[Any]], Any], *, each: Callable[[Any], None] | None = None
) -> Steps:
    """A ``torch.optim`` optimizer: ``start`` is the parameters' tree, a step takes gradients.

    Seen are the parameters; compare it with ``of_transformation(ours, trajectory=True)``.

    Args:
      make: makes the optimizer of a list of parameters, ``lambda p: torch.optim.Adam(p, 1e-3)``.
      each: called with the optimizer after each step (a scheduler's step).
    """

    def init(start: PyTree) -> Any:
        import torch

        leaves = [torch.nn.Parameter(_tensor(leaf)) for leaf in jax.tree.leaves(start)]
        return leaves, make(leaves), jax.tree.structure(start)

    def step(carry: Any, grads: PyTree) -> Any:
        leaves, optimizer, structure = carry
        for leaf, grad in zip(leaves, jax.tree.leaves(grads), strict=True):
            leaf.grad = _tensor(grad)
        optimizer.step()
        if each is not None:
            each(optimizer)
        values = [_array(leaf.detach()) for leaf in leaves]
        return carry, {"params": jax.tree.unflatten(structure, values)}

    return Steps(init, step)


def _arguments(x: PyTree) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def _tensor(a: Any) -> Any:
    import torch

    return torch.tensor(np.array(a))


def _array(t: Any) -> np.ndarray:
    return t.detach().numpy().copy()
