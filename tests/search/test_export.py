"""Tables of a study: CSV and Parquet give back the rows to the bit, and Optuna's dashboard opens the study."""

from __future__ import annotations

import csv
import io
import json
import math
import struct
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnkit import search
from nnkit.search.engine import Finished

SPACE = {
    "lr": search.log_uniform(1e-5, 1.0),
    "sizes": search.choice([(32,), (64, 32)]),
    "decay": search.choice([None, 0.5, 3, "four"]),
    "optimizer": search.conditional({"sgd": {"momentum": search.uniform(0, 0.99)}, "adam": {}}),
}
ORIGIN = {
    "device": {"kind": "cpu"},
    "versions": {"jax": "0.10.2", "python": "3.11"},
    "git": {"revision": "abc", "dirty": False},
}


def a_study(where=None):
    study = search.begin_study(SPACE, metric="val_loss", seeds=(0, 1), storage=where)
    study.optuna.sampler = search.make_sampler("random", study.space)
    rng = np.random.default_rng(0)
    for i in range(6):
        trial = study.optuna.ask()
        flat = study.space.suggest(trial)
        loss = rng.normal(size=(2, 3)).astype("f")
        loss[0, 2] = np.nan if i == 2 else loss[0, 2]
        history = {"val_loss": loss, "step": np.tile(np.arange(1, 4, dtype="i4"), (2, 1))}
        result = Finished(0, history, seconds=rng.random(), stopped=2 if i == 4 else None, how="exact")
        search.tell(study, trial, flat, result, provenance=ORIGIN)
    study.optuna.ask()
    study.optuna.set_user_attr("test:a", {"trial": 0, "numbers": {"error": 0.1 + 0.2}, "when": "2026"})
    return study


def exact(value):
    """A form of ``value`` that is equal only to itself: by type, and floats by their bits."""
    if isinstance(value, float):
        return struct.pack("d", value)
    if isinstance(value, list):
        return [exact(item) for item in value]
    return (type(value).__name__, value)


def same(rows, others):
    return [{n: exact(v) for n, v in row.items()} for row in rows] == [
        {n: exact(v) for n, v in row.items()} for row in others
    ]


@pytest.mark.parametrize("name", ["trials.csv", "trials.parquet", "new/folder/trials.csv"])
def test_a_study_comes_back_to_the_bit(tmp_path, name):
    study = a_study()
    path = study.export(tmp_path / name)
    assert path == tmp_path / name
    rows = search.read_table(path)
    assert same(rows, study.table())
    for row, trial in zip(rows, study.trials, strict=True):
        assert (row["number"], row["state"]) == (trial.number, trial.state)
        for metric, array in trial.history.items():
            restored = np.asarray(row[f"history/{metric}"], array.dtype)
            assert restored.tobytes() == array.tobytes()
    assert [row["state"] for row in rows] == [
        "complete", "complete", "diverged", "complete", "pruned", "complete", "running"
    ]  # fmt: skip
    assert rows[0]["tested/error"] == 0.1 + 0.2
    assert rows[0]["versions/jax"] == "0.10.2"
    assert rows[2]["value"] == math.inf


def test_a_value_that_is_none_differs_from_one_that_is_not_there(tmp_path):
    rows = [{"a": None, "b": 1}, {"b": 2}]
    for name in ("a.csv", "a.parquet"):
        assert search.read_table(search.write_table(tmp_path / name, rows)) == rows


numbers = st.integers() | st.floats(width=64) | st.booleans() | st.none()
texts = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\x00")) | st.sampled_from(
    [
        "",
        "1",
        "1_0",
        "1e5",
        "nan",
        "inf",
        "None",
        "True",
        " 1",
        "[1]",
        '"a"',
        "a,b",
        "a\nb",
        "a\r\nb",
        '{"a"',
        "٣",
    ]
)
values = (
    numbers | texts | st.recursive(numbers | texts, lambda inner: st.lists(inner, max_size=3), max_leaves=6)
)
tables = st.lists(st.dictionaries(st.sampled_from(["a", "b", "c/d", "e f"]), values, min_size=1), max_size=4)


