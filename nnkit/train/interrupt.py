"""SIGTERM and Ctrl-C as a wish that the training loop meets when it can."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["Wish", "interruptible"]


class Wish:
    """Whether somebody wants the run to end, and by which signal."""

    signal: signal.Signals | None = None

    def grant(self, message: str) -> None:
        """Ends the process's work as the signal would have, with a message: call it when all is saved.

        Raises:
          KeyboardInterrupt: for Ctrl-C.
          SystemExit: for SIGTERM, with the status 143 that shells give a terminated process.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt(message)
        if self.signal is not None:
            raise SystemExit(128 + self.signal)


@contextlib.contextmanager
def interruptible() -> Iterator[Wish]:
    """While it lasts, a first SIGTERM or Ctrl-C is noted; a second one acts at once.

    Python runs signal handlers in the main thread alone, so in any other thread nothing is noted.
    """
    wish = Wish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    previous: dict[int, object] = {}

    def note(number: int, frame: FrameType | None) -> None:
        wish.signal = signal.Signals(number)
        for known, handler in previous.items():
            signal.signal(known, handler)  # type: ignore[arg-type]

    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        # None: set outside of Python; ignored ones stay ignored (a shell's background jobs).
        if handler is not None and handler != signal.SIG_IGN:
            previous[number] = handler
            signal.signal(number, note)
    try:
        yield wish
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
