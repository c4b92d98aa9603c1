"""The entry point: options to a command, and what goes wrong to one line and a status."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import operator
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from nnkit.cli.evaluate import Eval
from nnkit.cli.export import Export
from nnkit.cli.info import Info, Version
from nnkit.cli.leaving import STATUSES, refused
from nnkit.cli.predict import Predict
from nnkit.cli.resume import Resume
from nnkit.cli.search import Resume as SearchResume
from nnkit.cli.search import Search
from nnkit.cli.search_best import Best, SearchExport, SearchPlot
from nnkit.cli.search_retrain import Retrain
from nnkit.cli.settings import read_settings
from nnkit.cli.train import Train
from nnkit.cli.verify import Verify
from nnkit.train import NotFiniteError

__all__ = ["main"]

COMMANDS: dict[str, Any] = {
    "train": Train,
    "eval": Eval,
    "predict": Predict,
    "resume": Resume,
    "export": Export,
    "search": Search,
    "info": Info,
    "verify": Verify,
    "version": Version,
}

OF_A_SEARCH: dict[str, Any] = {
    "resume": SearchResume,
    "best": Best,
    "retrain": Retrain,
    "export": SearchExport,
    "plot": SearchPlot,
}
"""The words after "search"; without one of them it begins or joins a search."""

_FURTHER = """\
What there is to do with a search, each with its own --help:
- nnkit search resume RUN: train the trials that are missing, or more of them
- nnkit search best RUN: the best trials, how sure that is, and the command that retrains the first
- nnkit search retrain RUN: the run folder of a trial, tested once
- nnkit search export RUN FILE: all trials as .csv or .parquet
- nnkit search plot RUN: pictures"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``nnkit`` with these arguments, by default the command line's, and returns its exit status."""
    missing = [name for name in ("tyro", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        needs = f"the command line needs {' and '.join(missing)}"
        print(f"{needs}: pip install 'nnkit[experiments]'", file=sys.stderr)
        return 2
    import tyro

    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        begin = _begin_with(given)
    except (ValueError, TypeError, OSError) as error:
        return refused(error)
    prog, commands, what = "nnkit", COMMANDS, "nnkit on the command line."
    if given[:1] == ["search"]:
        given = given[1:]
        if given[:1] and given[0] in OF_A_SEARCH:
            prog, commands = "nnkit search", OF_A_SEARCH
        else:
            prog, commands, what = "nnkit search", {}, f"{inspect.getdoc(Search)}\n\n{_FURTHER}"
    forms: list[Any] = []
    for name, command in commands.items():
        default: dict[str, Any] = {} if begin is None or name != "train" else {"default": begin}
        forms.append(Annotated[command, tyro.conf.subcommand(name=name, **default)])
    form: Any = functools.reduce(operator.or_, forms) if forms else Search
    command = tyro.cli(
        form,
        prog=prog,
        description=f"{what}\n\n{STATUSES}",
        args=given,
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    try:
        return command()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, NotFiniteError) as error:
        return refused(error)


def _begin_with(arguments: Sequence[str]) -> Train | None:
    """The command whose options are those of --config: they must be known before the others are read."""
    if arguments[:1] != ["train"]:
        return None
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config":
            path = value if equals else next(iter(arguments[i + 1 :]), "")
            return Train(**read_settings(Path(path)), config=Path(path)) if path else None
    return None
