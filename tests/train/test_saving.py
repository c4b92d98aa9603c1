"""What was saved comes back bit for bit, or an error says which leaf does not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnkit.train.saving import DamagedFileError, load_tree, save_tree
from nnkit.types import TrainState

ML_DTYPES = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4", "int2", "float4_e2m1fn"]
NUMPY_DTYPES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
]


class Moments(NamedTuple):
    mu: Any
    nu: Any


def bits(leaf: Any) -> tuple[Any, ...]:
    """All that can be told of a leaf: its type, dtype, shape and every bit, so that NaN equals NaN."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = np.asarray(jax.random.key_data(leaf))
        return ("key", str(jax.random.key_impl(leaf)), leaf.shape, data.tobytes())
    kind = jax.Array if isinstance(leaf, jax.Array) else type(leaf)
    array = np.asarray(leaf)
    return (kind, array.dtype, array.shape, array.tobytes())


def assert_same(got: Any, wanted: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert bits(a) == bits(b)


def train_state() -> TrainState:
    """One of everything that a run's state can have."""
    params = {
        "dense_0": {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.zeros(4, jnp.bfloat16)},
        "relu_0": {},
        "empty": jnp.zeros((0, 3)),
    }
    moments = Moments(mu=jax.tree.map(jnp.ones_like, params), nu=None)
    return TrainState(
        params, {}, (moments, (), [jnp.int32(7)], 3, 0.1, True), jax.random.key(1), jnp.int32(5)
    )


def spec(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf, tree
    )


def any_bits(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Arrays of random bits, NaNs with payloads among them."""
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    if name == "bool":
        raw &= 1
    return raw.view(dtype).reshape(shape)


def test_a_train_state_comes_back_with_and_without_its_values_at_hand(tmp_path):
    ts = train_state()
    save_tree(tmp_path / "ts.npz", ts)
    for like in (ts, spec(ts), jax.tree.map(lambda leaf: leaf, ts)):
        assert_same(load_tree(tmp_path / "ts.npz", like), ts)
    assert os.listdir(tmp_path) == ["ts.npz"]


def test_without_like_the_result_is_nested_dicts(tmp_path):
    ts = train_state()
    save_tree(tmp_path / "ts.npz", ts)
    got = load_tree(tmp_path / "ts.npz")
    assert_same(got["params"]["dense_0"], ts.params["dense_0"])
    assert_same(got["opt_state"]["0"]["mu"]["dense_0"], ts.opt_state[0].mu["dense_0"])
    assert {name: got["opt_state"][name] for name in "345"} == {"3": 3, "4": 0.1, "5": True}
    assert_same(got["key"], ts.key)
    assert list(got) == ["params", "opt_state", "key", "step"]


@pytest.mark.parametrize("name", NUMPY_DTYPES + ML_DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 4)])
def test_every_dtype(tmp_path, name, shape):
    array = any_bits(name, shape)
    with jax.enable_x64(True):
        # Through jnp, which reads from a sub-byte dtype only the bits that count.
        tree = {"numpy": array, "jax": jnp.array(array)}
        save_tree(tmp_path / "a.npz", tree)
        assert_same(load_tree(tmp_path / "a.npz"), tree)
        assert_same(load_tree(tmp_path / "a.npz", tree), tree)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys(tmp_path, implementation):
    key = jax.random.key(3, impl=implementation)
    tree = {"one": key, "many": jax.random.split(key, (2, 3))}
    save_tree(tmp_path / "a.npz", tree)
    for like in (None, tree, spec(tree)):
        got = load_tree(tmp_path / "a.npz", like)
        assert_same(got, tree)
        assert jax.random.uniform(got["one"]) == jax.random.uniform(key)


def leaves(dtypes: list[str]) -> st.SearchStrategy[Any]:
    arrays = st.sampled_from(dtypes).flatmap(
        lambda name: hnp.arrays(
            np.dtype(getattr(ml_dtypes, name, name)),
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
            elements=None if name in NUMPY_DTYPES else st.sampled_from([0, 1]),
        )
    )
    numbers = st.integers(-(2**63), 2**63 - 1) | st.floats() | st.booleans() | st.complex_numbers()
    return arrays | arrays.map(jnp.array) | numbers | st.integers(0, 9).map(jax.random.key) | st.none()


NAMES = (
    st.sampled_from(["kernel", "bias", "dense_0", "file", "a.npy", "manifest.json", "..", "ä"]) | st.text()
)
TREES = st.recursive(
    leaves(["bool", "int32", "uint8", "float32", "complex64", "bfloat16", "float8_e5m2", "float16"]),
    lambda inner: (
        st.dictionaries(NAMES.filter(lambda name: "/" not in name), inner, max_size=3)
        | st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.builds(Moments, inner, inner)
    ),
    max_leaves=6,
)


@given(TREES.filter(lambda tree: tree is not None))
def test_any_tree_comes_back(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("tree") / "a.npz"
    save_tree(path, tree)
    assert_same(load_tree(path, tree), tree)
    assert_same(load_tree(path, spec(tree)), tree)
    first = path.read_bytes()
    save_tree(path, load_tree(path, tree))
    assert path.read_bytes() == first


@given(st.dictionaries(NAMES.filter(lambda name: "/" not in name and name), st.integers(0, 9), min_size=1))
def test_dicts_come_back_without_like(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("tree") / "a.npz"
    tree = {"x": tree, "y": dict(tree)}
    save_tree(path, tree)
    assert load_tree(path) == tree


def test_names_that_a_zip_file_would_bend(tmp_path):
    tree = {
        name: number for number, name in enumerate(["a\x00b", "a\\b", "\ud800", "a" * 70000, "A", "", " "])
    }
    save_tree(tmp_path / "a.npz", tree)
    assert load_tree(tmp_path / "a.npz", tree) == tree


def test_layouts_in_memory_do_not_matter(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    views = {
        "transposed": array.T,
        "strided": array[:, ::2, ::-1],
        "big_endian": array.astype(">f4"),
        "fortran": np.asfortranarray(array),
        "broadcast": np.broadcast_to(array[:1], array.shape),
    }
    save_tree(tmp_path / "a.npz", views)
    got = load_tree(tmp_path / "a.npz")
    for name, view in views.items():
        np.testing.assert_array_equal(got[name], view)
        assert got[name].dtype == np.float32
        got[name][...] = 0  # The result is the caller's own, and writable.


def test_equal_trees_give_equal_bytes(tmp_path):
    tree = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": 1}
    save_tree(tmp_path / "a.npz", tree)
    save_tree(tmp_path / "b.npz", {"b": 1, "a": np.asfortranarray(tree["a"].astype(">f4"))})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_like_says_whether_arrays_are_of_numpy_or_of_jax(tmp_path):
    save_tree(tmp_path / "a.npz", {"n": np.ones(2, np.float32), "j": jnp.ones(2)})
    got = load_tree(tmp_path / "a.npz", {"n": jnp.ones(2), "j": np.ones(2, np.float32)})
    assert isinstance(got["n"], jax.Array)
    assert isinstance(got["j"], np.ndarray)
    got = load_tree(tmp_path / "a.npz", {name: jax.ShapeDtypeStruct((2,), np.float32) for name in "nj"})
    assert isinstance(got["n"], np.ndarray)
    assert isinstance(got["j"], jax.Array)


def test_a_donated_like_will_do(tmp_path):
    like = {"w": jnp.ones(3)}
    save_tree(tmp_path / "a.npz", {"w": jnp.arange(3.0)})
    like["w"].delete()
    assert_same(load_tree(tmp_path / "a.npz", like), {"w": jnp.arange(3.0)})


def test_the_file_is_an_npz_that_numpy_reads(tmp_path):
    save_tree(
        tmp_path / "a.npz", {"dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3, jnp.bfloat16)}}
    )
    with np.load(tmp_path / "a.npz") as file:
        np.testing.assert_array_equal(file["dense_0/kernel"], np.ones((2, 3)))
        assert file["dense_0/bias"].dtype == np.uint16
        manifest = json.loads(file["manifest.json"])
    assert manifest["leaves"]["dense_0/bias"]["dtype"] == "bfloat16"
    assert manifest["leaves"]["dense_0/kernel"]["shape"] == [2, 3]


# ------------------------------------------------------------------ damage


def check_detects(load, path: Path, tree: Any, damaged: bytes) -> None:
    """The damaged file is refused, or what is loaded is what was saved."""
    path.write_bytes(damaged)
    try:
        got = load(path, tree)
    except DamagedFileError:
        return
    assert_same(got, tree)


def damaged_file(tmp_path: Path) -> tuple[Path, Any, bytes]:
    tree = {
        "dense_0": {"kernel": np.asarray(jax.random.normal(jax.random.key(0), (8, 16)))},
        "flags": np.array([True, False]),
        "half": any_bits("bfloat16", (7,)),
        "key": jax.random.key(2),
        "epoch": 4,
    }
    save_tree(path := tmp_path / "a.npz", tree)
    return path, tree, path.read_bytes()


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def check_flipped_bits(load, tmp_path: Path, count: int | None = 200) -> None:
    path, tree, data = damaged_file(tmp_path)
    bits = range(8 * len(data))
    for bit in bits if count is None else random.Random(0).sample(bits, count):
        check_detects(load, path, tree, flipped(data, bit))


def test_single_flipped_bits(tmp_path):
    check_flipped_bits(load_tree, tmp_path)


@pytest.mark.slow
def test_every_single_flipped_bit(tmp_path):
    check_flipped_bits(load_tree, tmp_path, None)


def test_cut_off_files_are_refused(tmp_path):
    path, tree, data = damaged_file(tmp_path)
    for length in [*range(0, len(data), 37), *range(len(data) - 60, len(data))]:
        path.write_bytes(data[:length])
        with pytest.raises(DamagedFileError, match=r"a\.npz"):
            load_tree(path, tree)


@given(st.data())
@settings(max_examples=60)
def test_overwritten_stretches(tmp_path_factory, data):
    path, tree, contents = damaged_file(tmp_path_factory.mktemp("tree"))
    at = data.draw(st.integers(0, len(contents) - 1))
    patch = data.draw(st.binary(min_size=1, max_size=64) | st.integers(1, 64).map(bytes))
    check_detects(load_tree, path, tree, contents[:at] + patch + contents[at + len(patch) :])


def load_without_sums(path: Path, like: Any) -> Any:
    """A loader that detects what zipfile and numpy stumble over, and nothing else."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = {}
            for info in archive.infolist():
                if info.filename.endswith(".npy"):
                    with archive.open(info) as file:
                        file._expected_crc = None  # type: ignore[attr-defined]
                        found[info.filename.removesuffix(".npy")] = np.lib.format.read_array(file)
        flat = {
            "dense_0": {"kernel": found["dense_0/kernel"]},
            "flags": found["flags"],
            "half": found["half"].view(ml_dtypes.bfloat16),
            "key": jax.random.wrap_key_data(jnp.array(found["key"])),
            "epoch": found["epoch"].item(),
        }
    except Exception as error:
        raise DamagedFileError(str(error)) from error
    return flat


def test_a_loader_without_sums_fails_the_test_of_flipped_bits(tmp_path):
    path, tree, _ = damaged_file(tmp_path)
    assert_same(load_without_sums(path, tree), tree)
    with pytest.raises(AssertionError):
        check_flipped_bits(load_without_sums, tmp_path)


def test_a_wrong_sum_names_the_leaf(tmp_path):
    """A file whose zip sums are right and whose numbers are not: only the SHA-256 can tell."""
    save_tree(path := tmp_path / "a.npz", {"dense_0": {"bias": np.zeros(2), "kernel": np.ones(2)}})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["dense_0/kernel.npy"] = members["dense_0/kernel.npy"][:-1] + b"\x40"
    with zipfile.ZipFile(path, "w") as archive:
        for name, contents in members.items():
            archive.writestr(name, contents)
    with pytest.raises(DamagedFileError) as caught:
        load_tree(path)
    assert str(caught.value) == (
        f"leaf 'dense_0/kernel' in '{path}' is damaged (its SHA-256 is another): use an earlier file"
    )


def test_a_flipped_number_names_the_leaf(tmp_path):
    save_tree(path := tmp_path / "a.npz", {"dense_0": {"bias": np.zeros(2), "kernel": np.full(2, 3.25)}})
    data = path.read_bytes()
    path.write_bytes(flipped(data, 8 * data.index(np.float64(3.25).tobytes())))
    with pytest.raises(
        DamagedFileError, match=r"^leaf 'dense_0/kernel' in '.*a\.npz' is damaged \(Bad CRC-32"
    ):
        load_tree(path)


def test_a_directory_that_asks_for_a_decoder_or_for_gigabytes_is_not_followed(tmp_path):
    save_tree(path := tmp_path / "a.npz", {"a": np.zeros(2)})
    data = path.read_bytes()
    entry = data.index(b"PK\x01\x02")  # The directory's first; its method is at 10, its sizes at 20 and 24.
    for at in (10, 23, 27):
        path.write_bytes(flipped(data, 8 * (entry + at) + 3))
        with pytest.raises(DamagedFileError) as caught:
            load_tree(path)
        assert str(caught.value) == (
            f"leaf 'a' in '{path}' is damaged (its entry in the zip directory is wrong): use an earlier file"
        )


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "is cut off, damaged, or no file of save_tree (File is not a zip file): use an earlier one"),
        (b"{}", "is cut off, damaged, or no file of save_tree (File is not a zip file): use an earlier one"),
        ({"a.npy": "?"}, "is damaged or no file of save_tree: it has no manifest.json"),
        ({"manifest.json": "[]"}, "is no file of this save_tree (list indices must be integers"),
        ({"manifest.json": "{}"}, "is no file of this save_tree ('format'): load it with its writer"),
        (
            {"manifest.json": '{"format": "nnkit tree 2"}'},
            "is no file of this save_tree (format 'nnkit tree 2'): load it with its writer",
        ),
    ],
)
def test_files_of_others(tmp_path, contents, message):
    path = tmp_path / "a.npz"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in contents.items():
                archive.writestr(name, text)
    with pytest.raises(DamagedFileError) as caught:
        load_tree(path)
    assert str(caught.value).startswith(f"'{path}' {message}")
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_tree(tmp_path / "a.npz")
    assert str(caught.value) == (
        f"no file '{tmp_path}/a.npz': nothing was saved there, or under another name"
    )


