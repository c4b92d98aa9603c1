"""The names that the examples in docstrings and docs use without importing them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnkit


@pytest.fixture(autouse=True)
def _names_of_the_examples(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(jax=jax, jnp=jnp, np=np, nnkit=nnkit)
    doctest_namespace.update({name: getattr(nnkit, name) for name in nnkit.__all__})
