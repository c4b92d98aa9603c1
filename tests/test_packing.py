"""Packed optimizer states: the same numbers, and the user's tree wherever one looks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import optim, packing, train, tree
from tests.optim.oracle import ulps

OPTIMIZERS = {
    "adam": lambda: optim.adam(1e-2),
    "adam_mu_dtype": lambda: optim.adam(1e-2, mu_dtype=jnp.bfloat16),
    "momentum": lambda: optim.momentum(1e-2),
    "rmsprop": lambda: optim.rmsprop(1e-2, centered=True, momentum=0.9),
    "adagrad": lambda: optim.adagrad(1e-2),
}


def _params(dtype: Any = jnp.float32) -> Any:
    """Seventy layers of small leaves of two dtypes, one large leaf, an empty one and a None."""
    rng = np.random.default_rng(0)

    def layer(i: int) -> Any:
        kind = jnp.bfloat16 if i % 7 == 0 else dtype
        return {
            "kernel": jnp.asarray(rng.normal(size=(3, i % 5)), dtype),
            "bias": jnp.asarray(rng.normal(size=i % 4), kind),
        }

    layers = {f"dense_{i}": layer(i) for i in range(70)}
    return layers | {
        "large": jnp.asarray(rng.normal(size=(80, 80)), dtype),
        "none": None,
        "one": jnp.ones(()),
    }


def _run(tx: Any, params: Any, steps: int = 5) -> Any:
    @jax.jit
    def step(params: Any, state: Any) -> Any:
        grads = jax.tree.map(lambda p: jnp.sin(3 * p), params)
        updates, state = tx.update(grads, state, params)
        return optim.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def _unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "FEWEST", 10**9)


def _is_packed(state: Any) -> bool:
    return any(isinstance(x, packing.Packed) for x in jax.tree.leaves(state, is_leaf=_packed))


def _packed(x: Any) -> bool:
    return isinstance(x, packing.Packed)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_numbers_as_leaf_by_leaf(name: str) -> None:
    """Each step from the same state. XLA may round a multiply and add once or twice: 2 ulp."""
    tx, params = OPTIMIZERS[name](), _params()
    packed, plain, state = jax.jit(tx.update), jax.jit(tx.update), tx.init(params)
    assert _is_packed(state)
    for step in range(5):
        grads = jax.tree.map(lambda p, step=step: jnp.sin((3 + step) * p), params)
        expected = plain(grads, packing.unpack(state), params)
        assert not _is_packed(expected)
        updates, state = packed(grads, state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert tree.flatten((updates, state)).keys() == tree.flatten(expected).keys()
        assert ulps((updates, packing.unpack(state)), expected) <= 2


def test_the_state_reads_as_the_tree() -> None:
    params = _params()
    state = optim.scale_by_adam(b1=0.5).init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = optim.scale_by_adam(b1=0.5).update(grads, state)
    mu = state[1]
    assert mu["dense_3"]["kernel"].shape == (3, 3)
    np.testing.assert_array_equal(mu["dense_3"]["bias"], np.full(3, 0.5, np.float32))
    np.testing.assert_array_equal(mu["large"], np.full((80, 80), 0.5, np.float32))
    assert mu["none"] is None
    assert len(mu) == len(params)
    assert set(mu) == set(params)
    assert "dense_3" in mu
    assert "dense_70" not in mu
    assert "'dense_3': {'bias'" in repr(mu)
    assert jax.tree.structure(packing.unpack(mu)) == jax.tree.structure(params)


def test_few_leaves_stay_as_they_are() -> None:
    params = {f"w{i}": jnp.ones(2) for i in range(packing.FEWEST - 1)} | {"large": jnp.ones((80, 80))}
    assert packing.plan(params) is None
    assert isinstance(optim.adam(0.1).init(params)[0].mu, dict)
    assert packing.plan(params | {"one more": jnp.ones(2)}) is not None


def test_a_checkpoint_is_the_tree(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tx = optim.adam(1e-2)
    params, state = _run(tx, _params())
    train.save_tree(tmp_path / "packed.npz", state)
    back = train.load_tree(tmp_path / "packed.npz", like=jax.eval_shape(tx.init, params))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back, state)
    _unpacked(monkeypatch)
    plain = train.load_tree(tmp_path / "packed.npz", like=tx.init(params))
    assert not _is_packed(plain)
    train.save_tree(tmp_path / "plain.npz", plain)
    assert (tmp_path / "packed.npz").read_bytes() == (tmp_path / "plain.npz").read_bytes()


def test_under_vmap_and_scan() -> None:
    tx = optim.adam(1e-2)
    stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), _params())
    state = jax.vmap(tx.init)(stacked)
    assert _is_packed(state)
    assert state[0].mu["dense_3"]["kernel"].shape == (2, 3, 3)

    def run(params: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = tx.update(params, state)
            return (optim.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=3)[0]

    both = jax.vmap(run)(stacked)
    second = run(jax.tree.map(lambda p: 2 * p, _params()))
    for path, want in tree.flatten(second).items():
        np.testing.assert_allclose(
            np.asarray(tree.flatten(both)[path][1], np.float64), np.asarray(want, np.float64), rtol=1e-6
        )


def test_a_parameter_without_a_gradient_stays() -> None:
    tx, params = optim.scale_by_adam(), _params()
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params) | {"large": None}
    updates, new = tx.update(grads, state)
    assert updates["large"] is None
    assert _is_packed(new)
    np.testing.assert_array_equal(new[1]["large"], 0)
    np.testing.assert_allclose(new[1]["dense_3"]["kernel"], 0.1, rtol=1e-6)


def test_look_ahead_of_a_packed_velocity() -> None:
    tx, params = optim.momentum(0.1, 0.5), _params()
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    ahead = optim.look_ahead(params, state, 0.5)
    np.testing.assert_allclose(ahead["dense_3"]["kernel"], params["dense_3"]["kernel"] - 0.05, rtol=1e-6)


def test_gradients_of_another_tree_are_named() -> None:
    tx, params = optim.adam(0.1), _params()
    grads = jax.tree.map(jnp.ones_like, params)
    grads["dense_3"] = grads["dense_3"] | {"kernel": jnp.ones((3, 4))}
    with pytest.raises(
        ValueError, match=r"updates has shape \(3, 4\) at dense_3/kernel, mu has shape \(3, 3\)"
    ):
        tx.update(grads, tx.init(params), params)


def test_gradients_of_another_dtype_than_their_parameters() -> None:
    tx, params = optim.adam(0.1), _params()
    grads = jax.tree.map(jnp.ones_like, params)
    grads["dense_3"] = jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads["dense_3"])
    updates, state = tx.update(grads, tx.init(params), params)
    assert _is_packed(state)
    np.testing.assert_allclose(np.asarray(updates["dense_3"]["kernel"]), -0.1, rtol=1e-2)


def test_arrays_divided_among_devices_are_not_packed() -> None:
    class Spread:
        shape, dtype = (2,), np.dtype(np.float32)
        sharding = jax.sharding.NamedSharding(
            jax.sharding.AbstractMesh((2,), ("data",)), jax.sharding.PartitionSpec("data")
        )

    assert packing.plan([Spread() for _ in range(100)]) is None
    assert packing.plan([jnp.ones(2) for _ in range(100)]) is not None


def test_a_population_is_saved_and_loaded(tmp_path: Any) -> None:
    tx = optim.adam(1e-2)
    stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), _params())
    _, state = jax.vmap(tx.update)(stacked, jax.vmap(tx.init)(stacked))
    train.save_tree(tmp_path / "state.npz", state)
    for like in (state, jax.eval_shape(jax.vmap(tx.init), stacked)):
        back = train.load_tree(tmp_path / "state.npz", like=like)
        jax.tree.map(np.testing.assert_array_equal, back, state)


def test_a_mapped_state_prints() -> None:
    state = optim.scale_by_adam().init(_params())
    assert "packed float32" in repr(jax.tree.map(jnp.shape, state))
    assert "packed float32" in repr(jax.tree.map(jnp.linalg.norm, state))


def test_dict_methods_and_functions_of_trees() -> None:
    params = _params()
    mu = optim.scale_by_adam().init(params)[1]
    assert dict(mu.items()).keys() == params.keys()
    with pytest.raises(AttributeError):
        mu.no_such_thing  # noqa: B018
    after = optim.apply_updates(params, mu)
    assert ulps(after, params) == 0
    masked = tree.mask(mu, r"dense_3/.*")
    assert masked["dense_3"] == {"kernel": True, "bias": True}
    assert not masked["large"]


def test_a_donated_state_is_named() -> None:
    state = optim.adam(0.1).init(_params())
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    with pytest.raises(ValueError, match="was donated to a compiled function"):
        train.save_tree("never.npz", state)


def test_integer_gradients_are_named_by_their_path() -> None:
    tx, params = optim.adam(0.1), _params()
    grads = jax.tree.map(lambda p: jnp.ones(p.shape, jnp.int32), params)
    with pytest.raises(TypeError, match=r"updates has dtype int32 at dense_0/bias"):
        tx.update(grads, tx.init(params), params)


def test_lookahead_that_renews_an_unpacked_state() -> None:
    tx, params = optim.lookahead(optim.adam(0.1), 2, 0.5, reset_state=True), _params()
    pair = optim.LookaheadParams.init_synced(params)
    state = packing.unpack(tx.init(pair))
    for _ in range(3):
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, pair)
        pair = optim.apply_updates(pair, updates)
    assert not _is_packed(state)


def test_leaves_divided_over_an_explicit_mesh_are_left_alone() -> None:
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    params = {f"w{i}": jnp.ones((2, 4)) for i in range(70)}
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "d"))
    tx = optim.adam(0.1)
    with jax.set_mesh(mesh):
        divided = jax.device_put(params, spec)
        state = jax.jit(tx.init)(divided)
        assert not _is_packed(state)
        updates, _ = jax.jit(tx.update)(divided, state, divided)
    np.testing.assert_allclose(updates["w3"], -0.1, rtol=1e-5)
