"""What a check says: failures with their cause, and the report of a suite of checks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import jax

from nnkit.checks import unknown_name

__all__ = [
    "Check",
    "ConformanceError",
    "Failure",
    "NotApplicable",
    "Report",
    "Result",
    "Unusable",
    "check",
    "fail",
    "raised",
    "run_checks",
]

Subject = TypeVar("Subject")


class Failure(NamedTuple):
    """One promise that was not kept.

    Attributes:
      check: the check's title.
      what: what was looked at, in words.
      expected: what should have come.
      arrived: what came.
      path: where in the trees, ``state/mean[3]``; empty where the whole is meant.
      likely: the likely cause and what to do.
    """

    check: str
    what: str
    expected: str
    arrived: str
    path: str = ""
    likely: str = ""

    def __str__(self) -> str:
        lines = [f"{self.check}: {self.what}" if self.check else self.what]
        for label, text in (
            ("at", self.path),
            ("expected", self.expected),
            ("arrived", self.arrived),
            ("likely", self.likely),
        ):
            if text:
                lines.append(f"  {label:<8}  " + text.replace("\n", "\n            "))
        return "\n".join(lines)


class ConformanceError(AssertionError):
    """Raised with all the failures of a check or of a suite of checks."""

    def __init__(self, failures: Sequence[Failure], heading: str = ""):
        self.failures, self.heading = tuple(failures), heading
        parts = [heading] if heading else []
        super().__init__("\n\n".join([*parts, *map(str, failures)]))

    def __reduce__(self) -> tuple[Any, ...]:
        return ConformanceError, (self.failures, self.heading)


class NotApplicable(Exception):
    """Raised by a check that has nothing to look at; its text says why."""


class Unusable(Exception):
    """Raised from an error after which no other check has anything to look at either."""


def fail(what: str, *, expected: Any, arrived: Any, path: str = "", likely: str = "") -> NoReturn:
    """Raises a :class:`ConformanceError` with one failure, which the check puts its title on."""
    raise ConformanceError([Failure("", what, str(expected), str(arrived), path, likely)])


class Result(NamedTuple):
    """One line of a report; ``status`` is "passed", "failed", "skipped" or "not applied"."""

    check: str
    status: str
    detail: str
    seconds: float


class Report(NamedTuple):
    """What a suite of checks found; ``print(report)`` shows it as a table."""

    subject: str
    results: tuple[Result, ...]

    def __str__(self) -> str:
        width = max([len(r.check) for r in self.results], default=0)
        count = sum(r.status == "passed" for r in self.results)
        lines = [f"{self.subject}: {count} of {len(self.results)} checks passed"]
        lines += [f"  {r.check:<{width}}  {r.status:<11}  {r.detail}".rstrip() for r in self.results]
        return "\n".join(lines)

    def status(self, check: str) -> str:
        """The status of the check with this title.

        Raises:
          ValueError: no check of this report has it.
        """
        found = {r.check: r.status for r in self.results}
        if check not in found:
            raise unknown_name("check", check, list(found))
        return found[check]


class Check(Generic[Subject]):
    """One check: a function of the arguments of its suite, which raises where a promise is broken.

    Attributes:
      title: its name in reports and in ``skip``.
    """

    def __init__(
        self, title: str, subject: Callable[..., Subject], run: Callable[[Subject], str | None]
    ) -> None:
        self.title, self._run, self._subject = title, run, subject
        self.__name__, self.__doc__, self.__module__ = run.__name__, run.__doc__, run.__module__

    def on(self, subject: Subject) -> str | None:
        """Runs this check on what others have looked at as well; returns a remark or None."""
        __tracebackhide__ = True
        try:
            return self._run(subject)
        except ConformanceError as error:
            failures = [f._replace(check=self.title) for f in error.failures]
            raise ConformanceError(failures) from error.__cause__

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        """Runs this check alone; arguments as its suite takes them (``check_layer(layer, x, ...)``).

        Returns:
          Its result, whose status is "passed", or "not applied" with the reason.
        """
        __tracebackhide__ = True
        start = time.perf_counter()
        try:
            status, detail = "passed", self.on(self._subject(*args, **kwargs)) or ""
        except NotApplicable as why:
            status, detail = "not applied", str(why)
        except Unusable as error:
            raise (error.__cause__ or error) from None
        return Result(self.title, status, detail, time.perf_counter() - start)

    def __repr__(self) -> str:
        return f"<check {self.title!r}>"


def check(
    title: str, subject: Callable[..., Subject]
) -> Callable[[Callable[[Subject], str | None]], Check[Subject]]:
    """Makes a function of a subject a :class:`Check` of that title."""
    return lambda run: Check(title, subject, run)


def run_checks(
    name: str,
    subject: Callable[[], Subject],
    checks: Iterable[Check[Subject]],
    skip: Mapping[str, str] | None,
) -> Report:
    """Runs every check, and raises one error with all that failed.

    Args:
      name: what is checked, for the heading.
      subject: makes what the checks look at, and raises where it got the wrong arguments.
      checks: the suite.
      skip: titles of checks to leave out, each with the reason.
    """
    __tracebackhide__ = True  # pytest shows the caller's line, and the text
    checks, skip = list(checks), dict(skip or {})
    titles = [check.title for check in checks]
    for title, reason in skip.items():
        if title not in titles:
            raise unknown_name("check", title, titles)
        if not isinstance(reason, str) or not reason.strip():
            raise ValueError(f"skip={{{title!r}: ...}} needs a reason in words, got {reason!r}")
    failures: list[Failure] = []
    results: list[Result] = []
    made = subject()
    for check in checks:
        if check.title in skip:
            results.append(Result(check.title, "skipped", skip[check.title], 0.0))
            continue
        start = time.perf_counter()
        status, detail = "passed", ""
        try:
            detail = check.on(made) or ""
        except NotApplicable as why:
            status, detail = "not applied", str(why)
        except ConformanceError as error:
            status, detail = "failed", error.failures[0].what
            failures += error.failures
        except Unusable as error:
            cause = error.__cause__ or error
            failures.append(raised(check.title, cause, f"{error}: nothing else can be looked at"))
            results.append(Result(check.title, "failed", f"{type(cause).__name__}: {cause}", 0.0))
            break
        except Exception as error:
            status, detail = "failed", f"{type(error).__name__}: {error}"
            failure = raised(check.title, error)
            same = next((f.check for f in failures if f.arrived == failure.arrived), None)
            failures.append(
                failure if same is None else failure._replace(arrived=f"the same as under {same!r}")
            )
        results.append(Result(check.title, status, detail, time.perf_counter() - start))
    report = Report(name, tuple(results))
    if failures:
        done = len([r for r in results if r.status != "skipped"])
        raise ConformanceError(failures, f"{name} fails {len(failures)} of {done} checks")
    return report


def raised(check: str, error: BaseException, what: str = "an error was raised") -> Failure:
    """The failure for a function under test that raised where it should not."""
    notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", []))
    text = str(error)
    text = text if len(text) < 1200 else f"{text[:600]}\n...\n{text[-500:]}"
    concrete = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError)
    likely = (
        "a traced number is looked at in Python (if, and, float(), int(), len, numpy): use jnp.where, jnp or "
        "jax.lax.cond"
        if isinstance(error, concrete)
        else ""
    )
    return Failure(check, what, "no error", f"{type(error).__name__}: {text}{notes}", "", likely)
