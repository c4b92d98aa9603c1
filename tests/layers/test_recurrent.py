"""The recurrent layers against Flax and PyTorch: outputs, final carries and every gradient."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nnkit import layers
from tests import properties

BATCH, TIME, IN, FEATURES = 4, 5, 3, 2
LENGTHS = np.array([5, 1, 3, 4])
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
OURS = {"simple_rnn": layers.simple_rnn, "lstm": layers.lstm, "gru": layers.gru}
THEIRS = {"simple_rnn": nn.SimpleCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}
MODULES = {name: sys.modules[f"nnkit.layers.{name}"] for name in (*OURS, "recurrent", "scanning", "sequence")}


def close(ours, theirs, dtype="float64"):
    """To the tolerance relative to the largest element: sums over time cancel in the small ones."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert str(a.dtype) == dtype
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE[dtype] * max(np.abs(b).max(initial=0), 1e-3))


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def loss_of(y, carry, xp=jnp):
    """A number that depends on each element of the outputs and of the final carries in its own way."""
    total = 0
    for i, leaf in enumerate([y, *jax.tree.leaves(carry)]):
        weight = numbers(i, *leaf.shape)
        weight = jnp.asarray(weight, leaf.dtype) if xp is jnp else torch.tensor(weight, dtype=leaf.dtype)
        total = total + (xp.sin(leaf + 0.3) * weight).sum()
    return total


def example(layer, dtype, carries, in_features=IN):
    x = jnp.asarray(numbers(0, BATCH, TIME, in_features), dtype)
    params, _ = properties.made(layer, x)
    return params, x, jax.tree.map(lambda i: jnp.asarray(numbers(i + 7, BATCH, FEATURES), dtype), carries)


def values_and_gradients(run):
    """Output and carry, and the gradients of their loss by parameters, input and initial carry."""

    def loss(*args):
        y, carry = run(*args)
        return loss_of(y, carry), (y, carry)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def ours(layer, lengths=None):
    return values_and_gradients(
        lambda params, x, carry: layer.apply(params, {}, layers.Sequence(x, lengths, carry), train=True)[0]
    )


def flax_params(kind, params):
    def gates(names):
        kernels = (
            jnp.split(params["kernel"], len(names), -1),
            jnp.split(params["recurrent_kernel"], len(names), -1),
        )
        biases = jnp.split(params["bias"], params["bias"].shape[-1] // FEATURES)
        return zip(names, *kernels, biases, strict=False), biases

    out = {}
    if kind == "simple_rnn":
        return {
            "i": {"kernel": params["kernel"], "bias": params["bias"]},
            "h": {"kernel": params["recurrent_kernel"]},
        }
    if kind == "lstm":
        for k, w, r, b in gates("ifgo")[0]:
            out |= {f"i{k}": {"kernel": w}, f"h{k}": {"kernel": r, "bias": b}}
        return out
    each, biases = gates("rzn")
    for k, w, r, b in each:
        out |= {f"i{k}": {"kernel": w, "bias": b}, f"h{k}": {"kernel": r}}
    out["hn"]["bias"] = biases[3]
    return out


def flax_rnn(kind, cell, **options):
    rnn = nn.RNN(cell, return_carry=True)

    def run(params, x, carry):
        variables = {"params": {"cell": flax_params(kind, params)}}
        return rnn.apply(variables, x, initial_carry=carry, **options)[::-1]

    return run


def carry_of(kind):
    return (0, 1) if kind == "lstm" else 0


@cache
def flax_values(kind, dtype, ragged=False, **options):
    cell = {**THEIRS, "lstm": nn.OptimizedLSTMCell if dtype == "float32" else nn.LSTMCell}[kind]
    theirs = flax_rnn(
        kind, cell(FEATURES, param_dtype=dtype), seq_lengths=LENGTHS if ragged else None, **options
    )
    return values_and_gradients(theirs)(*example(OURS[kind](FEATURES), dtype, carry_of(kind)))


def check_flax(kind, dtype, make, ragged=False, **options):
    with jax.enable_x64(dtype == "float64"):
        layer = make(FEATURES, return_carry=True, mask_outputs=False, **options)
        params, x, carry = example(layer, dtype, carry_of(kind))
        lengths = LENGTHS if ragged else None
        theirs = flax_values(kind, dtype, ragged, **options)
        close(ours(layer, lengths)(params, x, carry), theirs, dtype)
        # Once more without derivatives, whose rules compute the outputs by themselves.
        alone, _ = layer.apply(params, {}, layers.Sequence(x, lengths, carry), train=False)
        close(alone, theirs[0][1], dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", OURS)
def test_equals_flax(kind, dtype):
    check_flax(kind, dtype, OURS[kind])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("simple_rnn", {}),
        ("lstm", {"reverse": True}),
        ("gru", {"reverse": True, "keep_order": True}),
    ],
)
def test_equals_flax_on_ragged_sequences(kind, options):
    """Lengths, reversal, and the outputs on the padding, over which Flax runs on."""
    check_flax(kind, "float64", partial(OURS[kind], unroll=2), True, **options)


