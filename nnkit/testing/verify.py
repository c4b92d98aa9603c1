"""Runs the equivalence table against what is installed, and shows or writes what was found."""

from __future__ import annotations

import html
import importlib.metadata
import importlib.util
import json
import math
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from nnkit.testing.equivalent import Distance
from nnkit.testing.report import ConformanceError
from nnkit.testing.table import Row, rows

__all__ = ["ORACLES", "Line", "as_html", "as_json", "exceeded", "installed", "select", "verify"]

ORACLES = ("optax", "flax", "torch", "jax")


class Line(NamedTuple):
    """A row with what was measured; ``error`` is set where nothing could be."""

    row: Row
    distance: Distance | None
    error: str
    seconds: float

    @property
    def status(self) -> str:
        """ "ok", "exceeded" or "error"."""
        if self.distance is None:
            return "error"
        return "ok" if self.row.bound.holds(self.distance) else "exceeded"


def installed() -> dict[str, str | None]:
    """The versions of the oracles' distributions, None for those that are missing."""
    return {
        name: importlib.metadata.version(name) if importlib.util.find_spec(name) else None for name in ORACLES
    }


def select(only: str | None = None, table: Iterable[Row] | None = None) -> list[Row]:
    """The rows in whose "family name oracle dtype" the pattern is found; all without one.

    >>> from nnkit.testing.verify import select
    >>> sorted({row.oracle for row in select("losses huber")})
    ['optax', 'torch']
    """
    pattern = re.compile(only or "", re.IGNORECASE)
    return [r for r in (rows() if table is None else table) if pattern.search(" ".join(r[:4]))]


def verify(chosen: Iterable[Row], tell: Callable[[Line], None] = lambda line: None) -> list[Line]:
    """Measures each row, telling of each as it is done."""
    lines = []
    for row in chosen:
        start = time.perf_counter()
        distance, error = None, ""
        try:
            distance = row.measure()
        except ConformanceError as found:
            error = found.failures[0].what + ": " + found.failures[0].arrived
        except Exception as found:  # A peer of another version may do anything; the other rows still count.
            error = f"{type(found).__name__}: {str(found).splitlines()[0] if str(found) else ''}"
        lines.append(Line(row, distance, error, time.perf_counter() - start))
        tell(lines[-1])
    return lines


def exceeded(lines: Iterable[Line]) -> list[Line]:
    """The lines that are not within their bounds, or could not be measured."""
    return [line for line in lines if line.status != "ok"]


def cells(line: Line) -> tuple[str, ...]:
    """A line of the table: function, oracle, dtype, ulp, relative, bound, status."""
    ulp, relative = "", ""
    if line.distance is not None:
        ulp = f"{line.distance.ulps}" if line.distance.ulps < 10**6 else f"{line.distance.ulps:.1e}"
        relative = f"{line.distance.relative:.1e}" if line.distance.relative else "0"
    return (
        f"{line.row.family}: {line.row.name}",
        line.row.oracle,
        line.row.dtype,
        ulp,
        relative,
        str(line.row.bound),
        line.status if not line.error else f"error: {line.error}",
    )


HEADS = ("function", "oracle", "dtype", "largest ulp", "relative", "bound", "status")


def as_json(lines: Iterable[Line]) -> str:
    """The table as JSON: versions and one object a row."""
    found = [
        {
            "family": line.row.family,
            "function": line.row.name,
            "oracle": line.row.oracle,
            "dtype": line.row.dtype,
            "ulps": line.distance.ulps if line.distance else None,
            "relative": _finite(line.distance.relative) if line.distance else None,
            "bound_ulps": line.row.bound.ulps,
            "bound_relative": line.row.bound.relative,
            "status": line.status,
            "error": line.error,
        }
        for line in lines
    ]
    return json.dumps({"oracles": installed(), "rows": found}, indent=1, allow_nan=False)


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def as_html(lines: Iterable[Line]) -> str:
    """The table as one HTML page without scripts or links."""
    lines = list(lines)
    escape: Callable[[Any], str] = lambda text: html.escape(str(text))
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in installed().items())
    wrong = len(exceeded(lines))
    body = "\n".join(
        f'<tr class="{line.status}">' + "".join(f"<td>{escape(c)}</td>" for c in cells(line)) + "</tr>"
        for line in lines
    )
    heads = "".join(f"<th>{escape(head)}</th>" for head in HEADS)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>nnkit verify</title>
<style>
body {{ font: 15px system-ui, sans-serif; margin: 2rem; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .15rem .8rem; border-bottom: 1px solid #ddd; text-align: left; }}
td:nth-child(n+4):nth-child(-n+6) {{ text-align: right; font-variant-numeric: tabular-nums; }}
tr.exceeded td, tr.error td {{ background: #fdd; }}
</style>
<h1>nnkit beside its peers</h1>
<p>{len(lines)} comparisons, {wrong} out of bounds. {escape(versions)}.</p>
<table><thead><tr>{heads}</tr></thead><tbody>
{body}
</tbody></table></html>
"""