# ------------------------------------------------------------------ another model


def mismatch(tmp_path: Path, saved: Any, like: Any) -> str:
    save_tree(path := tmp_path / "a.npz", saved)
    with pytest.raises(ValueError, match="parameters of another model") as caught:
        load_tree(path, like)
    assert not isinstance(caught.value, DamagedFileError)
    text, advice = str(caught.value).split(f" (file '{path}'). ")
    assert advice == "Build the model and the optimizer with the settings that the file was written with"
    return text.removeprefix("parameters of another model: ")


W = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("saved", "like", "message"),
    [
        ({"a": W}, {"a": W, "b": {"c": W}}, "'b/c' is missing"),
        ({"a": W, "b": W}, {"a": W}, "'b' is unexpected"),
        ({"a": W}, {"a": W.T}, "'a' is float32[2, 3] and should be float32[3, 2]"),
        ({"a": W}, {"a": W.astype(jnp.bfloat16)}, "'a' is float32[2, 3] and should be bfloat16[2, 3]"),
        ({"a": W}, {"a": 1.0}, "'a' is float32[2, 3] and should be a Python float"),
        ({"a": 1}, {"a": True}, "'a' is a Python int and should be a Python bool"),
        ({"a": 1}, {"a": jnp.int32(1)}, "'a' is a Python int and should be int32[]"),
        (
            {"a": jax.random.key(0)},
            {"a": jax.random.key(0, impl="rbg")},
            "'a' is key<fry>[] and should be key<rbg>[]",
        ),
        (
            {"a": jnp.zeros(2, jnp.uint32)},
            {"a": jax.random.key(0)},
            "'a' is uint32[2] and should be key<fry>[]",
        ),
        ({"a": W}, {"a": jnp.ones((2, 3, 1))}, "'a' is float32[2, 3] and should be float32[2, 3, 1]"),
        ({"a": W, "b": None}, {"a": None, "b": W}, "'b' is missing; 'a' is unexpected"),
        (
            {f"dense_{i}": W for i in range(9)},
            {f"dense_{i}": W.T for i in range(8)},
            "'dense_8' is unexpected; "
            + "; ".join(f"'dense_{i}' is float32[2, 3] and should be float32[3, 2]" for i in range(4))
            + "; and 4 more",
        ),
    ],
)
def test_leaves_that_do_not_fit(tmp_path, saved, like, message):
    assert mismatch(tmp_path, saved, like) == message


