"""The values of a program's variables while it is evaluated, each as long as it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import Jaxpr, Literal

from nnkit.train.history import Value, is_bad
from nnkit.train.scopes import Scope, scope_of, stack_of

__all__ = ["Level"]


class Level:
    """One jaxpr in evaluation: the values of its variables, as long as they are needed.

    A layer's inputs are kept until its last operation, so that they can be shown.
    """

    def __init__(
        self, jaxpr: Jaxpr, scope: tuple[Any, ...], outer: tuple[Level, int] | None, wanted: Sequence[bool]
    ):
        self.jaxpr, self.outer, self.stack = jaxpr, outer, scope
        self.scope = scope_of(scope)
        self.values: dict[Any, Value] = {}
        self.scopes = [scope_of((*scope, *stack_of(eqn))) for eqn in jaxpr.eqns]
        self.needed = [False] * len(jaxpr.eqns)
        last_of = {scope: i for i, scope in enumerate(self.scopes)}
        last: dict[Any, int] = {}
        end = len(jaxpr.eqns)
        for v, want in zip(jaxpr.outvars, wanted, strict=True):
            if want and not isinstance(v, Literal):
                last[v] = end
        for i in reversed(range(end)):
            eqn = jaxpr.eqns[i]
            if not any(v in last for v in eqn.outvars):
                continue
            self.needed[i] = True
            for v in eqn.invars:
                if not isinstance(v, Literal):
                    last[v] = max(last.get(v, 0), last_of[self.scopes[i]])
        self.ends: dict[int, list[Any]] = {}
        for v, i in last.items():
            self.ends.setdefault(i, []).append(v)
        self.last = last

    def read(self, v: Any) -> Value:
        if isinstance(v, Literal):
            return Value(v.val, bad=is_bad(v.val), constant=True)
        return self.values[v]

    def write(self, i: int, outputs: Sequence[Value]) -> None:
        for v, value in zip(self.jaxpr.eqns[i].outvars, outputs, strict=True):
            if v in self.last:
                self.values[v] = value
        for v in self.ends.get(i, ()):
            self.values.pop(v, None)

    def entering(self, at: int, scope: Scope) -> list[Value]:
        """What came into the layer ``scope.path`` up to equation ``at``, in the order of its use."""
        level: Level = self
        while level.scope.path == scope.path and level.outer is not None:
            level, at = level.outer
        inside = [
            eqn
            for eqn, s in zip(level.jaxpr.eqns[: at + 1], level.scopes, strict=False)
            if s.backward == scope.backward and (s.path == scope.path or s.path.startswith(scope.path + "/"))
        ]
        own = {v for eqn in inside for v in eqn.outvars}
        used = dict.fromkeys(v for eqn in inside for v in eqn.invars if not isinstance(v, Literal))
        return [level.values[v] for v in used if v not in own and v in level.values]
