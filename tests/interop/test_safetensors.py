"""safetensors files, against the safetensors library itself in both directions."""

from __future__ import annotations

import json
from pathlib import Path

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.flax
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnkit import interop, layers
from nnkit.interop.safetensors import _DTYPES
from nnkit.train import DamagedFileError
from tests.interop.oracle import same_bits

TREE = {
    "params": {"dense_0": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3, jnp.bfloat16)}},
    "state": (jnp.array(3, jnp.int32), np.array([True, False]), np.zeros((0, 4), np.float16)),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.safetensors"


def test_there_and_back(file):
    interop.save_safetensors(file, TREE, metadata={"epoch": "3", "note": "é"})
    same_bits(interop.load_safetensors(file, like=TREE), TREE)
    spec = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), TREE)
    read = interop.load_safetensors(file, like=spec)
    same_bits(read, TREE)
    assert isinstance(read["state"], tuple)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(read))
    plain = interop.load_safetensors(file)
    assert plain["state"]["1"].tolist() == [True, False]
    assert isinstance(plain["params"]["dense_0"]["bias"], np.ndarray)
    assert interop.safetensors_metadata(file) == {"epoch": "3", "note": "é"}
    with safetensors.safe_open(file, "flax") as theirs:
        assert theirs.metadata() == {"epoch": "3", "note": "é"}
        for name in theirs.keys():  # noqa: SIM118 - not a dict
            same_bits(theirs.get_tensor(name), _at(plain, name))
    interop.save_safetensors(file, {})
    assert interop.load_safetensors(file) == {}
    assert interop.safetensors_metadata(file) == {}


def _at(tree, name):
    for part in name.split("/"):
        tree = tree[part]
    return tree


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=5).filter(lambda name: "/" not in name and name != "__metadata__"),
        st.sampled_from(sorted(_DTYPES)).flatmap(
            lambda name: hnp.arrays(
                np.uint8, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
            ).map(lambda a: a.astype(bool) if name == "BOOL" else a.astype(_DTYPES[name]))
        ),
        max_size=4,
    )
)
def test_the_safetensors_library_reads_and_writes_the_same_bytes(tmp_path_factory, arrays):
    file = tmp_path_factory.mktemp("safetensors") / "a.safetensors"
    interop.save_safetensors(file, arrays)
    data = file.read_bytes()
    entries = dict(safetensors.deserialize(data))
    assert entries.keys() == arrays.keys()
    for name, array in arrays.items():
        assert entries[name]["shape"] == list(array.shape)
        assert bytes(entries[name]["data"]) == array.tobytes()
        assert np.dtype(_DTYPES[entries[name]["dtype"]]) == array.dtype
    same_bits(interop.load_safetensors(file), arrays)
    begin = 8 + int.from_bytes(data[:8], "little")
    assert begin % 8 == 0
    header = json.loads(data[8:begin])
    for name, entry in header.items():
        assert entry["data_offsets"][0] % arrays[name].itemsize == 0