def test_float64_is_not_cut_to_float32_behind_ones_back(tmp_path):
    with jax.enable_x64(True):
        save_tree(path := tmp_path / "a.npz", {"w": jnp.ones(2, jnp.float64)})
    with pytest.raises(ValueError, match="leaf 'w' in") as caught:
        load_tree(path)
    assert str(caught.value) == (
        f"leaf 'w' in '{path}' is float64, which JAX would cut to 32 bits now: "
        "call jax.config.update('jax_enable_x64', True) first"
    )
    with jax.enable_x64(True):
        assert load_tree(path)["w"].dtype == np.float64
    assert load_tree(path, {"w": np.zeros(2)})["w"].dtype == np.float64


def test_a_key_of_an_implementation_that_this_jax_has_not(tmp_path):
    save_tree(path := tmp_path / "a.npz", {"k": jax.random.key(0)})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["manifest.json"] = members["manifest.json"].replace(b"threefry2x32", b"sevenfry1x64")
    with zipfile.ZipFile(path, "w") as archive:
        for name, contents in members.items():
            archive.writestr(name, contents)
    with pytest.raises(ValueError, match=r"^leaf 'k' in '.*' is a key this JAX cannot make: .*sevenfry1x64"):
        load_tree(path)


def test_a_leaf_within_a_leaf_needs_like(tmp_path):
    for tree in ({"a": 1, "a/b": 2}, {"a/b": 2, "a": {"b/c": 1}}):
        save_tree(path := tmp_path / "a.npz", tree)
        with pytest.raises(ValueError, match=r"lies in another leaf: pass load_tree\(\.\.\., like=tree\)$"):
            load_tree(path)
        assert load_tree(path, tree) == tree


