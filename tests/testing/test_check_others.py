"""``check_optimizer``, ``check_loss``, ``check_schedule``, ``check_trainer``: right ones pass, wrong ones do not."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnkit import layers, losses, optim, testing, train
from nnkit.testing import loss as loss_checks
from nnkit.testing import optimizer as optimizer_checks
from nnkit.testing import schedule as schedule_checks
from nnkit.testing import trainer as trainer_checks
from nnkit.types import GradientTransformation, Trainer
from tests.testing.wrong_layers import Counter

COUNTER = Counter()

# ---- optimizers ----------------------------------------------------------------------------------------------


def tx(update: Any, init: Any = lambda params: {"n": jnp.zeros((), jnp.int32)}) -> GradientTransformation:
    return GradientTransformation(init, update)


def each(f: Any) -> GradientTransformation:
    """A transformation of the updates leaf by leaf, without a state of meaning."""
    return tx(lambda u, s, p=None: (jax.tree.map(f, u), s))


def _counting(count):
    return tx(lambda u, s, p=None: (jax.tree.map(lambda g: g * count(), u), s))


def _writing(u, s, p=None):
    s["n"] = s["n"] + 1
    return u, s


@jax.custom_batching.custom_vmap
def _same(x):
    return x


@_same.def_vmap
def _(axis_size, in_batched, x):
    return 2 * x, in_batched[0]


@jax.custom_vjp
def _halved(x):
    return x**2


_halved.defvjp(lambda x: (x**2, x), lambda x, g: (g * x,))


@jax.custom_jvp
def _stopped(x):
    return x**3


_stopped.defjvp(lambda p, t: (p[0] ** 3, 3 * jax.lax.stop_gradient(p[0]) ** 2 * t[0]))


@jax.custom_vjp
def _sine(x):
    return jnp.sin(x)


_sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


def _compared(learning_rate):
    return optim.sgd(learning_rate if learning_rate > 0.01 else 0.01)


OPTIMIZERS: list[tuple[str, str, Any, dict[str, Any], str]] = [
    ("signature", "no update", (lambda p: (), None), {}, r"expected  a function .init"),
    ("signature", "update of one", tx(lambda u: u), {}, "too many positional arguments"),
    (
        "shapes as eval_shape says",
        "widened",
        each(lambda g: g.astype(jnp.bfloat16)),
        {},
        "cast them to the parameters' dtypes",
    ),
    (
        "shapes as eval_shape says",
        "a state that changes",
        tx(lambda u, s, p=None: (u, {"n": jnp.zeros(())})),
        {},
        r"at        n\n  expected  int32\[\]\n  arrived   float32",
    ),
    (
        "dtypes",
        "float32 always",
        each(lambda g: g.astype(jnp.float32)),
        {},
        "the updates for bfloat16 parameters",
    ),
    ("purity", "a counter", _counting(Counter()), {}, "called again with the same arguments, differs"),
    ("purity", "writes into its state", tx(_writing), {}, r"changes its arguments\n  at        1/n"),
    ("jit", "a counter", _counting(Counter()), {}, "a compiled step differs"),
    ("vmap", "a wrong batching rule", each(_same), {}, "vmap over two populations differs"),
    (
        "one compilation",
        "a weak type",
        tx(
            lambda u, s, p=None: (u, {"n": jnp.zeros((), jnp.int32) + 1 if s["n"].weak_type else s["n"]}),
            lambda p: {"n": jnp.asarray(0)},
        ),
        {},
        "compiles again",
    ),
    (
        "donation",
        "keeps the parameters",
        tx(lambda u, s, p=None: (u, s), lambda p: {"slow": p}),
        {},
        "state/slow/dense_0/bias is the buffer of params/dense_0/bias",
    ),
    (
        "serialisation",
        "a function in the state",
        tx(lambda u, s, p=None: (u, s), lambda p: {"f": jnp.sin}),
        {},
        ".",
    ),
    ("extremes", "0/0", each(lambda g: g / jnp.abs(g)), {}, r"after gradients of zeros \(0\)"),
    ("finite differences", "half a slope", each(_halved), {}, "at        grads/"),
    ("forward mode", "no rule", each(_sine), {}, "custom_vjp"),
    ("second derivatives", "a stopped slope", each(_stopped), {}, "at        grads/"),
    (
        "hyper-parameters",
        "a comparison",
        _compared(0.1),
        {"factory": _compared, "hyperparameters": {"learning_rate": 0.1}},
        "TracerBoolConversionError",
    ),
    (
        "reference",
        "eps inside the root",
        optim.adam(1e-3, eps=0.0, eps_root=1e-8),
        {"reference": optax.adam(1e-3)},
        r"reference: the two part at step 0\n  at        updates/",
    ),
    (
        "reference",
        "another momentum",
        optim.sgd(0.1, 0.8),
        {"reference": optax.sgd(0.1, 0.9)},
        r"the two part at step 1\n(.|\n)*not the first step",
    ),
]


@pytest.mark.parametrize(
    ("title", "wrong", "arguments", "words"),
    [(title, wrong, arguments, words) for title, _, wrong, arguments, words in OPTIMIZERS],
    ids=[f"{title}: {name}" for title, name, *_ in OPTIMIZERS],
)
def test_a_wrong_optimizer_is_caught(title, wrong, arguments, words):
    _caught(optimizer_checks.CHECKS, title, words, wrong, **arguments)


def _caught(checks: Any, title: str, words: str, *args: Any, **kwargs: Any) -> None:
    check = next(check for check in checks if check.title == title)
    with pytest.raises((testing.ConformanceError, TypeError)) as caught:
        check(*args, **kwargs)
    assert re.search(words, str(caught.value)), str(caught.value)


def test_right_optimizers_pass():
    report = testing.check_optimizer(
        optim.adamw(1e-3, weight_decay=0.1),
        optax.adamw(1e-3, weight_decay=0.1),
        factory=lambda **n: optim.adamw(**n, mask=None),
        hyperparameters={"learning_rate": 0.01, "b1": 0.9, "weight_decay": 0.1},
    )
    assert {r.status for r in report.results} == {"passed"}
    assert re.search(r"reference +passed +at most [012] ulp", str(report))
    params = {"kernel": jnp.ones((3, 2))}
    grads = [{"kernel": jnp.arange(6.0).reshape(3, 2) + i} for i in range(3)]
    testing.check_optimizer(optim.momentum(0.1, 0.9), params=params, grads=grads)


# ---- losses --------------------------------------------------------------------------------------------------


def _squares(p, t):
    return jnp.mean((p - t) ** 2, -1)


def _exact(f):
    """A loss that refuses shapes which broadcast."""

    def loss(p, t):
        if p.shape != t.shape:
            raise ValueError("shapes differ")
        return f(p, t)

    return loss


LOSSES: list[tuple[str, Any, str]] = [
    (
        "one value an example",
        lambda p, t: jnp.mean((p - t) ** 2),
        r"expected  \(6,\), or more of \(6, 4\)'s leading axes\n  arrived   \(\)",
    ),
    ("one value an example", lambda p, t: jnp.mean((p[:, None] - t[None]) ** 2, -1), r"arrived   \(6, 6\)"),
    (
        "shapes as eval_shape says",
        lambda p, t: _squares(p, t) if isinstance(p, jax.core.Tracer) else _squares(p, t)[:2],
        "has another shape",
    ),
    ("purity", lambda p, t, c=COUNTER: _squares(p, t) + c(), "called again"),
    (
        "jit",
        lambda p, t: _squares(p, t) * (1.0 if isinstance(p, jax.core.Tracer) else 1.1),
        r"jit\(loss\) differs",
    ),
    ("vmap", lambda p, t: _squares(p, t) / p.shape[0], "the batch's size enters"),
    (
        "independence of examples",
        lambda p, t: _squares(p, t) - _squares(p, t).max(),
        r"at        values\[1:\]",
    ),
    ("broadcasting", _squares, r"arrived   values of shape \(24,\)"),
    ("dtypes", lambda p, t: _squares(p, t).astype(jnp.float32), "the values for float64 predictions"),
    (
        "extremes",
        lambda p, t: jnp.sqrt(jnp.sum(p**2, -1)),
        r"predictions of zeros \(0\)\n  at        gradient",
    ),
    ("finite differences", lambda p, t: jnp.mean(_halved(p - t), -1), "at        predictions"),
    ("forward mode", lambda p, t: jnp.mean(_sine(p - t), -1), "custom_vjp"),
    ("second derivatives", lambda p, t: jnp.mean(_stopped(p - t), -1), "at        predictions"),
]


@pytest.mark.parametrize(("title", "wrong", "words"), LOSSES, ids=[title for title, *_ in LOSSES])
def test_a_wrong_loss_is_caught(title, wrong, words):
    _caught(loss_checks.CHECKS, title, words, wrong)


@pytest.mark.parametrize(
    "arguments",
    [
        (losses.mean_squared_error,),
        (
            losses.softmax_cross_entropy,
            np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32),
            jnp.arange(6) % 4,
        ),
        (losses.binary_cross_entropy_with_logits,),
    ],
    ids=lambda a: a[0].__name__,
)
def test_right_losses_pass(arguments):
    testing.check_loss(*arguments)


# ---- schedules -----------------------------------------------------------------------------------------------


def _halving(step):
    return jnp.float32(0.5) ** (jnp.asarray(step).astype(jnp.float32) / 10)


SCHEDULES: list[tuple[str, Any, dict[str, Any], str]] = [
    ("a scalar of the step", lambda step: jnp.asarray(step) // 2, {}, r"arrived   int32 of shape \(\)"),
    ("a scalar of the step", lambda step: _halving(step)[None], {}, r"arrived   float32 of shape \(1,\)"),
    ("purity", lambda step, c=COUNTER: _halving(step) * c(), {}, "called again"),
    (
        "jit",
        lambda step: _halving(step) if isinstance(step, jax.core.Tracer) else 1.1 * _halving(step),
        {},
        r"jit\(schedule\) differs",
    ),
    ("vmap", lambda step: _same(_halving(step)), {}, r"vmap\(schedule\) differs"),
    (
        "kinds of step",
        lambda step: _halving(step) if isinstance(step, jax.Array) else 0.0,
        {},
        r"the value at int\(7\) differs",
    ),
    (
        "finite everywhere",
        lambda step: 1 / jnp.asarray(step).astype(jnp.float32),
        {},
        "the value at step 0\n  at        step 0\n  expected  a finite number",
    ),
    (
        "finite everywhere",
        lambda step: jnp.sqrt((100 - jnp.asarray(step)).astype(jnp.float32)),
        {},
        "the value at step 101",
    ),
    (
        "hyper-parameters",
        _halving,
        {
            "factory": lambda rate: lambda step: _halving(step) * (rate if rate > 0 else 0),
            "hyperparameters": {"rate": 1.0},
        },
        "TracerBoolConversionError",
    ),
    (
        "reference",
        lambda step: _halving(jnp.asarray(step) + 1),
        {"reference": lambda step: 0.5 ** (step / 10)},
        "it is the reference's value at step 1: the count is off",
    ),
]


@pytest.mark.parametrize(("title", "wrong", "arguments", "words"), SCHEDULES, ids=[t for t, *_ in SCHEDULES])
def test_a_wrong_schedule_is_caught(title, wrong, arguments, words):
    _caught(schedule_checks.CHECKS, title, words, wrong, **arguments)


def test_right_schedules_pass():
    report = testing.check_schedule(
        optim.warmup_cosine_decay_schedule(0.0, 0.3, 5, 100),
        optax.warmup_cosine_decay_schedule(0.0, 0.3, 5, 100),
        factory=lambda **n: optim.warmup_cosine_decay_schedule(warmup_steps=5, decay_steps=100, **n),
        hyperparameters={"init_value": 0.0, "peak_value": 0.3},
    )
    assert {r.status for r in report.results} == {"passed"}


# ---- trainers ------------------------------------------------------------------------------------------------

MODEL = layers.serial(layers.dense(3), layers.batch_norm(), layers.dropout(0.5), layers.dense(1))
RIGHT = train.trainer(MODEL, losses.mean_squared_error, optim.momentum(0.1, 0.9))
BATCH = (
    jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)), jnp.float32),
    jnp.asarray(np.random.default_rng(1).normal(size=(6, 1)), jnp.float32),
)


def _with(**functions: Any) -> Trainer:
    return RIGHT._replace(**functions)


def _after(change: Any) -> Trainer:
    """The right one whose step's state is changed afterwards."""

    def step(ts, batch):
        new, metrics = RIGHT.step(ts, batch)
        return change(ts, new), metrics

    return _with(step=step)


