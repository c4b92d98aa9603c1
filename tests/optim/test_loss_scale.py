"""Loss scaling: PyTorch's scale call for call, what a skipped step leaves, and float16 training that needs it."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnkit import data, layers, losses, metrics, optim, train
from nnkit.optim import LossScaleState
from tests.optim.oracle import ulps

INF, NAN = float("inf"), float("nan")
KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
Y = jnp.asarray([0, 1, 2, 0, 1, 2])
GRADS = [1.0, 2.0, INF, -3.0, 0.5, 4.0, 1.0, NAN, -INF, 2.0, 2.0, 2.0, 2.0, 2.0, -1.0, 0.25]


def raises(kind: type[Exception], text: str) -> Any:
    return pytest.raises(kind, match=re.escape(text))


def by_torch(factor: float, interval: int, initial: float) -> list[tuple[float, float]]:
    """The scale before each step and the parameter after it: SGD with momentum under GradScaler."""
    p = torch.nn.Parameter(torch.tensor(1.0))
    sgd = torch.optim.SGD([p], lr=0.1, momentum=0.5)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=initial, growth_factor=factor, backoff_factor=1 / factor, growth_interval=interval
    )
    rows = []
    for grad in GRADS:
        scale = scaler.get_scale()
        sgd.zero_grad()
        scaler.scale(p * grad).backward()
        scaler.step(sgd)
        scaler.update()
        rows.append((scale, p.item()))
    return rows


def by_nnkit(tx: Any) -> list[tuple[float, float]]:
    params = {"w": jnp.array(1.0)}
    state, rows = tx.init(params), []
    for grad in GRADS:
        scale = optim.loss_scale(state)
        grads = jax.grad(lambda p, g=grad, s=scale: s * (p["w"] * g))(params)
        updates, state = tx.update(grads, state, params)
        params = optim.apply_updates(params, updates)
        rows.append((float(scale), float(params["w"])))
    return rows


def equals_torch(make: Any, factor: float, interval: int, initial: float) -> None:
    tx = make(
        optim.sgd(0.1, momentum=0.5),
        initial_scale=initial,
        growth_interval=interval,
        factor=factor,
        min_scale=1e-30,
    )
    np.testing.assert_allclose(by_nnkit(tx), by_torch(factor, interval, initial), rtol=1e-6)


@pytest.mark.parametrize(
    ("factor", "interval", "initial"), [(2.0, 3, 2.0**15), (4.0, 1, 8.0), (1.5, 2, 100.0), (2.0, 2, 2.0**126)]
)
def test_equals_torchs_grad_scaler(factor, interval, initial):
    equals_torch(optim.dynamic_loss_scale, factor, interval, initial)


def _wrong(change: Any) -> Any:
    def make(inner: Any, **options: Any) -> Any:
        right = optim.dynamic_loss_scale(inner, **options)

        def update(u: Any, s: Any, p: Any = None, **_: Any) -> Any:
            return change(u, s, *right.update(u, s, p), inner, p)

        return optim.GradientTransformation(right.init, update)

    return make


MUTANTS = {
    "not unscaled": _wrong(lambda g, s, u, n, i, p: (i.update(g, s.inner_state, p)[0], n)),
    "the scale stays": _wrong(lambda g, s, u, n, i, p: (u, n._replace(scale=s.scale))),
    "it never grows": _wrong(lambda g, s, u, n, i, p: (u, n._replace(scale=jnp.minimum(s.scale, n.scale)))),
    "it grows in any case": _wrong(lambda g, s, u, n, i, p: (u, n._replace(good_steps=s.good_steps + 1))),
    "the inner state moves on": _wrong(
        lambda g, s, u, n, i, p: (
            u, n._replace(inner_state=i.update(jax.tree.map(jnp.nan_to_num, g), s.inner_state, p)[1])
        )
    ),
    "nothing is skipped": _wrong(
        lambda g, s, u, n, i, p: (i.update(jax.tree.map(lambda x: x / s.scale, g), s.inner_state, p)[0], n)
    ),
    "another interval": lambda inner, growth_interval, **o: optim.dynamic_loss_scale(
        inner, growth_interval=growth_interval + 1, **o
    ),
    "a static one": lambda inner, initial_scale, **o: optim.static_loss_scale(inner, initial_scale),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name):
    with pytest.raises(AssertionError):
        equals_torch(MUTANTS[name], 2.0, 3, 2.0**15)


TRACED = jax.jit(
    lambda s, g, n, f, low: optim.dynamic_loss_scale(
        optim.sgd(1.0), growth_interval=n, factor=f, min_scale=low
    ).update(g, s)[1]
)


@settings(max_examples=25)
@given(
    st.lists(st.booleans(), max_size=14),
    st.integers(1, 4),
    st.sampled_from([2.0, 3.0]),
    st.sampled_from([1.0, 6.0]),
)
def test_scale_and_counts_are_those_of_a_loop(
    finite: list[bool], interval: int, factor: float, low: float
) -> None:
    """With traced hyper-parameters; the scale starts at 4, so it may be below the least one."""
    state = optim.dynamic_loss_scale(optim.sgd(1.0), initial_scale=4.0).init(jnp.zeros(1))
    scale, good, skipped = 4.0, 0, 0
    for ok in finite:
        state = TRACED(state, jnp.array([1.0 if ok else NAN]), jnp.int32(interval), factor, jnp.float32(low))
        good, skipped = (good + 1, skipped) if ok else (0, skipped + 1)
        if not ok:
            scale = min(scale, max(scale / factor, low))
        elif good == interval:
            scale, good = scale * factor, 0
        assert float(state.scale) == pytest.approx(scale, rel=1e-6)
        assert (int(state.good_steps), int(state.total_notfinite)) == (good, skipped)
        assert bool(state.last_finite) == ok


def test_it_does_not_grow_to_inf_and_not_shrink_to_nothing():
    tx = optim.dynamic_loss_scale(optim.sgd(1.0), initial_scale=2.0**127, growth_interval=1)
    _, state = tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
    assert float(state.scale) == 2.0**127
    tx = optim.dynamic_loss_scale(optim.sgd(1.0), initial_scale=3.0, min_scale=2.0)
    _, state = tx.update(jnp.array([NAN]), tx.init(jnp.ones(1)))
    assert float(state.scale) == 2.0


def test_a_static_scale_stays_and_skips():
    tx = optim.static_loss_scale(optim.adam(0.1), 1024.0)
    state = tx.init(jnp.ones(2))
    updates, after = tx.update(jnp.array([1.0, NAN]), state)
    assert not updates.any()
    assert ulps(after.inner_state, state.inner_state) == 0
    assert (float(after.scale), int(after.total_notfinite)) == (1024.0, 1)
    updates, _ = tx.update(jnp.array([1024.0, 2048.0]), after)
    assert (
        ulps(updates, optim.adam(0.1).update(jnp.array([1.0, 2.0]), optim.adam(0.1).init(jnp.ones(2)))[0])
        <= 1
    )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float64])
def test_dtypes(dtype):
    """Half precision is divided in float32: 2⁻²⁴, the smallest float16, by 2¹⁵ would be 0."""
    with jax.enable_x64(dtype == jnp.float64):
        tx = optim.dynamic_loss_scale(optim.sgd(1.0))
        params = jnp.ones(2, dtype)
        updates, state = tx.update(jnp.full(2, 2.0**-24, dtype), tx.init(params), params)
        assert updates.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
        np.testing.assert_array_equal(updates, -(2.0**-39))
        assert state.scale.dtype == jnp.float32
        assert optim.apply_updates(params, updates).dtype == dtype


def test_mapped_scanned_and_the_rate_is_read_through_it():
    tx = optim.dynamic_loss_scale(optim.adam(0.1), initial_scale=4.0)
    grads = jnp.array([[4.0], [NAN]])
    states = jax.vmap(tx.init)(jnp.zeros((2, 1)))
    updates, states = jax.jit(jax.vmap(tx.update))(grads, states)
    np.testing.assert_allclose(updates, [[-0.1], [0.0]], rtol=1e-5)
    assert optim.loss_scale(states).tolist() == [4.0, 2.0]
    np.testing.assert_allclose(optim.learning_rate(states), 0.1)
    state, _ = jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(jnp.zeros(1)), grads)
    assert float(state.scale) == 2.0
    injected = optim.dynamic_loss_scale(optim.inject_hyperparams(optim.sgd)(1.0))
    state = optim.set_hyperparams(injected.init(jnp.zeros(1)), learning_rate=0.5)
    updates, _ = injected.update(jnp.array([2.0**15]), state)
    assert updates.tolist() == [-0.5]


# ---- in the trainer ----------------------------------------------------------------------------

NORMALISED = layers.serial(
    layers.dense(8, use_bias=False), layers.batch_norm(), layers.relu, layers.dropout(0.5), layers.dense(3)
)
LOSS = losses.softmax_cross_entropy


def _run(optimizer: Any, steps: int = 4, **options: Any) -> Any:
    trainer = train.trainer(NORMALISED, LOSS, optimizer, **options)
    ts = trainer.init(KEY, X)
    step, found = jax.jit(trainer.step), []
    for _ in range(steps):
        ts, seen = step(ts, (X, Y))
        found.append(seen["loss"])
    return ts, jnp.stack(found)


def _mask(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim == 2, params)


AROUND: dict[str, tuple[Any, Any]] = {
    "alone": (lambda wrap: wrap(optim.adam(1e-2)), None),
    "optax inside": (lambda wrap: wrap(optax.adam(1e-2)), None),
    "around a chain": (lambda wrap: wrap(optim.chain(optim.clip_by_global_norm(0.1), optim.sgd(0.1))), None),
    "first of a chain": (lambda wrap: optim.chain(wrap(optim.sgd(0.1, 0.9)), optim.scale(0.5)), None),
    "in optax.chain": (lambda wrap: optax.chain(wrap(optim.sgd(0.1, 0.9)), optax.scale(0.5)), None),
    "in MultiSteps": (lambda wrap: optim.MultiSteps(wrap(optim.adam(1e-2)), 2), None),
    "around MultiSteps": (lambda wrap: wrap(optim.MultiSteps(optim.adam(1e-2), 2).gradient_transformation()), None),
    "masked": (
        lambda wrap: optim.chain(
            optim.masked(wrap(optim.adam(1e-2)), _mask),
            optim.masked(optim.set_to_zero(), lambda p: jax.tree.map(lambda m: not m, _mask(p))),
        ),
        None,
    ),
    "with a plateau": (lambda wrap: wrap(optim.chain(optim.sgd(0.1), optim.reduce_on_plateau(patience=1))), None),
}  # fmt: skip


@pytest.mark.parametrize("name", AROUND)
def test_powers_of_two_change_nothing_wherever_it_stands(name):
    """Multiplying and dividing by 2¹⁵ is exact in float32, so the run is the same but for the order of sums."""
    make, _ = AROUND[name]
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        scaled, found = _run(make(optim.dynamic_loss_scale))
        plain, expected = _run(make(lambda inner: inner))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (scaled.params, scaled.state), (plain.params, plain.state),
    )  # fmt: skip


def test_without_a_scale_the_program_is_as_it_was():
    trainer = train.trainer(NORMALISED, LOSS, optim.adam(1e-2))
    ts = trainer.init(KEY, X)
    assert "is_finite" not in str(jax.make_jaxpr(trainer.step)(ts, (X, Y)))


def test_a_skipped_step_leaves_parameters_state_and_optimizer_as_they_were():
    """But for the count of steps and the scale; without a loss scale the running statistics are lost."""
    tx = optim.dynamic_loss_scale(optim.adam(1e-2))
    bad = X.at[0, 0].set(INF)
    trainer = train.trainer(NORMALISED, LOSS, tx)
    ts, _ = trainer.step(trainer.init(KEY, X), (X, Y))
    after, found = jax.jit(trainer.step)(ts, (bad, Y))
    same = [(t.params, t.state, t.opt_state.inner_state) for t in (ts, after)]
    jax.tree.map(np.testing.assert_array_equal, *same)
    assert not jnp.isfinite(found["loss"])
    assert (int(after.step), float(optim.loss_scale(after.opt_state))) == (2, 2.0**14)
    again, found = trainer.step(after, (X, Y))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((again.params, again.state, found)))
    unprotected = train.trainer(NORMALISED, LOSS, optim.apply_if_finite(optim.adam(1e-2), 5))
    lost, _ = unprotected.step(unprotected.init(KEY, X), (bad, Y))
    assert not jnp.isfinite(lost.state["batch_norm_0"]["var"]).all()


def test_the_optimizer_inside_gets_the_loss_and_the_gradients_unscaled():
    seen: dict[str, Any] = {}

    def update(u: Any, s: Any, p: Any = None, *, value: Any, grad: Any, value_fn: Any) -> Any:
        seen.update(u=u, value=value, grad=grad, again=value_fn(p))
        return u, s

    inner = optim.GradientTransformation(lambda p: (), update)  # pyright: ignore[reportArgumentType]
    outer: dict[str, Any] = {}

    def last(u: Any, s: Any, p: Any = None, *, value: Any, grad: Any) -> Any:
        outer.update(value=value, grad=grad)
        return u, s

    tx = optim.chain(
        optim.static_loss_scale(inner, 2.0**20),
        optim.GradientTransformation(lambda p: (), last),  # pyright: ignore[reportArgumentType]
    )

    def objective(params: Any, state: Any, batch: Any, *, key: Any, train: bool) -> Any:
        return jnp.sum(params["w"] * batch), (state, {})

    trainer = train.trainer(objective, init=lambda key, x: ({"w": jnp.ones(2)}, {}), optimizer=tx)

    def look(ts: Any) -> Any:
        metrics = trainer.step(ts, jnp.array([1.0, 2.0]))[1]
        return metrics, dict(outer)

    with jax.disable_jit():  # so that what update_if's conditional sees are values
        found, outside = look(trainer.init(KEY, X))
    assert (
        float(found["loss"]) == float(seen["value"]) == float(seen["again"]) == float(outside["value"]) == 3.0
    )
    for grads in (seen["u"], seen["grad"], outside["grad"]):
        np.testing.assert_array_equal(grads["w"], [1.0, 2.0])


def test_float16_on_the_digits_learns_only_with_a_scale():
    """A loss of weight 1e-6 has gradients below 2⁻²⁴, the smallest float16, at the network's output."""
    digits = data.load("digits").train
    x, y = jnp.asarray(digits.x[:1024], jnp.float32).reshape(1024, -1), jnp.asarray(digits.y[:1024])
    x = x / jnp.max(x)
    half = layers.policy(
        layers.serial(layers.dense(32), layers.relu, layers.dense(10)),
        param_dtype=jnp.float32, compute_dtype=jnp.float16, output_dtype=jnp.float32,
    )  # fmt: skip

    def run(wrap: Any) -> Any:
        trainer = train.trainer(
            half,
            lambda p, t: 1e-6 * LOSS(p, t),
            wrap(optim.sgd(0.5e6)),
            metrics={"accuracy": metrics.accuracy},
        )
        batches = x.reshape(16, 64, -1), y.reshape(16, 64)

        def epoch(ts: Any, _: Any) -> Any:
            return jax.lax.scan(trainer.step, ts, batches)[0], None

        ts = trainer.init(KEY, x[:1])
        after, _ = jax.jit(lambda ts: jax.lax.scan(epoch, ts, length=6))(ts)
        return ts, after, trainer.evaluate(after, (x, y))

    _, after, found = run(lambda inner: optim.dynamic_loss_scale(inner, growth_interval=20))
    assert found["accuracy"] > 0.9
    assert float(optim.loss_scale(after.opt_state)) > 2.0**15
    before, stuck, _ = run(lambda inner: inner)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), stuck.params, before.params)
    assert max(jax.tree.leaves(moved["dense_0"])) == 0.0


