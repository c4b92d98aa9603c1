"""Spectral normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from nnkit.checks import LayerError
from nnkit.layers.lift import positive_int
from nnkit.layers.normalization import check_epsilon
from nnkit.layers.reparametrize import as_names, checked_names, initialising, named, replace
from nnkit.tree import sum_of_squares, wide
from nnkit.types import Array, Layer, Params, Spec, State

__all__ = ["spectral_norm"]

_KEY = "spectral_norm"


def spectral_norm(
    layer: Layer,
    *,
    n_steps: int = 1,
    epsilon: float | Array = 1e-12,
    convention: Literal["flax", "pytorch"] = "flax",
    names: str | Sequence[str] = ("kernel",),
) -> Layer:
    """The layer with kernels divided by their largest singular value, ``kernel / σ``.

    A kernel is a matrix W (in, out), all axes but the last as one. σ = vᵀ W u comes of a power iteration whose
    vectors are state: each training step goes on from the last one's, so that one iteration a step follows
    the kernel as it learns. σ is differentiated with u and v held fixed.

    - ``"flax"``: ``v <- W u / |W u|, u <- Wᵀ v / |Wᵀ v|`` from the state's u (out,), random at first; at
      test time too, though the state then stays.
    - ``"pytorch"``: ``u <- Wᵀ v / |Wᵀ v|, v <- W u / |W u|`` from the state's v (in,); at test time u and v are
      the state's. 15 iterations are made at the start.

    The parameters are the layer's own, and so is the state but for ``spectral_norm`` in it: the vectors at the
    kernels' paths, in float32 at least. Inside a layer that stacks its parameters (``repeat``), wrap the
    block, not the stack.

    Args:
      layer: any layer, or a network of layers.
      n_steps: how many iterations a call makes.
      epsilon: added to the squared norms by which vectors are divided (in PyTorch: the least norm).
      convention: see above.
      names: the name or names of the parameters that are normalised, at any depth.

    Raises:
      LayerError: where the layer has no parameter of these names, or one that is no matrix, or stacks
        them (``repeat``), or has a state called ``spectral_norm``.

    Source: Miyato et al. 2018, "Spectral normalization for generative adversarial networks"; Flax's
    ``SpectralNorm`` and PyTorch's ``torch.nn.utils.parametrizations.spectral_norm``.

    >>> layer = layers.spectral_norm(layers.dense(2, use_bias=False), n_steps=20)
    >>> params, state = layer.init(jax.random.key(0), jnp.zeros((1, 3)))
    >>> y, state = layer.apply(params, state, jnp.eye(3), train=True)
    >>> jnp.linalg.svd(y, compute_uv=False).max().round(4).tolist()
    1.0
    """
    n_steps = positive_int(n_steps, "spectral_norm(n_steps=...)")
    check_epsilon("spectral_norm", epsilon)
    if convention not in ("flax", "pytorch"):
        raise ValueError(f"spectral_norm(convention=...) must be 'flax' or 'pytorch', got {convention!r}")
    pytorch = convention == "pytorch"
    names = as_names(names)

    def init(key: Array, x: Spec, /) -> tuple[Params, State]:
        vector_key = jax.random.fold_in(key, 2**31)
        with initialising(_KEY, names):
            params, state = layer.init(key, x)
        checked_names(_KEY, layer, names, params)
        if _KEY in state:
            raise LayerError(
                _KEY,
                "is around a layer that has a state called 'spectral_norm': one with names=[...] is enough",
            )
        made = 0

        def begin(path: tuple[str, ...], kernel: Array) -> dict[str, Array]:
            nonlocal made
            made += 1
            w = _matrix(path, kernel)
            k = jax.random.fold_in(vector_key, made)
            if not pytorch:
                return {"u": jax.random.normal(k, w.shape[1:], w.dtype)}
            v = _unit(jax.random.normal(k, w.shape[:1], w.dtype), epsilon)
            u, v = _iterate(w, v, 15, epsilon)
            return {"u": u, "v": v}

        return params, {**state, _KEY: named(params, names, begin)}

    def apply(
        params: Params, state: State, x: Any, *, key: Array | None = None, train: bool
    ) -> tuple[Any, State]:
        def vectors(path: tuple[str, ...], kernel: Array) -> dict[str, Array]:
            w = jax.lax.stop_gradient(_matrix(path, kernel))
            old = jax.tree.map(lambda a: a.astype(w.dtype), _at(state.get(_KEY, {}), path))
            if not pytorch:
                v, u = _iterate(w.T, old["u"], n_steps, epsilon)
            elif train:
                u, v = _iterate(w, old["v"], n_steps, epsilon)
            else:
                return old
            return {"u": u, "v": v}

        def divided(path: tuple[str, ...], kernel: Array) -> Array:
            w, now = _matrix(path, kernel), _at(found, path)
            sigma = now["v"] @ w @ now["u"]
            return (w / jnp.where(sigma != 0, sigma, 1)).reshape(kernel.shape).astype(kernel.dtype)

        def kept(path: tuple[str, ...], kernel: Array) -> dict[str, Array]:
            # A kernel of zeros makes the vectors 0, from which no iteration returns: the old ones stay.
            now = _at(found, path)
            return {
                name: jnp.where((now[name] == 0).all(), old, now[name].astype(old.dtype))
                for name, old in _at(state[_KEY], path).items()
            }

        found = named(params, names, vectors)
        inner = {name: part for name, part in state.items() if name != _KEY}
        y, inner = layer.apply(replace(params, names, divided), inner, x, key=key, train=train)
        return y, {**inner, _KEY: named(params, names, kept) if train else state[_KEY]}

    return layer._replace(init=init, apply=apply)


def _matrix(path: tuple[str, ...], kernel: Any) -> Array:
    if getattr(kernel, "ndim", 0) < 2:
        what = f"shape {kernel.shape}" if hasattr(kernel, "shape") else type(kernel).__name__
        raise LayerError("spectral_norm", f"takes matrices and got {what} for {'/'.join(path)}")
    return kernel.reshape(-1, kernel.shape[-1]).astype(wide(kernel.dtype))


def _iterate(w: Array, right: Array, steps: int, epsilon: float | Array) -> tuple[Array, Array]:
    """``left <- unit(Wᵀ right), right <- unit(W left)``, ``steps`` times; W is (right's length, left's)."""

    def step(_: Any, vectors: tuple[Array, Array]) -> tuple[Array, Array]:
        left = _unit(vectors[1] @ w, epsilon)
        return left, _unit(w @ left, epsilon)

    return jax.lax.fori_loop(0, steps, step, (jnp.zeros(w.shape[1], w.dtype), right), unroll=steps <= 2)


def _unit(vector: Array, epsilon: float | Array) -> Array:
    squares = sum_of_squares(vector)
    return vector * jax.lax.rsqrt(squares + jnp.asarray(epsilon, squares.dtype))


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        if name not in tree:
            raise LayerError(
                "spectral_norm",
                f"has no vectors for {'/'.join(path)} in its state: pass the state that this model's init made",
            )
        tree = tree[name]
    return tree