def _key_twice(ts, batch):
    noise = jax.random.normal(ts.key, batch[0].shape) + jax.random.uniform(ts.key, batch[0].shape)
    return RIGHT.step(ts, (batch[0] + noise, batch[1]))


def _one_mask(ts, batch):
    new, metrics = RIGHT.step(ts._replace(step=0 * ts.step), batch)
    return new._replace(step=ts.step + 1), metrics


def _evaluate_key_twice(ts, batch):
    noise = jax.random.normal(ts.key, batch[0].shape) + jax.random.uniform(ts.key, batch[0].shape)
    return RIGHT.evaluate(ts, (batch[0] + noise, batch[1]))


def _evaluate_eager(ts, batch):
    factor = 1.0 if isinstance(batch[0], jax.core.Tracer) else 1.1
    return {k: v * factor for k, v in RIGHT.evaluate(ts, batch).items()}


def _evaluate_dividing(ts, batch):
    x, y = batch
    return RIGHT.evaluate(ts, (x / jnp.linalg.norm(x, axis=1, keepdims=True), y))


def _dividing(ts, batch):
    x, y = batch
    return RIGHT.step(ts, (x / jnp.linalg.norm(x, axis=1, keepdims=True), y))


def _by_position(ts, batch):
    new, metrics = RIGHT.step(ts, batch)
    return new._replace(params=jax.tree.map(_same, new.params)), metrics


