"""A layer's numbers: its derivatives, its behaviour at extreme inputs, the independence of examples."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.testing.compare import check_same_bits
from nnkit.testing.layer.subject import LayerSubject, floats_of, with_floats
from nnkit.testing.report import NotApplicable, check, fail
from nnkit.testing.shared import EXTREMES, FAST, check_no_nan, extreme
from nnkit.testing.trees import batch_of, is_float, same_batch

__all__ = ["examples", "extremes", "forward_mode", "gradients", "second_derivatives"]

layer_check = partial(check, subject=LayerSubject)


@layer_check("finite differences")
def gradients(s: LayerSubject) -> None:
    """The gradient with respect to each parameter and input against central differences in float64."""
    s.derivatives.check_reverse(
        "a hand-written derivative rule is wrong, a stop_gradient hides a dependence, or the layer is not "
        "differentiable here: at a tie of a maximum or the kink of an absolute value try another x; where it rounds "
        "or quantises skip this check and say so"
    )


@layer_check("forward mode")
def forward_mode(s: LayerSubject) -> None:
    """``jax.jvp`` against central differences in float64."""
    s.derivatives.check_forward("a jax.custom_jvp rule is wrong or leaves an argument's tangent out")


@layer_check("second derivatives")
def second_derivatives(s: LayerSubject) -> None:
    """The gradient's gradient against central differences of the gradient in float64."""
    s.derivatives.check_second(
        "a derivative rule is written with operations whose own derivatives are wrong or stopped: "
        "differentiate the rule by hand too, or keep stop_gradient out of it"
    )


@layer_check("extremes")
def extremes(s: LayerSubject) -> None:
    """No NaN in outputs, states or gradients for inputs of zeros, a constant, 1e-30 and 1e4."""
    s.floating("nothing can be extreme")

    def run(params: Any, floats: Any, state: Any, train: bool) -> Any:
        def loss(numbers: Any, floats: Any) -> Any:
            x = with_floats(s.x, floats)
            found = s.call(with_floats(params, numbers), state, x, s.key, train)
            leaves = [leaf for leaf in jax.tree.leaves(found["y"]) if is_float(leaf)]
            # Linear in the output, with unequal weights: the loss has no NaN of its own.
            weighted = [jnp.sum(y * _weights(y)) for y in leaves]
            return sum(weighted[1:], weighted[0]) if weighted else jnp.zeros(()), found

        grads, found = jax.grad(loss, (0, 1), has_aux=True)(floats_of(params), floats)
        return {**found, "gradient": {"params": with_floats(params, grads[0]), "x": grads[1]}}

    for train in s.modes:
        compiled = jax.jit(partial(run, train=train), compiler_options=FAST)
        for name in EXTREMES:
            found = compiled(s.params, floats_of(extreme(s.x, name)), s.state)
            check_no_nan(f"input of {name} ({EXTREMES[name]:g}) with train={train}", found)


def _weights(y: Any) -> Any:
    return jnp.asarray(1 + np.arange(y.size).reshape(y.shape) % 3, y.dtype)


@layer_check("independence of examples")
def examples(s: LayerSubject) -> str:
    """Another first example leaves the outputs of the others as they are, to the bit."""
    batch = batch_of(s.x)
    if batch is None or batch < 2:
        raise NotApplicable(f"the batch has {batch or 'no axis and so no'} example(s): pass two or more")
    looked_at = [train for train in (True, False) if not (train and s.mixes_batch)]

    def exchange(a: Any) -> Any:
        if not same_batch(a, batch):
            return a
        last = 2 * a[-1] + 1 if is_float(a) else a[-1]
        return a.at[0].set(last)

    x = jax.tree.map(exchange, s.x)
    for train in looked_at:
        run = s.compiled(train)
        before, after = (run(s.params, s.state, inputs, s.key)["y"] for inputs in (s.x, x))
        for leaf in jax.tree.leaves(before):
            if not same_batch(leaf, batch):
                fail(
                    f"the output with train={train} has no batch axis",
                    expected=f"a leading axis of {batch}",
                    arrived=f"shape {leaf.shape}",
                    path="y",
                    likely="the batch axis was summed over or moved; skip this check if that is meant",
                )
        others = [jax.tree.map(lambda a: a[1:], y) for y in (before, after)]
        check_same_bits(
            f"the output of the other examples with train={train}, after the first was exchanged,",
            {"y[1:]": others[0]},
            {"y[1:]": others[1]},
            "a mean, a maximum or a normalisation runs over the batch axis"
            + (": pass mixes_batch=True if training is meant to" if train else ", at test time too"),
        )
    return "at test time" if len(looked_at) == 1 else ""
