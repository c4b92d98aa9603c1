"""Modules and functions of Flax linen, Flax nnx and PyTorch as counterparts of our layers, on our parameters.

Which number of theirs is which of ours is found by ``nnkit.interop``: our numbers, replaced by their positions,
are converted, and what arrives tells where each is to be taken from. So the conversion, which knows
arrays alone, becomes a function through which gradients flow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnkit import interop
from nnkit.testing.adapters import of_function, of_torch_module
from nnkit.testing.equivalent import Steps
from nnkit.testing.table.layers_case import Oracle, Setting
from nnkit.testing.trees import is_float
from nnkit.tree import flatten
from nnkit.types import PyTree

__all__ = [
    "channels_first",
    "linen",
    "linen_function",
    "nnx",
    "nnx_function",
    "torch_function",
    "torch_module",
]

Call = Callable[[Callable[..., Any], Any, bool], Any]


def _plain(f: Callable[..., Any], x: Any, train: bool) -> Any:
    return f(x)


class ByHand(NamedTuple):
    """Names of what ``interop`` does not convert.

    Attributes:
      write: from our parameters and state to their arrays by path.
      read: from their arrays by path, after a call, to our state.
    """

    write: Callable[[PyTree, PyTree], dict[str, Any]]
    read: Callable[[dict[str, Any]], PyTree] = lambda theirs: {}


def linen(
    make: Callable[[Any], Any],
    call: Call = _plain,
    by_hand: ByHand | None = None,
    names: dict[str, str] | None = None,
) -> Oracle:
    """The module ``make(flax.linen)``.

    Args:
      make: makes it.
      call: ``call(f, x, train)`` calls it, where f is the module, and gives y.
      by_hand: what ``interop`` cannot do.
      names: from our layers' paths to theirs, where ``interop`` cannot tell.
    """

    def steps(given: Setting) -> Steps:
        import flax.linen

        module = make(flax.linen)

        def called(f: Callable[..., Any], x: PyTree) -> Any:
            """Of f, which gives an output and variables, what ``call`` makes of the output, and the variables."""
            seen: list[Any] = []

            def output(*args: Any, **options: Any) -> Any:
                y, new = f(*args, **options)
                seen.append(new)
                return y

            return call(output, x, given.train), seen[0]

        def init(key: Any) -> Any:
            return called(partial(module.init_with_output, key), given.x)[1]

        with jax.numpy_dtype_promotion("standard"):
            like = jax.eval_shape(init, jax.random.key(0))
        fill, read = _between(given, like, by_hand, names)

        def run(params: PyTree, state: PyTree, x: PyTree) -> Any:
            variables = fill(params, state)
            y, new = called(partial(module.apply, variables, mutable=["batch_stats"]), x)
            return y, read({**variables, **new}, state)

        return of_function(run)

    return steps


def nnx(
    make: Callable[[Any, Any], Any],
    call: Call = _plain,
    by_hand: ByHand | None = None,
    names: dict[str, str] | None = None,
) -> Oracle:
    """The module ``make(flax.nnx, rngs)`` in the mode of the row; arguments as of :func:`linen`."""

    def steps(given: Setting) -> Steps:
        from flax import nnx

        module = make(nnx, nnx.Rngs(0))
        module.train() if given.train else module.eval()
        graph, like = nnx.split(module)
        fill, read = _between(given, like, by_hand, names)

        def run(params: PyTree, state: PyTree, x: PyTree) -> Any:
            model = nnx.merge(graph, fill(params, state))
            y = call(model, x, given.train)
            return y, read(nnx.state(model), state)

        return of_function(run)

    return steps


def linen_function(make: Callable[[Any], Callable[[Any], Any]]) -> Oracle:
    """The function ``make(flax.linen)`` of the input, of a layer without parameters."""

    def steps(given: Setting) -> Steps:
        import flax.linen

        f = make(flax.linen)
        return of_function(lambda params, state, x: (f(x), state))

    return steps


def nnx_function(make: Callable[[Any], Callable[[Any], Any]]) -> Oracle:
    """The function ``make(flax.nnx)`` of the input."""

    def steps(given: Setting) -> Steps:
        from flax import nnx

        f = make(nnx)
        return of_function(lambda params, state, x: (f(x), state))

    return steps


def torch_function(call: Callable[[Any, Any, Any, Any], Any]) -> Oracle:
    """``call(torch, params, state, x)`` on torch tensors, which gives y."""

    def steps(given: Setting) -> Steps:
        import torch

        return _alone(of_torch_module(lambda params, state, x: (call(torch, params, state, x), state)))

    return steps


def torch_module(make: Callable[[Any], Any], call: Call = _plain) -> Oracle:
    """The module ``make(torch)`` in the mode of the row; ``call`` as of :func:`linen`."""

    def steps(given: Setting) -> Steps:
        import torch

        floats = [a for a in jax.tree.leaves((given.x, given.start)) if is_float(a)]
        wide = floats[0].dtype == np.float64
        module = make(torch).to(torch.float64 if wide else torch.float32).train(given.train)
        like = module.state_dict()
        numbered, total = _numbered(given.start)
        written = interop.to_torch(given.layer, given.x, *numbered, like=like)
        places = {name: t.numpy().astype(np.int64) for name, t in written.items() if t.is_floating_point()}
        buffers = {name for name, _ in module.named_buffers()}
        back = _inverse(list(places.values()), total)

        def run(params: PyTree, state: PyTree, x: PyTree) -> Any:
            ours = [t.reshape(-1) for t in jax.tree.leaves((params, state))]
            flat = torch.cat([torch.zeros(1, dtype=ours[0].dtype), *ours]) if ours else None
            # A buffer is written to in its place, which autograd does not like to see.
            theirs = {
                name: flat[place].detach().clone() if name in buffers else flat[place]  # pyright: ignore
                for name, place in places.items()
            }

            def f(*args: Any, **options: Any) -> Any:
                return torch.func.functional_call(module, theirs, args, options)

            y = call(f, x, given.train)
            if not jax.tree.leaves(state):
                return y, state
            after = torch.cat([t.detach().reshape(-1) for t in theirs.values()])
            return y, jax.tree.map(lambda place: after[back[place]], _places(numbered[1]))

        return _alone(of_torch_module(run))

    return steps


def channels_first(f: Callable[[Any], Any], x: Any, train: bool = False) -> Any:
    """A :data:`Call` of a function of images for PyTorch, which has their channels before the window."""
    return f(x.movedim(-1, 1)).movedim(1, -1)


def _alone(steps: Steps) -> Steps:
    """On one thread: several wait for each other longer than these small arrays take."""

    def step(carry: Any, x: PyTree) -> Any:
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return steps.step(carry, x)
        finally:
            torch.set_num_threads(threads)

    return steps._replace(step=step)


def _between(
    given: Setting, like: PyTree, by_hand: ByHand | None, names: dict[str, str] | None
) -> tuple[Any, Any]:
    """From our parameters and state to variables like Flax's, and from these, after a call, to our state."""
    leaves, structure = jax.tree.flatten(like)
    paths = list(_by_path(like))
    if by_hand is not None:

        def fill(params: PyTree, state: PyTree) -> Any:
            theirs = by_hand.write(params, state)
            assert theirs.keys() <= set(paths), f"no {theirs.keys() - set(paths)} among {paths}"
            values = [theirs.get(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
            return jax.tree.unflatten(structure, values)

        return fill, lambda new, state: by_hand.read(_by_path(new))

    numbered, total = _numbered(given.start)
    filled = jax.tree.leaves(interop.to_flax(given.layer, given.x, *numbered, like=like, names=names))
    ours = [new is not old for new, old in zip(filled, leaves, strict=True)]
    places = [np.asarray(a).astype(int) for a, mine in zip(filled, ours, strict=True) if mine]
    back = _inverse(places, total)

    def fill(params: PyTree, state: PyTree) -> Any:
        flat = [a.ravel() for a in jax.tree.leaves((params, state))]
        flat = jnp.concatenate([jnp.zeros(1, flat[0].dtype), *flat]) if flat else None
        taken = iter(places)
        values = [flat[next(taken)] if mine else a for a, mine in zip(leaves, ours, strict=True)]  # pyright: ignore
        return jax.tree.unflatten(structure, values)

    def read(new: PyTree, state: PyTree) -> Any:
        if not jax.tree.leaves(state):
            return state
        now = zip(jax.tree.leaves(new), ours, strict=True)
        flat = jnp.concatenate([a.ravel() for a, mine in now if mine])
        return jax.tree.map(lambda place: flat[back[place]], _places(numbered[1]))

    return fill, read


def _by_path(variables: PyTree) -> dict[str, Any]:
    """nnx's variables have their array in a field of theirs."""
    return {path.removesuffix("/value"): leaf for path, leaf in flatten(variables).items()}


def _numbered(trees: PyTree) -> tuple[PyTree, int]:
    """The trees with their numbers' positions, from 1 on: 0 stands for what is 0 there and not ours."""
    leaves, structure = jax.tree.flatten(trees)
    ends = np.cumsum([0, *(leaf.size for leaf in leaves)])
    numbers = [
        (np.arange(leaf.size, dtype=np.float32) + 1 + end).reshape(leaf.shape)
        for leaf, end in zip(leaves, ends[:-1], strict=True)
    ]
    return jax.tree.unflatten(structure, numbers), int(ends[-1])


def _places(numbers: PyTree) -> PyTree:
    return jax.tree.map(lambda a: a.astype(int), numbers)


def _inverse(places: list[np.ndarray], total: int) -> np.ndarray:
    """Where each of our numbers is among theirs, one behind the other."""
    theirs = np.concatenate([place.ravel() for place in places]) if places else np.zeros(0, int)
    inverse = np.full(total + 1, len(theirs))
    inverse[theirs] = np.arange(len(theirs))
    return inverse
