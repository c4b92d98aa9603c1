"""What every test runs under: strict dtype promotion, fixed hypothesis seeds, no network."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from pathlib import Path

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_numpy_dtype_promotion", "strict")

# A test that passes today must pass tomorrow: examples come from a fixed seed, and slow CI is no failure.
settings.register_profile("nnkit", derandomize=True, deadline=None, max_examples=40, print_blob=True)
settings.load_profile("nnkit")

SLOW = frozenset((Path(__file__).parent / "slow.txt").read_text().splitlines())
"""Tests that took more than a second of processor time or so, but for the cheapest of each kind; ``make
test-slow`` has them all."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid in SLOW:
            item.add_marker(pytest.mark.slow)
