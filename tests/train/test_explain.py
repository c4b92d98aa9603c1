"""The first inf or NaN of a step is found at exactly its layer and rows, and shown with what it was made of."""

from __future__ import annotations

import importlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import layers, losses, optim, train
from nnkit.layers.children import visiting
from nnkit.train.elements import blamed, nonfinite
from nnkit.train.history import is_bad
from nnkit.train.report import Statistics
from nnkit.train.scopes import line_of
from nnkit.types import Layer

KEY = jax.random.key(0)
N, WIDTH = 6, 6  # as many rows as features, so that axes cannot be told apart by their lengths
X = np.asarray(jax.random.normal(jax.random.key(1), (N, WIDTH)))
Y = np.zeros((N, WIDTH), np.float32)
dense, serial, stateless, named = layers.dense, layers.serial, layers.stateless, layers.named


def _trainer(model, optimizer=None, loss=losses.mean_squared_error, **options):
    return train.trainer(model, loss, optimizer or optim.sgd(0.1), **options)


def _with(x, rows, value):
    return np.asarray(jnp.asarray(x).at[np.asarray(rows)].set(value))


log = stateless(jnp.log, name="log_")
root = stateless(lambda x: jnp.sqrt(jnp.abs(x)), name="root_")
standard = stateless(lambda x: (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True), name="standard_")


class Case(NamedTuple):
    """A model, a batch, and what is to be said of them."""

    model: Layer
    kind: str
    path: str
    operation: str | None = None
    rows: tuple[int, ...] | None = None
    x: Any = X
    y: Any = Y
    change: Any = None
    turns: tuple[int, ...] = ()

    def start(self):
        ts = _trainer(self.model).init(KEY, X[:1])
        return ts if self.change is None else self.change(ts)


def _wired(net, x):
    h = net.stem(x)
    return net.head(h) + net.body(net.body(h))


ZEROS = _with(np.abs(X) + 0.5, [1, 4], 0.0)  # two rows of zeros
HUGE = _with(X, [2, 5], 1e20)
SAME = _with(X, [0, 3], 2.0)  # rows without spread
linear = dense(WIDTH, use_bias=False)  # zeros stay zeros
out = dense(WIDTH)


def half(*children):
    return layers.policy(named("half", serial(*children)), compute_dtype=jnp.float16)


def _logs(model, path):
    return Case(model, "forward", path, "log", (1, 4), ZEROS)


def _roots(model, path, **more):
    return Case(model, "gradient", path, "div", (1, 4), ZEROS, **more)


def _set(names, value):
    """The change of a state that makes a kernel 0.5, and one number of it ``value``."""

    def change(path, leaf):
        if [k.key for k in path] == [*names.split("/"), "kernel"]:
            return jnp.full_like(leaf, 0.5).at[..., 0, 1].set(value)
        return leaf

    return lambda ts: ts._replace(params=jax.tree_util.tree_map_with_path(change, ts.params))