@pytest.mark.parametrize("merge", ["concatenate", jnp.maximum])
def test_bidirectional_equals_flax(merge):
    layer = layers.bidirectional(layers.lstm(FEATURES, return_carry=True), merge=merge)
    cells = [nn.RNN(nn.LSTMCell(FEATURES, param_dtype="float64")) for _ in range(2)]
    merged = {} if merge == "concatenate" else {"merge_fn": merge}
    theirs = nn.Bidirectional(*cells, **merged, return_carry=True)

    def run(params, x, carry):
        variables = {
            f"{name}_rnn": {"cell": flax_params("lstm", params[name])} for name in ("forward", "backward")
        }
        return theirs.apply({"params": variables}, x, initial_carry=carry)[::-1]

    with jax.enable_x64(True):
        args = example(layer, "float64", ((0, 1), (2, 3)))
        close(ours(layer)(*args), values_and_gradients(run)(*args))


# ---- PyTorch: two layers, both directions, packed sequences ------------------------------------


def _set_torch(kind, module, suffix, params):
    kernels = {f"weight_ih_{suffix}": params["kernel"].T, f"weight_hh_{suffix}": params["recurrent_kernel"].T}
    gates = 3 * FEATURES if kind == "gru" else params["bias"].shape[0]
    second = np.zeros(gates)
    second[-FEATURES:] = params["bias"][gates:] if kind == "gru" else 0
    biases = {f"bias_ih_{suffix}": params["bias"][:gates], f"bias_hh_{suffix}": second}
    for name, value in {**kernels, **biases}.items():
        getattr(module, name).data = torch.tensor(np.asarray(value), dtype=getattr(module, name).dtype)


