"""Layers each of which breaks one promise, and the title of the check that must catch it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning

from nnkit import layers
from nnkit.types import Layer


def layer(
    apply: Any, init: Any = lambda key, x: ({"w": jnp.ones(4, x.dtype)}, {"s": jnp.zeros((), x.dtype)})
) -> Layer:
    return Layer(init, apply, "wrong_")


def plain(f: Any) -> Layer:
    """A stateless layer of a function of x and of its parameter."""

    def apply(params, state, x, *, key=None, train):
        return f(x, params["w"]), state

    return layer(apply)


def _default_mode(params, state, x, *, key=None, train=True):
    return x * params["w"], state


def _positional(params, state, x, key=None, train=False):
    return x * params["w"], state


def _good(params, state, x, *, key=None, train):
    return x * params["w"], state


class Counter:
    n = 0

    def __call__(self) -> float:
        self.n += 1
        return float(self.n)


def _by_values(key, x):
    value = np.mean(np.asarray(x)) if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) else 0.0
    return {"w": jnp.full(4, value, x.dtype)}, {}


def _by_clock(key, x, count=Counter()):  # noqa: B008
    return {"w": jnp.full(4, count(), x.dtype)}, {}


def _counting(count):
    def apply(params, state, x, *, key=None, train):
        return x * params["w"] + jnp.asarray(count(), x.dtype), state

    return layer(apply)


def _numpy_draws(params, state, x, *, key=None, train):
    return x * params["w"] + jnp.asarray(np.random.default_rng().normal(size=x.shape), x.dtype), state


def _writing(params, state, x, *, key=None, train):
    state["s"] = state["s"] + 1
    return x * params["w"], state


def _eager_only(params, state, x, *, key=None, train):
    return x * params["w"] * (1.0 if isinstance(x, jax.core.Tracer) else 1.01), state


def _other_shape_when_traced(params, state, x, *, key=None, train):
    return (x if isinstance(x, jax.core.Tracer) else x[:, :2]) * 1, state


def _from_the_front(params, state, x, *, key=None, train):
    # Looks at how many axes there are: under vmap the layer cannot see the mapped one, but a
    # custom batching rule can be wrong.
    return _doubled(x) * params["w"], state


@jax.custom_batching.custom_vmap
def _doubled(x):
    return 2 * x


@_doubled.def_vmap
def _(axis_size, in_batched, x):
    return 3 * x, True


@jax.custom_vjp
def _square(x):
    return x**2


_square.defvjp(lambda x: (x**2, x), lambda x, g: (g * x,))


@jax.custom_jvp
def _cube(x):
    return x**3


# Right at first order; the stopped slope makes the second derivative 0.
_cube.defjvp(lambda p, t: (p[0] ** 3, 3 * jax.lax.stop_gradient(p[0]) ** 2 * t[0]))


@jax.custom_jvp
def _product(a, b):
    return a * b


# Right at first order and along each argument alone; the mixed second derivative is 0 in place of 1.
_product.defjvp(
    lambda p, t: (p[0] * p[1], jax.lax.stop_gradient(p[1]) * t[0] + jax.lax.stop_gradient(p[0]) * t[1])
)


def _other_constant(params, state, x, *, key=None, train):
    return x * params["w"] * _BY_MODE[train].astype(x.dtype), state


_BY_MODE = {True: jnp.ones(4), False: jnp.array([1.0, 1.0, 1.0, jnp.nan])}


def _own_key(key, x):
    return {"w": jax.random.normal(jax.random.key(3), (4,), x.dtype)}, {}


@jax.custom_vjp
def _sine(x):
    return jnp.sin(x)


_sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


def _growing(params, state, x, *, key=None, train):
    return x * params["w"], {**state, "new": jnp.zeros((), x.dtype)}


def _widening_state(params, state, x, *, key=None, train):
    return x * params["w"], {"s": state["s"].astype(jnp.bfloat16)}


def _moving_at_test_time(params, state, x, *, key=None, train):
    return x * params["w"], {"s": state["s"] + 1}


def _weak_init(key, x):
    return {"w": jnp.ones(4, x.dtype)}, {"s": jnp.asarray(0.0)}


def _strong_state(params, state, x, *, key=None, train):
    return x * params["w"], {"s": (state["s"] + 1).astype(x.dtype) if train else state["s"]}


def _key_twice(params, state, x, *, key=None, train):
    if not train:
        return x * params["w"], state
    if key is None:
        raise ValueError("a key is needed")
    return x * jax.random.uniform(key, x.shape, x.dtype) * jax.random.normal(key, x.shape, x.dtype), state


def _key_twice_in_init(key, x):
    return {"a": jax.random.normal(key, (4,)), "w": jax.random.normal(key, (4,))}, {}


def _constant_key(params, state, x, *, key=None, train):
    if train and key is None:
        raise ValueError("a key is needed")
    return x * jax.random.uniform(jax.random.key(0), x.shape, x.dtype), state


def _draws_if_it_can(params, state, x, *, key=None, train):
    return (x if key is None or not train else x * jax.random.uniform(key, x.shape, x.dtype)), state


def _draws_at_test_time(params, state, x, *, key=None, train):
    if key is None:
        if train:
            raise ValueError("a key is needed")
        return x, state
    return x * jax.random.uniform(key, x.shape, x.dtype), state


def _asks_in_vain(params, state, x, *, key=None, train):
    if key is None and train:
        raise ValueError("a key is needed")
    return x * params["w"], state


def _mixing_in_training(params, state, x, *, key=None, train):
    return (x - x.mean(axis=0) if train else x), state


def _rotating(params, state, x, *, key=None, train):
    return jnp.roll(x, 1, 0), state


def _shared_init(key, x):
    zeros = jnp.zeros(4, x.dtype)
    return {"w": zeros}, {"mean": zeros}


_KEPT = {jnp.dtype(d): jnp.zeros(4, d) for d in (jnp.float32, jnp.bfloat16, jnp.float16)}


def _kept_init(key, x):
    return {"w": _KEPT.get(x.dtype, jnp.zeros(4, x.dtype))}, {}


class _NotSaved:
    pass


jax.tree_util.register_pytree_node(_NotSaved, lambda n: ((), None), lambda *_: _NotSaved())


def _by_device(params, state, x, *, key=None, train):
    return x * jax.lax.stop_gradient(_mean_of_part(jax.lax.stop_gradient(x))), state


@custom_partitioning
def _mean_of_part(x):
    return jnp.broadcast_to(jnp.mean(x), x.shape)


# Each device runs the whole function on its part: right for a sine, wrong for a mean.
_mean_of_part.def_partition(
    partition=lambda mesh, arguments, result: (
        mesh,
        lambda x: jnp.broadcast_to(jnp.mean(x), x.shape),
        result.sharding,
        (arguments[0].sharding,),
    ),
    infer_sharding_from_operands=lambda mesh, arguments, result: arguments[0].sharding,
    sharding_rule="i j -> i j",
)


def _compared(rate=0.5):
    return layers.stateless(lambda x: x * rate if rate > 0.1 else x)


def _rounded(rate=0.5):
    return layers.stateless(
        lambda x: (
            x * (jnp.round(rate * 10) if hasattr(rate, "aval") else rate).astype(x.dtype)
            if hasattr(rate, "aval")
            else x * rate
        )
    )


# title -> (name, layer, further arguments, words that the text must have)
WRONG: list[tuple[str, str, Layer, dict[str, Any], str]] = [
    (
        "signature",
        "the mode has a default",
        layer(_default_mode),
        {},
        r"expected  apply\(params, state, x, \*, key=None, train\)\n"
        r"  arrived   apply\(params, state, x, \*, key=None, train=True\)",
    ),
    ("signature", "the key is positional", layer(_positional), {}, r"a mode that has a default is forgotten"),
    (
        "signature",
        "init takes a dtype",
        Layer(lambda key, x, dtype: ({}, {}), _good, "wrong_"),
        {},
        r"arrived   init\(key, x, dtype\)",
    ),
    (
        "init",
        "init looks at values",
        layer(_good, _by_values),
        {},
        r"init of a ShapeDtypeStruct differs\n  at        0/w\[0\]",
    ),
    ("init", "a key of its own", layer(_good, _own_key), {}, r"init with two keys\n  at        params/w\n"),
    ("init", "init counts its calls", layer(_good, _by_clock), {}, "to the bit"),
    (
        "readable paths",
        "a slash in a name",
        layer(_good, lambda key, x: ({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}, "w": jnp.ones(4)}, {})),
        {},
        "two leaves of params have one path",
    ),
    (
        "readable paths",
        "a kind for a name",
        layer(_good, lambda key, x: ({"dense_": jnp.ones(1), "w": jnp.ones(4)}, {})),
        {},
        "arrived   'dense_'",
    ),
    (
        "readable paths",
        "a Python number",
        layer(_good, lambda key, x: ({"w": jnp.ones(4), "n": 1.0}, {})),
        {},
        "arrived   float 1.0",
    ),
    ("state", "the state grows", layer(_growing), {}, "with new added"),
    (
        "state",
        "the state narrows",
        layer(_widening_state),
        {},
        r"expected  float32\[\]\n  arrived   bfloat16\[\]",
    ),
    (
        "state",
        "the state is weakly typed",
        layer(_strong_state, _weak_init),
        {},
        r"expected  weakly typed float32\[\]",
    ),
    (
        "state at test time",
        "the state moves at test time",
        layer(_moving_at_test_time),
        {},
        r"at        s\n  expected  0.0 to the bit\n  arrived   1.0: \d+ ulp, 1 apart; 1 of 1 numbers differ",
    ),
    (
        "dtypes",
        "the output is widened",
        plain(lambda x, w: x.astype(jnp.float32) * w.astype(jnp.float32)),
        {},
        r"the output for bfloat16 input with train=True\n  at        y\n  expected  bfloat16\n  arrived   float32",
    ),
    (
        "dtypes",
        "the output is narrowed",
        plain(lambda x, w: (x * w).astype(jnp.float32) if x.dtype == jnp.float64 else x * w),
        {},
        "expected  float64",
    ),
    ("key reuse", "a key for two draws", layer(_key_twice), {}, "apply with train=True uses a key twice"),
    ("key reuse", "a key for two parameters", layer(_good, _key_twice_in_init), {}, "init uses a key twice"),
    ("randomness", "a constant key", layer(_constant_key), {}, "a constant key, or one of its own"),
    (
        "randomness",
        "draws where it gets a key",
        layer(_draws_if_it_can),
        {},
        "raise a LayerError for key=None when train=True",
    ),
    (
        "randomness",
        "draws at test time",
        layer(_draws_at_test_time),
        {},
        "return the expectation where train is False",
    ),
    (
        "randomness",
        "a key asked for in vain",
        layer(_asks_in_vain),
        {"random": False},
        "a key is asked for that is not used",
    ),
    ("randomness", "promised and not drawn", layer(_good), {"random": True}, "the layer was said to draw"),
    (
        "shapes as eval_shape says",
        "another shape when traced",
        layer(_other_shape_when_traced),
        {},
        r"has another shape or dtype\n  at        y\n  expected  float32\[6, 4\]\n  arrived   float32\[6, 2\]",
    ),
    (
        "purity",
        "a counter",
        _counting(Counter()),
        {},
        "a counter, a global, numpy's or Python's random numbers",
    ),
    (
        "purity",
        "numpy's random numbers",
        layer(_numpy_draws),
        {},
        "called again with the same arguments, differs",
    ),
    ("purity", "writes into the state", layer(_writing), {}, r"changes its arguments\n  at        1/s"),
    ("jit", "eager only", layer(_eager_only), {}, r"jit\(apply\) with train=True differs"),
    ("vmap", "a wrong batching rule", layer(_from_the_front), {}, r"vmap\(apply\) over two members"),
    (
        "one compilation",
        "a dtype that goes round",
        layer(_widening_state),
        {},
        "the state that goes round has another shape or dtype",
    ),
    (
        "donation",
        "two leaves in one buffer",
        layer(_good, _shared_init),
        {},
        "state/mean is the buffer of params/w",
    ),
    (
        "donation",
        "a module's constant",
        layer(_good, _kept_init),
        {},
        "params/w of a second call is the buffer of params/w",
    ),
    (
        "serialisation",
        "a function in the state",
        layer(_good, lambda key, x: ({"w": jnp.ones(4, x.dtype)}, {"f": jnp.sin})),
        {},
        "cannot be saved",
    ),
    (
        "independence of examples",
        "mixes the batch",
        plain(lambda x, w: x - x.mean(axis=0)),
        {"mixes_batch": True},
        "at test time too",
    ),
    (
        "independence of examples",
        "mixes in training",
        layer(_mixing_in_training),
        {},
        "pass mixes_batch=True",
    ),
    (
        "independence of examples",
        "rotates the batch",
        layer(_rotating),
        {},
        "the output of the other examples",
    ),
    (
        "independence of examples",
        "sums over the batch",
        plain(lambda x, w: (x * w).sum(0)),
        {},
        r"expected  a leading axis of 6\n  arrived   shape \(4,\)",
    ),
    (
        "independence of examples",
        "the last enters the others",
        plain(lambda x, w: x * w + x[-1:] * (jnp.arange(x.shape[0]) == 1)[:, None].astype(x.dtype)),
        {},
        r"after the last was exchanged, differs\n  at        y\[:-1\]",
    ),
    (
        "independence of examples",
        "the batch's size",
        plain(lambda x, w: x * w / x.shape[0]),
        {},
        "the size of the batch or an example's place in it",
    ),
    (
        "independence of examples",
        "the place in the batch",
        plain(lambda x, w: x * w * jnp.arange(1, x.shape[0] + 1, dtype=x.dtype)[:, None]),
        {},
        "without the first, differs",
    ),
    (
        "extremes",
        "a constant of one mode",
        layer(_other_constant),
        {},
        "with train=False\n  at        ",
    ),
    (
        "extremes",
        "the root's slope at 0",
        plain(lambda x, w: jnp.sqrt(jnp.sum(x * x * w, -1, keepdims=True))),
        {},
        r"input of zeros \(0\) with train=True\n  at        gradient/params/w",
    ),
    (
        "extremes",
        "0/0",
        plain(lambda x, w: x / jnp.sum(jnp.abs(x), -1, keepdims=True) * w),
        {},
        r"at        gradient/params/w\n  expected  no NaN",
    ),
    (
        "extremes",
        "softmax without its maximum",
        plain(lambda x, w: jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True)),
        {},
        r"input of large \(10000\)",
    ),
    (
        "finite differences",
        "half the gradient",
        plain(lambda x, w: _square(x) * w),
        {},
        r"one leaf differs from the central difference\n  at        x\n",
    ),
    (
        "finite differences",
        "a stopped gradient",
        plain(lambda x, w: x * jax.lax.stop_gradient(w)),
        {},
        r"at        params/w\n",
    ),
    ("forward mode", "no rule", plain(lambda x, w: _sine(x) * w), {}, "write it with jax.custom_jvp"),
    (
        "second derivatives",
        "a stopped slope",
        plain(lambda x, w: _cube(x) * w),
        {},
        "differentiate the rule by hand too",
    ),
    (
        "second derivatives",
        "stopped between two leaves",
        plain(lambda x, w: _product(x, jnp.broadcast_to(w, x.shape))),
        {},
        r"direction of all leaves differs .*\n  at        all leaves at once",
    ),
    (
        "hyper-parameters",
        "a comparison in Python",
        _compared(),
        {"factory": _compared, "hyperparameters": {"rate": 0.5}},
        "TracerBoolConversionError",
    ),
    (
        "hyper-parameters",
        "another number when traced",
        _rounded(),
        {"factory": _rounded, "hyperparameters": {"rate": 0.5}},
        "of traced rate with train=True differs",
    ),
]

ON_A_MESH = layer(_by_device)
