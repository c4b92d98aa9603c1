"""``nnkit verify``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["Verify"]


@dataclasses.dataclass(frozen=True)
class Verify:
    """Measure how far nnkit is from optax, Flax, PyTorch and jax.nn, as far as they are installed.

    Every row of the table is computed while the command runs. The exit status is 1 where a bound is
    exceeded or a row cannot be measured, else 0.
    """

    only: str | None = None
    """Rows in which this regular expression is found, of "family function oracle dtype"."""
    html: Path | None = None
    """Write the table to this file as a page."""
    json: bool = False
    """Print the table as JSON instead."""
    list: bool = False
    """Print the rows and compute nothing."""

    def __call__(self) -> int:
        from nnkit.testing import verify as v

        try:
            chosen = v.select(self.only)
        except Exception as error:
            raise SystemExit(
                f"nnkit verify: --only {self.only!r} is no regular expression: {error}"
            ) from None
        versions = v.installed()
        missing = [name for name, version in versions.items() if version is None]
        there = [row for row in chosen if row.distribution not in missing]
        left_out = len(chosen) - len(there)
        if self.list:
            print("\n".join(" ".join(row[:4]) for row in chosen))
            return 0
        if missing:
            print(
                f"not installed: {', '.join(missing)}; {left_out} of {len(chosen)} rows left out",
                file=sys.stderr,
            )
        if not there:
            print(f"nnkit verify: no row to compute for --only {self.only!r}", file=sys.stderr)
            return 1
        lines = v.verify(there) if self.json else _with_progress(v, there, versions)
        if self.json:
            print(v.as_json(lines))
        if self.html is not None:
            self.html.write_text(v.as_html(lines), encoding="utf-8")
        return int(bool(v.exceeded(lines)))


def _with_progress(v: Any, rows: Sequence[Any], versions: dict[str, str | None]) -> Any:
    """Runs the rows under a progress bar and prints the table."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    # What is not a terminal has no width; a table cut to 80 columns is hard to read in a log.
    out = Console() if sys.stdout.isatty() else Console(width=120)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("verify", total=len(rows))
        lines = v.verify(rows, lambda line: progress.update(task, advance=1, description=line.row.name))
    caption = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    table = Table(*v.HEADS, title="nnkit beside its peers", caption=caption, box=SIMPLE_HEAD)
    for column in table.columns[3:6]:
        column.justify = "right"
    for line in lines:
        table.add_row(*v.cells(line), style=None if line.status == "ok" else "bold red")
    out.print(table)
    wrong = len(v.exceeded(lines))
    out.print(f"{len(lines)} comparisons, {wrong} out of bounds")
    return lines
