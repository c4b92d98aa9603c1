"""How a library names the arrays of its layers, and a layer of ours found under such a name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from nnkit.interop.flattening import Shape
from nnkit.interop.forms import Form
from nnkit.interop.parts import Part

__all__ = ["Dialect", "Match", "Shapes", "is_numbered", "written_at"]

Shapes: TypeAlias = Mapping[str, Shape]


class Dialect(NamedTuple):
    """What distinguishes one library's names from another's.

    Attributes:
      name: of the library.
      separator: between the names of a path.
      forms: the ways in which it writes a layer.
      ordered: whether the order of its arrays is that in which the layers were made.
      numbered: whether a name may end in the number of a layer, as PyTorch's ``weight_ih_l0``.
      left: which of its arrays nothing corresponds to, and need not.
    """

    name: str
    separator: str
    forms: Callable[[Part], list[Form]]
    ordered: bool
    numbered: bool = False
    left: str = r"(?!)"

    def key(self, prefix: str, name: str) -> str:
        """The full name of an array of the layer ``prefix``; ``rnn:l1`` is the layer 1 within ``rnn``."""
        base, _, number = prefix.partition(":")
        full = f"{base}{self.separator}{name}" if base else name
        return f"{full}_{number}" if number else full

    def prefix(self, key: str, name: str) -> str | None:
        """The layer whose array ``name`` is called ``key``, if one may be."""
        number = r"(?:_(l\d+(?:_reverse)?))?" if self.numbered else "()"
        found = re.fullmatch(rf"(?:(.+){re.escape(self.separator)})?{re.escape(name)}{number}", key)
        if found is None:
            return None
        base, layer = found.groups()
        return f"{base or ''}:{layer}" if layer else base or ""


class Match(NamedTuple):
    """A layer of ours, its name there, and how it is written there.

    Attributes:
      part: ours.
      prefix: theirs.
      form: how it is written.
      keys: full names of its arrays, by their names within the layer.
    """

    part: Part
    prefix: str
    form: Form
    keys: dict[str, str]


def written_at(
    part: Part, prefix: str, forms: Sequence[Form], theirs: Shapes, dialect: Dialect
) -> Match | None:
    """A layer of ours where theirs have all of its arrays under the name ``prefix``."""
    for form in forms:
        numbered = [f"{prefix}:l0"] if dialect.numbered and ":" not in prefix else []
        for p in (prefix, *numbered):
            keys = {name: dialect.key(p, name) for name in form.shapes}
            if all(key in theirs for key in keys.values()):
                return Match(part, p, form, keys)
        if len(form.shapes) == 1 and prefix in theirs:  # an array that is an attribute of its own there
            return Match(part, prefix, form, dict.fromkeys(form.shapes, prefix))
    return None


def is_numbered(form: Form) -> bool:
    return "weight_ih" in form.shapes
