"""How PyTorch writes each kind of layer.

Kernels have the outputs first there and the window last; gates and attention's projections are joined in one
matrix; statistics are called running.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import numpy as np

from nnkit.interop.flattening import Shape, first_array
from nnkit.interop.forms import Arrays, Form, Move, joined, moved, same
from nnkit.interop.parts import Part

__all__ = ["torch_forms"]

_Both = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]


def torch_forms(part: Part) -> list[Form]:
    """The ways in which PyTorch may write a layer, the likeliest first; none where it has no counterpart."""
    write, read = _features(part)
    if part.kind in ("dense", "conv", "conv_transpose"):
        return _weighted(part)
    if part.kind == "batch_norm":
        names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
        return [moved(part, *(Move(ours, theirs, write, read) for ours, theirs in names.items()))]
    if part.kind == "norm":
        names = {"scale": "weight", "bias": "bias"}
        return [moved(part, *(Move(ours, theirs, write, read) for ours, theirs in names.items()))]
    if part.kind == "embedding":
        return [moved(part, Move("embedding", "weight", same, same))]
    if part.kind == "prelu":
        shape = part.shapes["slope"]
        return [
            moved(
                part,
                Move("slope", "weight", lambda a: write(a).reshape(-1), lambda a: read(a.reshape(shape))),
            )
        ]
    if part.kind == "attention":
        return _attention(part)
    if part.kind in ("lstm", "gru", "rnn"):
        return _recurrent(part)
    return [moved(part, *(Move(name, name.replace("/", "."), write, read) for name in part.shapes))]


def _features(part: Part) -> _Both:
    """The order of the features along which a normalisation's arrays differ."""
    flat = part.layout.flat
    if flat is not None:
        there, back = _rows(flat)
        width = math.prod(flat)
        return (
            lambda a: there(a) if a.shape[:1] == (width,) else a,
            lambda a: back(a) if a.shape[:1] == (width,) else a,
        )
    if part.layout.spatial:  # scales of several axes, (height, width, channels)
        return (
            lambda a: np.moveaxis(a, -1, 0) if a.ndim > 1 else a,
            lambda a: np.moveaxis(a, 0, -1) if a.ndim > 1 else a,
        )
    return same, same


def _rows(flat: Shape) -> _Both:
    """Axis 0 from the order (height, width, channels) to (channels, height, width), and back."""
    *window, channels = flat

    def there(a: np.ndarray) -> np.ndarray:
        return np.moveaxis(a.reshape(*flat, *a.shape[1:]), len(window), 0).reshape(a.shape)

    def back(a: np.ndarray) -> np.ndarray:
        return np.moveaxis(a.reshape(channels, *window, *a.shape[1:]), 0, len(window)).reshape(a.shape)

    return there, back


def _weighted(part: Part) -> list[Form]:
    """Dense layers and convolutions, their kernels plain or computed from others."""
    write, read = _kernel(part)
    bias = Move("bias", "bias", same, same)
    if "kernel/direction" in part.shapes:
        scale, direction = part.shapes["kernel/scale"], part.shapes["kernel/direction"]
        if scale not in ((), direction[-1:]):
            return []
        ones = (1,) * (len(direction) - 1)

        def spread(a: np.ndarray) -> np.ndarray:
            return a.reshape(-1, *ones) if a.ndim else a

        return [
            moved(
                part,
                bias,
                Move("kernel/scale", g, spread, lambda a: a.reshape(scale)),
                Move("kernel/direction", v, write, read),
            )
            for g, v in (
                ("parametrizations.weight.original0", "parametrizations.weight.original1"),
                ("weight_g", "weight_v"),
            )
        ]
    if "spectral_norm/kernel/u" in part.shapes:
        if "spectral_norm/kernel/v" not in part.shapes or part.kind == "conv_transpose":
            return []  # PyTorch's needs both vectors: spectral_norm(convention="pytorch")
        turn, turn_back = _rows(_inputs(part))
        return [
            moved(
                part,
                bias,
                Move("kernel", kernel, write, read),
                Move("spectral_norm/kernel/u", u, same, same),
                Move("spectral_norm/kernel/v", v, turn, turn_back),
            )
            for kernel, u, v in (
                (
                    "parametrizations.weight.original",
                    "parametrizations.weight.0._u",
                    "parametrizations.weight.0._v",
                ),
                ("weight_orig", "weight_u", "weight_v"),
            )
        ]
    return [moved(part, Move("kernel", "weight", write, read), bias)]


