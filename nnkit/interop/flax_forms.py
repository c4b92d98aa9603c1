"""How Flax writes each kind of layer: as we do, but for its recurrent cells, whose gates are layers of their own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nnkit.interop.flattening import Shape
from nnkit.interop.forms import Arrays, Form, Move, joined, moved, same
from nnkit.interop.parts import Part

__all__ = ["flax_forms"]

_OWN = ("dense", "conv", "conv_transpose", "batch_norm", "norm", "embedding", "attention", "other")


def flax_forms(part: Part) -> list[Form]:
    """The ways in which Flax may write a layer, the likeliest first; none where it has no counterpart."""
    if any("kernel/direction" in name or name.startswith("spectral_norm") for name in part.shapes):
        return []
    if part.kind in _OWN:
        names = [name for name in part.shapes if name not in ("index", "cached_key", "cached_value")]
        return [moved(part, *(Move(name, name, same, same) for name in names))]
    if part.kind == "prelu":
        return [moved(part, Move("slope", "negative_slope", same, same))]
    return _recurrent(part)


def _recurrent(part: Part) -> list[Form]:
    """linen's cells, then nnx's; both by themselves, or as the ``cell`` of an ``RNN``."""
    if part.kind == "gru" and "bias" in part.shapes and part.shapes["bias"] != _biases(part, 4):
        return []  # reset_after=False: Flax's resets after the product with the kernel
    gates = {"lstm": "ifgo", "gru": "rzn", "rnn": ""}[part.kind]
    spellings = [{k: k for k in gates}, {k: f"{k}_" if k == "f" else k for k in gates}]
    forms = [_gate_by_gate(part, spelling) for spelling in spellings[: 1 + ("f" in gates)]]
    forms.append(_joined_gates(part))
    return forms + [_inside(form, "cell/") for form in forms]


def _biases(part: Part, blocks: int) -> Shape:
    return (blocks * part.shapes["recurrent_kernel"][0],)


def _gate_by_gate(part: Part, spelling: Mapping[str, str]) -> Form:
    """A dense layer for each gate and each of input and state; a simple cell is one gate without a name.

    An LSTM's biases are the state's; others' are the input's, and a GRU has one more, of the state in n.
    """
    gates = list(spelling) or [""]
    biased = "bias" in part.shapes
    names = [spelling.get(gate, gate) for gate in gates]
    homes = [f"h{gate}" for gate in gates] if part.kind == "lstm" else [f"i{name}" for name in names]
    homes += ["hn"] if part.kind == "gru" else []

    def write(ours: Arrays) -> dict[str, np.ndarray]:
        kernels = np.split(ours["kernel"], len(gates), axis=1)
        recurrent = np.split(ours["recurrent_kernel"], len(gates), axis=1)
        theirs = {f"i{name}/kernel": w for name, w in zip(names, kernels, strict=True)}
        theirs |= {f"h{gate}/kernel": w for gate, w in zip(gates, recurrent, strict=True)}
        if biased:
            blocks = np.split(ours["bias"], len(homes))
            theirs |= {f"{home}/bias": b for home, b in zip(homes, blocks, strict=True)}
        return theirs

    def read(theirs: Arrays) -> dict[str, np.ndarray]:
        ours = {
            "kernel": np.concatenate([theirs[f"i{name}/kernel"] for name in names], axis=1),
            "recurrent_kernel": np.concatenate([theirs[f"h{gate}/kernel"] for gate in gates], axis=1),
        }
        return ours | ({"bias": np.concatenate([theirs[f"{h}/bias"] for h in homes])} if biased else {})

    return joined(part, _leaves(biased), write, read)


def _joined_gates(part: Part) -> Form:
    """nnx's cells with one kernel for all gates. Its GRU has no bias of the state."""
    biased = "bias" in part.shapes
    home = "dense_h/bias" if part.kind == "lstm" else "dense_i/bias"
    width = part.shapes["kernel"][1]

    def write(ours: Arrays) -> dict[str, np.ndarray]:
        theirs = {"dense_i/kernel": ours["kernel"], "dense_h/kernel": ours["recurrent_kernel"]}
        if biased:
            if ours["bias"][width:].any():
                raise ValueError(
                    f"{part.path!r} has a bias of the state in its last {ours['bias'].size - width} numbers, "
                    "which nnx's GRUCell has not: linen's has"
                )
            theirs[home] = ours["bias"][:width]
        return theirs

    def read(theirs: Arrays) -> dict[str, np.ndarray]:
        ours = {"kernel": theirs["dense_i/kernel"], "recurrent_kernel": theirs["dense_h/kernel"]}
        if biased:
            bias = theirs[home]
            none = np.zeros(part.shapes["bias"][0] - width, bias.dtype)
            ours["bias"] = np.concatenate([bias, none])
        return ours

    return joined(part, _leaves(biased), write, read)


def _leaves(biased: bool) -> tuple[str, ...]:
    return ("kernel", "recurrent_kernel", "bias")[: 2 + biased]


def _inside(form: Form, around: str) -> Form:
    """The same form of what is ``around`` deeper."""
    return Form(
        {around + name: shape for name, shape in form.shapes.items()},
        lambda ours: {around + name: array for name, array in form.write(ours).items()},
        lambda theirs: form.read({name: theirs[around + name] for name in form.shapes}),
        form.leaves,
    )
