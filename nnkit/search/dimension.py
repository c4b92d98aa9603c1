"""``Dimension``: what one hyper-parameter may be, a range on its scale or a choice."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal

import jax
import numpy as np

from nnkit.checks import is_static_number

__all__ = ["Dimension", "Value"]

Value = str | int | float | bool | None | tuple[Any, ...]
"""What a hyper-parameter can be; tuples are of such values."""


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One hyper-parameter: its values, their scale, and whether a program is compiled for each of them.

    Made by :func:`uniform`, :func:`log_uniform`, :func:`integer` and :func:`choice`, which check. Values
    are Python's. A number u in [0, 1] stands for a value on the dimension's own scale: evenly spaced u
    are evenly spaced logarithms of a ``log_uniform``, and equal shares of a choice's options.
    """

    kind: Literal["uniform", "log_uniform", "integer", "choice"]
    low: float | None = None
    high: float | None = None
    step: float | None = None
    log: bool = False
    options: tuple[Value, ...] | None = None
    static: bool = False

    @property
    def count(self) -> int | None:
        """How many values there are; None for a continuous range."""
        if self.options is not None:
            return len(self.options)
        return None if self.step is None else self._last() + 1

    @property
    def dtype(self) -> np.dtype:
        """What it has as an array within a program, where it is traced."""
        numbers = self.options if self.options is not None else (self.low, self.high)
        whole = self.kind == "integer" or (self.kind == "choice" and all(isinstance(n, int) for n in numbers))
        return np.dtype(jax.dtypes.canonicalize_dtype(int if whole else float))

    def distribution(self) -> Any:
        """Optuna's distribution of the values as :meth:`stored` has them."""
        from optuna import distributions

        if self.options is not None:
            return distributions.CategoricalDistribution([self.stored(option) for option in self.options])
        if self.kind == "integer":
            low, high, step = int(self._low), int(self._high), int(self.step or 1)
            return distributions.IntDistribution(low, high, log=self.log, step=step)
        return distributions.FloatDistribution(self._low, self._high, log=self.log, step=self.step)

    def stored(self, value: Value) -> Any:
        """``value`` as Optuna's storage has it: a tuple becomes its text, all else stays."""
        return repr(value) if isinstance(value, tuple) else value

    def restored(self, stored: Any) -> Value:
        """The value of which ``stored`` is the stored one; numbers are put on the step's grid."""
        if self.options is None:
            return self._snapped(stored)
        return self.options[[self.stored(option) for option in self.options].index(stored)]

    def grid(self, n: int) -> list[Value]:
        """At most n values, evenly spaced on the scale, from the lowest to the highest; of a choice all.

        >>> search.log_uniform(1e-4, 1e-1).grid(4), search.integer(16, 256, log=True).grid(3)
        ([0.0001, 0.001, 0.01, 0.1], [16, 64, 256])
        """
        if self.options is not None:
            return list(self.options)
        if n == 1:
            return [self.at(0.5)]
        shares = [i / (n - 1) for i in range(n)]
        if self.step is None:
            # Of powers and logarithms only some twelve digits are meant.
            return [self._within(float(f"{self._between(u):.12g}")) for u in shares]
        if self.log:
            return [*sorted({round(self._between(u)) for u in shares})]
        return [self._nth(i) for i in sorted({round(u * self._last()) for u in shares})]

    def at(self, u: float) -> Value:
        """The value at u in [0, 1]; of counted values each has an equal share.

        >>> round(search.log_uniform(1e-4, 1.0).at(0.5), 12), search.choice(["a", "b"]).at(0.7)
        (0.01, 'b')
        """
        u = min(max(float(u), 0.0), 1.0)
        if self.options is not None:
            return self.options[min(int(u * len(self.options)), len(self.options) - 1)]
        if self.step is None:
            return self._within(self._between(u))
        if self.log:
            low, high = self._log_edges()
            return int(self._within(round(math.exp(low + u * (high - low)))))
        count = self._last() + 1
        return self._nth(min(int(u * count), count - 1))

    def position(self, value: Any) -> float:
        """The u at which ``value`` stands: ``at(position(value))`` is the value, up to rounding.

        >>> search.log_uniform(1e-4, 1.0).position(0.01), search.choice(["a", "b"]).position("b")
        (0.5, 0.75)
        """
        if self.options is not None:
            return (self.options.index(value) + 0.5) / len(self.options)
        if self.step is None:
            low, high, value = self._scaled(self._low), self._scaled(self._high), self._scaled(value)
            return (value - low) / (high - low)
        if self.log:
            low, high = self._log_edges()
            return (math.log(value) - low) / (high - low)
        return (self._index(value) + 0.5) / (self._last() + 1)

    def spec(self) -> dict[str, Any]:
        """What there is to know of it, in JSON's own types."""
        spec: dict[str, Any] = {"kind": self.kind}
        if self.options is not None:
            spec["options"] = [_listed(option) for option in self.options]
        else:
            spec |= {"low": self.low, "high": self.high}
            spec |= {} if self.step is None else {"step": self.step}
            spec |= {"log": True} if self.kind == "integer" and self.log else {}
        return {**spec, "static": self.static}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Dimension:
        """The dimension whose :meth:`spec` this is."""
        options = tuple(_tupled(option) for option in spec["options"]) if "options" in spec else None
        log = spec.get("log", spec["kind"] == "log_uniform")
        numbers = {name: spec.get(name) for name in ("low", "high", "step")}
        return cls(spec["kind"], **numbers, log=log, options=options, static=spec["static"])

    def check(self, value: Any, name: str) -> Value:
        """``value`` as this dimension has it, or an error that begins with ``name``."""
        if self.options is not None:
            value = _tupled(value)
            for option in self.options:
                if isinstance(option, bool) == isinstance(value, bool) and option == value:
                    return option
            raise ValueError(f"{name} is {value!r}, which is none of its options {list(self.options)}")
        value = value.item() if isinstance(value, np.generic) else value
        if not is_static_number(value) or (self.kind == "integer" and value != int(value)):
            number = "a whole number" if self.kind == "integer" else "a number"
            raise TypeError(f"{name} must be {number} in [{self.low}, {self.high}], got {value!r}")
        if not self._low <= value <= self._high:
            raise ValueError(f"{name} is {value!r}, which is not in [{self.low}, {self.high}]")
        snapped = self._snapped(value)
        if abs(snapped - value) > 1e-8 * abs(self.step or 0):
            raise ValueError(f"{name} is {value!r}, which is not {self.low} and a multiple of {self.step}")
        return snapped

    def __str__(self) -> str:
        if self.options is not None:
            return f"choice({list(self.options)})"
        more = f", step={self.step}" if self.step not in (None, 1) else ""
        more += ", log=True" if self.kind == "integer" and self.log else ""
        return f"{self.kind}({self.low}, {self.high}{more})"

    @property
    def _low(self) -> float:
        assert self.low is not None
        return self.low

    @property
    def _high(self) -> float:
        assert self.high is not None
        return self.high

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.log else float(value)

    def _between(self, u: float) -> float:
        if u in (0, 1):  # exp(log(x)) need not be x
            return self._high if u else self._low
        low, high = self._scaled(self._low), self._scaled(self._high)
        found = low + u * (high - low)
        return math.exp(found) if self.log else found

    def _within(self, value: float) -> float:
        return min(max(value, self._low), self._high)

    def _log_edges(self) -> tuple[float, float]:
        # Each integer has what rounds to it, as Optuna draws them.
        return math.log(self._low - 0.5), math.log(self._high + 0.5)

    def _last(self) -> int:
        return int((Decimal(str(self.high)) - Decimal(str(self.low))) / Decimal(str(self.step)))

    def _nth(self, i: int) -> float:
        # In decimals, since 0.1 + 2 * 0.1 is not 0.3.
        value = Decimal(str(self.low)) + i * Decimal(str(self.step))
        return int(value) if self.kind == "integer" else float(value)

    def _index(self, value: float) -> int:
        return round((value - self._low) / (self.step or 1))

    def _snapped(self, value: float) -> float:
        if self.step is None:
            return float(value)
        return int(value) if self.log else self._nth(self._index(value))


def _listed(option: Any) -> Any:
    return [_listed(inner) for inner in option] if isinstance(option, tuple) else option


def _tupled(option: Any) -> Any:
    """What JSON made of an option."""
    if isinstance(option, np.generic):
        return option.item()
    return tuple(_tupled(inner) for inner in option) if isinstance(option, list | tuple) else option
