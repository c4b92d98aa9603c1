"""Two step functions side by side: where, when and by how much they part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from nnkit.optim import apply_updates
from nnkit.testing.compare import check_form, numbers_of
from nnkit.testing.report import ConformanceError, Failure
from nnkit.testing.trees import is_float, random_tree, rough_gradients
from nnkit.testing.ulp import ulp_distance
from nnkit.tree import flatten
from nnkit.types import PyTree

__all__ = ["Distance", "EquivalenceError", "Steps", "assert_equivalent", "compare_steps", "of_transformation"]


class Steps(NamedTuple):
    """What runs in steps, whatever it is.

    Attributes:
      init: ``init(start) -> carry``.
      step: ``step(carry, input) -> (carry, seen)``; ``seen`` is the tree that is compared.
    """

    init: Callable[[Any], Any]
    step: Callable[[Any, Any], tuple[Any, PyTree]]


class Distance(NamedTuple):
    """How far two runs were apart at the most.

    Attributes:
      ulps: the largest distance in units in the last place.
      relative: the largest difference divided by the largest number of its part (output, state, gradient).
      step: the step of the largest ``relative``.
      path: its leaf.
    """

    ulps: int
    relative: float
    step: int
    path: str


class EquivalenceError(ConformanceError):
    """Raised at the first step at which two runs part."""


def assert_equivalent(
    ours: Steps,
    theirs: Steps,
    start: PyTree = None,
    inputs: Sequence[PyTree] | int = 50,
    *,
    max_ulps: int | None = None,
    rtol: float | None = None,
    from_theirs: bool = False,
    ignore: Callable[[Any], Any] | None = None,
) -> Distance:
    """Runs two step functions side by side and raises at the first step at which they part.

    Args:
      ours, theirs: see :class:`Steps`; ``nnkit.testing.adapters`` makes them of optimizers, layers and
        modules of optax, Flax and PyTorch.
      start: what both ``init`` get; by default a random tree with nested, scalar, empty and None leaves.
      inputs: what each step gets, or how many rough gradients (eight decades, zeros, 1e-20, 1e20,
        sign flips) of the default tree's form.
      max_ulps: how many floats may lie between two numbers.
      rtol: how far they may part relative to the largest number of the part, the tree's first level.
        Without either bound every bit must agree; with both, a number must be within one of them.
      from_theirs: whether each of our steps starts from their carry (the two must have equally many
        leaves, in one order), so that a difference does not add up.
      ignore: of their carry and ``seen``, ``(carry, seen)``, the places not to look at: one boolean
        array for each leaf of ``seen``.

    Returns:
      The largest distance.

    Raises:
      EquivalenceError: with the first step, the path, the distance in ulp and the magnitude.
      ValueError: no inputs, and so no step.

    >>> from nnkit import testing
    >>> by_hand = optim.chain(optim.trace(0.9), optim.scale(-0.1))
    >>> ours, theirs = map(testing.of_transformation, (optim.sgd(0.1, 0.9), by_hand))
    >>> testing.assert_equivalent(ours, theirs, inputs=3).ulps
    0
    """
    worst = Distance(0, 0.0, 0, "")
    start = random_tree() if start is None else start
    inputs = rough_gradients(steps=inputs) if isinstance(inputs, int) else inputs
    if not len(inputs):
        raise ValueError("inputs= has no step to compare: pass a number above 0, or a list that is not empty")
    for step, (seen, other, skipped) in enumerate(_both(ours, theirs, start, inputs, from_theirs, ignore)):
        found = _distance(step, seen, other, skipped, max_ulps, rtol)
        worst = Distance(max(worst.ulps, found.ulps), *max(worst[1:], found[1:], key=lambda d: d[0]))
    return worst


def compare_steps(
    ours: Steps,
    theirs: Steps,
    start: PyTree,
    inputs: Sequence[PyTree],
    *,
    from_theirs: bool = False,
    ignore: Callable[[Any], Any] | None = None,
) -> Distance:
    """The largest distance of the two runs, whatever it is; arguments as :func:`assert_equivalent`'s."""
    return assert_equivalent(ours, theirs, start, inputs, rtol=np.inf, from_theirs=from_theirs, ignore=ignore)


def of_transformation(tx: Any, *, strict: bool = True, trajectory: bool = False) -> Steps:
    """An optimizer of nnkit or optax: inputs are gradients, seen are updates and the new state.

    Args:
      tx: the optimizer.
      strict: False runs it under standard dtype promotion, which optax's Adam needs.
      trajectory: whether the parameters are what is seen, for optimizers whose states are not alike.
    """

    def step(params: PyTree, state: PyTree, grads: PyTree) -> Any:
        updates, state = tx.update(grads, state, params)
        return updates, state, apply_updates(params, updates)

    compiled = jax.jit(step)

    def run(carry: Any, grads: PyTree) -> Any:
        params, state = carry
        if strict:
            updates, state, params = compiled(params, state, grads)
        else:
            with jax.numpy_dtype_promotion("standard"):
                updates, state, params = compiled(params, state, grads)
        seen = {"params": params} if trajectory else {"updates": updates, "state": jax.tree.leaves(state)}
        return (params, state), seen

    return Steps(lambda params: (params, tx.init(params)), run)


