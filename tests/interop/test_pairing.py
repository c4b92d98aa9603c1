"""Layers of one shape whose names stand in another order than they are called, and what names and ignore may be."""

from __future__ import annotations

import itertools
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import pytest
import torch
from torch import nn

from nnkit import interop, layers
from tests.interop.oracle import close, draw, randomise, same_bits

X = draw(0, 3, 4)
UPS = ("up3", "up2", "up1")


def ups(**more: Any) -> Any:
    return layers.serial(up3=layers.dense(4), r=layers.tanh, up2=layers.dense(4), up1=layers.dense(4), **more)


class TorchUps(nn.Module):
    """Defines its layers from 1 to 3 and calls them from 3 to 1."""

    def __init__(self):
        super().__init__()
        self.up1, self.up2, self.up3 = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up1(self.up2(self.up3(x).tanh()))


class LinenUps(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x: Any) -> Any:
        x = jnp.tanh(flax.linen.Dense(4, name="up3")(x))
        return flax.linen.Dense(4, name="up1")(flax.linen.Dense(4, name="up2")(x))


def test_our_own_names_come_back_whatever_their_order(tmp_path):
    """In Flax's trees and in files names are sorted, and then their numbers say another order than the calls."""
    stack = layers.stacked(layers.lstm(3), layers.lstm(3))
    twice = layers.repeat(layers.serial(l2=layers.dense(4), l1=layers.dense(4)), 2)
    model = layers.serial(
        l2=layers.dense(4), r=layers.relu, l1=layers.dense(4), twice=twice, a=layers.batch_norm()
    )
    attention = layers.serial(b=layers.multi_head_attention(2), a=layers.multi_head_attention(2), rnn=stack)
    for model, x in ((model, X), (attention, draw(0, 2, 3, 4))):  # noqa: B020
        params, state = jax.tree.map(
            lambda a: jnp.asarray(draw(a.size, *a.shape)), jax.eval_shape(model.init, jax.random.key(0), x)
        )
        variables = interop.to_flax(model, x, params, state)
        same_bits(interop.from_flax(model, x, variables), (params, state))
        same_bits(interop.to_flax(model, x, params, state, variables), variables)
        numbers = interop.to_torch(model, x, params, state)
        same_bits(interop.from_torch(model, x, numbers), (params, state))
        interop.save_safetensors(tmp_path / "a.safetensors", numbers)
        in_file = interop.load_safetensors(tmp_path / "a.safetensors")
        same_bits(interop.from_torch(model, x, in_file), (params, state))


def test_modules_with_our_names_go_by_them():
    module, model = randomise(TorchUps()), ups()
    numbers = module.state_dict()
    params, state = interop.from_torch(model, X, numbers)
    close(model.apply(params, state, X, train=False)[0], module(torch.tensor(X)).detach())
    assert interop.torch_names(model, X, numbers) == {name: name for name in UPS}
    back = interop.to_torch(model, X, params, state, numbers)
    assert all(torch.equal(back[name], numbers[name]) for name in numbers)
    variables = LinenUps().init(jax.random.key(0), X)
    params, state = interop.from_flax(model, X, variables)
    close(model.apply(params, state, X, train=False)[0], LinenUps().apply(variables, X))


def test_order_against_names_is_refused():
    """One name that differs, or another name around them, and neither order nor names can be trusted."""
    numbers = randomise(TorchUps()).state_dict()
    crossed = "up3 with up1, up1 with up3 would be paired, against their names"
    head = {f"fc.{name}": a for name, a in nn.Linear(4, 2).state_dict().items()}
    model = ups(head=layers.dense(2))
    with pytest.raises(ValueError, match=f"by order {crossed}"):
        interop.from_torch(model, X, numbers | head)
    params, state = interop.from_torch(model, X, numbers | head, names={"head": "fc"})
    close(params["up3"]["kernel"], numbers["up3.weight"].T)
    around = {f"net.dec.{name}": a for name, a in numbers.items()}
    with pytest.raises(ValueError, match=f"by order in 'decoder' {crossed}"):
        interop.from_torch(layers.serial(decoder=ups()), X, around)
    with pytest.raises(ValueError, match=crossed):
        interop.to_torch(model, X, params, state, numbers | head)
    three = {
        f"m.{name}.{array}": a
        for name in ("a", "b", "c")
        for array, a in nn.Linear(4, 4).state_dict().items()
    }
    model = layers.serial(b=layers.dense(4), c=layers.dense(4), a=layers.dense(4))
    with pytest.raises(ValueError, match="by order b with a, a with c, c with b would be paired"):
        interop.from_torch(model, X, three)
    interop.from_torch(model, X, three, names={"": "m"})
    tree = {"net": {name: {"kernel": draw(i, 4, 4), "bias": draw(i, 4)} for i, name in enumerate(UPS)}}
    with pytest.raises(ValueError, match=crossed):
        interop.from_flax(ups(), X, {"params": tree})


def test_numbers_that_begin_elsewhere_are_not_crossed():
    """From 1 as many count; the first is the first, and our dense_1 not theirs of that name."""
    numbers = {f"dense_{i}.{name}": a for i in (1, 2, 3) for name, a in nn.Linear(4, 4).state_dict().items()}
    model = layers.serial(*[layers.dense(4)] * 3)
    wanted = {"dense_0": "dense_1", "dense_1": "dense_2", "dense_2": "dense_3"}
    for theirs in (numbers, dict(sorted(numbers.items()))):
        assert interop.torch_names(model, X, theirs) == wanted
        # A dict that tells one layer leaves the others to their order, among what is left.
        for here, there in wanted.items():
            assert interop.torch_names(model, X, theirs, names={here: there}) == wanted


