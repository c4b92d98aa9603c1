"""The command line: ``nnkit verify``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

__all__ = ["main", "verify"]


def verify(
    *,
    only: str | None = None,
    html: Path | None = None,
    json: bool = False,
    list: bool = False,
) -> int:
    """Measures how far nnkit is from optax, Flax, PyTorch and jax.nn, as far as they are installed.

    Every row of the table is computed while the command runs. The exit status is 1 where a bound is
    exceeded or a row cannot be measured, else 0.

    Args:
        only: Rows in which this regular expression is found, of "family function oracle dtype".
        html: Write the table to this file as a page.
        json: Print the table as JSON instead.
        list: Print the rows and compute nothing.
    """
    from nnkit.testing import verify as v

    try:
        chosen = v.select(only)
    except Exception as error:
        raise SystemExit(f"nnkit verify: --only {only!r} is no regular expression: {error}") from None
    versions = v.installed()
    missing = [name for name, version in versions.items() if version is None]
    there = [row for row in chosen if row.distribution not in missing]
    left_out = len(chosen) - len(there)
    if list:
        print("\n".join(" ".join(row[:4]) for row in chosen))
        return 0
    if missing:
        print(
            f"not installed: {', '.join(missing)}; {left_out} of {len(chosen)} rows left out",
            file=sys.stderr,
        )
    if not there:
        print(f"nnkit verify: no row to compute for --only {only!r}", file=sys.stderr)
        return 1
    lines = v.verify(there) if json else _with_progress(v, there, versions)
    if json:
        print(v.as_json(lines))
    if html is not None:
        html.write_text(v.as_html(lines), encoding="utf-8")
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``nnkit`` with these arguments, by default the command line's, and returns its exit status."""
    missing = [name for name in ("tyro", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"the command line needs {' and '.join(missing)}: pip install 'nnkit[verify]'", file=sys.stderr)
        return 2
    import tyro

    command = Annotated[int, tyro.conf.subcommand(constructor=verify, name="verify")]
    about = Annotated[None, tyro.conf.subcommand(constructor=version, name="version")]
    result = tyro.cli(command | about, prog="nnkit", description="nnkit on the command line.", args=arguments)
    return result or 0


def version() -> None:
    """Prints nnkit's version."""
    import nnkit

    print(nnkit.__version__)


if __name__ == "__main__":
    sys.exit(main())
