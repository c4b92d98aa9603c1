"""Averages of parameters and their running statistics: against PyTorch's, and by hand."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nnkit import layers, losses, optim, train
from nnkit.checks import LayerError
from nnkit.train import AveragedState

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(40, 4)) * [1, 2, 3, 4] + 5, RNG.normal(size=(40, 3))
KEY = jax.random.key(0)
MODEL = layers.serial(
    layers.dense(8), layers.batch_norm(momentum=0.9, unbiased=True), layers.relu,
    layers.dense(8), layers.batch_norm(momentum=0.97, unbiased=True), layers.dense(3),
)  # fmt: skip
LINE = layers.dense(1, use_bias=False)


def _trainer(optimizer=None, model=LINE):
    return train.trainer(model, losses.mean_squared_error, optimizer or optim.sgd(0.1))


def _walk(trainer, values, dtype=jnp.float32):
    """The averages after steps whose parameters are the given numbers."""
    ts = trainer.init(KEY, jnp.zeros((1, 1), dtype))
    step = jax.jit(trainer.step)
    found = []
    for value in values:
        ts, _ = step(ts, jnp.asarray(value, dtype))
        found.append(float(train.average_params(ts)["kernel"][0, 0]))
    return np.asarray(found), ts


def _given(dtype=jnp.float32):
    """A trainer whose parameter after a step is what it is given as the batch."""

    def step(ts, batch):
        params = {"kernel": jnp.full((1, 1), batch).astype(dtype)}
        return ts._replace(params=params, step=ts.step + 1), {"loss": jnp.float32(0)}

    return _trainer()._replace(step=step, skipping=None)


VALUES = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, 6.0]


def test_the_weights_are_powers_of_the_decay_over_their_sum():
    for decay in (0.0, 0.5, 0.9, 1.0):
        found, _ = _walk(train.averaged(_given(), decay), VALUES)
        for t in range(1, len(VALUES) + 1):
            weights = decay ** np.arange(t - 1, -1, -1.0)
            expected = (weights * VALUES[:t]).sum() / weights.sum()
            np.testing.assert_allclose(found[t - 1], expected, rtol=1e-5, err_msg=f"{decay} {t}")


@pytest.mark.parametrize("wrong", [{"debias": False}, {"start": 1}, {"every": 2}], ids=str)
def test_other_weights_are_seen(wrong, monkeypatch):
    right = train.averaged
    monkeypatch.setattr(train, "averaged", lambda *a, **k: right(*a, **k, **wrong))
    with pytest.raises(AssertionError):
        test_the_weights_are_powers_of_the_decay_over_their_sum()


@pytest.mark.parametrize("kind", ["ema", "mean"])
def test_pytorchs_averaged_model_and_its_update_bn(kind):
    """Steps of gradient descent there; the averages and the running statistics of both, in float64."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

    net = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8, momentum=0.1), torch.nn.ReLU(),
        torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8, momentum=0.03), torch.nn.Linear(8, 3),
    ).double()  # fmt: skip
    multi = get_ema_multi_avg_fn(0.9) if kind == "ema" else None
    theirs = AveragedModel(net, multi_avg_fn=multi)
    with jax.enable_x64(True):
        options = {"decay": 0.9, "debias": False} if kind == "ema" else {"decay": 1.0}
        trainer = train.averaged(_trainer(model=MODEL), **options)
        x, y = jnp.asarray(X), jnp.asarray(Y)
        ts = trainer.init(KEY, x[:1])
        _into_torch(net, ts.params)
        descent = torch.optim.SGD(net.parameters(), lr=0.1)
        step = jax.jit(trainer.step)
        for i in range(6):
            rows = slice(5 * i, 5 * i + 10)
            ts, _ = step(ts, (x[rows], y[rows]))
            descent.zero_grad()
            torch.nn.functional.mse_loss(net(torch.tensor(X[rows])), torch.tensor(Y[rows])).backward()
            descent.step()
            theirs.update_parameters(net)
        average = train.average_params(ts)
        update_bn([torch.tensor(X[i : i + 10]) for i in range(0, 40, 10)], theirs)
        state = train.reestimate(MODEL, average, ts.state, x, batch_size=10)
        linear = [m for m in theirs.module if isinstance(m, torch.nn.Linear)]
        norms = [m for m in theirs.module if isinstance(m, torch.nn.BatchNorm1d)]
        close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
        for i, m in enumerate(linear):
            close(average[f"dense_{i}"]["kernel"], m.weight.detach().numpy().T)
        for i, m in enumerate(norms):
            close(average[f"batch_norm_{i}"]["scale"], m.weight.detach().numpy())
            close(state[f"batch_norm_{i}"]["mean"], m.running_mean.numpy())
            close(state[f"batch_norm_{i}"]["var"], m.running_var.numpy())
        # And so is what the average predicts.
        theirs.eval()
        expected = theirs(torch.tensor(X)).detach().numpy()
        close(train.predict(MODEL, average, state, x, batch_size=40), expected)


