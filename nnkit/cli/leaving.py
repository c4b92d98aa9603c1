"""How a command ends that could not do all it was asked: one line for a person, a status for a script."""

from __future__ import annotations

import sys
from pathlib import Path

from nnkit.train import NotFiniteError

__all__ = ["ENDED", "STATUSES", "going_on", "refused"]

STATUSES = """\
exit status: 0 done; 1 refused or failed, or numbers are not as recorded; 2 wrong options, or the command line's
libraries are missing; 130 ended by Ctrl-C; 143 by SIGTERM"""

ENDED = (KeyboardInterrupt, SystemExit, ValueError, TypeError, OSError, ImportError, NotFiniteError)
"""What ends a run without being a fault of the program."""


def refused(error: object) -> int:
    """Says in one line what is wrong."""
    print(f"error: {error}", file=sys.stderr)
    return 1


def going_on(error: BaseException, folder: Path) -> int:
    """Says how a run that was ended goes on, and returns the exit status.

    Args:
      error: what ended it, one of :data:`ENDED`.
      folder: the run's.
    """
    signalled = isinstance(error, KeyboardInterrupt | SystemExit)
    if not signalled:
        refused(error)
    if (folder / "metrics.csv").exists() and signalled:
        print(f"interrupted: the epochs so far are in {folder}/metrics.csv", file=sys.stderr)
    elif signalled:
        print("interrupted", file=sys.stderr)
    if (folder / "config.json").exists() and not (folder / "result.json").exists():
        print(f"go on with: nnkit resume {folder}", file=sys.stderr)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 130 if signalled else 1