CASES = {
    "nan in the data": Case(out, "batch", "batch/0", None, (2, 5), _with(X, [2, 5], np.nan)),
    "inf in the targets": Case(out, "batch", "batch/1", None, (1,), y=_with(Y, [1], np.inf)),
    "a NaN parameter": Case(
        serial(out, out), "params", "dense_1/kernel", change=_set("dense_1", np.nan)
    ),
    "log in serial": _logs(serial(log, out), "log_0"),
    "the first of three": _logs(serial(log, serial(log, named("b", log)), out), "log_0"),
    "log deep in serial": _logs(serial(named("a", serial(layers.relu, named("b", serial(log))))), "a/b/log_0"),
    "log in wire": _logs(layers.wire(_wired, stem=layers.identity, body=log, head=out), "body"),
    "log in residual": _logs(layers.residual(serial(layers.relu, log)), "body/log_0"),
    "log in remat": _logs(serial(layers.remat(named("r", serial(layers.relu, log)))), "r/log_0"),
    "log in frozen": _logs(serial(layers.frozen(named("r", serial(log))), out), "r/log_0"),
    "log in repeat": _logs(layers.repeat(log, 3), "block")._replace(turns=(0,)),
    "std of 0": Case(serial(standard, out), "forward", "standard_0", "div", (0, 3), SAME),
    "overflow of a square": Case(
        serial(out, named("square", stateless(jnp.square))), "forward", "square", "square", (2, 5), HUGE
    ),
    "overflow in a dense layer": Case(
        serial(out, named("head", out)), "forward", "head", "dot_general", (5,), change=_set("head", 2e38)
    ),
    "overflow in float16": Case(
        serial(half(out, named("wide", dense(4))), out),
        "forward",
        "half/wide",
        "convert_element_type",
        (3, 4, 5),
        change=_set("half/wide", 5e4),
    ),
    "a parameter too large for float16": Case(
        serial(half(out)), "forward", "half/dense_0", "convert_element_type", change=_set("half/dense_0", 1e6)
    ),
    "a row too large for float16": Case(
        serial(half(out)), "forward", "half", "convert_element_type", (2, 5), HUGE
    ),
    "no gradient of sqrt at 0 is asked for": Case(serial(root, out), "finite", "", x=ZEROS),
    "the gradient of sqrt at 0": _roots(serial(linear, root, out), "root_0"),
    "the gradient in remat": _roots(serial(linear, layers.remat(named("r", serial(root))), out), "r/root_0"),
    "the first of two backwards": _roots(serial(linear, root, root, out), "root_1"),
    "the gradient in repeat": _roots(layers.repeat(serial(linear, root), 3), "block/root_0", turns=(2,)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_first_non_finite_number_is_found(name):
    case = CASES[name]
    report = train.explain(_trainer(case.model), case.start(), (case.x, case.y))
    assert (report.kind, report.path, report.rows) == (case.kind, case.path, case.rows)
    assert report.operation == (case.operation or "")
    assert tuple(turn.number for turn in report.turns) == case.turns


@pytest.mark.parametrize(
    "name",
    [n for n, case in CASES.items() if case.kind == "forward" and not re.search("too large|repeat", n)],
)
def test_it_is_the_first_layer_that_an_observer_sees_give_what_is_not_finite(name):
    case = CASES[name]
    ts, bad = case.start(), []

    def visit(call):
        rows = np.unique(np.nonzero(~np.isfinite(call.y))[0])
        if len(rows):
            bad.append((call.path, tuple(rows)))

    with visiting(visit):
        case.model.apply(ts.params, ts.state, jnp.asarray(case.x), train=True)
    assert bad[0] == (case.path, case.rows)


def bare(f, x=ZEROS, y=Y, wrap=lambda step: step, **options):
    """The report on a step that minimises ``f(w, x, y)``, without layers, from w of ones."""

    def objective(params, state, batch, *, key, train):
        return f(params["w"], *batch), (state, {})

    init = lambda key, x: ({"w": jnp.ones((WIDTH, WIDTH))}, {})
    trainer = train.trainer(objective, init=init, optimizer=optim.sgd(0.1), **options)
    return train.explain(trainer._replace(step=wrap(trainer.step)), trainer.init(KEY, X[:1]), (x, y))


def _logs_of(f):
    """What is said where rows 1 and 4 are 0 and ``f`` takes the logarithm."""
    report = bare(f)
    return report.kind, report.operation, report.rows, tuple(turn.number for turn in report.turns)


def test_a_loss_outside_of_all_layers_is_named_by_its_line():
    report = bare(lambda w, x, y: -(jnp.log(x) @ w).mean())
    assert (report.kind, report.path, report.operation, report.rows) == ("forward", "", "log", (1, 4))
    assert re.fullmatch(r"test_explain\.py:\d+", report.line)
    assert report.inputs["batch/0"].min == 0
    text = str(report)
    assert text.startswith(
        "step 0 (the first is 0): the forward pass of what is outside of all layers (loss, penalty) made inf of finite"
    )
    assert "operation: log, test_explain.py:" in text
    assert "rows of the batch: 1, 4\n" in text


def test_loops_branches_and_calls_are_looked_into():
    def over_time(w, x, y):
        _, logs = jax.lax.scan(lambda c, row: (c, jnp.log(row) * c), 1.0, x.T)
        return (logs.T @ w).mean()

    assert _logs_of(over_time) == ("forward", "log", (1, 4), (0,))
    backwards = lambda w, x, y: (jax.lax.map(jnp.log, x) @ w).mean()  # one row a turn
    assert _logs_of(backwards) == ("forward", "log", (1, 4), (1,))
    branch = lambda w, x, y: jax.lax.cond(
        x[0, 0] > 0, lambda x: (jnp.log(x) @ w).mean(), lambda x: w.sum(), x
    )
    assert _logs_of(branch) == ("forward", "log", (1, 4), ())
    jitted = lambda w, x, y: (jax.jit(jnp.log)(x) @ w).mean()
    assert _logs_of(jitted) == ("forward", "log", (1, 4), ())

    def counted(w, x, y):
        x = jax.lax.stop_gradient(x)
        _, x = jax.lax.while_loop(lambda c: c[0] < 4, lambda c: (c[0] + 1, c[1] / (c[0] - 2.0)), (0.0, x + 1))
        return (x @ w).mean()

    assert _logs_of(counted) == ("forward", "div", (0, 1, 2, 3, 4, 5), (2,))


def test_a_step_that_is_jitted_is_looked_into():
    report = bare(lambda w, x, y: (jnp.log(x) @ w).mean(), wrap=jax.jit)
    assert (report.kind, report.operation, report.rows) == ("forward", "log", (1, 4))


@pytest.mark.parametrize("parts", [2, 4])
def test_rows_of_micro_batches_are_those_of_the_batch(parts):
    """Micro-batches are every second or fourth example; six are not four equal parts."""
    report = bare(lambda w, x, y: (jnp.log(x) @ w).mean(), micro_batches=parts)
    assert (report.kind, report.operation, report.rows) == ("forward", "log", (1, 4))


def test_no_rows_where_no_single_row_is_to_blame():
    """float16 sums of six rows overflow though no row does; a parameter has as many rows as the batch."""
    total = lambda w, x, y: jnp.sum(jnp.full_like(x, 3e38) * w)
    assert bare(total).rows is None
    assert bare(lambda w, x, y: (x @ jnp.log(w - 1)).mean()).rows is None


def test_infinities_that_are_put_away_again_are_none():
    """A mask of -inf, and a log(0) behind a where; a NaN elsewhere is then found all the same."""

    def loss(w, x, y, f=lambda x: x):
        causal = jnp.tril(jnp.ones((len(x), len(x)), bool))
        scores = jnp.where(causal, x @ w @ x.T, -jnp.inf)
        safe = jnp.where(x > 0, jnp.log(x), 0.0)
        return (jax.nn.softmax(scores) @ f(safe)).mean()

    assert bare(loss).kind == "finite"
    report = bare(lambda w, x, y: loss(w, x, y, lambda safe: safe / (x * (w[0, 0] + 1))))
    assert (report.kind, report.operation, report.rows) == ("forward", "div", (1, 4))
    targets = _with(Y, [3], np.nan)  # labels that are missing
    assert bare(lambda w, x, y: jnp.where(jnp.isnan(y), 0.0, (x @ w)).mean(), y=targets).kind == "finite"


def test_a_where_that_chooses_another_is_not_followed():
    """A log(0) that is not chosen, before the division that is to blame, in one and the same where."""

    def loss(w, x, y):
        avoided = jnp.log(x)
        return (jnp.where(x > 0, avoided, 1 / (x * w[0])) @ w).mean()

    report = bare(loss)
    assert (report.kind, report.operation, report.rows) == ("forward", "div", (1, 4))


def test_a_mask_that_leaves_nothing_is_a_constants_fault():
    masked = lambda w, x, y: jax.nn.softmax(jnp.where(x > 0, x @ w, -jnp.inf)).mean()
    report = bare(masked)
    assert (report.kind, report.operation, report.rows) == ("constant", "sub", (1, 4))
    assert "finfo" in str(train.NotFiniteError(0, 1, report))
    assert bare(lambda w, x, y: jnp.float32(jnp.nan)).kind == "constant"


def test_the_gradient_of_a_where_behind_the_operation():
    report = bare(lambda w, x, y: jnp.where(x @ w > 0, jnp.sqrt(x @ w), 0.0).mean())
    assert (report.kind, report.operation, report.rows, report.leaves) == ("gradient", "div", (1, 4), ("w",))
    assert "jnp.sqrt(jnp.where(x > 0, x, 1))" in str(train.NotFiniteError(0, 1, report))


def test_an_optimizers_update():
    rate = lambda step: jnp.where(step == 3, jnp.inf, 0.1)
    trainer = _trainer(serial(out, out), optim.sgd(rate))
    ts = trainer.init(KEY, X[:1])
    assert train.explain(trainer, ts, (X, Y)).kind == "finite"
    report = train.explain(
        trainer, ts._replace(step=jnp.int32(3), opt_state=_counted(ts.opt_state, 3)), (X, Y)
    )
    assert (report.step, report.kind, report.path) == (3, "update", "dense_0/bias")
    assert report.leaves == ("dense_0/bias", "dense_0/kernel", "dense_1/bias", "dense_1/kernel")
    assert "the optimizer's update of dense_0/bias is not" in str(report)
    assert "schedule" in str(train.NotFiniteError(3, 1, report))


def _counted(opt_state, n):
    return jax.tree.map(lambda x: jnp.full_like(x, n), opt_state)


def test_state_that_came_in_not_finite():
    model = serial(layers.batch_norm(), out)
    trainer = _trainer(model, optim.adam(0.1))
    ts = trainer.init(KEY, X[:1])
    spoilt = ts._replace(state=jax.tree.map(lambda s: s * jnp.nan, ts.state))
    report = train.explain(trainer, spoilt, (X, Y))  # training does not use running statistics
    assert (report.kind, report.path) == ("state", "batch_norm_0/mean")
    spoilt = ts._replace(
        opt_state=jax.tree.map(lambda s: s * jnp.asarray(jnp.nan, s.dtype) if s.ndim else s, ts.opt_state)
    )
    report = train.explain(trainer, spoilt, (X, Y))
    assert report.kind == "opt_state"
    assert re.fullmatch("opt_state/.*batch_norm_0/bias", report.leaves[0])


def test_a_packed_optimizer_state_is_named_as_the_tree_it_is():
    params = {f"w{i}": jnp.ones(2) for i in range(70)} | {"w": jnp.ones((WIDTH, WIDTH))}
    objective = lambda params, state, batch, *, key, train: (
        sum(map(jnp.sum, jax.tree.leaves(params))),
        (state, {}),
    )
    trainer = train.trainer(
        objective, init=lambda key, x: (params, {}), optimizer=optim.sgd(0.1, momentum=0.9)
    )
    ts = trainer.init(KEY, X[:1])
    trace = jax.tree.map(lambda t: t.at[140 - 3].set(jnp.nan) if t.shape == (176,) else t, ts.opt_state)
    report = train.explain(trainer, ts._replace(opt_state=trace), (X, Y))
    assert (report.kind, len(report.leaves)) == ("opt_state", 1)
    assert "packed" not in report.leaves[0]


def test_steps_that_an_optimizer_drops_are_finite():
    trainer = _trainer(serial(linear, root, out), optim.dynamic_loss_scale(optim.sgd(0.1)))
    ts = trainer.init(KEY, X[:1])
    assert train.explain(trainer, ts, (ZEROS, Y)).kind == "finite"
    assert bool(train.chunk_is_finite(ts, {"loss": jnp.array([jnp.inf])}))


def test_the_report_shows_the_layers_inputs_and_parameters():
    model = serial(named("a", out), named("b", serial(named("c", out))), named("d", out))
    trainer = _trainer(model)
    ts = _set("b/c", 2e38)(trainer.init(KEY, X[:1]))
    report = train.explain(trainer, ts, (X, Y), rows=np.arange(100, 100 + N))
    before, _ = model.apply(ts.params, ts.state, X, train=True)
    h = X @ ts.params["a"]["kernel"] + ts.params["a"]["bias"]
    assert (report.path, report.examples) == ("b/c", tuple(100 + i for i in report.rows))
    assert report.inputs["input"].max == pytest.approx(float(h.max()), rel=1e-5)
    assert report.inputs["input"].shape == (N, WIDTH)
    assert set(report.params) == {"b/c/kernel", "b/c/bias"}
    assert report.params["b/c/kernel"].max == np.float32(2e38)
    assert report.output.inf == int(np.isinf(np.asarray(before)).any(1).sum())
    text = str(report)
    assert "layer b/c made inf of finite numbers" in text
    assert re.search(r", nnkit/\w+/\w+\.py:\d+\n", text)
    assert f"examples {report.examples[0]}" in text
    assert not re.search(r"[ /]\w+/site-packages|, /", text)


def test_statistics_are_of_the_finite_numbers():
    x = jnp.array([1.0, 2.0, 6.0, jnp.nan, jnp.inf, -jnp.inf], jnp.bfloat16)
    assert Statistics.of(x) == Statistics((6,), "bfloat16", 1.0, 6.0, 3.0, np.std([1, 2, 6]), 1, 2)
    assert Statistics.of(jnp.array([3 + 4j, 0j])).max == 5.0
    nothing = Statistics.of(jnp.array([jnp.nan]))
    assert np.isnan(nothing.mean)
    assert nothing.nan == 1


def test_wrong_arguments_are_named():
    trainer = _trainer(out)
    ts = trainer.init(KEY, X[:1])
    with pytest.raises(TypeError, match="explain takes the TrainState before the step and got dict"):
        train.explain(trainer, {}, (X, Y))
    with pytest.raises(
        ValueError, match=r"one number for each row of the batch, of shape \(6,\), and got \(5,\)"
    ):
        train.explain(trainer, ts, (X, Y), rows=range(5))


def test_a_mask_of_inf_is_not_the_culprit_where_its_sum_with_another_inf_is_nan():
    """Row 2's scores overflow to +inf, also where the mask is -inf."""

    def loss(w, x, y):
        x = x[:, :, None] * w
        masked = jnp.log(jnp.tril(jnp.ones((WIDTH, WIDTH)))) + jnp.einsum("bid,bjd->bij", x, x)
        return jax.nn.softmax(masked).mean()

    report = bare(loss, x=_with(np.abs(X), [2], 1e25))
    assert (report.kind, report.operation, report.rows) == ("forward", "dot_general", (2,))


def test_an_inf_beside_the_culprit_in_a_sum():
    """Logarithms of zeros, which softmax takes, and an overflow in another place of the same row."""

    def loss(w, x, y):
        masked = jnp.log(jnp.abs(x)) + jnp.square(x)
        return jax.nn.softmax(masked).mean() * w.mean()

    report = bare(loss, x=_with(X, [2], np.array([0, 0, 0, 1, 1e25, 1])))
    assert (report.kind, report.operation, report.rows) == ("forward", "square", (2,))


@pytest.mark.parametrize("label", [-1, 7])
def test_labels_out_of_range_are_named_with_their_rows(label):
    trainer = _trainer(dense(2), loss=losses.softmax_cross_entropy)
    ts = trainer.init(KEY, X[:1])
    labels = np.zeros(N, np.int32)
    labels[[1, 4]] = label
    report = train.explain(trainer, ts, (X, labels), rows=np.arange(100, 100 + N))
    assert (report.kind, report.rows, report.examples) == ("batch", (1, 4), (101, 104))
    text = str(train.NotFiniteError(0, 1, report))
    assert f"label targets[1] is {label} (2 of 6 are out of place), and 2 classes have labels 0..1" in text
    assert "a look at these rows of the data" in text
    assert "isfinite" not in text
    assert "constant" not in text


def test_a_constant_is_shown_where_it_becomes_part_of_the_batch():
    """A NaN for a label out of range, of a loss that checks nothing."""
    report = bare(lambda w, x, y: jnp.where(x[:, 0] > 0, (x @ w)[:, 0], jnp.asarray(jnp.nan)).mean())
    assert (report.kind, report.operation, report.rows) == ("constant", "select_n", (1, 4))
    assert report.line.startswith("test_explain.py:")


def test_rows_of_micro_batches_of_unequal_size_are_all_told():
    zeros = np.zeros((7, WIDTH), np.float32)
    report = bare(lambda w, x, y: (jnp.log(x) @ w).mean(), x=zeros, y=zeros, micro_batches=3)
    assert (report.operation, report.rows) == ("log", (0, 1, 2, 3, 4, 5, 6))


def test_the_only_row_of_a_batch_of_one():
    report = bare(lambda w, x, y: (jnp.log(x) @ w).mean(), x=ZEROS[1:2], y=Y[:1])
    assert (report.operation, report.rows) == ("log", (0,))


@pytest.mark.parametrize(
    ("f", "x", "wanted", "found"),
    [
        (jnp.transpose, [[np.inf, 1], [np.nan, np.inf]], [[0, 1], [0, 1]], [[0, 0], [1, 1]]),
        (lambda x: jax.lax.slice(x, (0,), (2,)), [np.inf, np.nan, np.inf], [0, 1], [0, 1, 0]),
        (lambda x: jax.lax.broadcast(x, (2,)), [np.inf, np.inf, 1], [[0, 0, 1], [1, 0, 0]], [1, 0, 0]),
        (lambda x: jnp.max(x, 1), [[-np.inf, np.inf], [-np.inf, 1]], [1, 0], [[0, 1], [0, 0]]),
        (lambda x: jnp.max(x, 1), [[np.nan, np.inf], [np.nan, 1]], [1, 0], [[1, 0], [0, 0]]),
        (lambda x: x + np.float32(np.inf), [-np.inf, np.nan], [1, 0], [1, 0]),
        (jnp.sort, [np.inf, 1, np.nan], [1, 0, 0], [1, 0, 1]),
    ],
)
def test_which_elements_are_to_blame(f, x, wanted, found):
    x = np.asarray(x, np.float32)
    eqn = jax.make_jaxpr(f)(x).eqns[0]
    args = [v.val if hasattr(v, "val") else x for v in eqn.invars]
    masks = blamed(eqn, args, [f(jnp.asarray(x))], [np.asarray(wanted, bool)])
    np.testing.assert_array_equal(masks[0], np.asarray(found, bool))


def _every_inf(eqn, inputs, outputs, wanted):
    return [nonfinite(x) if is_bad(x) else np.zeros(np.shape(x), bool) for x in inputs]


def _last_backward(history):
    return [op for op in history.operations if op.scope.backward][-1]


MUTANTS = {
    "the last gradient": (
        "history.History.first_backward",
        _last_backward,
        lambda: test_the_first_non_finite_number_is_found("the first of two backwards"),
    ),
    "every inf is followed": (
        "history.blamed",
        _every_inf,
        test_a_where_that_chooses_another_is_not_followed,
    ),
    "every inf of a sum is followed": ("history.blamed", _every_inf, test_an_inf_beside_the_culprit_in_a_sum),
    "the first birth though its rows are others": (
        "history.Operation.rows",
        lambda op, wanted: None,
        test_a_mask_of_inf_is_not_the_culprit_where_its_sum_with_another_inf_is_nan,
    ),
    "a constant wherever it is": (
        "history.Operation.rows",
        lambda op, wanted: None,
        test_a_constant_is_shown_where_it_becomes_part_of_the_batch,
    ),
    "lines inside calls alone": (
        "replay._line",
        lambda level, i: line_of(level.jaxpr.eqns[i]),
        test_a_constant_is_shown_where_it_becomes_part_of_the_batch,
    ),
    "operations by their identity": (
        "explain._same_code",
        lambda a, b: a.equation is b.equation,
        test_rows_of_micro_batches_of_unequal_size_are_all_told,
    ),
    "the batch is not checked": (
        "explain.refused",
        lambda trainer, ts, batch: "",
        lambda: test_labels_out_of_range_are_named_with_their_rows(-1),
    ),
    "axes by their place": (
        "replay._axis",
        lambda here, there: 0 if here.shape else None,
        test_no_rows_where_no_single_row_is_to_blame,
    ),
    "micro-batches are not followed": (
        "replay.Replay._note_part",
        lambda replay, value: None,
        lambda: test_rows_of_micro_batches_are_those_of_the_batch(2),
    ),
    "loops over rows are not followed": (
        "replay._only_row",
        lambda args, otherwise: otherwise,
        test_loops_branches_and_calls_are_looked_into,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_replay_is_noticed(name, monkeypatch):
    what, wrong, check = MUTANTS[name]
    module, *names, attribute = what.split(".")
    target = importlib.import_module(f"nnkit.train.{module}")
    for owner in names:
        target = getattr(target, owner)
    monkeypatch.setattr(target, attribute, wrong)
    with pytest.raises(AssertionError):
        check()