def test_files_of_pytorch(file):
    """A state dict goes through a file, in bfloat16 and from tensors that are views."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).to(torch.bfloat16)
    numbers = module.state_dict()
    safetensors.torch.save_file(numbers, file, metadata={"format": "pt"})
    model, x = layers.serial(layers.dense(3), layers.batch_norm()), np.zeros((1, 4), np.float32)
    params, state = interop.from_torch(model, x, interop.load_safetensors(file))
    same_bits((params, state), interop.from_torch(model, x, numbers))
    back = interop.to_torch(model, x, params, state, numbers)
    back["0.weight"] = (
        back["0.weight"].T.contiguous().T
    )  # not contiguous: same numbers, another order in memory
    interop.save_safetensors(file, back, metadata={"format": "pt"})
    theirs = safetensors.torch.load_file(file)
    assert theirs.keys() == numbers.keys()
    assert all(torch.equal(theirs[name], numbers[name]) for name in numbers)


def test_arrays_that_are_not_contiguous_or_of_another_byte_order(file):
    a = np.arange(24.0).reshape(2, 3, 4)
    tree = {
        "turned": a.T,
        "strided": a[:, ::2, ::-1],
        "big": a.astype(">f8"),
        "broadcast": np.broadcast_to(a[0], (2, 3, 4)),
    }
    interop.save_safetensors(file, tree)
    for name, array in safetensors.numpy.load_file(file).items():
        assert np.array_equal(array, tree[name])
        assert array.flags.c_contiguous


def test_whole_or_absent(file, monkeypatch):
    interop.save_safetensors(file, TREE)
    before = file.read_bytes()
    for bad, message in (
        ({"a": jax.random.key(0)}, "'a' is a PRNG key, which safetensors has no place for"),
        ({"a": np.zeros(2, np.complex128)}, "'a' has dtype complex128, which safetensors has no place for"),
        ({"a": {"b": "text"}}, "'a/b' is a str, not an array"),
    ):
        with pytest.raises(TypeError, match=message):
            interop.save_safetensors(file, bad)
    with pytest.raises(ValueError, match="an array cannot be called '__metadata__'"):
        interop.save_safetensors(file, {"__metadata__": np.zeros(1)})
    with pytest.raises(TypeError, match="metadata holds strings by name, got 'epoch': 3"):
        interop.save_safetensors(file, TREE, metadata={"epoch": 3})
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="the disk is full"):
        interop.save_safetensors(file, {"a": np.zeros(1)})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_what_does_not_fit_is_named_by_path(file):
    interop.save_safetensors(file, {"a": {"b": np.zeros((2, 3), np.float32), "c": np.zeros(1, np.float32)}})
    like = {"a": {"b": jnp.zeros((3, 2)), "d": jnp.zeros(1)}}
    message = r"'a/d' is missing; 'a/c' is unexpected; 'a/b' is float32\[2, 3\] and should be float32\[3, 2\]"
    with pytest.raises(ValueError, match=message):
        interop.load_safetensors(file, like=like)
    with pytest.raises(ValueError, match=r"'a/b' is float32\[2, 3\] and should be bfloat16\[2, 3\]"):
        interop.load_safetensors(file, like={"a": {"b": jnp.zeros((2, 3), jnp.bfloat16), "c": jnp.zeros(1)}})
    interop.save_safetensors(file, {"a": np.zeros(2)})
    with pytest.raises(ValueError, match="'a' is float64, which JAX would cut to 32 bits now"):
        interop.load_safetensors(file, like={"a": np.zeros(2)})
    with jax.enable_x64(True):
        assert interop.load_safetensors(file, like={"a": np.zeros(2)})["a"].dtype == jnp.float64
    interop.save_safetensors(file, {"a": np.zeros(1), "a/b": np.zeros(1)})
    with pytest.raises(ValueError, match=r"'a/b' .* lies in another array: pass load_safetensors"):
        interop.load_safetensors(file)
    with pytest.raises(FileNotFoundError, match=r"no file .* nothing was saved there"):
        interop.load_safetensors(file.parent / "other")


def test_damage_is_an_error(file):
    interop.save_safetensors(file, {"a": np.zeros(3, np.float32), "b": np.ones((2, 2), np.float16)})
    good = file.read_bytes()
    n = int.from_bytes(good[:8], "little")

    def with_header(change) -> bytes:
        header = json.loads(good[8 : 8 + n])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + good[8 + n :]

    bad = [good[:-1], good + b"\0", b"", good[:5], b"\xff" * 8 + good[8:], b"{}", good[:8] + b"\0" + good[9:]]
    bad += [
        with_header(lambda h: h["a"].update(data_offsets=[4, 16])),
        with_header(lambda h: h["a"].update(shape=[4])),
        with_header(lambda h: h["a"].update(shape=[-3])),
        with_header(lambda h: h["a"].update(dtype="F5")),
        with_header(lambda h: h["a"].pop("dtype")),
        with_header(lambda h: h.update(c=3)),
        with_header(lambda h: h["b"].update(data_offsets=[0, 8])),
    ]
    for data in bad:
        file.write_bytes(data)
        with pytest.raises(DamagedFileError, match="is cut off, damaged or no safetensors file"):
            interop.load_safetensors(file)


def test_a_header_that_is_not_as_it_should_be(file):
    """Each is refused with its reason, whatever of it is asked for; none gets to numpy or to the user."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    text = json.dumps(entry)
    cases = [
        ({"a": entry | {"data_offsets": [0.0, 4.0]}}, r"'a' has data_offsets \[0.0, 4.0\], not whole numbers"),
        ({"a": entry | {"data_offsets": [False, 4]}}, r"'a' has data_offsets \[False, 4\], not whole numbers"),
        ({"a": entry | {"data_offsets": [0, 2, 4]}}, r"'a' has data_offsets \[0, 2, 4\], not two"),
        ({"a": entry | {"data_offsets": ["0", "4"]}}, r"'a' has data_offsets \['0', '4'\], not whole"),
        ({"a": entry | {"data_offsets": [0, 2**70]}}, "'a' does not lie where it should"),
        ({"a": entry | {"shape": [2**70, 0], "data_offsets": [0, 0]}}, r"'a' has the shape \[1180591620717"),
        ({"a": entry | {"shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}, r"'a' has the shape \[46116860"),
        ({"a": entry | {"shape": [1] * 65}}, "'a' has the shape .*: maximum supported dimension"),
        ({"a": entry | {"shape": [True]}}, r"'a' has shape \[True\], not whole numbers from 0"),
        ({"a": entry | {"shape": [-1, -1]}}, r"'a' has shape \[-1, -1\], not whole numbers from 0"),
        ({"a": entry | {"shape": 1}}, "'a' has shape 1, not whole numbers from 0"),
        ({"a": entry | {"dtype": []}}, r"'a' has the dtype \[\], which is none of BOOL, U8"),
        ({"a": [entry]}, "'a' is not told of by dtype, shape and data_offsets"),
        ([entry], "its header is a list, not a dict"),
        ("[" * 200_000, "maximum recursion depth exceeded"),
        (f'{{"a": {text}, "a": {text}}}', "it has 'a' twice"),
        ('{"a": {"dtype": "F32", "shape": [1], "shape": [1], "data_offsets": [0, 4]}}', "it has 'shape' twice"),
        ({"a": entry, "__metadata__": {"epoch": 3}}, "its __metadata__ is not a dict of strings"),
        ({"a": entry, "__metadata__": ["epoch"]}, "its __metadata__ is not a dict of strings"),
    ]  # fmt: skip
    for header, reason in cases:
        data = (header if isinstance(header, str) else json.dumps(header)).encode()
        file.write_bytes(len(data).to_bytes(8, "little") + data + bytes(4))
        for read in (
            interop.load_safetensors,
            interop.safetensors_metadata,
            lambda file: interop.load_safetensors(file, like={"a": jnp.zeros(1)}),
        ):
            with pytest.raises(DamagedFileError, match=rf"no safetensors file \({reason}"):
                read(file)


def test_like_must_hold_arrays(file):
    interop.save_safetensors(file, {"w": np.zeros((), np.float32)})
    message = r"like has a float at 'a/w': pass an array or jax.ShapeDtypeStruct"
    with pytest.raises(TypeError, match=message):
        interop.load_safetensors(file, like={"a": {"w": 1.0}})
    with pytest.raises(TypeError, match="like has a PRNG key at 'w', which safetensors has no place for"):
        interop.load_safetensors(file, like={"w": jax.random.key(0)})


def test_eight_bit_floats(file):
    tree = {
        "a": np.array([0.5, -448, 1], ml_dtypes.float8_e4m3fn),
        "b": np.array([1.5], ml_dtypes.float8_e5m2),
    }
    interop.save_safetensors(file, tree)
    theirs = safetensors.torch.load_file(file)
    assert theirs["a"].to(torch.float32).tolist() == [0.5, -448, 1]
    assert theirs["b"].dtype == torch.float8_e5m2
    same_bits(interop.load_safetensors(file), tree)
