"""The implementations by name; each is imported only when it is asked for.

The first six are what is compared by default: nnkit, and the fastest form of each peer that is an
ordinary training loop by its documentation, PyTorch with its own number of threads and with one. The
others are further forms, for whoever doubts the choice.
"""

from __future__ import annotations

import importlib

from benchmarks.task import Implementation
from nnkit.checks import unknown_name

__all__ = ["DEFAULT", "KNOWN", "find"]

KNOWN = {
    "nnkit": "benchmarks.peers.nnkit:Nnkit",
    "linen": "benchmarks.peers.linen:Linen",
    "nnx": "benchmarks.peers.nnx:Partial",
    "equinox": "benchmarks.peers.equinox:Flat",
    "pytorch": "benchmarks.peers.pytorch:Eager",
    "pytorch.1": "benchmarks.peers.pytorch:OneThread",
    "linen.scan": "benchmarks.peers.linen:Scanned",
    "nnx.jit": "benchmarks.peers.nnx:Jitted",
    "nnx.split": "benchmarks.peers.nnx:Functional",
    "equinox.filter_jit": "benchmarks.peers.equinox:Filtered",
    "torch.compile": "benchmarks.peers.pytorch:Compiled",
}
DEFAULT = ("nnkit", "linen", "nnx", "equinox", "pytorch", "pytorch.1")


def find(name: str) -> type[Implementation]:
    """The class of an implementation.

    >>> find("linen").__name__
    'Linen'
    """
    if name not in KNOWN:
        raise unknown_name("implementation", name, KNOWN)
    module, _, kind = KNOWN[name].partition(":")
    return getattr(importlib.import_module(module), kind)
