"""The test set, used once: what the chosen trial gives on it, marked in the study's record."""

from __future__ import annotations

import getpass
import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from nnkit.search.choose import check_selection, complete_trial
from nnkit.train.runs import plain, provenance

if TYPE_CHECKING:
    from nnkit.search.study import Study, Trial

__all__ = ["FinalTest", "final_test", "final_tests"]

# A finished trial of Optuna's takes no more attributes, so the mark is the study's. One attribute a test:
# of two processes that write at the same time none loses what the other wrote.
_PREFIX = "test:"


@dataclass(frozen=True)
class FinalTest:
    """One use of the test set, as it stands in the study's record."""

    trial: int
    numbers: dict[str, Any]
    """What the test gave, by name: numbers, or lists with one for each seed."""
    who: str
    """user@host."""
    when: str
    """Date and time, UTC."""
    git: dict[str, Any]
    command: str
    again: bool
    """Whether the test set had been used before."""

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {_shown(value)}" for name, value in self.numbers.items())
        again = " (again: the test set had been used before)" if self.again else ""
        return f"trial {self.trial} on {self.when} by {self.who}: {numbers}{again}"


def final_test(
    study: Study,
    test_fn: Callable[[Trial], Any],
    number: int | None = None,
    *,
    again: bool = False,
) -> FinalTest:
    """Tests the chosen trial on the test set, once, and writes that into the study's record.

    Whoever looks at the test set, goes back and chooses anew has made it a validation set. So the record
    keeps who tested which trial when, and with what result, and a second test of any trial of the study is
    refused; ``again=True`` does it all the same, and the record says so.

    Args:
      study: from :func:`sweep` or :func:`open_study`.
      test_fn: takes the trial and gives its test metrics: a mapping from names to numbers (or arrays, one
        for each seed), or one number. It usually begins with :func:`retrain`. If it raises, nothing is marked.
      number: which trial; by default ``study.best``.
      again: whether to test although the test set was used before.

    Raises:
      ValueError: the test set was used before; a trial that is not complete; trials were chosen by a metric
        of the test set.
      TypeError: what ``test_fn`` gives is neither a number nor a mapping from names to numbers.

    >>> def train_fn(key, hparams):
    ...     return {"val_loss": (hparams["x"] - 1) ** 2}
    >>> study = search.sweep(train_fn, {"x": search.uniform(0, 3)}, trials=4)
    >>> tested = search.final_test(study, lambda trial: {"test_loss": (trial.hparams["x"] - 1.1) ** 2})
    >>> tested.trial == study.best.number, list(tested.numbers)
    (True, ['test_loss'])
    >>> search.final_test(study, lambda trial: 0.0)
    Traceback (most recent call last):
        ...
    ValueError: the test set was used: trial ...
    """
    check_selection(study.metric)
    trial = study.best if number is None else complete_trial(study, number)
    if (before := final_tests(study)) and not again:
        raise ValueError(
            f"the test set was used: {before[-1]}. A result that is chosen after that is no test any more; "
            "pass again=True to test all the same, and the record will say so"
        )
    numbers = _numbers(test_fn(trial))
    here = provenance()
    # Read anew: somebody else may have tested in the meantime.
    tested = FinalTest(
        trial.number,
        numbers,
        _who(),
        datetime.now(UTC).isoformat(timespec="milliseconds"),
        here["git"],
        here["command"],
        bool(final_tests(study)),
    )
    study.optuna.set_user_attr(_PREFIX + secrets.token_hex(4), asdict(tested))
    return tested


def final_tests(study: Study) -> list[FinalTest]:
    """All tests that the record has, the earliest first.

    >>> study = search.sweep(lambda key, hparams: {"val_loss": hparams["x"]}, {"x": search.uniform(0, 3)}, trials=2)
    >>> search.final_tests(study)
    []
    """
    attributes = study.optuna.user_attrs
    found = [FinalTest(**value) for name, value in attributes.items() if name.startswith(_PREFIX)]
    return sorted(found, key=lambda tested: tested.when)


def _numbers(given: Any) -> dict[str, Any]:
    numbers = given if isinstance(given, Mapping) else {"test": given}
    found = {}
    for name, value in numbers.items():
        array = np.asarray(value)
        if not np.issubdtype(array.dtype, np.number) or array.dtype == complex:
            raise TypeError(
                f"test_fn must give a number or a mapping from names to numbers, and {name!r} is a "
                f"{type(value).__name__}"
            )
        found[str(name)] = plain(array, str(name))
    if not found:
        raise TypeError("test_fn must give a number or a mapping from names to numbers, and gave none")
    return found


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user number without a name, as in some containers
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def _shown(value: Any) -> str:
    numbers = np.asarray(value, float)  # reads the names of NaN and inf, too
    return f"{numbers.mean():.4g}" + (f" (mean of {numbers.size})" if numbers.ndim else "")
