"""TensorBoard's event files."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from nnkit.record.logger import Logger, finite_part, picture

__all__ = ["tensorboard"]


def tensorboard(folder: str | os.PathLike[str], *, bins: int = 64) -> Logger:
    """A logger that writes TensorBoard's event files into ``folder``, by tensorboardX.

    Scalars are float32 there. Histograms are of the finite numbers; where some are not, their count is a scalar
    ``.../not_finite``. A run that goes on in the same folder hides from TensorBoard what an earlier process
    wrote beyond the step where it goes on. Settings show under HPARAMS.

    Args:
      folder: made with the first call that has something to write; runs side by side are folders in one.
      bins: of histograms.

    Raises:
      ImportError: tensorboardX is not installed; the message names the extra.

    ::

        logger = record.tensorboard(f"{folder}/tensorboard")
        train.fit(..., run_dir=folder, callbacks=record.log_to(logger, histograms=True))
    """
    try:
        import tensorboardX  # noqa: F401  # type: ignore
    except ImportError:
        raise ImportError(
            "event files of TensorBoard need tensorboardX: pip install nnkit[tensorboard]"
        ) from None
    return _TensorBoard(os.fspath(folder), bins)


class _TensorBoard:
    # tensorboardX's own SummaryWriter hands its events to a thread whose queue no flush waits for, and names files
    # by the second, so that two within one overwrite each other. Its forms and its record writer are used here.
    def __init__(self, folder: str, bins: int):
        self._folder, self._bins = folder, bins
        self._file: Any = None
        self._last = 0
        self._waiting: list[Any] = []  # summaries without a step, until the first step is known

    def _write(self, step: int, summaries: list[Any]) -> None:
        """Appends the summaries, and lets go of them: a process that is killed afterwards has told them."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore

        events = [Event(step=step, summary=summary) for summary in self._waiting + summaries]
        if self._file is None:
            self._file = self._opened()
            # This says that the run goes on from here, and that what is known of later steps is void.
            begin = SessionLog(status=SessionLog.START)
            events = [
                Event(step=step, file_version="brain.Event:2"),
                Event(step=step, session_log=begin),
                *events,
            ]
        for event in events:
            event.wall_time = time.time()
            self._file.write(event.SerializeToString())
        self._file.flush()
        self._last = step
        self._waiting.clear()

    def _opened(self) -> Any:
        from tensorboardX.record_writer import RecordWriter  # type: ignore

        os.makedirs(self._folder, exist_ok=True)
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9}.{platform.node()}.{os.getpid()}.{now % 10**9:09d}"
        return RecordWriter(os.path.join(self._folder, name))

    def scalars(self, step: int, values: Mapping[str, float], /) -> None:
        from tensorboardX.summary import scalar  # type: ignore

        self._write(step, [scalar(name, float(value)) for name, value in values.items()])

    def histograms(self, step: int, values: Mapping[str, np.ndarray], /) -> None:
        from tensorboardX.summary import histogram, scalar  # type: ignore

        found = []
        for name, array in values.items():
            numbers = finite_part(array)
            if numbers.size:
                found.append(histogram(name, numbers, self._bins))
            if numbers.size < np.size(array):
                found.append(scalar(f"{name}/not_finite", np.size(array) - numbers.size))
        self._write(step, found)

    def images(self, step: int, values: Mapping[str, np.ndarray], /) -> None:
        from tensorboardX.summary import image  # type: ignore

        found = [image(name, picture(name, pixels), dataformats="HWC") for name, pixels in values.items()]
        self._write(step, found)

    def hyperparameters(self, settings: Mapping[str, Any], metrics: Mapping[str, float], /) -> None:
        # SummaryWriter.add_hparams would make a folder of its own, with another run of one point in it.
        from tensorboardX.summary import hparams  # type: ignore

        # Without the experiment's summary TensorBoard shows the settings of all runs and not of the first.
        _, begin, end = hparams(dict(settings), {})
        self._waiting.append(end if metrics else begin)

    def close(self) -> None:
        if self._waiting:
            self._write(self._last, [])
        if self._file is not None:
            self._file.close()