def _into_torch(net, params):
    kinds = {torch.nn.Linear: "dense", torch.nn.BatchNorm1d: "batch_norm"}
    seen = dict.fromkeys(kinds.values(), 0)
    for m in net:
        if kind := kinds.get(type(m)):
            p = params[f"{kind}_{seen[kind]}"]
            seen[kind] += 1
            weight = np.asarray(p["kernel"]).T if kind == "dense" else np.asarray(p["scale"])
            m.weight.data = torch.tensor(weight.copy())
            m.bias.data = torch.tensor(np.asarray(p["bias"]).copy())


def test_steps_are_those_of_the_trainer_and_evaluation_takes_the_average():
    plain = _trainer(optim.adam(0.1))
    for evaluate_average in (True, False):
        trainer = train.averaged(plain, 0.5, evaluate_average=evaluate_average)
        batch = jnp.asarray(X, jnp.float32), jnp.asarray(Y[:, :1], jnp.float32)
        a, b = plain.init(KEY, batch[0][:1]), trainer.init(KEY, batch[0][:1])
        for _ in range(3):
            (a, found), (b, also) = jax.jit(plain.step)(a, batch), jax.jit(trainer.step)(b, batch)
        jax.tree.map(
            np.testing.assert_array_equal, (a.params, a.opt_state), (b.params, b.opt_state.inner_state)
        )
        assert found == also
        average = train.average_params(b)
        expected = plain.evaluate(a._replace(params=average) if evaluate_average else a, batch)
        assert trainer.evaluate(b, batch) == expected
        assert plain.evaluate(a, batch) != plain.evaluate(a._replace(params=average), batch)
        trainer.check(b, batch)


def test_a_late_start_and_one_of_so_many():
    trainer = train.averaged(_given(), 1.0, start=2, every=3)
    found, _ = _walk(trainer, VALUES)
    # Steps 5 and 8; before the first of them it is the parameters.
    np.testing.assert_allclose(found, [*VALUES[:4], -5, -5, -5, 0.5], rtol=1e-6)


def test_decay_and_start_may_be_traced():
    def run(decay, start):
        trainer = train.averaged(_given(), decay, start=start)
        ts = trainer.init(KEY, jnp.zeros((1, 1)))
        ts, _ = jax.lax.scan(trainer.step, ts, jnp.asarray(VALUES))
        return ts

    decays, starts = jnp.asarray([0.5, 0.9, 1.0]), jnp.asarray([0, 3, 20])
    many = jax.jit(jax.vmap(run))(decays, starts)
    found = train.average_params(many)["kernel"][:, 0, 0]
    last = lambda decay, start=0: _walk(train.averaged(_given(), decay, start=start), VALUES)[0][-1]
    alone = [last(float(d), int(s)) for d, s in zip(decays, starts, strict=True)]
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(train.average_params)(many)["kernel"][:, 0, 0], alone, rtol=1e-5)
    slope = jax.grad(lambda d: train.average_params(run(d, 0))["kernel"].sum())(0.9)
    np.testing.assert_allclose(slope, (last(0.91) - last(0.89)) / 0.02, rtol=1e-2)


def test_half_precision_parameters_are_averaged_in_float32():
    # 1 and 1 + 2⁻⁷ are neighbours in bfloat16: their average with decay 0.99 moves by less than half of that.
    values = [1.0] * 20 + [1.0078125] * 200
    found, ts = _walk(train.averaged(_given(jnp.bfloat16), 0.99), values)
    assert ts.opt_state.average["kernel"].dtype == jnp.float32
    assert train.average_params(ts)["kernel"].dtype == jnp.bfloat16
    assert 1.006 < float(ts.opt_state.average["kernel"][0, 0]) < 1.0078125
    assert found[-1] == 1.0078125


def test_what_is_inside_the_state_is_found():
    optimizer = optim.chain(
        optim.inject_hyperparams(optim.sgd)(0.5), optim.reduce_on_plateau(0.5, 1, monitor="val_loss")
    )
    trainer = train.averaged(_trainer(optim.dynamic_loss_scale(optimizer, initial_scale=8.0)))
    ts = trainer.init(KEY, jnp.zeros((1, 4)))
    assert float(optim.learning_rate(ts.opt_state)) == 0.5
    assert float(optim.loss_scale(ts.opt_state)) == 8
    opt_state = ts.opt_state
    for _ in range(2):
        opt_state = optim.report(opt_state, {"val_loss": 1.0})
    assert isinstance(opt_state, AveragedState)
    assert float(optim.learning_rate(opt_state)) == 0.25
    assert float(optim.learning_rate(optim.set_hyperparams(opt_state, learning_rate=2.0))) == 1.0


