"""``share``: one parameter in several places of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nnkit import tree
from nnkit.checks import LayerError, unknown_name
from nnkit.layers.children import Window, check_child
from nnkit.types import Array, Layer, Params, Spec, State

__all__ = ["share"]

Source = str | tuple[str, Callable[[Array], Array]]
_OWNER = "share"


def share(layer: Layer, ties: Mapping[str, Source]) -> Layer:
    """The layer with some of its parameters tied to others: ``θ[target] = f(θ[source])``.

    A target is not in the parameter tree any more, so that it is counted, decayed, saved and updated once,
    as its source; ``apply`` supplies it, and its gradient adds to the source's. The names are the paths
    of the model's parameters; a path that leads to a layer ties all parameters beneath it. A layer that
    is simply called twice needs none of this: :func:`wire` does that.

    Args:
      layer: any layer.
      ties: from target to source: ``{"head/kernel": "embedding_0/embedding"}``, or to a pair of the source
        and a function of each of its arrays, ``("embedding_0/embedding", jnp.transpose)``.

    Raises:
      LayerError: for paths that are not in the model, a source that is itself tied, and arrays whose
        shapes or dtypes differ.

    Source: Press & Wolf 2017, "Using the output embedding to improve language models".

    >>> autoencoder = layers.serial(code=layers.dense(2), back=layers.dense(5))
    >>> tied = layers.share(autoencoder, {"back/kernel": ("code/kernel", jnp.transpose)})
    >>> params, state = tied.init(jax.random.key(0), jnp.zeros((1, 5)))
    >>> list(tree.flatten(params))
    ['back/bias', 'code/bias', 'code/kernel']
    >>> tied.apply(params, state, jnp.ones((3, 5)), train=False)[0].shape
    (3, 5)
    """
    check_child(_OWNER, layer)
    rules = {target: _rule(target, source) for target, source in dict(ties).items()}
    _check_rules(rules)

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        params, state = layer.init(key, x)
        known = _paths(params)
        for path in {**rules, **{source: None for source, _ in rules.values()}}:
            if path not in known:
                raise LayerError(_OWNER, f"ties an {unknown_name('parameter', path, known)}")
        for target, (source, f) in rules.items():
            _check_fit(target, _at(params, target), source, _at(params, source), f)
        for target in rules:
            params = _without(params, target.split("/"))
        return params, state

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        whole = params
        known = _paths(params)
        for target, (source, f) in rules.items():
            if target in known:
                raise LayerError(
                    _OWNER,
                    f"got the parameter {target!r}, which it ties to {source!r}: pass what its own init returned",
                )
            if source not in known:
                raise LayerError(
                    _OWNER, f"got parameters without {source!r}: pass what its own init returned"
                )
            whole = _with(whole, target.split("/"), jax.tree.map(f, _at(params, source)))
        window = Window(lambda params: layer.apply(params, state, x, key=key, train=train))
        (y, new_state), seen = window.run(window.added, whole)
        window.tell(seen, params, new_state)
        return y, new_state

    return layer._replace(init=init, apply=apply)


def _rule(target: Any, source: Any) -> tuple[str, Any]:
    path: Any = source
    f: Any = lambda a: a
    if isinstance(source, tuple) and len(source) == 2:
        path, f = source
    if not isinstance(target, str) or not isinstance(path, str) or not callable(f):
        raise TypeError(
            "share takes a dict from the path of a parameter to that of its source, or to a pair of the source "
            f"and a function, got {target!r}: {source!r}"
        )
    return path, f


def _check_rules(rules: Mapping[str, tuple[str, Any]]) -> None:
    sources = [source for source, _ in rules.values()]
    for target in rules:
        for other in [*(t for t in rules if t != target), *sources]:
            if _overlap(target, other):
                raise ValueError(
                    f"share: {target!r} is tied and cannot also be, hold or lie in {other!r}, which is tied or a "
                    "source: tie each parameter once, to one that stays"
                )


def _overlap(a: str, b: str) -> bool:
    return f"{a}/".startswith(f"{b}/") or f"{b}/".startswith(f"{a}/")


def _paths(params: Params) -> set[str]:
    """Of all parameters and of the layers that hold them."""
    leaves = tree.flatten(params)
    return {"/".join(path.split("/")[: i + 1]) for path in leaves for i in range(path.count("/") + 1)}


def _at(params: Any, path: str) -> Any:
    for name in path.split("/"):
        params = params[name]
    return params


def _without(params: Params, names: list[str]) -> dict[str, Any]:
    """The tree without what is at the path, and without a dict that is left empty."""
    first, *rest = names
    new = dict(params)
    part = _without(new[first], rest) if rest else {}
    if part:
        return {**new, first: part}
    del new[first]
    return new


def _with(params: Params, names: list[str], value: Any) -> dict[str, Any]:
    first, *rest = names
    return {**params, first: _with(params.get(first, {}), rest, value) if rest else value}


def _check_fit(target: str, old: Any, source: str, at_source: Any, f: Any) -> None:
    new = jax.eval_shape(lambda part: jax.tree.map(f, part), at_source)
    want, got = (
        {path: f"{a.dtype}{a.shape}" for path, a in tree.flatten(part).items()} for part in (old, new)
    )
    if want == got:
        return
    if want.keys() != got.keys():
        raise LayerError(
            _OWNER, f"ties {target!r}, which has {sorted(want)}, to {source!r}, which has {sorted(got)}"
        )
    path = next(path for path in want if want[path] != got[path])
    where = f"{target}/{path}" if path else target
    turned = jnp.ndim(_at(old, path) if path else old) == 2 and _turned(old, new, path)
    hint = f": write {target!r}: ({source!r}, jnp.transpose)" if turned else ""
    raise LayerError(_OWNER, f"ties {where!r}, {want[path]}, to {source!r}, which gives {got[path]}{hint}")


def _turned(old: Any, new: Any, path: str) -> bool:
    a, b = (_at(part, path) if path else part for part in (old, new))
    return a.shape == b.shape[::-1]
