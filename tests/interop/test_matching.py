"""Which layer is which: by order, by names, and what is said where they do not match."""

from __future__ import annotations

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from nnkit import interop, layers
from nnkit.types import Layer
from tests.interop.oracle import close, draw, randomise, same_bits

X = np.zeros((1, 4), np.float32)
mlp = layers.serial(
    layers.dense(3), layers.relu, body=layers.serial(layers.dense(3), layers.relu), head=layers.dense(2)
)


def linears(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


def theirs(*widths: int) -> dict[str, torch.Tensor]:
    return randomise(linears(*widths)).state_dict()


def test_by_order_and_by_names():
    numbers = theirs(4, 3, 3, 2)
    by_order = interop.from_torch(mlp, X, numbers)
    assert interop.torch_names(mlp, X, numbers) == {"dense_0": "0", "body/dense_0": "1", "head": "2"}
    for names in (
        {"dense_0": "0", "body/dense_0": "1", "head": "2"},
        lambda path: {"dense_0": "0", "body/dense_0": "1"}.get(path, "2"),
        [("^dense_0$", "0"), ("^body.*", "1"), ("head", "2")],
    ):
        same_bits(interop.from_torch(mlp, X, numbers, names=names), by_order)
    swapped = interop.from_torch(
        mlp,
        np.zeros((1, 3), np.float32),
        theirs(3, 3, 3, 2),
        names={"dense_0": "1", "body/dense_0": "0", "head": "2"},
    )
    straight = interop.from_torch(mlp, np.zeros((1, 3), np.float32), theirs(3, 3, 3, 2))
    assert jnp.array_equal(swapped[0]["dense_0"]["kernel"], straight[0]["body"]["dense_0"]["kernel"])


def test_a_path_stands_for_all_beneath_it():
    numbers = {f"net.encoder.{name}": a for name, a in theirs(4, 3).items()}
    numbers |= {f"net.{name}": a for name, a in theirs(4, 3, 3, 2).items() if name.startswith("2")}
    model = layers.serial(encoder=layers.serial(layers.dense(3)), head=layers.dense(2))
    names = {"": "net", "encoder/dense_0": "net.encoder.0", "head": "net.2"}
    assert interop.torch_names(model, X, numbers, names=names) == {
        "encoder/dense_0": "net.encoder.0",
        "head": "net.2",
    }
    numbers = {
        name.replace("encoder.0", "encoder.dense_0").replace("net.2", "net.head"): a
        for name, a in numbers.items()
    }
    interop.from_torch(model, X, numbers, names={"": "net"})


def test_a_layer_alone():
    numbers = nn.Linear(4, 2).state_dict()
    for names in (None, {}, {"": ""}):
        params, state = interop.from_torch(layers.dense(2), X, numbers, names=names)
        assert sorted(params) == ["bias", "kernel"]
        assert interop.to_torch(layers.dense(2), X, params, state, names=names).keys() == numbers.keys()


@pytest.mark.parametrize(
    ("numbers", "names", "lines"),
    [
        (theirs(4, 3, 3), None, ["'head' (dense: bias (2,), kernel (3, 2)): without a counterpart"]),
        (theirs(4, 3, 3, 2, 5), None, ["PyTorch's 3.weight (5, 2), 3.bias (5,): without a counterpart"]),
        (
            theirs(4, 3, 5, 2),
            None,
            ["'body/dense_0' (dense: bias (3,), kernel (3, 3)) needs 1.weight of shape (3, 3), and it is (5, 3)",
             "'head' (dense: bias (2,), kernel (3, 2)) needs 2.weight of shape (2, 3), and it is (2, 5)"],
        ),
        (
            theirs(4, 3, 3, 2),
            {"dense_0": "0", "body": "rest", "head": "2"},
            ["'body/dense_0' (dense: bias (3,), kernel (3, 3)): without a counterpart, looked for "
             "rest.dense_0.weight (3, 3), rest.dense_0.bias (3,)", "PyTorch's 1.weight (3, 3), 1.bias (3,): without"],
        ),
        (
            theirs(4, 3, 3, 2),
            {"dense_0": "0", "body/dense_0": "1", "haed": "2"},
            ["names has 'haed', which is no layer with arrays of the model"],
        ),
        (
            theirs(4, 3, 3, 2),
            {"dense_0": "0", "body/dense_0": "1", "head": "1"},
            ["1.weight goes to 'body/dense_0' and 'head'", "needs 1.weight of shape (2, 3), and it is (3, 3)"],
        ),
    ],
    ids=["too few", "too many", "other shapes", "wrong name", "unknown path", "one twice"],
)  # fmt: skip
def test_what_does_not_match_is_named(numbers, names, lines):
    with pytest.raises(ValueError, match="the model and the arrays of PyTorch do not match:") as error:
        interop.from_torch(mlp, X, numbers, names=names)
    for line in lines:
        assert line in str(error.value), error.value
    assert "pass names={path here: name there}" in str(error.value)


def test_long_lists_are_cut():
    model = layers.serial(*[layers.dense(3)] * 20)
    with pytest.raises(ValueError, match="and 9 more"):
        interop.from_torch(model, X, {"a.weight": np.zeros((3, 4), np.float32)})


def test_files_sort_names_so_their_order_means_nothing():
    """With sorted names only numbers tell an order, and they count as numbers: 10 comes after 2."""
    model, module = layers.serial(*[layers.dense(4)] * 11), randomise(linears(*[4] * 12))
    numbers = module.state_dict()
    in_file = dict(sorted(numbers.items()))
    assert list(in_file) != list(numbers)
    same_bits(interop.from_torch(model, X, in_file), interop.from_torch(model, X, numbers))
    named = {"weight": nn.Linear(4, 4).weight, "bias": nn.Linear(4, 4).bias}
    in_file = {
        f"{name}.{array}": named[array] for name in ("first", "second") for array in ("bias", "weight")
    }
    message = "which of first, second comes first is not in the names, which are sorted"
    with pytest.raises(ValueError, match=message):
        interop.from_torch(layers.serial(layers.dense(4), layers.dense(4)), X, in_file)
    interop.from_torch(layers.serial(first=layers.dense(4), second=layers.dense(4)), X, in_file, names={})


def test_what_is_ignored_keeps_its_initial_values():
    numbers = theirs(4, 3, 3, 7)
    model = layers.serial(mlp, extra=layers.batch_norm())
    options = {
        "names": {"serial_0/dense_0": "0", "serial_0/body/dense_0": "1"},
        "ignore": r"extra|.*head|2\..*",
    }
    with pytest.raises(ValueError, match="without a counterpart"):
        interop.from_torch(model, X, numbers, names=options["names"])
    params, state = interop.from_torch(model, X, numbers, key=jax.random.key(3), **options)
    begun = model.init(jax.random.key(3), X)
    close(params["serial_0"]["head"]["kernel"], begun[0]["serial_0"]["head"]["kernel"])
    same_bits(state, begun[1])
    assert np.array_equal(params["serial_0"]["dense_0"]["kernel"], numbers["0.weight"].T)
    back = interop.to_torch(model, X, params, state, numbers, **options)
    assert list(back) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_repeated_block_with_a_part_ignored():
    model = layers.repeat(layers.serial(a=layers.dense(4), b=layers.dense(4)), 3)
    numbers = randomise(linears(4, 4, 4, 4, 4)).state_dict()
    params, _ = interop.from_torch(model, X, numbers, ignore="block/1/.*")
    begun, _ = model.init(jax.random.key(0), X)
    kernel = params["block"]["b"]["kernel"]
    assert np.array_equal(kernel[0], numbers["1.weight"].T)
    assert np.array_equal(kernel[2], numbers["3.weight"].T)
    close(kernel[1], begun["block"]["b"]["kernel"][1])


def test_state_that_is_ours_alone():
    """A decoder's cache and what probe records are in no state dict: they start as init makes them."""
    model = layers.serial(
        layers.probe(layers.dense(8)),
        layers.probe(layers.relu),
        layers.multi_head_attention(2, causal=True, cache_length=6),
        layers.probe(layers.dense(2)),
    )
    x = np.zeros((3, 5, 4), np.float32)
    numbers = nn.ModuleList([nn.Linear(4, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 2)]).state_dict()
    params, state = interop.from_torch(model, x, numbers)
    same_bits(state, model.init(jax.random.key(0), x)[1])
    back = interop.to_torch(model, x, params, state, numbers)
    assert all(torch.equal(back[name], numbers[name]) for name in numbers)


def test_a_layer_called_in_training_only_and_one_of_a_users():
    """What test time does not call is found by a trace of training; a layer of one's own keeps its names."""

    def init(key, x, /):
        return {"weight": jnp.ones(x.shape[-1]), "offset": {"bias": jnp.zeros(x.shape[-1])}}, {}

    def apply(params, state, x, *, key=None, train):
        return x * params["weight"] + params["offset"]["bias"], state

    def forward(net, x):
        h = net.scale(net.body(x))
        return net.auxiliary(h) if net.train else h

    model = layers.wire(
        forward,
        body=layers.dense(4),
        scale=Layer(init, apply, "scale_shift_"),
        auxiliary=layers.conv_transpose(4, 3, convention="torch", padding=0),
    )
    x = draw(0, 2, 5, 4)
    body, transposed = randomise(nn.Linear(4, 4)), randomise(nn.ConvTranspose1d(4, 4, 3))
    numbers = {f"body.{name}": a for name, a in body.state_dict().items()}
    numbers |= {f"auxiliary.{name}": a for name, a in transposed.state_dict().items()}
    numbers |= {"scale.weight": torch.full((4,), 2.0), "scale.offset.bias": torch.full((4,), 3.0)}
    params, state = interop.from_torch(model, x, numbers, names={})
    wanted = transposed((body(torch.tensor(x)) * 2 + 3).movedim(-1, 1)).movedim(1, -1).detach()
    close(model.apply(params, state, x, train=True)[0], wanted)
    back = interop.to_torch(model, x, params, state, numbers, names={})
    assert all(torch.equal(back[name], numbers[name]) for name in numbers)


def test_dtypes_and_inputs_stay():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).to(dtype)
        numbers = randomise(module).state_dict()
        before = {name: a.clone() for name, a in numbers.items()}
        model = layers.serial(layers.dense(3), layers.batch_norm())
        params, state = interop.from_torch(model, X, numbers)
        assert {str(a.dtype) for a in jax.tree.leaves((params, state))} == {str(dtype).removeprefix("torch.")}
        back = interop.to_torch(model, X, params, state, numbers)
        assert all(
            torch.equal(numbers[name], before[name]) and numbers[name].dtype == before[name].dtype
            for name in before
        )
        assert all(
            torch.equal(back[name], numbers[name]) and back[name].dtype == numbers[name].dtype
            for name in numbers
        )
        back["0.weight"].zero_()
        assert float(abs(params["dense_0"]["kernel"]).max()) > 0
        numbers["0.weight"].zero_()
        assert float(abs(params["dense_0"]["kernel"]).max()) > 0