def _both(
    ours: Steps, theirs: Steps, start: PyTree, inputs: Sequence[PyTree], from_theirs: bool, ignore: Any
) -> Any:
    mine, other = ours.init(start), theirs.init(start)
    structure = jax.tree.structure(mine)
    for given in inputs:
        if from_theirs:
            leaves = jax.tree.leaves(other)
            if len(leaves) != structure.num_leaves:
                raise EquivalenceError(
                    [
                        Failure(
                            "equivalence",
                            "the two carry different trees",
                            f"{len(leaves)} leaves",
                            f"{structure.num_leaves} leaves: {structure}",
                            likely="from_theirs=False lets each go its own way",
                        )
                    ]
                )
            mine = jax.tree.unflatten(structure, leaves)
        mine, seen = ours.step(mine, given)
        other, expected = theirs.step(other, given)
        yield seen, expected, ignore((other, expected)) if ignore else None


def _distance(
    step: int, seen: PyTree, other: PyTree, skipped: Any, max_ulps: int | None, rtol: float | None
) -> Distance:
    try:
        check_form(f"what is compared at step {step}", other, seen)
    except ConformanceError as error:
        raise EquivalenceError([f._replace(check="equivalence") for f in error.failures]) from None
    mine, worst = flatten(seen), Distance(0, 0.0, step, "")
    sizes = _sizes(other)
    masks = skipped if skipped is not None else [False] * len(mine)
    for mask, (path, leaf) in zip(masks, flatten(other).items(), strict=True):
        a, b = numbers_of(mine[path]), numbers_of(leaf)
        if np.iscomplexobj(a):
            a, b = (np.stack([np.real(v), np.imag(v)], -1) for v in (a, b))
            mask = np.asarray(mask)[..., None]
        if not is_float(a):
            if not np.array_equal(a, b):
                _raise(step, path, a, b, np.asarray(a != b), "", "")
            continue
        looked_at = ~np.broadcast_to(mask, a.shape)
        ulp = np.where(looked_at, ulp_distance(a, b), 0)
        wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
        with np.errstate(invalid="ignore"):
            off = np.where((ulp == 0) | ~looked_at, 0, np.abs(wide_a - wide_b))
        relative = off / sizes[path.split("/")[0]]
        wrong = ulp > (max_ulps or 0)
        if rtol is not None:
            beyond = ~(relative <= rtol)
            wrong = beyond if max_ulps is None else wrong & beyond
        if wrong.any():
            bounds = [f"{max_ulps} ulp"] if max_ulps is not None else []
            bounds += [f"{rtol:g} of the part's largest"] if rtol is not None else []
            bound = " or ".join(bounds)
            at = np.unravel_index(np.argmax(np.where(wrong, ulp, 0)), a.shape)
            _raise(
                step,
                path,
                a,
                b,
                wrong,
                f": {ulp[at]} ulp, {relative[at]:.3g} of the part's largest",
                bound or "every bit",
                at,
            )
        largest = float(np.where(np.isnan(relative), np.inf, relative).max(initial=0))
        worst = Distance(
            max(worst.ulps, int(ulp.max(initial=0))),
            *max(worst[1:], (largest, step, path), key=lambda d: d[0]),
        )
    return worst


def _sizes(tree: PyTree) -> dict[str, float]:
    """The largest number of each part at the top of the tree.

    Not of each leaf: the gradient of a bias that has no influence (attention's of the keys) is 0 but for
    roundings, which have no size of their own to be measured by.
    """
    sizes: dict[str, float] = {}
    for path, leaf in flatten(tree).items():
        part = path.split("/")[0]
        numbers = numbers_of(leaf)
        numbers = np.abs(numbers) if np.iscomplexobj(numbers) or is_float(numbers) else np.zeros(0)
        numbers = numbers.astype(np.float64)
        largest = float(numbers[np.isfinite(numbers)].max(initial=np.finfo(np.float64).tiny))
        sizes[part] = max(sizes.get(part, 0.0), largest)
    return sizes


def _raise(
    step: int,
    path: str,
    a: np.ndarray,
    b: np.ndarray,
    wrong: np.ndarray,
    text: str,
    bound: str,
    at: Any = None,
) -> None:
    index = np.unravel_index(np.argmax(wrong), a.shape) if at is None else at
    where = f"{path}{[int(i) for i in index]}" if index else path
    raise EquivalenceError(
        [
            Failure(
                "equivalence",
                f"the two part at step {step}",
                f"{b[index]!s} (theirs){' within ' + bound if bound else ''}",
                f"{a[index]!s}{text}; {np.count_nonzero(wrong)} of {a.size} numbers of this leaf",
                where,
                "the first step: initial values or the formula itself"
                if step == 0
                else "not the first step: a count, a bias correction, an accumulator or the schedule",
            )
        ]
    )
