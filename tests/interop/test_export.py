"""Exported programs, run by processes in which there is no nnkit."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import interop, layers, models
from nnkit.interop.export import READER
from nnkit.tree import flatten

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
MODEL = layers.serial(layers.dense(8), layers.batch_norm(), layers.relu, layers.dropout(0.5), layers.dense(3))
X = RNG.normal(size=(7, 4)).astype(np.float32)

needs_flatbuffers = pytest.mark.skipif(
    importlib.util.find_spec("flatbuffers") is None, reason="jax.export writes with flatbuffers"
)

NETWORKS = {
    "mlp": (MODEL, (4,)),
    "cnn": (models.cnn(10, hidden=(8,)), (12, 12, 1)),
    # The 3x3 convolutions of 8 to 8 channels are cut into chunks of examples where their number is known.
    "convolutions": (
        layers.serial(
            layers.conv(8, (3, 3), strides=2, padding=1),
            layers.relu,
            layers.conv(8, (3, 3), strides=2, padding=1),
            layers.depthwise_conv((3, 3)),
            layers.avg_pool((2, 2)),
            layers.global_avg_pool(),
        ),
        (16, 16, 8),
    ),
    "attention": (layers.transformer_block(2), (5, 8)),
    "lstm": (layers.lstm(6, last_only=True), (5, 3)),
}


def trained(model, x):
    """Parameters and state away from where they begin, zeros and ones."""
    params, state = model.init(KEY, x)
    shift = lambda a: a + jnp.asarray(0.1 * np.random.default_rng(1).random(a.shape), a.dtype)
    return jax.tree.map(shift, params), jax.tree.map(shift, state)


def expected(model, params, state, x):
    return jax.jit(lambda p, s, x: model.apply(p, s, x, train=False)[0])(params, state, x)


RUN = """
import sys
{reader}
for name in {names!r}:
    folder = f"{root}/{{name}}"
    predict = load_predict(folder)
    for size in (1, 6):
        np.save(f"{{folder}}.{{size}}.out.npy", predict(np.load(f"{{folder}}.{{size}}.npy")))