def test_float64_needs_x64():
    numbers = nn.Linear(4, 2).double().state_dict()
    with pytest.raises(ValueError, match=r"'(kernel|bias)' is float64, which JAX would cut to 32 bits now"):
        interop.from_torch(layers.dense(2), X, numbers)
    with jax.enable_x64(True):
        params, _ = interop.from_torch(layers.dense(2), X, numbers)
        assert params["kernel"].dtype == jnp.float64


def test_arrays_of_numpy_and_jax_do_as_well():
    numbers = nn.Linear(4, 2).state_dict()
    wanted = interop.from_torch(layers.dense(2), X, numbers)
    same_bits(
        interop.from_torch(layers.dense(2), X, {name: a.numpy() for name, a in numbers.items()}), wanted
    )
    same_bits(
        interop.from_torch(layers.dense(2), X, {name: jnp.asarray(a) for name, a in numbers.items()}), wanted
    )
    with pytest.raises(TypeError, match="'weight' is a list, not an array"):
        interop.from_torch(layers.dense(2, use_bias=False), X, {"weight": [[0.0] * 4] * 2})


def test_without_pytorch(monkeypatch):
    """Reading a state dict of plain arrays needs no PyTorch; making one says what to install."""
    monkeypatch.setitem(sys.modules, "torch", None)
    numbers = {"weight": draw(0, 2, 4), "bias": draw(1, 2)}
    params, state = interop.from_torch(layers.dense(2), X, numbers)
    with pytest.raises(ImportError, match="to_torch makes PyTorch's tensors: pip install torch"):
        interop.to_torch(layers.dense(2), X, params, state)


