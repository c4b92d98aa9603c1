"""``nnkit verify``: the table, what it writes, and its exit status."""

from __future__ import annotations

import importlib.util
import json
import sys
import tomllib
from pathlib import Path

import pytest

from nnkit import cli, layers
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
    monkeypatch.setattr(verify, "rows", lambda: iter([row("one", GOOD), row("two", GOOD, "flax")]))
    assert cli.main(["verify"]) == 0
    found = capsys.readouterr()
    assert "not installed: flax; 1 of 2 rows left out" in found.err
    assert "1 comparisons" in found.out
    assert cli.main(["verify", "--only", "two"]) == 1
    assert "no row to compute for --only 'two'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tyro", "rich"])
def test_a_missing_command_line_library_is_one_line(name, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == name else find(n))
    assert cli.main(["verify"]) == 2
    assert capsys.readouterr().err == f"the command line needs {name}: pip install 'nnkit[verify]'\n"


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
    assert {r.oracle for r in table.rows()} <= set(verify.ORACLES)
    project = tomllib.loads((Path(__file__).parent.parent.parent / "pyproject.toml").read_text())
    assert project["project"]["scripts"]["nnkit"] == "nnkit.cli:main"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("dense", lambda: layers.serial(layers.dense(3), layers.stateless(lambda x: x * (1 + 1e-4)))),
        ("batch_norm", lambda: layers.batch_norm(momentum=0.9)),
        ("layer_norm", lambda: layers.layer_norm(epsilon=1e-3)),
        ("conv", lambda: layers.conv(3, (3, 3), padding="CIRCULAR")),
    ],
)
def test_wrong_layers_exceed_their_bounds(name, wrong):
    case = table.layers.TABLE[name]
    if name == "dense":
        inner, outer = layers.dense(3), wrong()
        apply = lambda p, s, x, *, key=None, train: outer.apply({"dense_0": p}, s, x, key=key, train=train)
        made = inner._replace(apply=apply)
    else:
        made = wrong()
    import jax.numpy as jnp

    assert not Bound(relative=1e-5).holds(
        table.layers._measure(case._replace(layer=made), "flax", jnp.float32)
    )


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
