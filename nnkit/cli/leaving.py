"""How a command ends that could not do all it was asked: one line for a person, a status for a script."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from nnkit.train import NotFiniteError
from nnkit.train.checkpoints import steps as saved_steps

__all__ = ["ENDED", "STATUSES", "going_on", "refused"]

STATUSES = """\
exit status: 0 done; 1 refused or failed, or numbers are not as recorded; 2 wrong options, or the command line's
libraries are missing; 130 ended by Ctrl-C; 143 by SIGTERM"""

ENDED = (KeyboardInterrupt, SystemExit, ValueError, TypeError, OSError, ImportError, NotFiniteError)
"""What ends a run without being a fault of the program."""


def refused(error: object) -> int:
    """Says in one line what is wrong, and below it what else was noted of it."""
    print(f"error: {error}", file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        if "JAX has removed its internal frames" not in note:  # about a traceback, which is not shown
            print(note, file=sys.stderr)
    return 1


def going_on(error: BaseException, folder: Path, options: Sequence[str] = ()) -> int:
    """Says how a run that was ended goes on, and returns the exit status.

    Args:
      error: what ended it, one of :data:`ENDED`.
      folder: the run's.
      options: of "nnkit resume", where that is what was ended: perhaps before they were noted in config.json.
    """
    signalled = isinstance(error, KeyboardInterrupt | SystemExit)
    if not signalled:
        refused(error)
    if (folder / "metrics.csv").exists() and signalled:
        print(f"interrupted: the epochs so far are in {folder}/metrics.csv", file=sys.stderr)
    elif signalled:
        print("interrupted", file=sys.stderr)
    unfinished = (folder / "config.json").exists() and not (folder / "result.json").exists()
    # From the beginning a run that is not finite comes to the same step again.
    hopeless = isinstance(error, NotFiniteError) and not saved_steps(folder / "checkpoints")
    if (unfinished and not hopeless) or (signalled and options):
        command = ["nnkit", "resume", str(folder), *(options if signalled else ())]
        print(f"go on with: {shlex.join(command)}", file=sys.stderr)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 130 if signalled else 1