assert "nnkit" not in sys.modules
print("done")
"""


def in_another_process(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_flatbuffers
def test_programs_give_the_same_bits_in_a_process_without_nnkit(tmp_path):
    wanted = {}
    for name, (model, shape) in NETWORKS.items():
        params, state = trained(model, jax.ShapeDtypeStruct((2, *shape), jnp.float32))
        interop.export_predict(
            model, params, state, jax.ShapeDtypeStruct((2, *shape), jnp.float32), tmp_path / name
        )
        for size in (1, 6):
            x = RNG.normal(size=(size, *shape)).astype(np.float32)
            np.save(tmp_path / f"{name}.{size}.npy", x)
            wanted[f"{name}.{size}"] = expected(model, params, state, x)
    code = RUN.format(reader=READER, names=list(NETWORKS), root=str(tmp_path))
    assert in_another_process(code, tmp_path) == "done\n"
    for name, y in wanted.items():
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.out.npy"), y, err_msg=name)


@needs_flatbuffers
def test_the_readme_is_all_that_is_needed(tmp_path):
    """Its code as it stands, in the folder, on a program with its parameters baked in and one without."""
    params, state = trained(MODEL, X)
    np.save(tmp_path / "x.npy", X)
    for bake_in in (False, True):
        folder = interop.export_predict(MODEL, params, state, X, tmp_path / str(bake_in), bake_in=bake_in)
        text = (folder / "README.md").read_text()
        code = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[0]
        code += 'import sys\nnp.save("../y.npy", predict(np.load("../x.npy")))\nassert "nnkit" not in sys.modules\n'
        in_another_process(code, folder)
        y = expected(MODEL, params, state, X)
        # Constants are folded while compiling: the last bit may differ.
        np.testing.assert_allclose(np.load(tmp_path / "y.npy"), y, rtol=1e-6, atol=0 if not bake_in else 1e-6)
        assert (folder / "arrays.safetensors").exists() != bake_in
        assert "| ['batch', 4] | float32 |" in text
        assert "| params/dense_0/kernel | [4, 8] | float32 |" in text


@needs_flatbuffers
def test_the_manifest_names_everything(tmp_path):
    params, state = MODEL.init(KEY, X)
    folder = interop.export_predict(MODEL, params, state, X, tmp_path / "a", platforms=["cpu", "tpu"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["platforms"] == ["cpu", "tpu"]
    assert manifest["batch_size"] == "any"
    assert manifest["inputs"] == {"": {"shape": ["batch", 4], "dtype": "float32"}}
    assert manifest["outputs"] == {"": {"shape": ["batch", 3], "dtype": "float32"}}
    assert manifest["arrays"]["state/batch_norm_0/var"] == {"shape": [8], "dtype": "float32"}
    assert set(manifest["arrays"]) == set(flatten(interop.load_safetensors(folder / "arrays.safetensors")))
    program = jax.export.deserialize(bytearray((folder / "predict.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "tpu")


@needs_flatbuffers
def test_trees_go_in_and_out_by_path_and_half_precision_stays(tmp_path):
    def forward(net, x):
        left, right = x
        return {"sum": net.body(left) + right, "first": (left[:, 0],)}

    model = layers.wire(forward, body=layers.dense(3))
    x = (jnp.asarray(X, jnp.bfloat16), jnp.ones((7, 3), jnp.bfloat16))
    params, state = model.init(KEY, x)
    folder = interop.export_predict(model, params, state, x, tmp_path / "a")
    wanted = expected(model, params, state, x)
    names: dict = {}
    exec(READER, names)
    y = names["load_predict"](str(folder))({"0": x[0], "1": x[1]})
    assert y.keys() == {"sum", "first/0"}
    np.testing.assert_array_equal(y["sum"], wanted["sum"])
    np.testing.assert_array_equal(y["first/0"], wanted["first"][0])
    assert names["read_arrays"](folder / "arrays.safetensors")["params/body/kernel"].dtype == jnp.bfloat16


@needs_flatbuffers
def test_padded_sequences_have_their_lengths_as_an_input(tmp_path):
    model = layers.gru(4, last_only=True)
    x = layers.Sequence(RNG.normal(size=(5, 6, 3)).astype(np.float32), np.array([1, 2, 6, 3, 4], np.int32))
    params, state = model.init(KEY, x)
    folder = interop.export_predict(model, params, state, x, tmp_path / "a")
    names: dict = {}
    exec(READER, names)
    y = names["load_predict"](str(folder))({"x": x.x, "lengths": x.lengths})
    np.testing.assert_array_equal(y, expected(model, params, state, x))


@needs_flatbuffers
def test_an_earlier_export_is_replaced_and_a_damaged_one_not_begun(tmp_path):
    params, state = MODEL.init(KEY, X)
    folder = interop.export_predict(MODEL, params, state, X, tmp_path / "a")
    interop.export_predict(MODEL, params, state, X, folder, bake_in=True, batch_size=7)
    assert not (folder / "arrays.safetensors").exists()
    assert json.loads((folder / "manifest.json").read_text())["batch_size"] == 7
    before = (folder / "predict.stablehlo").read_bytes()
    with pytest.raises(ValueError, match="dense_0 has a kernel of shape"):
        interop.export_predict(MODEL, params, state, X[:, :3], folder)
    assert (folder / "predict.stablehlo").read_bytes() == before


needs_the_size = layers.stateless(lambda x: x[: x.shape[0] // 2] if x.shape[0] > 3 else x)


@needs_flatbuffers
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"model": needs_the_size},
            ValueError,
            r"cannot export this model for any batch size, which it must know .*batch_size=7\) for batches of 7",
        ),
        ({"platforms": ["gpu"]}, ValueError, "unknown platform 'gpu'.* Known: cpu, cuda, rocm, tpu"),
        ({"platforms": []}, ValueError, r"platforms=...\) needs one at least"),
        ({"batch_size": 0}, ValueError, r"export_predict\(batch_size=...\) must be a whole number of at least 1"),
        ({"x": jnp.float32(3)}, ValueError, "takes an example of the input with a batch axis"),
        ({"params": {}}, ValueError, "dense_0 has no 'kernel'"),
        ({"path": Path(__file__).parent}, ValueError, "which holds .*: choose a new or an empty one"),
        ({"path": Path(__file__)}, OSError, "is not a folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_said(tmp_path, changes, error, message):
    params, state = MODEL.init(KEY, X)
    arguments = {"model": MODEL, "params": params, "state": state, "x": X, "path": tmp_path / "a"} | changes
    if "model" in changes:
        arguments |= {"params": {}, "state": {}, "x": jnp.ones((7, 4))}
    with pytest.raises(error, match=message):
        interop.export_predict(**arguments)
    assert not (tmp_path / "a").exists()


def test_without_flatbuffers_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    params, state = MODEL.init(KEY, X)
    with pytest.raises(
        ImportError, match=r"^export_predict needs flatbuffers: pip install 'nnkit\[export\]'$"
    ):
        interop.export_predict(MODEL, params, state, X, tmp_path / "a")
    assert not (tmp_path / "a").exists()
