"""Cutting a data set into parts: an exact, seeded partition.

The random order is the stable sort of the raw 64-bit output of PCG64, the one stream that NumPy
promises never to change, so a seed gives the same parts on every platform and in every version.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped

from nnkit.data.dataset import Dataset, Splits

__all__ = ["hold_out", "split"]


def split(
    dataset: Dataset,
    fractions: Sequence[float] = (0.6, 0.2, 0.2),
    *,
    seed: int = 0,
    stratify: bool = False,
) -> Splits:
    """A data set cut at random into training, validation and test part.

    Every example is in exactly one part, and within a part the order of the data set is kept. Each
    part has the floor or the ceiling of ``fraction * n`` examples; with ``stratify`` also the floor
    or the ceiling of ``fraction * n_c`` of every class.

    Args:
      dataset: what to cut.
      fractions: the share of training, validation and test part; they sum to 1. A part whose share
        is 0 becomes ``None``.
      seed: a non-negative integer; the parts are a function of it and the length (and labels).
      stratify: give each part the same mixture of classes.

    Raises:
      ValueError: fractions that are negative or do not sum to 1, a part that would be empty, or
        ``stratify`` without integer labels.

    >>> parts = split(Dataset(np.zeros((10, 2)), np.arange(10)))
    >>> [len(part) for part in parts]
    [6, 2, 2]
    """
    fractions = tuple(float(fraction) for fraction in fractions)
    if len(fractions) != 3:
        raise ValueError(
            f"fractions has {len(fractions)} numbers and needs 3: training, validation and test, "
            "for instance (0.8, 0, 0.2)"
        )
    if not (min(fractions) >= 0 and abs(sum(fractions) - 1) <= 1e-6):
        raise ValueError(
            f"fractions are {fractions} and sum to {sum(fractions):g}: they must be 0 or more and sum to 1"
        )
    if fractions[0] == 0:
        raise ValueError(f"fractions are {fractions}: the training part needs a share")
    parts = _cut(dataset, fractions, ("training", "validation", "test"), seed, stratify)
    train, validation, test = parts
    return Splits(train, validation if fractions[1] > 0 else None, test if fractions[2] > 0 else None)


def hold_out(splits: Splits, fraction: float = 0.1, *, seed: int = 0, stratify: bool = False) -> Splits:
    """The splits with a validation part cut at random off the training part; the test part stays.

    For data that are published as training and test set. The partition is that of :func:`split`.

    Raises:
      ValueError: there is a validation part already, ``fraction`` is not between 0 and 1, a part
        would be empty, or ``stratify`` without integer labels.

    >>> parts = hold_out(Splits(Dataset(np.zeros((10, 2)), np.arange(10))), 0.3)
    >>> len(parts.train), len(parts.validation), parts.test
    (7, 3, None)
    """
    if splits.validation is not None:
        raise ValueError(
            f"{splits.train.name} has a validation part of {len(splits.validation)} examples already: use it, "
            "or drop it with splits._replace(validation=None)"
        )
    if not 0 < fraction < 1:
        raise ValueError(
            f"fraction must be between 0 and 1, got {fraction}: it is the share that is held out"
        )
    parts = _cut(splits.train, (1 - fraction, fraction), ("training", "validation"), seed, stratify)
    return splits._replace(train=parts[0], validation=parts[1])


def _cut(
    dataset: Dataset, fractions: tuple[float, ...], parts: tuple[str, ...], seed: int, stratify: bool
) -> list[Dataset]:
    if stratify and (dataset.y.ndim != 1 or not np.issubdtype(dataset.y.dtype, np.integer)):
        raise ValueError(
            f"stratify=True needs one integer label an example, and {dataset.name} has y of shape "
            f"{dataset.y.shape} {dataset.y.dtype}: pass stratify=False"
        )
    n, total = len(dataset), sum(fractions)
    groups = np.unique(dataset.y, return_inverse=True)[1] if stratify else np.zeros(n, np.int64)
    counts = _rounded(np.bincount(groups), np.asarray(fractions) / total)
    for part, fraction, size in zip(parts, fractions, counts.sum(0), strict=True):
        if fraction > 0 and size == 0:
            raise ValueError(
                f"the {part} part would be empty: {fraction:g} of the {n} examples of {dataset.name}; "
                "take a larger share or 0"
            )
    part_of = np.empty(n, np.int64)
    # One random order for all; a stable sort by group leaves each group's members in random order.
    order = np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")
    order = order[np.argsort(groups[order], kind="stable")]
    part_of[order] = np.repeat(np.tile(np.arange(len(parts)), len(counts)), counts.ravel())
    return [dataset.take(np.flatnonzero(part_of == i)) for i in range(len(parts))]


def _rounded(
    sizes: Int[np.ndarray, " groups"], fractions: Float[np.ndarray, " parts"]
) -> Int[np.ndarray, "groups parts"]:
    """Whole numbers near ``sizes[:, None] * fractions`` whose rows sum to ``sizes``.

    Each entry and each column sum is the floor or the ceiling of the exact one ("controlled
    rounding", M. Bacharach, Management Science 12, 1966). Rounding each row by itself cannot keep
    the column sums: a hundred classes of four would all round the same way.
    """
    exact = np.outer(sizes, fractions).round(9)  # 0.7 * 10 is 7, not 7.000000000000001
    low, high = np.floor(exact).astype(np.int64), np.ceil(exact).astype(np.int64)
    total = (sizes.sum() * fractions).round(9)
    least, most = np.floor(total), np.ceil(total)
    table = low.copy()
    for row, missing in enumerate(sizes - low.sum(1)):
        table[row, np.argsort(low[row] - exact[row], kind="stable")[:missing]] += 1
    while True:
        sums = table.sum(0)
        if (over := np.flatnonzero(sums > most)).size:
            path = _path(table > low, table < high, over[:1], np.flatnonzero(sums < most))
        elif (under := np.flatnonzero(sums < least)).size:
            path = _path(table > low, table < high, np.flatnonzero(sums > least), under[:1])
        else:
            return table
        if path is None:
            return table
        for giver, taker in itertools.pairwise(path):
            row = np.flatnonzero((table[:, giver] > low[:, giver]) & (table[:, taker] < high[:, taker]))[0]
            table[row, giver] -= 1
            table[row, taker] += 1


def _path(
    gives: Shaped[np.ndarray, "groups parts"], takes: Shaped[np.ndarray, "groups parts"], sources, targets
) -> list[int] | None:
    """The parts through which one unit can move from a source to a target, each step within a group.

    There is one whenever a column sum is off, by the integrality of network flows; ``None`` could
    only come from fractions within 1e-9 of a whole number of examples, and then costs one example.
    """
    came_from: dict[int, int | None] = {int(source): None for source in sources}
    queue = list(came_from)
    for part in queue:
        if part in targets:
            path: list[int] = [part]
            while (before := came_from[path[0]]) is not None:
                path.insert(0, before)
            return path
        for taker in np.flatnonzero((gives[:, part, None] & takes).any(0)):
            if int(taker) not in came_from:
                came_from[int(taker)] = part
                queue.append(int(taker))
    return None
