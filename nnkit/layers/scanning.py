"""A cell run over time: the loop under every recurrent layer, and its derivative."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnkit.types import Array, Params, PyTree, Spec

__all__ = ["Affine", "Cell", "Loop", "affine_cell", "scan_affine", "scan_steps"]


class Affine(NamedTuple):
    """A step in two parts, for cells whose output is what they feed back.

    Attributes:
      mix: ``mix(params, x, h) -> z``, linear in the parameters for given x and h and in (x, h) up to
        an offset: all of the cell's matrix products. z is an array or a tuple of arrays.
      pointwise: ``pointwise(carry, z) -> (carry, y)``: the rest.
      hidden: ``hidden(carry) -> h``, the output of the step before.
    """

    mix: Callable[[Params, Array, Array], Any]
    pointwise: Callable[[PyTree, Any], tuple[PyTree, Array]]
    hidden: Callable[[PyTree], Array]


class Cell(NamedTuple):
    """One step of a recurrence, which ``recurrent`` runs over time.

    Attributes:
      init: ``init(key, x) -> params`` for the input of one step, an array or a spec (batch, ...).
      step: ``step(params, carry, x) -> (carry, y)``. With recurrent dropout it is also given
        ``mask=``, of y's shape, by which what is fed back is to be multiplied.
      initial_carry: ``initial_carry(params, x) -> carry``, any pytree of arrays with a batch axis.
      name: the name of the layer that runs it.
      affine: the step in two parts where it has them, which makes its gradient faster.
    """

    init: Callable[[Array, Spec], Params]
    step: Callable[..., tuple[PyTree, Array]]
    initial_carry: Callable[[Params, Spec], PyTree]
    name: str = "recurrent_"
    affine: Affine | None = None


def affine_cell(
    init: Callable[[Array, Spec], Params],
    initial_carry: Callable[[Params, Spec], PyTree],
    affine: Affine,
    name: str,
) -> Cell:
    """The cell whose step is ``pointwise(carry, mix(params, x, hidden(carry)))``."""

    def step(params: Params, carry: PyTree, x: Array, *, mask: Array | None = None) -> tuple[PyTree, Array]:
        return affine.pointwise(carry, affine.mix(params, x, _masked(affine.hidden(carry), mask)))

    return Cell(init, step, initial_carry, name, affine)


class Loop(NamedTuple):
    """How the loop runs, all static.

    Attributes:
      run_on: whether the cell runs on over the padding, the final carry being put aside at each
        sequence's end; otherwise the carry stands still there.
      unroll: of ``jax.lax.scan``.
    """

    run_on: bool = False
    unroll: int = 1


def scan_steps(
    loop: Loop, step: Callable[..., Any], carry: PyTree, xs: PyTree, valid: Array | None
) -> tuple[PyTree, Array]:
    """``step(carry, x) -> (carry, y)`` over the leading axis of ``xs``: the final carry, and all y.

    ``valid`` (time, batch) tells steps from padding. The carry is that after each sequence's last
    valid step.
    """
    running_on = loop.run_on and valid is not None

    def body(state: Any, inputs: Any) -> Any:
        (running, kept), (x, ok) = state, inputs
        new, y = step(running, x)
        if ok is None:
            return (new, None), y
        if running_on:
            return (new, _where(ok, new, kept)), y
        return (_where(ok, new, running), None), y

    start = (carry, carry if running_on else None)
    (running, kept), ys = jax.lax.scan(body, start, (xs, valid), unroll=loop.unroll)
    return (kept if running_on else running), ys


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _scan_affine(
    loop: Loop, affine: Affine, params: Params, consts: Any, carry: PyTree, xs: Array, mask: Any, valid: Any
) -> tuple[PyTree, Array]:
    """The recurrence, with what ``pointwise`` closes over in ``consts``."""

    def step(carry: PyTree, x: Array) -> tuple[PyTree, Array]:
        z = affine.mix(params, x, _masked(affine.hidden(carry), mask))
        return affine.pointwise(carry, z, *consts)

    return scan_steps(loop, step, carry, xs, valid)


@_scan_affine.defjvp
def _(loop: Loop, affine: Affine, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    """The derivative with the parameters' share of it taken out of the loop.

    By z_t = mix(params, x_t, h_{t-1}), dz_t = mix(dparams, x_t, h_{t-1}) + mix(params, dx_t, 0) + (the
    part of dh_{t-1}). The first two need no loop once all h are known: backwards, each kernel's gradient
    is one product over all steps and examples. Differentiation of the loop adds up one product a
    step, and reads and writes a kernel's size at each (a batch of 16, 256 features: 41 ms where this takes 22
    on a CPU).
    """
    params, consts, carry, xs, mask, valid = primals
    dparams, dconsts, dcarry, dxs, dmask, _ = tangents
    time, batch = xs.shape[:2]
    shape = jax.eval_shape(lambda x: affine.mix(params, x, affine.hidden(carry)), _one(xs))
    zeros = jax.tree.map(lambda z: jnp.zeros((time, *z.shape), z.dtype), shape)

    def shifted(consts: Any, carry: PyTree, shift: Any) -> tuple[PyTree, Array]:
        def step(carry: PyTree, inputs: Any) -> tuple[PyTree, Array]:
            x, shift = inputs
            z = affine.mix(params, x, _masked(affine.hidden(carry), mask))
            return affine.pointwise(carry, jax.tree.map(jnp.add, z, shift), *consts)

        return scan_steps(loop, step, carry, (xs, shift), valid)

    out, linear = jax.linearize(shifted, consts, carry, zeros)
    ys = out[1]
    before = jnp.concatenate([affine.hidden(carry).astype(ys.dtype)[None], ys[:-1]])[:time]

    def mixed(params: Params, xs: Array, mask: Any) -> Any:
        # In two axes: XLA's kernel gradient of a product with three is four times slower on a CPU.
        flat = (a.reshape(time * batch, *a.shape[2:]) for a in (xs, _masked(before, mask)))
        return jax.tree.map(lambda z: z.reshape(time, batch, *z.shape[1:]), affine.mix(params, *flat))

    _, dz = jax.jvp(mixed, (params, xs, mask), (dparams, dxs, dmask))
    return out, linear(dconsts, dcarry, dz)


def scan_affine(
    loop: Loop,
    affine: Affine,
    params: Params,
    carry: PyTree,
    xs: Array,
    mask: Array | None,
    valid: Array | None,
) -> tuple[PyTree, Array]:
    """:func:`scan_steps` of an affine cell, with its own derivative in both modes."""
    z = jax.eval_shape(lambda x: affine.mix(params, x, affine.hidden(carry)), _one(xs))
    # An activation may close over a traced value (a slope that a sweep maps over).
    pointwise, consts = jax.closure_convert(affine.pointwise, carry, z)
    return _scan_affine(loop, affine._replace(pointwise=pointwise), params, consts, carry, xs, mask, valid)


def _one(xs: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(xs.shape[1:], xs.dtype)


def _masked(h: Array, mask: Array | None) -> Array:
    return h if mask is None else h * mask.astype(h.dtype)


def _where(ok: Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(ok.reshape(ok.shape + (1,) * (a.ndim - 1)), a, b), new, old)
