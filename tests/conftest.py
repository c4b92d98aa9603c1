"""What every test runs under: strict dtype promotion, fixed hypothesis seeds, no network."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from hypothesis import settings

jax.config.update("jax_numpy_dtype_promotion", "strict")

# A test that passes today must pass tomorrow: examples come from a fixed seed, and slow CI is no failure.
settings.register_profile("nnkit", derandomize=True, deadline=None, max_examples=40, print_blob=True)
settings.load_profile("nnkit")
