from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import layers
from nnkit.checks import LayerError

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)


def test_equals_the_same_graph_by_combinators():
    wired = layers.wire(lambda net, x: net.head(x + net.body(x)), body=layers.dense(4), head=layers.dense(2))
    params, state = wired.init(KEY, X)
    combined = layers.serial(layers.residual(layers.dense(4)), head=layers.dense(2))
    theirs = {"residual_0": {"body": params["body"]}, "head": params["head"]}
    np.testing.assert_array_equal(
        wired.apply(params, state, X, train=False)[0], combined.apply(theirs, {}, X, train=False)[0]
    )


def test_a_child_called_twice_has_one_set_of_parameters_and_its_state_passes_on():
    wired = layers.wire(lambda net, x: net.norm(net.norm(x) + 7), norm=layers.batch_norm(momentum=0.5))
    params, state = wired.init(KEY, X)
    assert set(params) == {"norm"}
    _, new = wired.apply(params, state, X, train=True)
    once = 0.5 * 0 + 0.5 * X.mean(axis=0)
    np.testing.assert_allclose(new["norm"]["mean"], 0.5 * once + 0.5 * 7, rtol=1e-5)


def test_calls_of_one_child_draw_different_numbers():
    wired = layers.wire(lambda net, x: (net.drop(x), net.drop(x)), drop=layers.dropout(0.5))
    (a, b), _ = wired.apply({}, {}, jnp.ones((10, 10)), key=KEY, train=True)
    assert (a != b).any()


def test_keys_asked_for_are_all_different_and_differ_from_those_of_children():
    def forward(net, x):
        y = net.drop(x)
        return [jax.random.key_data(net.key()) for _ in range(3)], y

    with jax.debug_key_reuse(True):
        wired = layers.wire(forward, drop=layers.dropout(0.5))
        keys, _ = wired.apply({}, {}, X, key=KEY, train=True)[0]
    assert len({tuple(np.asarray(k)) for k in keys}) == 3


def test_parameters_of_a_child_can_be_used_beside_it():
    wired = layers.wire(lambda net, x: net.enc(x) @ net.enc.params["kernel"].T, enc=layers.dense(3))
    params, state = wired.init(KEY, X)
    k = params["enc"]["kernel"]
    np.testing.assert_allclose(wired.apply(params, state, X, train=False)[0], X @ k @ k.T, rtol=1e-5)


def test_the_mode_is_known_inside():
    wired = layers.wire(lambda net, x: net.f(x) + (100 if net.train else 0), f=layers.identity)
    np.testing.assert_array_equal(wired.apply({}, {}, X, train=True)[0], X + 100)


def test_nested_and_initialised_from_a_spec():
    inner = layers.wire(lambda net, x: net.a(x), a=layers.dense(3))
    outer = layers.wire(lambda net, x: net.inner(net.inner_2(x)), inner=inner, inner_2=inner)
    params, _ = outer.init(KEY, jax.ShapeDtypeStruct((1, 4), jnp.float32))
    assert params["inner"]["a"]["kernel"].shape == (3, 3)
    assert params["inner_2"]["a"]["kernel"].shape == (4, 3)
    assert isinstance(params["inner"]["a"]["kernel"], jax.Array)
    np.testing.assert_array_equal(
        params["inner"]["a"]["kernel"], jax.jit(outer.init)(KEY, X)[0]["inner"]["a"]["kernel"]
    )


def test_a_child_may_be_called_in_training_only():
    def forward(net, x):
        h = net.body(x)
        return (h, net.aux(h)) if net.train else h

    wired = layers.wire(forward, body=layers.dense(3), aux=layers.dense(2))
    params, state = wired.init(KEY, X)
    assert params["aux"]["kernel"].shape == (3, 2)
    assert not jnp.allclose(
        params["aux"]["kernel"], layers.dense(2).init(KEY, jnp.zeros((1, 3)))[0]["kernel"]
    )
    assert wired.apply(params, state, X, train=True)[0][1].shape == (6, 2)
    assert wired.apply(params, state, X, train=False)[0].shape == (6, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: layers.wire(lambda net, x: net.a(x), a=layers.relu, b=layers.dense(2)).init(KEY, X),
            LayerError,
            r"wire never calls its children \['b'\]",
        ),
        (
            lambda: layers.wire(lambda net, x: net.c(x), a=layers.relu).init(KEY, X),
            AttributeError,
            r"wire has no child 'c'; its children are \['a'\]",
        ),
        (
            lambda: layers.wire(lambda net, x: x, key=layers.relu),
            ValueError,
            r"\['key'\] cannot be names of children",
        ),
        (
            lambda: layers.wire(lambda net, x: x, _h=layers.relu),
            ValueError,
            "names that begin with _ are its own",
        ),
        (
            lambda: layers.wire(lambda net, x: x @ net.a.params["kernel"], a=layers.dense(2)).init(KEY, X),
            LayerError,
            "uses the parameters of 'a' before its first call",
        ),
        (
            lambda: layers.wire(lambda net, x: jax.random.normal(net.key(), x.shape)).apply(
                {}, {}, X, train=False
            ),
            LayerError,
            r"wire draws random numbers and needs a key: pass apply\(..., key=key\)",
        ),
        (
            lambda: layers.serial(block=layers.wire(lambda net, x: net.d(x), d=layers.dropout(0.5))).apply(
                {}, {}, X, train=True
            ),
            LayerError,
            "^block/d needs a key when train=True",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_batch_norm_inside_is_initialised_by_one_example():
    def forward(net, x):
        return net.head(net.norm(net.stem(x)))

    model = layers.wire(forward, stem=layers.dense(8), norm=layers.batch_norm(), head=layers.dense(2))
    one, many = (model.init(jax.random.key(0), jnp.zeros((n, 4))) for n in (1, 5))
    jax.tree.map(np.testing.assert_array_equal, one, many)


def test_what_runs_across_devices_is_initialised_outside_of_them():
    model = layers.serial(
        layers.wire(
            lambda net, x: net.norm(net.stem(x)), stem=layers.dense(3), norm=layers.batch_norm(axis_name="b")
        ),
        layers.dense(1),
    )
    params, state = model.init(jax.random.key(0), jnp.zeros((2, 4)))
    run = jax.vmap(lambda x: model.apply(params, state, x, train=True)[0], axis_name="b")
    assert run(jnp.ones((3, 2, 4))).shape == (3, 2, 1)


def test_a_network_of_nested_layers_is_traced_a_few_times_and_not_two_to_its_depth():
    def traces(depth: int) -> int:
        count = 0

        def innermost(x):
            nonlocal count
            count += 1
            return x

        model = layers.stateless(innermost)
        for _ in range(depth):
            model = layers.wire(lambda net, x: net.inner(x), inner=layers.serial(model, layers.dense(2)))
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2)))
        return count

    assert traces(8) <= 2 * 2 * traces(4)  # 16 times as many where each level doubles the traces
