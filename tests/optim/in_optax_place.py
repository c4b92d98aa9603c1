"""A pytest plugin that puts nnkit's functions in the place of optax's, for optax's own tests.

    python -m pytest -p tests.optim.in_optax_place --pyargs optax.schedules._schedule_test

Every public name of ``nnkit.optim`` that optax has too replaces optax's in all of its modules, states
included, but for ``GradientTransformation``, which is optax's protocol itself.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Any

import optax

from nnkit import optim

KEPT = {"GradientTransformation"}


def _modules() -> list[Any]:
    for package in (optax, optax.schedules, optax.transforms, optax.contrib):
        for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            if not found.name.endswith("_test"):
                importlib.import_module(found.name)
    src = importlib.import_module("optax._src")
    for found in pkgutil.iter_modules(src.__path__, "optax._src."):
        if not found.name.endswith(("_test", "test_utils")):
            importlib.import_module(found.name)
    return [module for name, module in sys.modules.items() if name.split(".")[0] == "optax"]


def install() -> list[str]:
    """Replaces them; returns the names."""
    originals = {}
    for name in set(optim.__all__) - KEPT:
        old = getattr(optax, name, None) or getattr(optax.contrib, name, None)
        made_by = getattr(old, "func", old)  # nadam is a functools.partial of adam
        if getattr(made_by, "__module__", "").split(".")[0] == "optax":
            originals[name] = old
    for module in _modules():
        for name, old in originals.items():
            if vars(module).get(name) is old:
                setattr(module, name, getattr(optim, name))
    return sorted(originals)


REPLACED = install()