def test_a_step_that_is_left_out_is_not_averaged():
    trainer = train.averaged(_trainer(), 0.5)
    ts = trainer.init(KEY, jnp.zeros((1, 4)))
    good = jnp.asarray(X, jnp.float32), jnp.asarray(Y[:, :1], jnp.float32)
    ts, _ = jax.jit(trainer.skipping)(ts, good)
    after, found = jax.jit(trainer.skipping)(ts, (good[0] * jnp.nan, good[1]))
    assert float(found["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, ts.opt_state, after.opt_state)
    later, _ = jax.jit(trainer.skipping)(after, good)
    assert float(later.opt_state.weight) == 1.5
    assert train.averaged(_given()).skipping is None


def test_a_fit_with_an_average():
    trainer = train.averaged(_trainer(model=layers.dense(3)), 0.9)
    data = X.astype("f") / 10, Y.astype("f")
    ts, history = train.fit(trainer, data, epochs=2, key=KEY, batch_size=16, validation=data, progress=False)
    assert history[-1]["val_loss"] == pytest.approx(train.evaluate(trainer, ts, data)["loss"])
    assert float(ts.opt_state.weight) == pytest.approx(sum(0.9**i for i in range(6)))


# Running statistics.


def _initial(model, x):
    return model.init(KEY, x[:1])


def _by_hand(state, batches):
    """The mean over batches, weighted by size, of what batch normalisation sees of each."""
    sizes = np.asarray([len(b) for b in batches], float)
    weigh = lambda f: (np.asarray([f(b) for b in batches]) * sizes[:, None]).sum(0) / sizes.sum()
    return {"mean": weigh(lambda b: b.mean(0)), "var": weigh(lambda b: b.var(0))}


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, "traced"])
def test_statistics_are_the_mean_of_the_batches_own_for_any_momentum(momentum):
    x = X.astype("f")

    def run(m):
        model = layers.batch_norm(momentum=m)
        params, state = _initial(model, x)
        state = jax.tree.map(lambda s: s + 100, state)  # what was before is not seen
        return train.reestimate(model, params, state, x, batch_size=12)

    state = jax.jit(run)(0.9) if momentum == "traced" else run(momentum)
    expected = _by_hand(None, [x[:12], x[12:24], x[24:36], x[36:]])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), state, expected)


def test_small_statistics_have_their_digits():
    """Beside an initial variance of 1 nothing of 1e-12 would be left in float32."""
    x = (X * 1e-6).astype("f")
    model = layers.batch_norm()
    params, state = _initial(model, x)
    state = train.reestimate(model, params, state, x, batch_size=20)
    expected = _by_hand(None, [x[:20], x[20:]])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), state, expected)


def test_statistics_that_stand_still_stay_and_what_follows_them_sees_them():
    inner = layers.batch_norm(use_running_average=True)
    model = layers.serial(inner, layers.frozen(layers.batch_norm()), layers.batch_norm(momentum=0.5))
    x = X.astype("f")
    params, state = _initial(model, x)
    state["batch_norm_0"] = {"mean": jnp.full(4, 3.0), "var": jnp.full(4, 4.0)}
    new = train.reestimate(model, params, state, x, batch_size=20)
    for name in ("batch_norm_0", "batch_norm_1"):
        jax.tree.map(np.testing.assert_array_equal, new[name], state[name])
    seen = (x - 3) / np.sqrt(4 + 1e-5) / np.sqrt(1 + 1e-5)
    expected = _by_hand(None, [seen[:20], seen[20:]])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), new["batch_norm_2"], expected)


def test_a_batch_whose_mask_counts_nothing_has_no_part():
    model = layers.batch_norm(momentum=0.9)
    x = X.astype("f")
    mask = np.ones(40, bool)
    mask[20:30] = False
    mask[3] = False
    params, state = model.init(KEY, (x[:1], mask[:1]))
    found = train.reestimate(model, params, state, (x, mask), batch_size=10)
    batches = [np.delete(x[:10], 3, axis=0), x[10:20], x[30:]]
    expected = {
        "mean": np.mean([b.mean(0) for b in batches], axis=0),
        "var": np.mean([b.var(0) for b in batches], axis=0),
    }
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), found, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("row", [0, 13, 39])
def test_what_is_not_finite_or_overflows_is_seen_in_the_statistics(value, row):
    x = X.astype("f")
    x[row, 1] = value
    model = layers.batch_norm(momentum=0.9)
    found = train.reestimate(model, *_initial(model, X.astype("f")), x, batch_size=12)
    assert not np.isfinite(found["var"][1])
    assert value == 1e30 or not np.isfinite(found["mean"][1])
    others = [0, 2, 3]
    expected = _by_hand(
        None, [x[:12][:, others], x[12:24][:, others], x[24:36][:, others], x[36:][:, others]]
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[jnp.array(others)], b, rtol=2e-5), found, expected)


