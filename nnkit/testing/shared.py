"""Checks that pure functions over trees have in common, whatever the functions are."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.testing.compare import check_same_bits
from nnkit.testing.report import NotApplicable, fail, raised
from nnkit.testing.trees import batch_of, is_float, map_floats, same_batch
from nnkit.train.saving import load_tree, save_tree
from nnkit.tree import flatten, path_str
from nnkit.types import PyTree

__all__ = [
    "EXTREMES",
    "FAST",
    "check_buffers",
    "check_no_nan",
    "check_pure",
    "check_saved",
    "extreme",
    "mesh_of",
    "sharded",
    "tiled",
]

EXTREMES = {"zeros": 0.0, "constant": 3.0, "tiny": 1e-30, "large": 1e4}
"""What is put in the place of every floating number: alternating in sign where not constant."""


FAST = {"xla_backend_optimization_level": 0}
"""Compiling is the cost here, and takes two thirds of the time without the backend's optimizations."""


def check_pure(what: str, call: Callable[..., PyTree], *args: Any) -> None:
    """The same call twice gives the same bits, and what goes in is not changed."""
    before = [(path_str(p), leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(args)]
    copies = [np.array(leaf) if isinstance(leaf, np.ndarray) else leaf for _, leaf in before]
    first = call(*args)
    after = [(path_str(p), leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(args)]
    likely = "a dict or array of the caller's is written to: make a new one, {**state, 'mean': mean}"
    if [p for p, _ in before] != [p for p, _ in after]:
        changed = {p for p, _ in before} ^ {p for p, _ in after}
        fail(
            f"{what} changes the structure of its arguments",
            expected="arguments left as they were",
            arrived=f"entries {sorted(changed)} came or went",
            path=min(changed),
            likely=likely,
        )
    for (path, old), copy, (_, new) in zip(before, copies, after, strict=True):
        if old is not new or (isinstance(new, np.ndarray) and not np.array_equal(copy, new, equal_nan=True)):
            fail(
                f"{what} changes its arguments",
                expected="arguments left as they were",
                arrived="another array in the same place",
                path=path,
                likely=likely,
            )
    check_same_bits(
        f"{what}, called again with the same arguments,",
        first,
        call(*args),
        "something beside the arguments has a part in it: a counter, a global, numpy's or Python's random numbers",
    )


def check_buffers(what: str, make: Callable[[], PyTree]) -> None:
    """No two leaves share a buffer, and none is kept for the next call: each may be donated."""
    first, second = make(), make()
    seen: dict[int, str] = {}
    likely = (
        "jit(..., donate_argnums=...) deletes or refuses shared buffers: make each leaf by a call of its own"
    )
    for tree, where in ((first, ""), (second, " of a second call")):
        for path, leaf in flatten(tree).items():
            for pointer in _pointers(leaf):
                other = seen.setdefault(pointer, path + where)
                if other != path + where:
                    fail(
                        f"two leaves of {what} are one buffer",
                        expected="a buffer for each leaf of each call",
                        arrived=f"{path}{where} is the buffer of {other}",
                        path=path,
                        likely=likely,
                    )


def _pointers(leaf: Any) -> list[int]:
    if not isinstance(leaf, jax.Array) or leaf.size == 0 or len(leaf.devices()) != 1:
        return []
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return [leaf.unsafe_buffer_pointer()]


def check_saved(what: str, tree: PyTree) -> PyTree:
    """The tree after ``save_tree`` and ``load_tree``, which must have every bit of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tree.npz"
        likely = "a leaf is no array (a function, a string, an object): keep only arrays in the trees"
        try:
            save_tree(path, tree)
            loaded = load_tree(path, like=tree)
        except (TypeError, ValueError) as error:
            failure = raised("", error)
            fail(
                f"{what} cannot be saved",
                expected=failure.expected,
                arrived=failure.arrived,
                likely=likely,
            )
    check_same_bits(f"{what}, saved and loaded,", tree, loaded)
    return loaded


def extreme(tree: PyTree, name: str) -> PyTree:
    """``tree`` with one of EXTREMES in the place of every floating number."""
    value = EXTREMES[name]

    def fill(a: Any) -> jax.Array:
        signs = np.ones(a.shape) if name == "constant" else 1 - 2.0 * (np.indices(a.shape).sum(0) % 2)
        return jnp.asarray(signs * min(value, float(jnp.finfo(a.dtype).max) / 4), a.dtype)

    return map_floats(fill, tree)


def check_no_nan(what: str, tree: PyTree) -> None:
    """Fails where a floating leaf has a NaN; inf may be the right answer."""
    for path, leaf in flatten(tree).items():
        nans = int(np.isnan(np.asarray(leaf)).sum()) if is_float(leaf) else 0
        if nans:
            fail(
                what,
                expected="no NaN",
                arrived=f"{nans} of {leaf.size} numbers are NaN",
                path=path or "the value",
                likely="0/0, inf-inf or the root's slope at 0; in a gradient a jnp.where whose other branch is "
                "infinite: put a harmless number into that branch as well (where twice)",
            )


def mesh_of(devices: int = 8) -> jax.sharding.Mesh:
    """A mesh of up to so many of the devices that are there, with the one axis ``batch``.

    Raises:
      NotApplicable: with fewer than two devices.
    """
    found = jax.devices()[:devices]
    if len(found) < 2:
        raise NotApplicable(
            "one device is visible: start pytest with --nnkit-devices 8, or Python with "
            "jax.config.update('jax_num_cpu_devices', 8) before anything runs"
        )
    return jax.sharding.Mesh(np.array(found), ("batch",))


def tiled(tree: PyTree, devices: int) -> PyTree:
    """``tree`` with its batch repeated until so many devices can share it evenly."""
    batch = batch_of(tree)
    if not batch:
        raise NotApplicable("the input has no batch axis to share among devices")
    times = int(np.lcm(batch, devices)) // batch
    return jax.tree.map(
        lambda a: jnp.concatenate([a] * times) if times > 1 and same_batch(a, batch) else a, tree
    )


def sharded(tree: PyTree, mesh: jax.sharding.Mesh, batch: int | None) -> PyTree:
    """``tree`` with each leaf's batch axis split over the mesh; leaves without one go to every device."""

    def put(a: Any) -> Any:
        spec = jax.sharding.PartitionSpec("batch") if same_batch(a, batch) else jax.sharding.PartitionSpec()
        return jax.device_put(a, jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)