@given(tables)
def test_any_table_comes_back(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp()
    for name in ("any.csv", "any.parquet"):
        assert same(search.read_table(search.write_table(folder / name, rows)), rows)


def test_csv_is_what_others_read(tmp_path):
    path = search.write_table(
        tmp_path / "a.csv", [{"lr": 0.1, "name": "adam", "history/loss": [[0.5, 0.25]]}]
    )
    (row,) = csv.DictReader(io.StringIO(path.read_text()))
    assert row == {"lr": "0.1", "name": "adam", "history/loss": "[[0.5, 0.25]]"}
    assert json.loads(row["history/loss"]) == [[0.5, 0.25]]


def test_parquet_has_columns_of_types(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    schema = parquet.read_schema(a_study().export(tmp_path / "a.parquet"))
    types = {name: str(schema.field(name).type) for name in schema.names}
    assert types["params/lr"] == "double"
    assert types["number"] == "int64"
    assert types["history/val_loss"].replace("element", "item") == "list<item: list<item: double>>"
    assert types["params/decay"] == "string"
    assert schema.field("params/decay").metadata[b"encoding"] == b"json"


def test_another_kind_of_file_is_refused(tmp_path):
    message = r"cannot export to '.*a.json': a table is a .csv or a .parquet file"
    with pytest.raises(ValueError, match=message):
        search.write_table(tmp_path / "a.json", [])
    with pytest.raises(ValueError, match=r"cannot read '.*a.json': a table is a .csv or a .parquet file"):
        search.read_table(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match=r"there is no table '.*a.csv'"):
        search.read_table(tmp_path / "a.csv")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError) as caught:
        search.write_table(tmp_path / "a.parquet", [{"a": 1}])
    message = "Parquet needs pyarrow: pip install 'nnkit[parquet]', or export to a .csv file"
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


def test_a_table_is_whole_or_absent(tmp_path, monkeypatch):
    path = search.write_table(tmp_path / "a.csv", [{"a": 1}])

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nnkit.train.files.os.fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        search.write_table(path, [{"a": 2}])
    assert search.read_table(path) == [{"a": 1}]
    assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["sqlite:///{}/study.db", "{}/study.log"])
def test_the_study_opens_in_optunas_dashboard(tmp_path, form):
    dashboard = pytest.importorskip("optuna_dashboard")
    address = form.format(tmp_path)
    study = a_study(address if "://" in address else f"journal:{address}")
    if "://" not in address:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        address = JournalStorage(JournalFileBackend(address))
    app = dashboard.wsgi(address)

    def get(path):
        said = []
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "QUERY_STRING": "", "wsgi.input": io.BytesIO()}
        environ |= {"SERVER_NAME": "here", "SERVER_PORT": "80", "wsgi.url_scheme": "http"}
        body = b"".join(app(environ, lambda status, headers, error=None: said.append(status)))
        assert said == ["200 OK"], body
        return body

    assert b"<html" in get("/dashboard")
    (summary,) = json.loads(get("/api/studies"))["study_summaries"]
    assert summary["study_name"] == "search"
    # As a browser reads it: without NaN and Infinity, which are no JSON.
    found = json.loads(get(f"/api/studies/{summary['study_id']}"), parse_constant=pytest.fail)
    assert [trial["state"] for trial in found["trials"]] == [
        "Complete", "Complete", "Complete", "Complete", "Pruned", "Complete", "Running"
    ]  # fmt: skip
    record = {
        a["key"]: json.loads(a["value"], parse_constant=pytest.fail) for a in found["trials"][0]["user_attrs"]
    }
    assert record["nnkit"]["seeds"] == [0, 1]
    assert found["trials"][0]["values"] == [study.trials[0].value]