# ---- where it may stand, and bad input ---------------------------------------------------------

P = {"a": jnp.ones(2), "b": jnp.ones(2)}


@pytest.mark.parametrize(
    "make",
    [
        lambda tx: optim.chain(tx, optim.scale(1.0)),
        lambda tx: optim.named_chain(("first", tx), ("then", optim.scale(1.0))),
        lambda tx: optim.chain(optim.chain(tx), optim.scale(1.0)),
        lambda tx: optim.MultiSteps(tx, 2),
        lambda tx: optax.MultiSteps(tx, 2),
        lambda tx: optim.masked(tx, {"a": True, "b": False}),
        lambda tx: optim.partition({"all": tx}, {"a": "all", "b": "all"}),
        lambda tx: optim.inject_hyperparams(lambda rate: tx)(0.1),
    ],
)
def test_where_the_scale_is_found(make):
    assert float(optim.loss_scale(make(optim.dynamic_loss_scale(optim.adam(0.1))).init(P))) == 2.0**15


@pytest.mark.parametrize(
    "make",
    [
        lambda tx: optim.chain(optim.clip_by_global_norm(1.0), tx),
        lambda tx: optax.chain(optax.clip(1.0), tx),
        lambda tx: optim.named_chain(("first", optim.clip(1.0)), ("then", tx)),
        lambda tx: optim.partition({"a": tx, "b": optim.sgd(0.1)}, {"a": "a", "b": "b"}),
        lambda tx: optim.chain(optim.clip(1.0), optim.MultiSteps(tx, 2).gradient_transformation()),
    ],
)
def test_where_others_would_see_scaled_gradients_is_an_error(make):
    state = make(optim.dynamic_loss_scale(optim.adam(0.1))).init(P)
    with raises(
        ValueError,
        "a loss scale is not the first to see the gradients: put it around the whole optimizer, "
        "dynamic_loss_scale(chain(clip_by_global_norm(1.0), adam(1e-3)))",
    ):
        optim.loss_scale(state)


