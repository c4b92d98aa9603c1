"""What every layer promises, as checks that raise AssertionError."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit import tree
from nnkit.types import Layer

KEY = jax.random.key(0)


def made(layer: Layer, x: Any, seed: int = 0) -> tuple[Any, Any]:
    """Parameters and state that are no special case: zeros and ones are moved off their values."""
    params, state = layer.init(jax.random.key(seed), x)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 100), max(len(leaves), 1))
    moved = [p + 0.1 * jax.random.normal(k, p.shape, p.dtype) for p, k in zip(leaves, keys, strict=False)]
    return jax.tree.unflatten(structure, moved), state


def close(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    left, right = tree.flatten(a), tree.flatten(b)
    assert left.keys() == right.keys(), (list(left), list(right))
    for path in left:
        assert left[path].dtype == right[path].dtype, path
        np.testing.assert_allclose(left[path], right[path], rtol=rtol, atol=atol, err_msg=path)


def equal(a: Any, b: Any) -> None:
    close(a, b, rtol=0, atol=0)


def has_the_protocols_signature(layer: Layer, x: Any) -> None:
    assert [*inspect.signature(layer.init).parameters] == ["key", "x"]
    parameters = inspect.signature(layer.apply).parameters
    assert [*parameters] == ["params", "state", "x", "key", "train"]
    assert parameters["key"].kind == parameters["train"].kind == inspect.Parameter.KEYWORD_ONLY
    assert parameters["key"].default is None
    assert parameters["train"].default is inspect.Parameter.empty


def init_looks_at_shapes_only(layer: Layer, x: Any) -> None:
    spec = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), x)
    from_array, from_spec = layer.init(KEY, x), layer.init(KEY, spec)
    equal(from_array, from_spec)
    shapes = jax.eval_shape(layer.init, KEY, x)
    assert jax.tree.structure(shapes) == jax.tree.structure(from_array)
    for leaf, shape in zip(jax.tree.leaves(from_array), jax.tree.leaves(shapes), strict=True):
        assert isinstance(leaf, jax.Array)
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)


def jit_equals_eager(layer: Layer, x: Any) -> None:
    params, state = made(layer, x)
    compiled = jax.jit(layer.apply, static_argnames="train")
    for train in (True, False):
        eager = layer.apply(params, state, x, key=KEY, train=train)
        close(eager, compiled(params, state, x, key=KEY, train=train))
        close(eager, layer.apply(params, state, x, key=KEY, train=train), 0, 0)


def vmap_equals_loop(layer: Layer, x: Any) -> None:
    """A stacked population of networks, each with its own parameters, state, input and key."""
    members = [made(layer, x, seed) for seed in range(3)]
    inputs = [jax.tree.map(lambda a, s=s: a * (1 + s) / 2, x) for s in range(3)]
    keys = jax.random.split(KEY, 3)

    def stack(trees: Any) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    for train in (True, False):

        def run(params: Any, state: Any, x: Any, key: Any, train: bool = train) -> Any:
            return layer.apply(params, state, x, key=key, train=train)

        mapped = jax.vmap(run)(
            stack([p for p, _ in members]), stack([s for _, s in members]), stack(inputs), keys
        )
        loop = stack([run(p, s, x, k) for (p, s), x, k in zip(members, inputs, keys, strict=True)])
        close(mapped, loop)


def gradients_equal_finite_differences(layer: Layer, x: Any) -> None:
    """In float64, with respect to parameters and input, along random directions."""
    with jax.enable_x64(True):
        x = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), x)
        params, state = made(layer, x)

        def value(params: Any, x: Any) -> jax.Array:
            y, _ = layer.apply(params, state, x, key=KEY, train=True)
            return sum(jnp.sum(jnp.sin(leaf + 0.3)) for leaf in jax.tree.leaves(y))

        grads = jax.grad(value, argnums=(0, 1))(params, x)
        rng = np.random.default_rng(0)
        direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), (params, x))
        h = 1e-6

        def moved(sign: float) -> jax.Array:
            at = jax.tree.map(lambda a, d: a + sign * h * d, (params, x), direction)
            return value(*at)

        expected = (moved(1.0) - moved(-1.0)) / (2 * h)
        products = jax.tree.map(lambda g, d: jnp.sum(g * d), grads, direction)
        np.testing.assert_allclose(sum(jax.tree.leaves(products)), expected, rtol=1e-6, atol=1e-7)


def state_keeps_its_form_and_training_alone_changes_it(layer: Layer, x: Any) -> None:
    params, state = made(layer, x)
    _, trained = layer.apply(params, state, x, key=KEY, train=True)
    assert jax.tree.structure(trained) == jax.tree.structure(state)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(trained), strict=True):
        assert (old.shape, old.dtype, old.weak_type) == (new.shape, new.dtype, new.weak_type)
    _, tested = layer.apply(params, state, x, train=False)
    equal(tested, state)


def compiles_once(layer: Layer, x: Any) -> None:
    traces = 0

    @jax.jit
    def step(params: Any, state: Any, x: Any, key: Any) -> Any:
        nonlocal traces
        traces += 1
        return layer.apply(params, state, x, key=key, train=True)[1]

    params, state = made(layer, x)
    for seed in range(3):
        state = step(params, state, x, jax.random.key(seed))
    assert traces == 1, f"traced {traces} times"


def randomness_comes_from_the_key(layer: Layer, x: Any, random: bool) -> None:
    params, state = made(layer, x)

    def run(seed: int) -> Any:
        return layer.apply(params, state, x, key=jax.random.key(seed), train=True)[0]

    equal(run(1), run(1))
    same = all(
        bool((a == b).all()) for a, b in zip(jax.tree.leaves(run(1)), jax.tree.leaves(run(2)), strict=True)
    )
    assert same != random, (
        "different keys gave the same output" if random else "the output depends on the key"
    )
    layer.apply(params, state, x, train=False)  # no key is needed at test time
    if not random:
        layer.apply(params, state, x, train=True)


def no_key_is_used_twice(layer: Layer, x: Any) -> None:
    with jax.debug_key_reuse(True):
        params, state = jax.jit(layer.init)(jax.random.key(5), x)
        try:
            jax.jit(layer.apply, static_argnames="train")(params, state, x, key=jax.random.key(6), train=True)
        except jax.errors.KeyReuseError as error:
            raise AssertionError(str(error)) from error


def examples_are_independent(layer: Layer, x: Any, train: bool) -> None:
    """Output i has no gradient with respect to input j."""
    params, state = made(layer, x)

    def others(x: Any) -> jax.Array:
        y, _ = layer.apply(params, state, x, key=KEY, train=train)
        return sum(jnp.sum(jnp.sin(leaf[1:] + 0.3)) for leaf in jax.tree.leaves(y))

    for grad in jax.tree.leaves(jax.grad(others)(x)):
        np.testing.assert_array_equal(grad[0], 0)


def output_has_the_inputs_dtype(layer: Layer, x: Any) -> None:
    for dtype in (jnp.bfloat16, jnp.float16):
        low = jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), x)
        params, state = layer.init(KEY, low)
        for train in (True, False):
            y, _ = layer.apply(params, state, low, key=KEY, train=train)
            assert {leaf.dtype for leaf in jax.tree.leaves(y)} == {jnp.dtype(dtype)}


def paths_are_readable_and_unique(layer: Layer, x: Any) -> None:
    params, state = layer.init(KEY, x)
    for part in (params, state):
        try:
            paths = list(tree.flatten(part))
        except ValueError as error:
            raise AssertionError(str(error)) from error
        for path in paths:
            assert all(name.isidentifier() and not name.endswith("_") for name in path.split("/")), path
