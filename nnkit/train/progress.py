"""What a run shows while it runs: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from typing import Any, Protocol

__all__ = ["Progress", "progress_bar"]


class Progress(Protocol):
    """What ``fit`` tells of its progress."""

    def __enter__(self) -> Progress: ...
    def __exit__(self, *exc: Any) -> None: ...
    def advance(self, steps: int, loss: float) -> None:
        """``steps`` more were taken; ``loss`` is their mean."""
        ...

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch ended with these metrics."""
        ...

    @property
    def watches_steps(self) -> bool:
        """Whether ``advance`` needs the loss; fetching it makes the host wait for the device."""
        ...


class _Quiet:
    watches_steps = False

    def __enter__(self) -> _Quiet:
        return self

    def __exit__(self, *exc: Any) -> None:
        pass

    def advance(self, steps: int, loss: float) -> None:
        pass

    def epoch(self, row: dict[str, Any]) -> None:
        pass


class _Bar:
    watches_steps = True

    def __init__(self, epochs: int, steps: int, done: int, batch_size: int):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            TextColumn("{task.fields[loss]} {task.fields[validation]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
        )
        self._epochs, self._steps, self._batch_size, self._done = epochs, steps, batch_size, done
        self._task = self._bar.add_task(
            self._name(), total=epochs * steps, completed=done, loss="", validation="", rate=""
        )

    def _name(self) -> str:
        return f"epoch {min(self._done // self._steps + 1, self._epochs)}/{self._epochs}"

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._bar.stop()

    def advance(self, steps: int, loss: float) -> None:
        self._done += steps
        speed = self._bar.tasks[0].speed
        rate = f"{speed * self._batch_size:,.0f} examples/s" if speed else ""
        self._bar.update(
            self._task, advance=steps, description=self._name(), loss=f"loss {loss:.4f}", rate=rate
        )

    def epoch(self, row: dict[str, Any]) -> None:
        # One number has room beside the rest in 80 columns: the first metric, or else the loss.
        found = [name for name in row if name.startswith("val_")]
        for name in [name for name in found if name != "val_loss"][:1] or found[:1]:
            self._bar.update(self._task, validation=f"{name} {row[name]:.3f}")


def progress_bar(show: bool | None, *, epochs: int, steps: int, done: int, batch_size: int) -> Progress:
    """A bar with loss, validation metrics, examples a second and the time left.

    Args:
      show: True, False, or None for "on a terminal, if rich is installed".
      epochs: in the whole run.
      steps: in one epoch.
      done: steps taken before.
      batch_size: examples in a step.
    """
    if show is False or (show is None and not sys.stderr.isatty()):
        return _Quiet()
    try:
        return _Bar(epochs, steps, done, batch_size)
    except ImportError:
        if show is None:
            return _Quiet()
        raise ImportError("a progress bar needs rich: pip install nnkit[experiments]") from None
