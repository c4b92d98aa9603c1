"""``nnkit verify``: the table, what it writes, and its exit status."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import pytest

from nnkit import activations, cli, layers
from nnkit.testing import table, verify
from nnkit.testing.equivalent import Distance
from nnkit.testing.table import Bound, Row

SMALL = "losses (huber|hinge) (optax|torch) float32"


def row(name: str, distance: Distance | Exception, oracle: str = "optax") -> Row:
    def measure() -> Distance:
        if isinstance(distance, Exception):
            raise distance
        return distance

    return Row("made", name, oracle, "float32", Bound(ulps=2), measure)


GOOD, FAR = Distance(1, 1e-7, 3, "y"), Distance(9, 1e-6, 4, "y")


def test_bounds():
    assert Bound(ulps=2).holds(GOOD)
    assert not Bound(ulps=2).holds(FAR)
    assert Bound(relative=1e-5).holds(FAR)
    assert not Bound(relative=1e-5).holds(FAR._replace(relative=float("nan")))
    assert (str(Bound(ulps=2)), str(Bound(relative=1e-5))) == ("2 ulp", "1e-05")


def test_a_small_table_in_every_form(tmp_path, capsys):
    page = tmp_path / "table.html"
    assert cli.main(["verify", "--only", SMALL, "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "losses: huber" in out
    assert "3 comparisons, 0 out of bounds" in out
    text = page.read_text()
    assert text.count("<tr class=") == 3
    assert "<td>losses: hinge</td><td>optax</td><td>float32</td>" in text
    assert cli.main(["verify", "--only", SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {r["status"] for r in found["rows"]} == {"ok"}
    assert found["oracles"]["optax"]


def test_the_exit_status_tells_of_a_bound_exceeded(monkeypatch, capsys):
    rows = [row("good", GOOD), row("<far>", FAR), row("broken", ZeroDivisionError("by zero"))]
    monkeypatch.setattr(verify, "rows", lambda: iter(rows))
    assert cli.main(["verify"]) == 1
    out = capsys.readouterr().out
    assert "exceeded" in out
    assert "ZeroDivisionError: by zero" in out
    assert "3 comparisons, 2 out of bounds" in out
    lines = verify.verify(rows)
    assert [line.status for line in lines] == ["ok", "exceeded", "error"]
    assert "&lt;far&gt;" in verify.as_html(lines)
    assert 'tr class="exceeded"' in verify.as_html(lines)
    assert [r["ulps"] for r in json.loads(verify.as_json(lines))["rows"]] == [1, 9, None]


def test_missing_oracles_are_named_and_left_out(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "flax" else find(name))
    monkeypatch.setattr(
        verify, "rows", lambda: iter([row("one", GOOD), row("two", GOOD, "flax"), row("three", GOOD, "nnx")])
    )
    assert cli.main(["verify"]) == 0
    found = capsys.readouterr()
    assert "not installed: flax; 2 of 3 rows left out" in found.err
    assert "1 comparisons" in found.out
    assert cli.main(["verify", "--only", "two"]) == 1
    assert "no row to compute for --only 'two'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tyro", "rich"])
def test_a_missing_command_line_library_is_one_line(name, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == name else find(n))
    assert cli.main(["verify"]) == 2
    assert capsys.readouterr().err == f"the command line needs {name}: pip install 'nnkit[experiments]'\n"


def test_a_bad_pattern():
    with pytest.raises(SystemExit, match=r"--only '\(' is no regular expression"):
        cli.main(["verify", "--only", "("])


@pytest.mark.parametrize("arguments", [["--help"], ["verify", "--help"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 0
    assert "verify" in capsys.readouterr().out


def test_list(capsys):
    assert cli.main(["verify", "--only", "^layers dense", "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "layers dense flax float32"


def test_rows_are_told_apart_and_importing_them_imports_no_oracle():
    names = [tuple(r[:4]) for r in table.rows()]
    assert len(names) == len(set(names)) > 200
    assert {r.distribution for r in table.rows()} <= set(verify.ORACLES)
    project = tomllib.loads((Path(__file__).parent.parent.parent / "pyproject.toml").read_text())
    assert project["project"]["scripts"]["nnkit"] == "nnkit.cli:main"


def before(layer, change):
    """The layer on a changed input."""
    return layer._replace(apply=lambda p, s, x, **mode: layer.apply(p, s, change(x), **mode))


def with_params(layer, change):
    return layer._replace(apply=lambda p, s, x, **mode: layer.apply(change(p), s, x, **mode))


def scaled(layer):
    def apply(p, s, x, **mode):
        y, s = layer.apply(p, s, x, **mode)
        return y * (1 + 1e-4), s

    return layer._replace(apply=apply)


def stuck(layer, train):
    """Always in one mode."""
    return layer._replace(apply=lambda p, s, x, **mode: layer.apply(p, s, x, **{**mode, "train": train}))


def without(field):
    return lambda x: x._replace(**{field: None})


RAGGED = {"return_carry": True, "mask_outputs": False}
ENCODER = {"mlp_features": 12, "norm": partial(layers.layer_norm, epsilon=1e-5), "activation": layers.relu}
WRONG = [
    ("dense", "flax", scaled),
    ("dense", "nnx", scaled),
    ("dense", "torch", scaled),
    ("embedding (padding_idx)", "torch", lambda right: layers.embedding(7, 3)),
    ("spatial_dropout (test time)", "torch", lambda right: layers.stateless(lambda x: 0.5 * x)),
    ("batch_norm (50 batches)", "flax", lambda right: layers.batch_norm(momentum=0.9)),
    ("batch_norm (50 batches)", "nnx", lambda right: stuck(right, True)),
    ("batch_norm (PyTorch's, 50 batches)", "torch", lambda right: layers.batch_norm(momentum=0.9)),
    ("layer_norm", "flax", lambda right: layers.layer_norm(epsilon=1e-3)),
    ("weight_norm", "flax", lambda right: layers.weight_norm(layers.dense(3), epsilon=1e-3)),
    ("spectral_norm", "flax", lambda right: layers.spectral_norm(layers.dense(3), n_steps=2)),
    ("spectral_norm (PyTorch's)", "torch", lambda right: stuck(right, False)),
    ("conv", "flax", lambda right: layers.conv(3, (3, 3), padding="CIRCULAR")),
    (
        "conv_transpose (PyTorch's)",
        "torch",
        lambda right: with_params(right, lambda p: {**p, "kernel": p["kernel"][::-1]}),
    ),
    ("min_pool", "torch", lambda right: layers.max_pool((3, 2), strides=(2, 2))),
    (
        "avg_pool (without the padding)",
        "flax",
        lambda right: layers.avg_pool((3, 3), strides=(2, 2), padding="SAME"),
    ),
    ("adaptive_avg_pool", "torch", lambda right: layers.resize((4, 3))),
    ("upsample (linear)", "torch", lambda right: layers.upsample((2, 3))),
    ("pixel_shuffle", "torch", lambda right: before(right, lambda x: x[..., ::-1])),
    ("lstm (Flax's padding)", "flax", lambda right: before(right, without("lengths"))),
    ("lstm (no padding)", "nnx", lambda right: before(right, lambda s: s._replace(carry=s.carry[::-1]))),
    ("lstm", "torch", lambda right: layers.lstm(2, **RAGGED)),
    (
        "gru",
        "torch",
        lambda right: with_params(
            right,
            lambda p: {**p, "recurrent_kernel": p["recurrent_kernel"][:, jnp.array([2, 3, 0, 1, 4, 5])]},
        ),
    ),
    (
        "stacked, bidirectional (gru)",
        "torch",
        lambda right: before(right, lambda s: s._replace(carry=s.carry[::-1])),
    ),
    ("multi_head_attention (padding)", "nnx", lambda right: before(right, without("mask"))),
    ("multi_head_attention (causal)", "torch", lambda right: layers.multi_head_attention(2)),
    (
        "multi_head_attention (cross)",
        "torch",
        lambda right: before(right, lambda s: s._replace(value=s.key)),
    ),
    (
        "multi_head_attention (grouped, causal)",
        "torch",
        lambda right: with_params(
            right, lambda p: {**p, "key": {n: a[..., ::-1, :] for n, a in p["key"].items()}}
        ),
    ),
    (
        "transformer_block (norm last, padding)",
        "torch",
        lambda right: layers.transformer_block(2, norm_first=True, **ENCODER),
    ),
]


@pytest.mark.parametrize(
    ("name", "oracle", "wrong"), WRONG, ids=[f"{name}-{oracle}" for name, oracle, _ in WRONG]
)
def test_wrong_layers_exceed_their_bounds(name, oracle, wrong):
    case = table.layers.TABLE[name]
    found = table.layers.measure(case, oracle, jnp.float32, wrong(case.layer))
    assert not Bound(relative=1e-5).holds(found)


WITHOUT_A_COUNTERPART = {
    "gaussian_dropout", "gaussian_noise", "learned_positions", "sinusoidal_positions", "stochastic_depth",
    # of several layers, or of what a user writes
    "activation_gradients", "add", "branch", "concatenate", "flatten", "frozen", "named", "observe", "parallel",
    "policy", "probe", "recurrent", "remat", "repeat", "residual", "serial", "shape_dependent", "share", "stateless",
    "summary", "wire", "with_dtype",
    # compared in lstm, gru and simple_rnn
    "gru_cell", "lstm_cell", "simple_cell",
}  # fmt: skip


def test_every_layer_with_a_counterpart_has_a_row():
    rows = {name for row in table.layers.TABLE for name in re.split(r"[ ,(]+", row)}
    plain = {name for name in layers.__all__ if hasattr(activations, name) or name in ("identity", "exp")}
    functions = {name for name in layers.__all__ if name.islower()}
    assert functions - rows - plain == WITHOUT_A_COUNTERPART
    for case in table.layers.TABLE.values():
        assert any((case.flax, case.nnx, case.torch))


@pytest.mark.parametrize("family", ["schedules", "losses", "activations", "layers"])
@pytest.mark.slow
def test_the_whole_table_but_the_optimizers(family):
    """The optimizers' rows are asserted one by one in tests/optim."""
    lines = verify.verify(verify.select(f"^{family} "))
    assert not [verify.cells(line) for line in verify.exceeded(lines)]


def test_no_oracle_is_imported_by_the_table():
    import subprocess

    code = "import sys, nnkit.testing.table; print({'optax', 'flax', 'torch', 'rich', 'tyro'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
