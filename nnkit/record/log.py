"""``log_to``: a logger as a callback of ``fit``."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from nnkit import tree
from nnkit.record.logger import Logger, settings_of
from nnkit.train.preflight import whole

__all__ = ["log_to"]

_METHODS = ("scalars", "histograms", "images", "hyperparameters", "close")
_PATIENCE = 3
"""After so many failures in a row a logger is not called again: each may have cost a time-out."""


def log_to(
    logger: Logger,
    *,
    every: Literal["epoch"] | int = "epoch",
    histograms: bool | str = False,
    images: Callable[[Any], Mapping[str, Any]] | None = None,
) -> Callable[[str, Any], None]:
    """A callback of ``fit`` that tells ``logger`` what the run does.

    At the start the run's configuration; after each epoch its row, without the step, which is the
    horizontal axis; at the end the configuration with the last metrics, and ``close()``. Where there are
    several processes, process 0 speaks. A callback serves one run, whose end closes its logger: make another
    for the next.

    An exception of the logger, a server that is gone for instance, never ends the run: it becomes a
    ``RuntimeWarning`` and that call is lost. After three in a row the logger is not called again. What was
    lost can be told later from the run folder's metrics.jsonl, see :func:`nnkit.train.read_records`.

    Args:
      logger: from :func:`tensorboard`, :func:`mlflow`, :func:`wandb`, or your own :class:`Logger`.
      every: "epoch", or how many dispatches of steps (fit's ``steps_per_call`` each) go from one telling
        to the next. The means over such a dispatch are told as ``chunk/loss`` and so on, beside the epochs.
      histograms: whether parameters are told as distributions, each under its path; or a regular
        expression that must match the whole path, ``.*kernel`` for ``dense_0/kernel``, to choose some. One that
        matches none is a ``RuntimeWarning`` with the paths that there are.
      images: a function of the view with images by name, (height, width) or (height, width, 1 or 3), uint8
        or from 0 to 1.

    Raises:
      TypeError, ValueError: an argument that cannot be meant, before the run starts.

    >>> class Printing:
    ...     def scalars(self, step, values): print(step, sorted(values))
    ...     def histograms(self, step, values): print(step, sorted(values))
    ...     def images(self, step, values): pass
    ...     def hyperparameters(self, settings, metrics): pass
    ...     def close(self): print("closed")
    >>> trainer = train.trainer(layers.dense(1), losses.mean_squared_error, optim.sgd(0.1))
    >>> x = np.ones((8, 2), "f")
    >>> callback = record.log_to(Printing(), histograms=True)
    >>> _ = train.fit(trainer, (x, x[:, :1]), epochs=1, key=jax.random.key(0), batch_size=4, callbacks=callback)
    2 ['epoch', 'loss', 'seconds']
    2 ['bias', 'kernel']
    closed
    """
    missing = [name for name in _METHODS if not callable(getattr(logger, name, None))]
    if missing:
        raise TypeError(
            f"log_to needs a logger and got {type(logger).__name__}, which has no {', '.join(missing)}: pass "
            "record.tensorboard(folder), or an object with the methods of record.Logger"
        )
    if every != "epoch":
        every = whole(every, "log_to(every=...), unless it is 'epoch',")
    if not isinstance(histograms, bool | str):
        raise TypeError(
            f"log_to(histograms=...) takes a bool or a regular expression, got {type(histograms).__name__}"
        )
    if isinstance(histograms, str):
        try:
            re.compile(histograms)
        except re.error as error:
            raise ValueError(
                f"log_to(histograms={histograms!r}) is no regular expression ({error}): pass True for all "
                "parameters, or '.*kernel' for those whose path ends so"
            ) from error
    if images is not None and not callable(images):
        raise TypeError(f"log_to(images=...) takes a function of the view, got {type(images).__name__}")
    return _Log(logger, every, histograms, images)


class _Log:
    """The callback, with the count of what it has seen."""

    def __init__(self, logger: Logger, every: Any, histograms: bool | str, images: Any):
        self._logger, self._every, self._histograms, self._images = logger, every, histograms, images
        self._chunks = self._failures = 0
        self._warned = False

    def __call__(self, event: str, view: Any) -> None:
        if jax.process_index() != 0:
            return
        if event == "start":
            self._try("hyperparameters", lambda: (settings_of(view.config), {}))
        elif event == "epoch":
            self._tell(view, "")
        elif event == "chunk":
            self._chunks += 1
            if self._every != "epoch" and self._chunks % self._every == 0:
                self._tell(view, "chunk/")
        elif event == "end":
            self._try("hyperparameters", lambda: (settings_of(view.config), _numbers(view.metrics)))
            self._failures = 0  # whatever it missed, it may put its files in order
            self._try("close", tuple)

    def _tell(self, view: Any, prefix: str) -> None:
        numbers = {f"{prefix}{name}": value for name, value in _numbers(view.metrics).items()}
        self._try("scalars", lambda: (view.step, numbers))
        if self._histograms is not False and self._is_matched(view):
            self._try("histograms", lambda: (view.step, self._parameters(view)))
        if self._images is not None:
            self._try("images", lambda: (view.step, self._pictures(view)))

    def _is_matched(self, view: Any) -> bool:
        """Whether there are parameters to tell; if not, a warning at the first time."""
        if self._chosen(view):
            return True
        if not self._warned:
            self._warned = True
            paths = ", ".join(tree.flatten(view.state.params)) or "none"
            warnings.warn(
                f"log_to(histograms={self._histograms!r}) matches the whole path of no parameter, so no histogram "
                f"is told; there are {paths}",
                RuntimeWarning,
                stacklevel=4,
            )
        return False

    def _chosen(self, view: Any) -> dict[str, Any]:
        pattern = re.compile(".*" if self._histograms is True else str(self._histograms))
        return {path: p for path, p in tree.flatten(view.state.params).items() if pattern.fullmatch(path)}

    def _parameters(self, view: Any) -> dict[str, np.ndarray]:
        leaves = self._chosen(view)
        wide = {p: x.astype(jnp.float32) if x.dtype.itemsize < 4 else x for p, x in leaves.items()}
        return {path: np.asarray(leaf) for path, leaf in jax.device_get(wide).items()}

    def _pictures(self, view: Any) -> dict[str, np.ndarray]:
        return {name: np.asarray(image) for name, image in self._images(view).items()}

    def _try(self, method: str, arguments: Callable[[], tuple[Any, ...]]) -> None:
        """Calls the logger; what goes wrong is a warning."""
        if self._failures >= _PATIENCE:
            return
        try:
            getattr(self._logger, method)(*arguments())
        except Exception as error:
            self._failures += 1
            given_up = self._failures == _PATIENCE and method != "close"
            warnings.warn(
                f"the logger {type(self._logger).__name__} failed in {method} ({type(error).__name__}: {error}); the "
                f"run goes on{', and the logger is not called again' if given_up else ''}",
                RuntimeWarning,
                stacklevel=4,
            )
        else:
            self._failures = 0


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a row; a column that a callback added as text is left out."""
    return {
        name: float(value)
        for name, value in row.items()
        if name != "step" and not isinstance(value, str) and value is not None
    }
