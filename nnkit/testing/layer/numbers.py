"""A layer's numbers: its derivatives, its behaviour at extreme inputs, the independence of examples."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.testing.compare import check_close, check_same_bits
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
    """Another first or last example leaves the outputs of the others as they are, to the bit.

    At test time the batch without its first example gives what it gave in it, where the layer takes one.
    """
    batch = batch_of(s.x)
    if batch is None or batch < 2:
        raise NotApplicable(f"the batch has {batch or 'no axis and so no'} example(s): pass two or more")
    looked_at = [train for train in (True, False) if not (train and s.mixes_batch)]
    others = {0: slice(1, None), -1: slice(None, -1)}
    exchanged = {at: _exchange(s.x, batch, at) for at in others}
    if all(x is None for x in exchanged.values()):
        raise NotApplicable("all examples are the same integers: pass an x whose rows differ")
    for train in looked_at:
        before = s.jitted(train)["y"]
        for leaf in jax.tree.leaves(before):
            if not same_batch(leaf, batch):
                fail(
                    f"the output with train={train} has no batch axis",
                    expected=f"a leading axis of {batch}",
                    arrived=f"shape {leaf.shape}",
                    path="y",
                    likely="the batch axis was summed over or moved; skip this check if that is meant",
                )
        for at, x in exchanged.items():
            if x is None:
                continue
            after = s.compiled(train)(s.params, s.state, x, s.key)["y"]
            name, which = ("y[:-1]", "last") if at else ("y[1:]", "first")
            left, right = (jax.tree.map(lambda a, kept=others[at]: a[kept], y) for y in (before, after))
            check_same_bits(
                f"the output of the other examples with train={train}, after the {which} was exchanged,",
                {name: left},
                {name: right},
                "a mean, a maximum or a normalisation runs over the batch axis"
                + (": pass mixes_batch=True if training is meant to" if train else ", at test time too"),
            )
    remarks = ["at test time"] if len(looked_at) == 1 else []
    return ", ".join(remarks if _check_smaller(s, batch) else [*remarks, "of this batch size alone"])


def _of_examples(a: Any, batch: int) -> bool:
    """Whether a leaf has a row for each example; a square one may be a mask of steps against steps."""
    return same_batch(a, batch) and a.shape[:2] != (batch, batch)


def _exchange(x: Any, batch: int, at: int) -> Any:
    """``x`` with other numbers in one example, or None where there are none to take."""
    changed = False

    def exchange(a: Any) -> Any:
        nonlocal changed
        if is_float(a) and same_batch(a, batch):
            changed = True
            return a.at[at].set(2 * a[-1 - at] + 1)
        if _of_examples(a, batch) and jnp.issubdtype(a.dtype, jnp.integer):
            rows = np.asarray(a)
            differs = np.flatnonzero((rows != rows[at]).reshape(batch, -1).any(1))
            changed = changed or differs.size > 0
            return a.at[at].set(a[int(differs[0])]) if differs.size else a
        return a

    exchanged = jax.tree.map(exchange, x)
    return exchanged if changed else None


def _check_smaller(s: LayerSubject, batch: int) -> bool:
    """The batch without its first example, at test time; False where the layer does not take one example less."""
    if any(same_batch(a, batch) and not _of_examples(a, batch) for a in jax.tree.leaves(s.x)[1:]):
        return False
    x = jax.tree.map(lambda a: a[1:] if same_batch(a, batch) else a, s.x)
    run = partial(s.call, train=False)
    try:
        found = jax.eval_shape(run, s.params, s.state, x, s.key)["y"]
    except Exception:  # a mask or a cache may be of one size of batch
        return False
    expected = jax.tree.map(lambda a: a[1:], s.jitted(False)["y"])
    if [a.shape for a in jax.tree.leaves(found)] != [a.shape for a in jax.tree.leaves(expected)]:
        return False
    check_close(
        "the output of the other examples with train=False, without the first,",
        {"y[1:]": expected},
        {"y[1:]": jax.jit(run, compiler_options=FAST)(s.params, s.state, x, s.key)["y"]},
        "the size of the batch or an example's place in it enters: a division by x.shape[0], jnp.arange(x.shape[0])",
        rtol=s.rtol,
    )
    return True