def _torch_gradient(kind, module, suffix):
    w_ih, w_hh, b_ih, b_hh = (
        getattr(module, f"{name}_{suffix}").grad.numpy()
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    bias = np.concatenate([b_ih, b_hh[-FEATURES:]]) if kind == "gru" else b_ih
    return {"kernel": w_ih.T, "recurrent_kernel": w_hh.T, "bias": bias}


def check_torch(kind, dtype, make):
    """Two layers in both directions over packed sequences: PyTorch's h_n is (layers · directions, batch, ·)."""
    torch_class = {"simple_rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[kind]
    module = torch_class(
        IN, FEATURES, num_layers=2, bidirectional=True, batch_first=True, dtype=getattr(torch, dtype)
    )
    one = layers.bidirectional(make(FEATURES, return_carry=True))
    layer = layers.stacked(first=one, second=one)
    places = [("first", "forward"), ("first", "backward"), ("second", "forward"), ("second", "backward")]
    suffixes = ["l0", "l0_reverse", "l1", "l1_reverse"]
    with jax.enable_x64(dtype == "float64"):
        pair = ((1, 0), (3, 2)) if kind == "lstm" else (0, 1)
        params, x, carry = example(layer, dtype, (pair, jax.tree.map(lambda i: i + 4, pair)))
        (_, (y, final)), grads = ours(layer, LENGTHS)(params, x, carry)

        def four(carry):
            """The carries of the four as lists (h, c) or (h,), stacked as PyTorch has them."""
            flat = [carry[i][j] for i in range(2) for j in range(2)]
            parts = zip(*[c[::-1] if kind == "lstm" else (c,) for c in flat], strict=True)
            return [np.stack([np.asarray(p) for p in part]) for part in parts]

        for (outer, inner), suffix in zip(places, suffixes, strict=True):
            _set_torch(kind, module, suffix, params[outer][inner])
        tx = torch.tensor(np.asarray(x), requires_grad=True)
        start = [torch.tensor(c, requires_grad=True) for c in four(carry)]
        packed = torch.nn.utils.rnn.pack_padded_sequence(
            tx, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False
        )
        out, last = module(packed, tuple(start) if kind == "lstm" else start[0])
        ty, _ = torch.nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=TIME)
        last = list(last) if kind == "lstm" else [last]
        # The same loss as ours: its leaves are in our order, layer by layer, direction by direction, (c, h).
        leaves = [part[i] for i in range(4) for part in last[::-1]]
        loss_of(ty, leaves, torch).backward()
        close(y, ty.detach().numpy(), dtype)
        close(four(final), [part.detach().numpy() for part in last], dtype)
        for (outer, inner), suffix in zip(places, suffixes, strict=True):
            close(grads[0][outer][inner], _torch_gradient(kind, module, suffix), dtype)
        close(grads[1], tx.grad.numpy(), dtype)
        close(four(grads[2]), [s.grad.numpy() for s in start], dtype)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
@pytest.mark.parametrize("kind", OURS)
def test_equals_pytorch_on_ragged_sequences(kind, dtype):
    check_torch(kind, dtype, OURS[kind])


def test_relu_rnn_equals_pytorch():
    module = torch.nn.RNN(IN, FEATURES, nonlinearity="relu", batch_first=True, dtype=torch.float64)
    with jax.enable_x64(True):
        layer = layers.simple_rnn(FEATURES, activation_fn=jax.nn.relu, last_only=True)
        params, x, _ = example(layer, "float64", 0)
        _set_torch("simple_rnn", module, "l0", params)
        y = layer.apply(params, {}, x, train=False)[0]
        close(y, module(torch.tensor(np.asarray(x)))[0][:, -1].detach().numpy())


# ---- wrong implementations ---------------------------------------------------------------------


def mutated(name, old, new):
    """The module ``name`` of nnkit.layers with one piece of its text replaced."""
    text = inspect.getsource(MODULES[name])
    assert text.count(old) >= 1, (name, old)
    module = importlib.util.module_from_spec(importlib.util.find_spec(f"nnkit.layers.{name}"))
    exec(compile(text.replace(old, new), f"mutant of {name}", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("i, f, g, o = jnp.split(z, 4, axis=-1)", "f, i, g, o = jnp.split(z, 4, axis=-1)"),
        ("lambda carry: carry[1]", "lambda carry: carry[0]"),
        ("c * f * (1 - f)", "c * f"),
        ("o * (1 - t * t)", "1 - t * t"),
        ("dnew, by_c * dnew + by_o * do", "dnew, by_c * dnew"),
        ("add_bias(z, bias_of(", "add_bias(z, 2 * bias_of("),
    ],
)
def test_a_wrong_lstm_is_seen(old, new):
    with pytest.raises(AssertionError):
        check_flax("lstm", "float64", mutated("lstm", old, new).lstm)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("from_x + r * from_h", "from_x + from_h"),
        ("(1 - z) * n + z * h", "z * n + (1 - z) * h"),
        ("r, z = jnp.split(gate_fn(both), 2, axis=-1)", "z, r = jnp.split(gate_fn(both), 2, axis=-1)"),
        ("by_n * from_h * r * (1 - r)", "by_n * from_h * r"),
        ("(h - n) * z * (1 - z)", "(n - h) * z * (1 - z)"),
    ],
)
def test_a_wrong_gru_is_seen(old, new):
    with pytest.raises(AssertionError):
        check_flax("gru", "float64", mutated("gru", old, new).gru)


@pytest.mark.parametrize(
    ("name", "attribute", "old", "new"),
    [
        ("scanning", "scan_affine", "ys[:-1]])[:time]", "ys])[1:]"),
        ("scanning", "scan_affine", "(dparams, dxs, dmask)", "(dparams, 0 * dxs, dmask)"),
        ("scanning", "scan_affine", "return (new, _where(ok, new, kept)), y", "return (new, new), y"),
        ("sequence", "reverse_valid", "if lengths is None or time == 0", "if True"),
    ],
)
def test_a_wrong_scan_is_seen(name, attribute, old, new, monkeypatch):
    monkeypatch.setattr(MODULES["recurrent"], attribute, getattr(mutated(name, old, new), attribute))
    with pytest.raises(AssertionError):
        check_flax("gru", "float64", layers.gru, True, reverse=True, keep_order=True)