def _inputs(part: Part) -> Shape:
    """What the rows of the kernel, taken as a matrix, stand for: (*window, in)."""
    return part.layout.flat or part.shapes["kernel"][:-1]


def _kernel(part: Part) -> _Both:
    if part.kind == "dense":
        there, back = _rows(part.layout.flat) if part.layout.flat else (same, same)
        return lambda a: there(a).T, lambda a: back(a.T)
    if part.kind == "conv_transpose" and not _is_transposed(part):
        return _as_transposed(part)

    def write(a: np.ndarray) -> np.ndarray:
        return a.transpose(-1 + a.ndim, -2 + a.ndim, *range(a.ndim - 2))

    return write, lambda a: a.transpose(*range(2, a.ndim), 1, 0)


def _is_transposed(part: Part) -> bool:
    """Whether a transposed convolution's kernel has its outputs before its inputs: asked of it with more inputs."""
    assert part.layer is not None
    x = first_array(part.x)
    wider = jax.ShapeDtypeStruct((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, _ = jax.eval_shape(part.layer.init, key, wider)
    kernel = params["kernel"]
    kernel = kernel["direction"] if isinstance(kernel, dict) else kernel
    return kernel.shape[-1] == 2 * x.shape[-1]


def _as_transposed(part: Part) -> _Both:
    """From (*window, in // groups, out), applied as it is, to PyTorch's (in, out // groups, *window), flipped."""
    assert part.layer is not None
    groups = first_array(part.x).shape[-1] // part.shapes["kernel"][-2]
    n = len(part.shapes["kernel"]) - 2

    def write(a: np.ndarray) -> np.ndarray:
        *window, ins, outs = a.shape
        a = np.flip(a, tuple(range(n))).reshape(*window, ins, groups, outs // groups)
        return a.transpose(n + 1, n, n + 2, *range(n)).reshape(groups * ins, outs // groups, *window)

    def read(a: np.ndarray) -> np.ndarray:
        ins, outs, *window = a.shape
        a = a.reshape(groups, ins // groups, outs, *window)
        a = a.transpose(*range(3, 3 + n), 1, 0, 2).reshape(*window, ins // groups, groups * outs)
        return np.flip(a, tuple(range(n)))

    return write, read


def _attention(part: Part) -> list[Form]:
    if any(name.endswith("_ln/scale") for name in part.shapes):
        return []
    shapes = {name: part.shapes[f"{name}/kernel"] for name in ("query", "key", "value", "out")}
    biased = "query/bias" in part.shapes
    leaves = tuple(f"{name}/{leaf}" for name in shapes for leaf in ("kernel", "bias")[: 1 + biased])

    def matrices(ours: Arrays) -> dict[str, np.ndarray]:
        flat = {
            name: ours[f"{name}/kernel"].reshape(s[0], -1).T for name, s in shapes.items() if name != "out"
        }
        return flat | {"out": ours["out/kernel"].reshape(-1, shapes["out"][-1]).T}

    def kernels(weights: Arrays) -> dict[str, np.ndarray]:
        return {f"{name}/kernel": weights[name].T.reshape(shape) for name, shape in shapes.items()}

    def bias(ours: Arrays) -> dict[str, np.ndarray]:
        if not biased:
            return {}
        three = [ours[f"{name}/bias"].reshape(-1) for name in ("query", "key", "value")]
        return {"in_proj_bias": np.concatenate(three), "out_proj.bias": ours["out/bias"]}

    def biases(theirs: Arrays) -> dict[str, np.ndarray]:
        if not biased:
            return {}
        three = np.split(theirs["in_proj_bias"], np.cumsum(widths)[:-1])
        ours = {f"{n}/bias": b.reshape(shapes[n][1:]) for n, b in zip(shapes, three, strict=False)}
        return ours | {"out/bias": theirs["out_proj.bias"]}

    widths = [math.prod(shapes[name][1:]) for name in ("query", "key", "value")]
    found = []
    if len({shapes[name][0] for name in ("query", "key", "value")}) == 1:

        def write(ours: Arrays) -> dict[str, np.ndarray]:
            w = matrices(ours)
            three = np.concatenate([w["query"], w["key"], w["value"]])
            return {"in_proj_weight": three, "out_proj.weight": w["out"], **bias(ours)}

        def read(theirs: Arrays) -> dict[str, np.ndarray]:
            q, k, v = np.split(theirs["in_proj_weight"], np.cumsum(widths)[:-1])
            w = {"query": q, "key": k, "value": v, "out": theirs["out_proj.weight"]}
            return kernels(w) | biases(theirs)

        found.append(joined(part, leaves, write, read))
    each = {
        "query": "q_proj_weight",
        "key": "k_proj_weight",
        "value": "v_proj_weight",
        "out": "out_proj.weight",
    }
    found.append(
        joined(
            part,
            leaves,
            lambda ours: {each[name]: w for name, w in matrices(ours).items()} | bias(ours),
            lambda theirs: kernels({name: theirs[t] for name, t in each.items()}) | biases(theirs),
        )
    )
    linear = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
    moves = [Move(f"{n}/bias", f"{t}.bias", np.ravel, _shaped(part, f"{n}/bias")) for n, t in linear.items()]
    moves += [
        Move(f"{n}/kernel", f"{t}.weight", _matrix(n), _shaped(part, f"{n}/kernel", turned=True))
        for n, t in linear.items()
    ]
    return [*found, moved(part, *moves)]


def _matrix(name: str) -> Callable[[np.ndarray], np.ndarray]:
    return lambda a: (a.reshape(-1, a.shape[-1]) if name == "out" else a.reshape(a.shape[0], -1)).T


def _shaped(part: Part, leaf: str, turned: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    return lambda a: (a.T if turned else a).reshape(part.shapes[leaf])


def _recurrent(part: Part) -> list[Form]:
    """The gates i, f, g, o and r, z, n are PyTorch's in number and order; it has a second bias."""
    blocks = {"rnn": 1, "lstm": 4, "gru": 3}[part.kind]
    features = part.shapes["recurrent_kernel"][0]
    biased = "bias" in part.shapes
    if biased and part.kind == "gru" and part.shapes["bias"] != (4 * features,):
        return []  # reset_after=False: PyTorch's resets after the product with the kernel
    width = blocks * features

    def write(ours: Arrays) -> dict[str, np.ndarray]:
        theirs = {"weight_ih": ours["kernel"].T, "weight_hh": ours["recurrent_kernel"].T}
        if biased:
            bias = ours["bias"]
            rest = np.concatenate([np.zeros_like(bias[: 2 * width - bias.size]), bias[width:]])
            theirs |= {"bias_ih": bias[:width], "bias_hh": rest}
        return theirs

    def read(theirs: Arrays) -> dict[str, np.ndarray]:
        ours = {"kernel": theirs["weight_ih"].T, "recurrent_kernel": theirs["weight_hh"].T}
        if biased:
            first, second = theirs["bias_ih"], theirs["bias_hh"]
            # Where one is 0 the other keeps its bits: -0 + 0 would be 0.
            both = np.where(second == 0, first, first + second)
            if part.kind == "gru":
                both = np.concatenate([both[: 2 * features], first[2 * features :], second[2 * features :]])
            ours["bias"] = both
        return ours

    leaves = ("kernel", "recurrent_kernel", "bias")[: 2 + biased]
    return [joined(part, leaves, write, read)]
