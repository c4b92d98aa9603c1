"""The checks of these tests fail where the mapping is wrong: one deliberate mistake at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from torch import nn

from nnkit import layers
from nnkit.interop import flattening, flax, parts, pytorch, torch_forms, trees
from nnkit.interop.flattening import Layout
from tests.interop.oracle import check_torch, draw, randomise
from tests.interop.test_flattening import run
from tests.interop.test_flax import LAYERS, check_linen
from tests.interop.test_torch_layers import image, recurrent, self_attention, sequence


class Mutant(NamedTuple):
    name: str
    where: Any
    attribute: str
    mutate: Callable[[Any], Any]
    check: Callable[[], Any]


def torch_check(
    model: Any, shape: tuple[int, ...], module: Callable[[], nn.Module], run: Any
) -> Callable[[], Any]:
    return lambda: check_torch(model, draw(0, *shape), randomise(module()), run)


def same(a: np.ndarray) -> np.ndarray:
    return a


def read_with(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Any], Any]:
    """A mutant of a dialect: what is read and written is changed, by a change that undoes itself."""

    def mutate(dialect: Any) -> Any:
        def forms(part: Any) -> Any:
            return [
                form._replace(
                    read=lambda theirs, form=form: form.read(change(dict(theirs))),
                    write=lambda ours, form=form: change(form.write(ours)),
                )
                for form in dialect.forms(part)
            ]

        return dialect._replace(forms=forms)

    return mutate


def swapped(a: str, b: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arrays: arrays | {a: arrays[b], b: arrays[a]} if a in arrays else arrays


def blocks(names: tuple[str, ...], order: tuple[int, ...]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(arrays: dict[str, Any]) -> dict[str, Any]:
        for name in names:
            pieces = np.split(arrays[name], len(order))
            arrays[name] = np.concatenate([pieces[i] for i in order])
        return arrays

    return change


flat = layers.serial(layers.conv(5, 3), layers.flatten, layers.dense(2))
FLAT = torch_check(
    flat,
    (2, 4, 3, 3),
    lambda: nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(60, 2)),
    run,
)
square = layers.conv_transpose(4, 3, padding="VALID")
SQUARE = torch_check(square, (2, 5, 4), lambda: nn.ConvTranspose1d(4, 4, 3), image)
CONV = torch_check(layers.conv(4, 3, padding=1), (2, 5, 4), lambda: nn.Conv1d(4, 4, 3, padding=1), image)
ATTENTION = torch_check(
    layers.multi_head_attention(2),
    (2, 3, 8),
    lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    self_attention,
)
LSTM = torch_check(layers.lstm(5), (2, 4, 3), lambda: nn.LSTM(3, 5, batch_first=True), recurrent)
GRU = torch_check(layers.gru(5), (2, 4, 3), lambda: nn.GRU(3, 5, batch_first=True), recurrent)
NORM = torch_check(layers.batch_norm(), (5, 4), lambda: nn.BatchNorm1d(4), sequence)
twice = layers.repeat(layers.serial(layers.dense(4), layers.tanh), 2)
TWICE = torch_check(
    twice, (3, 4), lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()), sequence
)
PROJECTIONS = ("in_proj_weight", "in_proj_bias")
RECURRENT = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def flax_lstm() -> None:
    model, module, shape = LAYERS["lstm"]
    check_linen(model, module, draw(0, *shape))


def reverse(parts_of: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: parts_of(*args)[::-1]


def turns_reversed(part_of: Callable[..., Any]) -> Callable[..., Any]:
    def mutant(*args: Any) -> Any:
        part = part_of(*args)
        return part._replace(turn=(1 - part.turn[0],) if part.turn else ())

    return mutant


def rounding(to_jax: Any) -> Any:
    return lambda path, a: to_jax(path, a.astype(np.float16).astype(a.dtype))


def not_turned(kernel: Any) -> Any:
    return lambda part: (lambda a: a.transpose(1, 2, 0), lambda a: a.transpose(2, 0, 1))


MUTANTS = [
    Mutant("kernels of equal axes not turned", torch_forms, "_kernel", not_turned, CONV),
    Mutant("flattened features not permuted", torch_forms, "_rows", lambda f: lambda flat: (same, same), FLAT),
    Mutant("flattened features permuted back", torch_forms, "_rows", lambda f: lambda flat: f(flat)[::-1], FLAT),
    Mutant("the flatten not found", flattening.Layouts, "_output", lambda f: lambda *args: Layout(), FLAT),
    Mutant("the transposed kernel not flipped", torch_forms.np, "flip", lambda f: lambda a, axes: a, SQUARE),
    Mutant("Flax's kernel taken for PyTorch's", torch_forms, "_is_transposed", lambda f: lambda part: True, SQUARE),
    Mutant("queries and keys swapped", pytorch, "_TORCH", read_with(blocks(PROJECTIONS, (1, 0, 2))), ATTENTION),
    Mutant("keys and values swapped", pytorch, "_TORCH", read_with(blocks(PROJECTIONS, (0, 2, 1))), ATTENTION),
    Mutant("gates i and f swapped", pytorch, "_TORCH", read_with(blocks(RECURRENT, (1, 0, 2, 3))), LSTM),
    Mutant("gates g and o swapped", pytorch, "_TORCH", read_with(blocks(RECURRENT, (0, 1, 3, 2))), LSTM),
    Mutant("gates r and z swapped", pytorch, "_TORCH", read_with(blocks(RECURRENT, (1, 0, 2))), GRU),
    Mutant("biases of n swapped", pytorch, "_TORCH", read_with(swapped("bias_ih", "bias_hh")), GRU),
    Mutant("the second bias dropped", pytorch, "_TORCH", read_with(lambda a: a | {"bias_hh": 0 * a["bias_hh"]}), LSTM),
    Mutant("mean and variance swapped", pytorch, "_TORCH", read_with(swapped("running_mean", "running_var")), NORM),
    Mutant("scale and bias swapped", pytorch, "_TORCH", read_with(swapped("weight", "bias")), NORM),
    Mutant("blocks in the wrong order", parts, "_part", turns_reversed, TWICE),
    Mutant("layers in the wrong order", pytorch, "parts", reverse, TWICE),
    Mutant("numbers rounded", trees, "to_jax", rounding, NORM),
    Mutant("Flax's gates swapped", flax, "_FLAX", read_with(swapped("cell/hi/bias", "cell/hf/bias")), flax_lstm),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mistake_is_caught(mutant, monkeypatch):
    original = getattr(mutant.where, mutant.attribute)
    monkeypatch.setattr(mutant.where, mutant.attribute, mutant.mutate(original))
    with pytest.raises(AssertionError):
        mutant.check()


@pytest.mark.parametrize("check", [FLAT, SQUARE, CONV, ATTENTION, LSTM, GRU, NORM, TWICE, flax_lstm])
def test_without_a_mistake_nothing_is(check):
    check()