def _counted(ts, batch, count=COUNTER):
    new, metrics = RIGHT.step(ts, batch)
    return new, {**metrics, "time": jnp.float32(count())}


def _shared(key, x):
    ts = RIGHT.init(key, x)
    return ts._replace(opt_state=ts.params)


TRAINERS: list[tuple[str, str, Trainer, str]] = [
    (
        "the train state",
        "a tuple",
        _with(init=lambda k, x: tuple(RIGHT.init(k, x))),
        "expected  a TrainState\n  arrived   tuple",
    ),
    (
        "the train state",
        "step 1",
        _with(init=lambda k, x: RIGHT.init(k, x)._replace(step=jnp.int32(1))),
        "expected  int32 0",
    ),
    (
        "the train state",
        "an old key",
        _with(init=lambda k, x: RIGHT.init(k, x)._replace(key=jax.random.key_data(k))),
        "jax.random.key",
    ),
    (
        "a step",
        "does not count",
        _after(lambda old, new: new._replace(step=old.step)),
        "step \\+ 1 is not returned",
    ),
    (
        "a step",
        "splits the key",
        _after(lambda old, new: new._replace(key=jax.random.split(new.key)[0])),
        "fold the step's number",
    ),
    (
        "a step",
        "does not move",
        _after(lambda old, new: new._replace(params=old.params)),
        "the updates are not applied",
    ),
    (
        "a step",
        "narrows",
        _after(
            lambda old, new: new._replace(params=jax.tree.map(lambda p: p.astype(jnp.bfloat16), new.params))
        ),
        "at        params/batch_norm_0/bias",
    ),
    (
        "metrics",
        "no loss",
        _with(evaluate=lambda ts, b: {"accuracy": jnp.ones(())}),
        "arrived   \\['accuracy'\\]",
    ),
    (
        "metrics",
        "a vector",
        _with(evaluate=lambda ts, b: {"loss": jnp.ones(6)}),
        "return the mean over the examples",
    ),
    (
        "what is carried",
        "old statistics",
        _after(lambda o, n: n._replace(state=o.state)),
        "state after two steps",
    ),
    (
        "what is carried",
        "old moments",
        _after(lambda o, n: n._replace(opt_state=o.opt_state)),
        "the step returns the opt_state it got",
    ),
    ("randomness", "one mask for ever", _with(step=_one_mask), "one dropout mask for ever"),
    ("key reuse", "evaluate", _with(evaluate=_evaluate_key_twice), "evaluate uses a key twice"),
    ("jit", "evaluate", _with(evaluate=_evaluate_eager), r"jit\(evaluate\) differs"),
    ("extremes", "evaluate", _with(evaluate=_evaluate_dividing), "evaluate on inputs of zeros"),
    ("purity", "a counter", _with(step=_counted), "called again"),
    ("key reuse", "a key twice", _with(step=_key_twice), "a step uses a key twice"),
    ("jit", "a counter", _with(step=_counted), r"jit\(step\) differs"),
    ("vmap", "a wrong batching rule", _with(step=_by_position), "vmap over two seeds differs"),
    (
        "one compilation",
        "a weak type",
        _after(
            lambda old, new: new._replace(
                state={
                    "batch_norm_0": jax.tree.map(lambda a: a.astype(jnp.bfloat16), new.state["batch_norm_0"])
                }
            )
        ),
        ".",
    ),
    ("donation", "a shared tree", _with(init=_shared), "is the buffer of"),
    (
        "serialisation",
        "a function",
        _with(init=lambda k, x: RIGHT.init(k, x)._replace(opt_state={"f": jnp.sin})),
        ".",
    ),
    ("extremes", "0/0", _with(step=_dividing), "a step on inputs of zeros"),
]