# ------------------------------------------------------------------ what cannot be saved


def donated() -> jax.Array:
    array = jnp.ones(3)
    array.delete()
    return array


@pytest.mark.parametrize(
    ("leaf", "error", "message"),
    [
        ("text", TypeError, "leaf 'a/b' is a str: a tree's leaves are arrays, PRNG keys and numbers"),
        (print, TypeError, "leaf 'a/b' is a builtin_function_or_method: a tree's leaves are arrays"),
        (np.array(["text"]), TypeError, "leaf 'a/b' has dtype <U4: a tree's arrays hold numbers or bools"),
        (np.array([None]), TypeError, "leaf 'a/b' has dtype object: a tree's arrays hold numbers or bools"),
        (np.zeros(1, "M8[s]"), TypeError, "leaf 'a/b' has dtype datetime64[s]: a tree's arrays hold"),
        (np.zeros(1, [("x", "f4")]), TypeError, "leaf 'a/b' has dtype [('x', '<f4')]: a tree's arrays hold"),
        (2**63, ValueError, "leaf 'a/b' is the int 9223372036854775808, which does not fit into 64 bits"),
        (
            donated(),
            ValueError,
            "leaf 'a/b' was donated to a compiled function: save the state which that returned",
        ),
    ],
)
def test_leaves_that_cannot_be_saved(tmp_path, leaf, error, message):
    (tmp_path / "a.npz").write_bytes(b"old")
    with pytest.raises(error) as caught:
        save_tree(tmp_path / "a.npz", {"a": {"b": leaf}})
    assert str(caught.value).startswith(message)
    assert (tmp_path / "a.npz").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.npz"]