def test_parameters_of_another_model():
    params, state = mlp.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"'dense_0/kernel' has shape \(4, 3\) and the model needs \(4, 5\)"):
        interop.to_torch(layers.serial(layers.dense(5)), X, params, state)
    with pytest.raises(ValueError, match="params have no 'other/kernel': pass what this model's init made"):
        interop.to_torch(layers.serial(other=layers.dense(3)), X, params, state)
    model = layers.repeat(layers.dense(4), 2)
    params = {"block": {"kernel": jnp.zeros((2, 4, 3)), "bias": jnp.zeros((2, 4))}}
    with pytest.raises(ValueError, match=r"needs \(4, 4\), behind an axis for the repetitions"):
        interop.to_torch(model, X, params, {})


def test_layers_without_a_counterpart():
    grouped = layers.serial(layers.gru(3, reset_after=False))
    params, state = grouped.init(jax.random.key(0), np.zeros((1, 2, 4), np.float32))
    with pytest.raises(ValueError, match=r"'gru_0' \(gru: .*\): nothing that PyTorch has"):
        interop.to_torch(grouped, np.zeros((1, 2, 4), np.float32), params, state)
    numbers = nn.LSTM(4, 3, proj_size=2, batch_first=True).state_dict()
    with pytest.raises(ValueError, match=r"weight_hr_l0 \(2, 3\)"):
        interop.from_torch(layers.lstm(3), np.zeros((1, 2, 4), np.float32), numbers)


