"""``wire``: a layer whose forward pass is a function that calls its children by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from nnkit.checks import LayerError
from nnkit.layers.children import Children, inferring, merge, name_children
from nnkit.types import Array, Layer, Params, Spec, State

__all__ = ["Child", "Net", "wire"]

_RESERVED = frozenset({"key", "train"})
_TRAINING = 2**16
"""Added to the position of a child that is called in training only, so that its key is its own."""


class Child:
    """A child bound to its parameters and state for the length of one forward pass."""

    def __init__(self, net: Net, name: str):
        self._net, self._name = net, name

    def __call__(self, x: Any) -> Any:
        """The child's output. A second call uses the same parameters: that is how weights are tied."""
        return self._net._call(self._name, x)

    @property
    def params(self) -> Params:
        """The child's parameters, for use beside its own forward pass (a tied output matrix)."""
        return self._net._params_of(self._name)


class Net:
    """What the function given to :func:`wire` receives: its children as attributes.

    Attributes:
      train: the mode.
    """

    train: bool

    def __init__(
        self, children: Children, params: Params, state: State, key: Array | None, train: bool, making: bool
    ):
        self._children, self._params, self._state = children, dict(params), dict(state)
        self._key, self.train, self._making, self._calls = key, train, making, 0
        self._specs: dict[str, tuple[int, Any]] = {}

    def key(self) -> Array:
        """A fresh key at each call, for a forward pass that draws random numbers of its own."""
        if self._key is None:
            raise LayerError(
                self._children.owner, "draws random numbers and needs a key: pass apply(..., key=key)"
            )
        self._calls += 1
        return jax.random.fold_in(self._key, self._calls - 1)

    def __getattr__(self, name: str) -> Child:
        if name.startswith("_") or name not in self._children.layers:
            raise AttributeError(
                f"{self._children.owner} has no child {name!r}; its children are {list(self._children.layers)}"
            )
        return Child(self, name)

    def _call(self, name: str, x: Any) -> Any:
        position = self._calls
        self._calls += 1
        if self._making and name not in self._specs:
            spec = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), x)
            self._specs[name] = position, spec
            assert self._key is not None
            params, state = self._children.init(name, self._key, spec, position)
            merge(name, params, self._params)
            merge(name, state, self._state)
        y, state = self._children.apply(
            name, self._params, self._state, x, key=self._key, train=self.train, position=position
        )
        merge(name, state, self._state)
        return y

    def _params_of(self, name: str) -> Params:
        if self._making and name not in self._specs:
            raise LayerError(
                self._children.owner,
                f"uses the parameters of {name!r} before its first call, which makes them",
            )
        return self._params.get(name, {})


def wire(forward: Callable[[Net, Any], Any], /, **children: Layer) -> Layer:
    """A layer written as a function ``forward(net, x) -> y`` that calls its children by name.

    Any directed graph of layers can be written so; the function says what is computed, and the
    library threads state and keys. A child that is called twice has one set of parameters, and
    its state passes from the first call to the second. A call inside ``jax.lax.scan`` or
    ``jax.checkpoint`` is not seen as such: loop over a layer's own ``apply`` there.

    Args:
      forward: a pure function of ``net`` (children as attributes, ``net.train``, ``net.key()``
        and ``net.child.params``) and of the layer's input.
      children: the layers, under the names by which ``forward`` calls them.

    Raises:
      LayerError: where a child is never called, or ``forward`` asks for one that is not there.

    >>> def forward(net, x):
    ...     h = net.stem(x)
    ...     return net.head(h + net.block(net.block(h)))
    >>> model = layers.wire(
    ...     forward, stem=layers.dense(8), block=layers.dense(8), head=layers.dense(2)
    ... )
    >>> params, state = model.init(jax.random.key(0), jnp.zeros((1, 4)))
    >>> sorted(params)
    ['block', 'head', 'stem']
    """
    clash = sorted(name for name in children if name in _RESERVED or name.startswith("_"))
    if clash:
        raise ValueError(
            f"wire: {clash} cannot be names of children: net.key() and net.train have other uses, and names "
            "that begin with _ are its own"
        )
    kids = Children("wire", name_children("wire", (), children))

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        called: dict[str, tuple[int, Any]] = {}

        # The function is only traced here, to learn which input each child sees first. The
        # parameters made while tracing are abstract, so they are made once more below, for good.
        def trace(key: Array, x: Any, train: bool) -> Any:
            net = Net(kids, {}, {}, key, train=train, making=True)
            y = forward(net, x)
            for name, (position, spec) in net._specs.items():
                called.setdefault(name, (position + train * _TRAINING, spec))
            return y

        with inferring():
            jax.eval_shape(partial(trace, train=False), key, x)
            if len(called) < len(kids.layers):  # a child may be called in training only: an auxiliary loss
                jax.eval_shape(partial(trace, train=True), key, x)
        unused = [name for name in kids.layers if name not in called]
        if unused:
            raise LayerError(
                "wire", f"never calls its children {unused}: call them in the function or drop them"
            )
        params: dict[str, Any] = {}
        state: dict[str, Any] = {}
        for name, (position, spec) in called.items():
            child_params, child_state = kids.init(name, key, spec, position)
            merge(name, child_params, params)
            merge(name, child_state, state)
        return params, state

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        kids.check(params, state, key)
        net = Net(kids, params, state, key, train, making=False)
        y = forward(net, x)
        return y, net._state

    return Layer(init, apply, "wire_")