def test_two_leaves_of_one_path(tmp_path):
    with pytest.raises(
        ValueError, match=r"^two leaves of the tree have the path 'a/b': use names without '/'$"
    ):
        save_tree(tmp_path / "a.npz", {"a": {"b": 1}, "a/b": 2})


# ------------------------------------------------------------------ killed

WRITER = """
import os, sys
import numpy as np
from nnkit.train.saving import save_tree

# One import for all the writers: each is a fork that saves trees of 0s, 1s, 2s, ... until it is killed.
for line in sys.stdin:
    if not (writer := os.fork()):
        for number in range(10**6):
            save_tree(line.strip(), {"a": np.full(200_000, number), "b": {"c": np.full(100_000, number)}})
        os._exit(0)
    print(writer, flush=True)
    os.waitpid(writer, 0)
    print("ended", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_writer_leaves_the_old_file_or_the_new(tmp_path):
    path, seen, left = tmp_path / "a.npz", set(), 0
    wait = random.Random(0)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WRITER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        for _ in range(10):
            print(path, file=server.stdin, flush=True)
            writer = int(server.stdout.readline())
            deadline = time.monotonic() + 30
            while not path.exists():
                assert time.monotonic() < deadline, "the writer writes nothing"
                time.sleep(0.001)
            time.sleep(wait.uniform(0, 0.05))
            os.kill(writer, signal.SIGKILL)
            assert server.stdout.readline() == "ended\n"
            tree = load_tree(path)
            number = tree["a"][0]
            assert (tree["a"] == number).all()
            assert (tree["b"]["c"] == number).all()
            seen.add(int(number))
            left += len(os.listdir(tmp_path)) - 1
            for leftover in tmp_path.glob(".nnkit-*.tmp"):
                leftover.unlink()
        server.stdin.close()
    assert len(seen) > 1, "every kill came at the same tree: the moments were not random"
    assert left > 0, "no kill came in the middle of a write"
