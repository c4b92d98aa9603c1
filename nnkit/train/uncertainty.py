"""Monte-Carlo dropout: a network's doubts, from the spread of its predictions under dropout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from nnkit.checks import LayerError, check_key
from nnkit.modes import SAMPLING
from nnkit.train.preflight import whole
from nnkit.tree import wide
from nnkit.types import Array, Layer, Params, PyTree, State

__all__ = ["Outputs", "Uncertain", "check_sampling", "distribution", "entropy_of", "sample"]

Outputs: TypeAlias = Literal["logits", "probabilities", "values"]
"""What a model puts out."""


class Uncertain(NamedTuple):
    """What S samples y_1, ..., y_S of a network's output say: with logits, y_s are their probabilities.

    With p = (1/S) sum_s y_s and the entropy H(p) = -sum_c p_c log p_c, in nats:

    Attributes:
      mean: p, (batch, ..., classes), or the mean of the values.
      spread: the standard deviation of each entry, sqrt(sum_s (y_s - mean)² / (S - 1)).
      entropy: H(p), (batch, ...): all there is to doubt, from 0 to log(classes). None for values.
      mutual_information: H(p) - (1/S) sum_s H(y_s), (batch, ...): the part of it on which the samples disagree,
        which more data would resolve (BALD: Houlsby et al. 2011). None for values.

    Where the model gives a tree of outputs, each of these is such a tree. Entropies are NaN for a row of
    "probabilities" with a negative number or a NaN in it.
    """

    mean: PyTree
    spread: PyTree
    entropy: PyTree
    mutual_information: PyTree


def check_sampling(samples: Any, key: Any, outputs: Any, at_once: Any) -> None:
    """Raises for arguments of ``predict`` that do not go together."""
    if outputs not in get_args(Outputs):
        raise ValueError(
            f"predict(outputs=...) must be 'logits', 'probabilities' or 'values', got {outputs!r}"
        )
    whole(at_once, "predict(samples_at_once=...)")
    if samples is None:
        if key is not None:
            raise TypeError("predict got a key and draws nothing: pass samples=100 too, or leave the key out")
        return
    if key is None:
        raise TypeError("predict(samples=...) needs a key: pass predict(..., key=jax.random.key(0))")
    check_key(key, "predict")
    if isinstance(samples, Tracer):
        return
    if isinstance(samples, int | np.integer) and samples == 1:
        raise ValueError("predict(samples=1) has no spread: draw at least 2, some 100 for a stable one")
    whole(samples, "predict(samples=...)", 2)


class _Seen(NamedTuple):
    """What is kept of the samples so far, of one output."""

    mean: Array
    squares: Array  # the sum of (y - mean)²
    entropy: Array | None  # the mean of the samples' entropies


@partial(jax.jit, static_argnames=("model", "at_once", "outputs"))
def sample(
    model: Layer,
    params: Params,
    state: State,
    x: Any,
    key: Array,
    batch: Any,
    samples: Any,
    *,
    at_once: int,
    outputs: Outputs,
) -> Uncertain:
    """Mean and spread of so many samples of one batch; their number may be traced.

    What is kept does not grow with their number: means and sums of squares about them are merged (Chan,
    Golub and LeVeque 1979), since E[y²] - E[y]² would lose all digits where the spread is small.
    """
    key = jax.random.fold_in(key, batch)

    def one(s: Array) -> PyTree:
        y = model.apply(params, state, x, key=jax.random.fold_in(key, s), train=SAMPLING)[0]
        return jax.tree.map(partial(distribution, outputs), y)

    _check_draws(model, params, state, x)
    spec = jax.eval_shape(one, jax.ShapeDtypeStruct((), jnp.int32))
    has_entropy = outputs != "values"
    seen = jax.tree.map(lambda a: _nothing(a.shape, a.dtype, has_entropy), spec)

    def add(chunk: Array, seen: PyTree) -> PyTree:
        numbers = chunk * at_once + jnp.arange(at_once, dtype=jnp.int32)
        ys = jax.vmap(one)(numbers)
        merge = partial(_merged, drawn=numbers < samples, before=chunk * at_once)
        return jax.tree.map(merge, seen, ys, is_leaf=_is_seen)

    seen = jax.lax.fori_loop(0, (samples + at_once - 1) // at_once, add, seen)

    def over(part: Callable[[_Seen], Any]) -> PyTree:
        return jax.tree.map(part, seen, is_leaf=_is_seen)

    mean, squares = over(lambda s: s.mean), over(lambda s: s.squares)
    spread = jax.tree.map(lambda total: jnp.sqrt(total / (samples - 1).astype(total.dtype)), squares)
    if not has_entropy:
        return Uncertain(mean, spread, None, None)

    def information(s: _Seen) -> Array:
        assert s.entropy is not None
        return jnp.maximum(entropy_of(s.mean) - s.entropy, 0)  # rounding may go below

    return Uncertain(mean, spread, over(lambda s: entropy_of(s.mean)), over(information))


def _check_draws(model: Layer, params: Params, state: State, x: Any) -> None:
    """Raises where the model draws nothing: then it goes without a key, and has no doubts to show."""
    try:
        jax.eval_shape(lambda *a: model.apply(*a, key=None, train=SAMPLING)[0], params, state, x)
    except (LayerError, TypeError, ValueError, AttributeError):
        return  # the key is missed; or something else is wrong, which the call with a key says
    raise ValueError(
        "predict(samples=...) of a model that draws nothing: all samples are equal. It needs a layer that drops, "
        "layers.dropout(0.5) for instance, whose rate is not 0 and which is not frozen"
    )


def distribution(outputs: Outputs, y: Array) -> Array:
    """The output as what is averaged, in float32 at least."""
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(f"predict(samples=...) takes the mean of floating outputs, got {y.dtype}")
    y = y.astype(wide(y.dtype))
    if outputs == "values":
        return y
    if y.ndim < 2 or y.shape[-1] < 2:
        raise ValueError(
            f"predict(outputs={outputs!r}) got an output of shape {y.shape} and needs (batch, ..., classes) with at "
            "least 2 classes: pass outputs='values', or give one logit z as two, jnp.stack([0 * z, z], -1)"
        )
    return jax.nn.softmax(y) if outputs == "logits" else y


def _nothing(shape: tuple[int, ...], dtype: Any, has_entropy: bool) -> _Seen:
    zeros = jnp.zeros(shape, dtype)
    return _Seen(zeros, zeros, jnp.zeros(shape[:-1], dtype) if has_entropy else None)


def _is_seen(tree: Any) -> bool:
    return isinstance(tree, _Seen)


def _merged(seen: _Seen, ys: Array, *, drawn: Array, before: Array) -> _Seen:
    """What was seen with more samples, those of ``ys`` (samples, batch, ...) that are ``drawn``."""
    count = jnp.sum(drawn, dtype=ys.dtype)
    old = before.astype(ys.dtype)
    share = count / (old + count)
    counts = drawn.reshape(-1, *(1,) * (ys.ndim - 1))
    mean = jnp.sum(jnp.where(counts, ys, 0), axis=0) / count
    squares = jnp.sum(jnp.where(counts, jnp.square(ys - mean), 0), axis=0)
    apart = mean - seen.mean
    entropy = seen.entropy
    if entropy is not None:
        now = jnp.sum(jnp.where(counts[..., 0], entropy_of(ys), 0), axis=0) / count
        entropy = entropy + (now - entropy) * share
    return _Seen(
        seen.mean + apart * share,
        seen.squares + squares + jnp.square(apart) * old * share,
        entropy,
    )


def entropy_of(p: Array) -> Array:
    """-sum p log p over the last axis, 0 log 0 being 0."""
    some = p > 0
    return -jnp.sum(
        jnp.where(some, p * jnp.log(jnp.where(some, p, 1)), jnp.where(p == 0, 0, jnp.nan)), axis=-1
    )
