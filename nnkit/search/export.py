"""A study as one table, in CSV or Parquet, which gives back the very bits."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnkit.train.files import check_writable, write_atomically

if TYPE_CHECKING:
    from nnkit.search.records import Trial

__all__ = ["read_table", "rows_of", "write_table"]


def rows_of(trials: Iterable[Trial]) -> list[dict[str, Any]]:
    """A row for each trial: what it is, ``params/...``, and its numbers; what a trial has not, its row has not.

    ``values`` and ``history/...`` are nested lists, by seed, fold and epoch as they have them.
    """
    return [_row(trial) for trial in trials]


def write_table(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes rows to a .csv or .parquet file, in one instant: :func:`read_table` reads the same rows.

    In CSV a list is in JSON, and so is a string that would be read as something else. In Parquet numbers
    and nested lists of numbers are columns of their types; a column of several types is in JSON, and its
    field's metadata say so.

    Args:
      path: the file; its folder is made.
      rows: dicts of numbers, strings, bools, None and nested lists of them.

    Raises:
      ValueError: the name ends in neither.
      ImportError: Parquet needs pyarrow.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = search.write_table(f"{folder}/trials.csv", [{"lr": 0.1, "kind": "adam"}, {"lr": 1, "kind": "1"}])
    ...     print(path.read_text().strip())
    ...     search.read_table(path)
    lr,kind
    0.1,adam
    1,""\"1""\"
    [{'lr': 0.1, 'kind': 'adam'}, {'lr': 1, 'kind': '1'}]
    """
    path = Path(path)
    write = {".csv": _csv, ".parquet": _parquet}.get(path.suffix)
    if write is None:
        raise ValueError(f"cannot export to {str(path)!r}: a table is a .csv or a .parquet file")
    content = write(rows)
    check_writable(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return path


def read_table(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a file of :func:`write_table`, bit for bit; cells that are empty are left out.

    Raises:
      ValueError: the name is that of another kind of file.
      FileNotFoundError: there is none.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"cannot read {str(path)!r}: a table is a .csv or a .parquet file")
    if not path.exists():
        raise FileNotFoundError(f"there is no table {str(path)!r}: write one with study.export(...)")
    if path.suffix == ".parquet":
        return _rows_of_parquet(path)
    header, *lines = csv.reader(io.StringIO(path.read_bytes().decode(), newline=""))
    return [{n: _value(cell) for n, cell in zip(header, line, strict=True) if cell} for line in lines]


def _row(trial: Trial) -> dict[str, Any]:
    row: dict[str, Any] = {"number": trial.number, "state": trial.state, "value": trial.value}
    row |= {f"params/{path}": _plain(value) for path, value in trial.params.items()}
    row |= {
        "seeds": list(trial.seeds) or None,
        "values": None if trial.values is None else trial.values.tolist(),
        "seconds": trial.seconds,
        "how": trial.how,
        "stopped": trial.stopped,
        "repeat_of": trial.repeat_of,
        "finite": trial.health.get("finite"),
        "epochs": trial.health.get("epochs"),
        "device": trial.device.get("kind"),
        "git": trial.git.get("revision"),
        "worker": trial.worker,
        "started": None if trial.started is None else trial.started.isoformat(),
        "ended": None if trial.ended is None else trial.ended.isoformat(),
    }
    row |= {f"versions/{name}": version for name, version in trial.versions.items()}
    row |= {f"tested/{name}": _plain(value) for name, value in (trial.tested or {}).items()}
    row |= {f"history/{name}": array.tolist() for name, array in trial.history.items()}
    # An option that is None is a value; anything else that is None is not there.
    return {name: v for name, v in row.items() if v is not None or name.startswith("params/")}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    columns = _columns(rows)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row[name]) if name in row else "" for name in columns] for row in rows)
    return text.getvalue().encode()


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value if value and _value(value) == value else json.dumps(value)
    return json.dumps(value) if isinstance(value, list | dict) else repr(value)


def _value(cell: str) -> Any:
    if cell in _WORDS:
        return _WORDS[cell]
    if cell[0] in '[{"':
        try:
            return json.loads(cell)
        except ValueError:
            return cell
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell


_WORDS = {"True": True, "False": False, "None": None}


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    pa, pq = _pyarrow()
    arrays, fields = [], []
    for name in _columns(rows):
        cells = [(name in row, row.get(name)) for row in rows]
        kinds = {_kind(value) for there, value in cells if there}
        typed = len(kinds) == 1 and None not in kinds
        values = [(value if typed else json.dumps(value)) if there else None for there, value in cells]
        arrays.append(pa.array(values, _arrow(pa, next(iter(kinds))) if typed else pa.string()))
        fields.append(pa.field(name, arrays[-1].type, metadata=None if typed else {"encoding": "json"}))
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=pa.schema(fields)), buffer)
    return buffer.getvalue()


def _rows_of_parquet(path: Path) -> list[dict[str, Any]]:
    _, pq = _pyarrow()
    table = pq.read_table(path)
    coded = {field.name for field in table.schema if (field.metadata or {}).get(b"encoding") == b"json"}
    return [
        {n: json.loads(v) if n in coded else v for n, v in row.items() if v is not None}
        for row in table.to_pylist()
    ]


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            "Parquet needs pyarrow: pip install 'nnkit[parquet]', or export to a .csv file"
        ) from None
    return pyarrow, pyarrow.parquet


def _kind(value: Any) -> tuple[int, str] | None:
    """How deep lists are nested and what is in them; None of what has no type in a table."""
    if isinstance(value, list):
        kinds = {_kind(item) for item in value}
        kind = kinds.pop() if len(kinds) == 1 else None
        return None if kind is None else (kind[0] + 1, kind[1])
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        return None
    name = type(value).__name__
    return (0, name) if name in ("bool", "int", "float", "str") else None


def _arrow(pa: Any, kind: Any) -> Any:
    depth, name = kind
    dtype = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "str": pa.string()}[name]
    for _ in range(depth):
        dtype = pa.list_(dtype)
    return dtype
