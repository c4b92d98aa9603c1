"""A copy outlives its tree and takes no memory anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit.train.host_copies import HostCopies


def check_copies(copy: Callable[[HostCopies, Any], Any]) -> None:
    """A copy outlives its tree, and the tree's buffers can be given up while it is there."""
    copies = HostCopies()
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    device, host = add(jnp.zeros(5000)), np.zeros(50)
    made = copy(copies, {"device": device, "host": host})
    where = device.unsafe_buffer_pointer()
    device = add(device)
    host += 1
    assert device.unsafe_buffer_pointer() == where, "the copy holds the buffer"
    np.testing.assert_array_equal(np.asarray(made["device"]), np.ones(5000))
    np.testing.assert_array_equal(made["host"], np.zeros(50))
    again = copy(copies, {"device": device, "host": host})
    np.testing.assert_array_equal(np.asarray(again["device"]), np.full(5000, 2))
    assert np.shares_memory(np.asarray(made["device"]), np.asarray(again["device"])), "memory is taken anew"


def test_a_copy_is_a_copy_in_the_same_memory():
    check_copies(HostCopies.copy)


COPIES: dict[str, Callable[[HostCopies, Any], Any]] = {
    "views": lambda copies, tree: jax.tree.map(np.asarray, tree),
    "fresh": lambda copies, tree: HostCopies().copy(tree),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_other_ways_to_copy_fail(copy):
    with pytest.raises(AssertionError):
        check_copies(copy)


def test_trees_of_another_kind_get_memory_of_their_own():
    copies = HostCopies()
    for made in ({"a": jnp.ones(3)}, {"a": jnp.ones(4)}, {"a": jnp.ones(4, int)}, [jnp.ones(4, int), 3], {}):
        copy = copies.copy(made)
        assert jax.tree.structure(copy) == jax.tree.structure(made)
        for a, b in zip(jax.tree.leaves(copy), jax.tree.leaves(made), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert copies.copy({"a": jnp.ones(4)}, keep=False) is None