@pytest.mark.parametrize("library", [optim, optax])
def test_apply_if_finite_around_it_would_keep_the_scale_from_falling(library):
    tx = optim.chain(library.apply_if_finite(optim.dynamic_loss_scale(optim.adam(0.1)), 5))
    with raises(
        ValueError,
        "apply_if_finite is around a loss scale and hides from it the gradients that are not finite, so that it never "
        "falls: put the loss scale outermost, it skips such steps itself",
    ):
        optim.loss_scale(tx.init(P))
    inside = optim.dynamic_loss_scale(library.apply_if_finite(optim.adam(0.1), 5))
    assert float(optim.loss_scale(inside.init(P))) == 2.0**15
    assert optim.loss_scale(library.apply_if_finite(optim.adam(0.1), 5).init(P)) == 1.0


def test_bad_input():
    sgd = optim.sgd(0.1)
    two = optim.dynamic_loss_scale(optim.static_loss_scale(sgd, 2.0))
    with raises(
        ValueError, "the optimizer has 2 loss scales, and a loss has one: put it around the whole optimizer"
    ):
        optim.loss_scale(two.init(P))
    with raises(TypeError, "dynamic_loss_scale: inner must have init and update, got float"):
        optim.dynamic_loss_scale(0.1)  # pyright: ignore[reportArgumentType]
    with raises(ValueError, "factor must be in (1, inf), got 1.0: the scale grows and shrinks by it"):
        optim.dynamic_loss_scale(sgd, factor=1.0)
    with raises(ValueError, "initial_scale must be in (0, inf), got 0"):
        optim.dynamic_loss_scale(sgd, initial_scale=0)
    with raises(ValueError, "min_scale must be in (0, inf), got 0.0"):
        optim.dynamic_loss_scale(sgd, min_scale=0.0)
    with raises(ValueError, "growth_interval must be at least 1, got 0"):
        optim.dynamic_loss_scale(sgd, growth_interval=0)
    with raises(ValueError, "scale must be in (0, inf), got -1.0"):
        optim.static_loss_scale(sgd, -1.0)
    with raises(
        TypeError, "dynamic_loss_scale got the state of another transformation: tuple in place of LossScaleS"
    ):
        optim.dynamic_loss_scale(sgd).update(P, sgd.init(P))
    assert optim.loss_scale(optim.adam(0.1).init(P)) == 1.0
    assert LossScaleState._fields[-1] == "inner_state"