@pytest.mark.parametrize(
    ("title", "wrong", "words"),
    [(title, wrong, words) for title, _, wrong, words in TRAINERS],
    ids=[f"{title}: {name}" for title, name, *_ in TRAINERS],
)
def test_a_wrong_trainer_is_caught(title, wrong, words):
    _caught(trainer_checks.CHECKS, title, words, wrong, BATCH)


def test_right_trainers_pass():
    report = testing.check_trainer(RIGHT, BATCH, skip={"mesh": "in on_a_mesh.py"})
    assert {r.status for r in report.results} == {"passed", "skipped"}


def test_every_check_has_something_wrong():
    for suite, table in (
        (optimizer_checks, OPTIMIZERS),
        (loss_checks, LOSSES),
        (schedule_checks, SCHEDULES),
        (trainer_checks, [*TRAINERS, ("mesh",)]),
    ):
        assert {check.title for check in suite.CHECKS} == {row[0] for row in table}


def test_arguments_that_go_together():
    for check, arguments in (
        (testing.check_optimizer, (optim.sgd(0.1),)),
        (testing.check_schedule, (_halving,)),
    ):
        with pytest.raises(TypeError, match="factory= and hyperparameters= go together"):
            check(*arguments, factory=optim.sgd)
    with pytest.raises(TypeError, match=r"predictions is one array, got tuple"):
        testing.check_loss(_squares, (jnp.ones(2), jnp.ones(2)), jnp.ones(2))
    with pytest.raises(TypeError, match="predictions= and targets= go together"):
        testing.check_loss(_squares, jnp.ones((2, 1)))
    with pytest.raises(TypeError, match=r"pass a nnkit\.Trainer"):
        testing.check_trainer(MODEL, BATCH)
    with pytest.raises(TypeError, match="params= needs grads="):
        testing.check_optimizer(optim.sgd(0.1), params={"w": jnp.ones(2)})