def test_biases_of_which_one_is_zero_keep_their_bits():
    x = np.zeros((1, 2, 4), np.float32)
    numbers = nn.LSTM(4, 3, batch_first=True).state_dict()
    numbers["bias_ih_l0"].fill_(-0.0)
    numbers["bias_hh_l0"].zero_()
    params, state = interop.from_torch(layers.lstm(3), x, numbers)
    assert bool(jnp.signbit(params["bias"]).all())
    back = interop.to_torch(layers.lstm(3), x, params, state, numbers)
    assert all(
        bool(torch.signbit(b).all()) == (name == "bias_ih_l0") for name, b in back.items() if "bias" in name
    )
    same_bits(interop.from_torch(layers.lstm(3), x, back), (params, state))
    numbers = randomise(nn.LSTM(4, 3, batch_first=True)).state_dict()
    params, _ = interop.from_torch(layers.lstm(3), x, numbers)
    close(params["bias"], numbers["bias_ih_l0"] + numbers["bias_hh_l0"])


def test_a_parameter_that_is_an_attribute():
    """Learned positions are often a bare parameter in PyTorch."""
    model = layers.serial(layers.dense(4), position=layers.learned_positions(6))
    numbers = {"proj.weight": draw(0, 4, 3), "proj.bias": draw(1, 4), "pos": draw(2, 6, 4)}
    names = {"dense_0": "proj", "position": "pos"}
    x = np.zeros((1, 5, 3), np.float32)
    params, state = interop.from_torch(model, x, numbers, names=names)
    assert np.array_equal(params["position"]["embedding"], numbers["pos"])
    assert list(interop.to_torch(model, x, params, state, numbers, names=names)) == list(numbers)


def test_projections_that_are_layers_of_their_own():
    model, x = layers.multi_head_attention(4, num_key_value_heads=2), draw(0, 2, 3, 8)
    numbers = {
        f"{p}_proj.{a}": t for p in "qkv" for a, t in nn.Linear(8, 8 if p == "q" else 4).state_dict().items()
    }
    numbers |= {f"out_proj.{a}": t for a, t in nn.Linear(8, 8).state_dict().items()}
    params, state = interop.from_torch(model, x, numbers, names={})
    y, _ = model.apply(params, state, x, train=False)
    q, k, v = (torch.tensor(x) @ numbers[f"{p}_proj.weight"].T + numbers[f"{p}_proj.bias"] for p in "qkv")
    q, k, v = (a.reshape(2, 3, -1, 2).transpose(1, 2) for a in (q, k, v))
    wanted = (
        nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).reshape(2, 3, 8)
    )
    close(y, (wanted @ numbers["out_proj.weight"].T + numbers["out_proj.bias"]).detach())
    back = interop.to_torch(model, x, params, state, numbers, names={})
    assert all(torch.equal(back[name], numbers[name]) for name in numbers)
