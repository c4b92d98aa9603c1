"""The command line: ``nnkit train``, ``eval``, ``predict``, ``resume``, ``export``, ``info``, ``verify``."""

from nnkit.cli.main import main

__all__ = ["main"]