def test_large_statistics_do_not_hide_the_momentum():
    """A variance of 1e35 beside a probe of 2⁶⁴ would leave nothing of it, and 1 − m for the result's factor."""
    x = (X * 3e17).astype("f")
    model = layers.batch_norm(momentum=0.9)
    found = train.reestimate(model, *_initial(model, x), x, batch_size=20)
    expected = _by_hand(None, [x[:20].astype(float), x[20:].astype(float)])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), found, expected)


def test_other_state_stays_and_names_can_be_chosen():
    model = layers.serial(
        layers.spectral_norm(layers.dense(4)), layers.batch_norm(), layers.dense(4), layers.batch_norm()
    )
    x = X.astype("f")
    params, state = _initial(model, x)
    found = train.reestimate(model, params, state, x, where=r"batch_norm_1/.*")
    for name in ("dense_0", "batch_norm_0"):
        jax.tree.map(np.testing.assert_array_equal, found[name], state[name])
    assert not np.allclose(found["batch_norm_1"]["var"], state["batch_norm_1"]["var"])
    chosen = train.reestimate(model, params, state, x, where=lambda path: path.startswith("batch_norm_1"))
    jax.tree.map(np.testing.assert_array_equal, found, chosen)


def test_batches_draw_by_their_number():
    model = layers.serial(layers.dropout(0.5), layers.batch_norm(momentum=0.0))
    x = jnp.ones((8, 2))
    params, state = _initial(model, x)
    found = train.reestimate(model, params, state, x, batch_size=4, key=KEY)
    means = []
    for i in range(2):
        _, s = model.apply(params, state, x[:4], key=jax.random.fold_in(KEY, i), train=True)
        means.append(s["batch_norm_0"]["mean"])
    assert (means[0] != means[1]).any()
    np.testing.assert_allclose(found["batch_norm_0"]["mean"], np.mean(means, axis=0), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: train.averaged(_trainer(), 1.5),
            ValueError,
            r"decay must be in \[0, 1\], got 1.5: it is the",
        ),
        (lambda: train.averaged(_trainer(), every=0), ValueError, "every must be at least 1, got 0"),
        (lambda: train.averaged(_trainer(), start=1.5), TypeError, "start must be a whole number, got 1.5"),
        (
            lambda: train.average_params(_trainer().init(KEY, jnp.zeros((1, 4)))),
            TypeError,
            r"has no average of the parameters: take the state of train.averaged\(trainer\)",
        ),
        (
            lambda: train.reestimate(LINE, *_initial(LINE, jnp.zeros((1, 4))), X.astype("f")),
            ValueError,
            r"reestimate: no path of the state matches where='.*', there are none",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_last_batch_of_one_example_is_named():
    model = layers.batch_norm()
    params, state = _initial(model, X.astype("f"))
    with pytest.raises(LayerError, match="one value per channel") as caught:
        train.reestimate(model, params, state, X.astype("f"), batch_size=13)
    assert "in the last batch, of 1 examples: give reestimate another batch_size" in caught.value.__notes__
    noisy = layers.serial(layers.dropout(0.5), model)
    with pytest.raises(LayerError, match="needs a key"):
        train.reestimate(noisy, *_initial(noisy, X.astype("f")), X.astype("f"))


@pytest.mark.parametrize("how", ["fit", "run"])
def test_the_best_epoch_comes_back_with_its_average(how):
    """Validated with the average, so that is what is best: evaluated again it gives the best loss."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(48, 3)).astype(np.float32)
    y = (x[:, :1] + rng.normal(size=(48, 1))).astype(np.float32)
    plain = train.trainer(layers.dense(1), losses.mean_squared_error, optim.sgd(0.4))
    trainer = train.averaged(plain, 0.5)
    rule = train.early_stopping(patience=100, restore_best=True)
    arguments = {"epochs": 8, "batch_size": 8, "validation": (x[:16], y[:16]), "early_stopping": rule}
    data = (x[16:], y[16:])
    if how == "fit":
        ts, rows = train.fit(trainer, data, key=jax.random.key(0), **arguments)
        found = [row["val_loss"] for row in rows]
    else:
        ts, history = train.run(trainer, jax.random.key(0), data, **arguments)
        found = history["val_loss"]
    best = int(np.argmin(found))
    assert int(ts.stopping.best_epoch) == best + 1 < 8
    np.testing.assert_allclose(train.evaluate(trainer, ts, (x[:16], y[:16]))["loss"], found[best], rtol=1e-6)