def test_layers_that_a_dict_does_not_name_keep_their_order():
    module = randomise(nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise((4, 4, 4, 4, 2)))))
    model, numbers = layers.serial(*[layers.dense(4)] * 3, head=layers.dense(2)), module.state_dict()
    straight = {"dense_0": "0", "dense_1": "1", "dense_2": "2", "head": "3"}
    assert interop.torch_names(model, X, numbers, names={"head": "3"}) == straight
    swapped = straight | {"dense_0": "1", "dense_1": "0"}
    assert interop.torch_names(model, X, numbers, names={"dense_1": "0"}) == swapped
    variables = {"params": {f"Dense_{i}": {"kernel": draw(i, 4, 4), "bias": draw(i, 4)} for i in range(3)}}
    variables["params"]["out"] = {"kernel": draw(3, 4, 2), "bias": draw(3, 2)}
    names = interop.flax_names(model, X, variables, names={"head": "out"})
    assert names == {"dense_0": "Dense_0", "dense_1": "Dense_1", "dense_2": "Dense_2", "head": "out"}
    with pytest.raises(ValueError, match="which of Dense_0, Dense_1, Dense_2, out comes first"):
        interop.flax_names(model, X, variables)


def test_what_is_no_state_dict():
    module, model = nn.Linear(4, 2), layers.dense(2)
    numbers = module.state_dict()
    params, state = interop.from_torch(model, X, numbers)
    for wrong, message in (
        (module, r"takes the state dict of a module, got a Linear: pass module\.state_dict\(\)"),
        ([*numbers], r"takes a state dict, arrays by name, got a list: pass module\.state_dict\(\)"),
        ({"model": numbers, "epoch": 3}, r"a dict with dicts in \['model'\]: pass checkpoint\['model'\]"),
        (
            {"net": numbers, "ema": numbers, "optimizer": {"state": {}}},
            r"pass checkpoint\['net'\] or checkpoint\['ema'\]$",
        ),
        ({"a": {"b": numbers}}, r"with dicts in \['a'\]: pass the state dict in it"),
    ):
        for call in (
            lambda: interop.from_torch(model, X, wrong),  # noqa: B023
            lambda: interop.torch_names(model, X, wrong),  # noqa: B023
            lambda: interop.to_torch(model, X, params, state, wrong),  # noqa: B023
        ):
            with pytest.raises(TypeError, match=message):
                call()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"names": "fc"}, TypeError, r"names is a dict \{path here: name there\}, a function or .*, got 'fc'"),
        ({"names": 3}, TypeError, "got 3"),
        ({"names": {"head": 0}}, TypeError, "names maps paths to names, both of them strings, got 'head': 0"),
        ({"names": ["fc"]}, TypeError, r"names has the rule 'fc': write \(regular expression, replacement\)"),
        ({"names": [("a", "b", "c")]}, TypeError, r"names has the rule \('a', 'b', 'c'\)"),
        ({"names": lambda path: None}, TypeError, "names gives None for 'head', not a string"),
        ({"names": [("head", "0"), ("(", "1")]}, ValueError, r"names has '\(', which is no regular expression"),
        ({"names": [("head", r"\2")]}, ValueError, r"names cannot replace 'head' by '\\\\2': invalid group reference"),
        ({"ignore": "[a"}, ValueError, r"ignore has '\[a', which is no regular expression: unterminated"),
        ({"ignore": ["head"]}, TypeError, r"ignore is a regular expression, got \['head'\]"),
    ],
)  # fmt: skip
def test_names_and_ignore_of_other_kinds(options, error, message):
    model, numbers = layers.serial(head=layers.dense(2)), nn.Sequential(nn.Linear(4, 2)).state_dict()
    params, state = interop.from_torch(model, X, numbers)
    with pytest.raises(error, match=message):
        interop.from_torch(model, X, numbers, **options)
    with pytest.raises(error, match=message):
        interop.to_flax(model, X, params, state, **options)


def test_arrays_that_the_model_has_not():
    model = layers.serial(layers.dense(2), layers.batch_norm(), layers.probe(layers.relu))
    params, state = model.init(jax.random.key(0), X)
    for to in (interop.to_torch, interop.to_flax):
        to(model, X, params, state)
        with pytest.raises(
            ValueError, match="params have 'dense_1/kernel', which this model has not: pass what"
        ):
            to(model, X, {**params, "dense_1": {"kernel": jnp.zeros((2, 2))}}, state)
        with pytest.raises(ValueError, match="state have 'batch_norm_0/count', which"):
            to(model, X, params, {**state, "batch_norm_0": {**state["batch_norm_0"], "count": jnp.zeros(())}})
        with pytest.raises(ValueError, match="names has 'haed', which is no layer with arrays of the model"):
            to(model, X, params, state, names={"haed": "fc"})
    more = {f"dense_{i}": {"bias": jnp.zeros(1)} for i in range(1, 8)}
    with pytest.raises(ValueError, match="'dense_5/bias' and 2 more, which this model has not"):
        interop.to_torch(model, X, {**params, **more}, state)
