"""Combinators: layers made of layers.

Each threads its children's state and gives each child its own key; see ``children.py``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from nnkit.checks import LayerError
from nnkit.layers.children import Children, inferring, merge, name_children
from nnkit.layers.lift import identity, stateless
from nnkit.layers.sequence import Sequence
from nnkit.types import Array, Layer, Params, Spec, State

__all__ = ["add", "branch", "concatenate", "frozen", "named", "parallel", "residual", "serial"]


def named(name: str, layer: Layer) -> Layer:
    """The same layer under a name of the user's, which paths, tables and errors then show.

    >>> model = layers.serial(layers.named("hidden", layers.dense(8)), layers.relu)
    >>> params, _ = model.init(jax.random.key(0), jnp.zeros((1, 4)))
    >>> sorted(params)
    ['hidden']
    """
    if not isinstance(name, str) or not name or "/" in name or name.endswith("_"):
        raise ValueError(
            f"a layer's name must be a string without '/' and without '_' at its end, got {name!r}"
        )
    return layer._replace(name=name)


def serial(*layers: Layer, **named_layers: Layer) -> Layer:
    """One layer after the other: ``y = f_n(...f_2(f_1(x)))``.

    Keyword arguments are further layers under names of the user's. With no layers it is the
    identity. The lengths of a ``layers.Sequence`` reach the first layer only; ``stacked`` hands them on.

    Raises:
      LayerError: where a recurrent layer follows one that was given lengths.

    >>> model = layers.serial(layers.dense(8), layers.relu, layers.dense(8), layers.relu, head=layers.dense(2))
    >>> params, state = model.init(jax.random.key(0), jax.ShapeDtypeStruct((1, 4), jnp.float32))
    >>> sorted(params)
    ['dense_0', 'dense_1', 'head']
    >>> y, state = model.apply(params, state, jnp.ones((3, 4)), train=False)
    >>> y.shape
    (3, 2)
    """
    children = Children("serial", name_children("serial", layers, named_layers))

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        params: dict[str, Any] = {}
        state: dict[str, Any] = {}
        padded: tuple[int, ...] = ()
        for i, name in enumerate(children.layers):
            padded = _check_lengths(children, name, x, padded)
            child_params, child_state = children.init(name, key, x, i)
            merge(name, child_params, params)
            merge(name, child_state, state)
            x = _output_spec(children, name, params, state, x, key, i)
        return params, state

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        children.check(params, state, key)
        new_state: dict[str, Any] = {}
        padded: tuple[int, ...] = ()
        for i, name in enumerate(children.layers):
            padded = _check_lengths(children, name, x, padded)
            x, child = children.apply(name, params, state, x, key=key, train=train, position=i)
            merge(name, child, new_state)
        return x, new_state

    return Layer(init, apply, "serial_")


_RECURRENT = frozenset({"recurrent_", "simple_rnn_", "lstm_", "gru_", "bidirectional_", "stacked_"})


def _check_lengths(children: Children, name: str, x: Any, padded: tuple[int, ...]) -> tuple[int, ...]:
    """The (batch, time) that x has with lengths, or had when they were last seen; () where it has none.

    Raises where a recurrent layer would run over padding since the layer before got the lengths alone.
    """
    if isinstance(x, Sequence):
        return () if x.lengths is None else getattr(x.x, "shape", ())[:2]
    shape = getattr(x, "shape", ())
    if len(shape) < 3 or shape[:2] != padded:  # a last_only has ended the sequence
        return ()
    if children.layers[name].name in _RECURRENT:
        raise LayerError(
            "serial",
            f"was given lengths and has lost them where {name} runs, since layers give arrays: put the recurrent "
            "layers together in stacked(...), or call each with layers.Sequence(x, lengths) in wire",
        )
    return padded


def _output_spec(
    children: Children, name: str, params: Params, state: State, x: Spec, key: Array, position: int
) -> Spec:
    def run(params: Params, state: State, x: Any, key: Array) -> Any:
        return children.apply(name, params, state, x, key=key, train=False, position=position)[0]

    with inferring():
        return jax.eval_shape(run, params, state, x, key)


def parallel(*layers: Layer, **named_layers: Layer) -> Layer:
    """The i-th layer on the i-th input: ``(x_1, ..., x_n) -> (f_1(x_1), ..., f_n(x_n))``.

    >>> both = layers.parallel(layers.dense(2), layers.identity)
    >>> params, state = both.init(jax.random.key(0), (jnp.zeros((1, 4)), jnp.zeros((1, 3))))
    >>> (a, b), _ = both.apply(params, state, (jnp.zeros((5, 4)), jnp.zeros((5, 3))), train=False)
    >>> a.shape, b.shape
    ((5, 2), (5, 3))
    """
    return _side_by_side("parallel", layers, named_layers, spread=False)


def branch(*layers: Layer, **named_layers: Layer) -> Layer:
    """All layers on the same input: ``x -> (f_1(x), ..., f_n(x))``.

    Followed by ``add`` or ``concatenate()`` it is a block with several paths. (stax: ``FanOut``
    followed by ``parallel``.)

    >>> wide = layers.serial(layers.dense(8), layers.relu, layers.dense(3))
    >>> inception = layers.serial(layers.branch(layers.dense(2), wide), layers.concatenate())
    >>> params, state = inception.init(jax.random.key(0), jnp.zeros((1, 4)))
    >>> inception.apply(params, state, jnp.zeros((5, 4)), train=False)[0].shape
    (5, 5)
    """
    return _side_by_side("branch", layers, named_layers, spread=True)


def _side_by_side(
    owner: str, layers: tuple[Layer, ...], named_layers: dict[str, Layer], spread: bool
) -> Layer:
    children = Children(owner, name_children(owner, layers, named_layers))
    n = len(children.layers)

    def inputs(x: Any) -> tuple[Any, ...]:
        if spread:
            return (x,) * n
        if not isinstance(x, tuple | list) or len(x) != n:
            got = f"{len(x)} of them" if isinstance(x, tuple | list) else type(x).__name__
            raise LayerError(owner, f"has {n} layers and takes a tuple of {n} inputs, got {got}")
        return tuple(x)

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        params: dict[str, Any] = {}
        state: dict[str, Any] = {}
        for i, (name, x_i) in enumerate(zip(children.layers, inputs(x), strict=True)):
            child_params, child_state = children.init(name, key, x_i, i)
            merge(name, child_params, params)
            merge(name, child_state, state)
        return params, state

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        children.check(params, state, key)
        outputs = []
        new_state: dict[str, Any] = {}
        for i, (name, x_i) in enumerate(zip(children.layers, inputs(x), strict=True)):
            y, child = children.apply(name, params, state, x_i, key=key, train=train, position=i)
            merge(name, child, new_state)
            outputs.append(y)
        return tuple(outputs), new_state

    return Layer(init, apply, f"{owner}_")


def residual(layer: Layer, shortcut: Layer = identity) -> Layer:
    """A block with a way around it: ``y = shortcut(x) + f(x)``.

    ``shortcut`` is a projection (a dense layer, a 1×1 convolution) where ``f`` changes the shape. Both take
    the input whole: around a layer of a tuple, ``(x, mask)``, :func:`wire` adds what is to be added.

    Raises:
      LayerError: where the two do not give arrays of one shape.

    Source: He et al. 2015, "Deep Residual Learning for Image Recognition".

    >>> block = layers.residual(layers.serial(layers.dense(8), layers.relu, layers.dense(4)))
    >>> params, state = block.init(jax.random.key(0), jnp.zeros((1, 4)))
    >>> sorted(params["body"])
    ['dense_0', 'dense_1']
    """
    both = _side_by_side("residual", (), {"body": layer, "shortcut": shortcut}, spread=True)

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        (y, around), state = both.apply(params, state, x, key=key, train=train)
        for name, part in (("shortcut", around), ("body", y)):
            if not hasattr(part, "shape"):
                raise LayerError(
                    "residual",
                    f"adds arrays and has a {name} that gives {type(part).__name__}: write the sum in wire, as in "
                    "wire(lambda net, x: x[0] + net.body(x), body=...)",
                )
        if y.shape != around.shape:
            raise LayerError(
                "residual",
                f"has a body that gives {y.shape} and a shortcut that gives {around.shape}: "
                "pass residual(body, shortcut) with a projection to the body's shape",
            )
        return around + y, state

    return both._replace(apply=apply)


def _sum(xs: Any) -> Array:
    xs = _inputs("add", xs)
    shapes = {x.shape for x in xs}
    if len(shapes) > 1:
        raise LayerError(
            "add",
            f"got shapes {', '.join(str(x.shape) for x in xs)}: they must be equal "
            "(put a projection on the shortcut)",
        )
    total = xs[0]
    for x in xs[1:]:
        total = total + x
    return total


add: Layer = stateless(_sum, name="add_")
"""The sum of a tuple of equally shaped inputs. (stax: ``FanInSum``.)"""


def concatenate(axis: int = -1) -> Layer:
    """A tuple of inputs joined along ``axis``. (stax: ``FanInConcat``.)

    >>> y, _ = layers.concatenate().apply({}, {}, (jnp.zeros((5, 2)), jnp.zeros((5, 3))), train=False)
    >>> y.shape
    (5, 5)
    """
    return stateless(lambda xs: jnp.concatenate(_inputs("concatenate", xs), axis), name="concatenate_")


def _inputs(owner: str, xs: Any) -> tuple[Array, ...]:
    if not isinstance(xs, tuple | list) or not xs:
        raise LayerError(owner, f"takes a tuple of inputs, as branch(...) returns, got {type(xs).__name__}")
    return tuple(xs)


def frozen(layer: Layer) -> Layer:
    """The layer as it is: no gradient reaches its parameters and it always runs as at test time.

    Gradients still flow through it to its input. Its parameters stay in the tree: a penalty or weight
    decay still moves them unless a mask (``mask="head/.*"``) leaves them out. With train=True its state stays
    too, that of layers that change theirs at test time (a cache) included.

    >>> model = layers.serial(backbone=layers.frozen(layers.dense(3)), head=layers.dense(1))
    >>> params, state = model.init(jax.random.key(0), jnp.zeros((1, 4)))
    >>> loss = lambda p: model.apply(p, state, jnp.ones((2, 4)), train=True)[0].sum()
    >>> jax.tree.map(lambda g: bool((g == 0).all()), jax.grad(loss)(params))["backbone"]
    {'bias': True, 'kernel': True}
    """

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        y, new_state = layer.apply(jax.lax.stop_gradient(params), state, x, key=key, train=False)
        return y, state if train else new_state

    return layer._replace(apply=apply)
