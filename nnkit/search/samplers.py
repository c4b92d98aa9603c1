"""``make_sampler``: samplers by name, whose draws are a function of the seed and the study alone."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nnkit.checks import unknown_name
from nnkit.search.coarse_to_fine import coarse_to_fine
from nnkit.search.draws import check_whole, fill, share
from nnkit.search.grids import grid_for
from nnkit.search.space import Flat, Space, as_space
from nnkit.search.storage import require_optuna

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

__all__ = ["SAMPLERS", "make_sampler"]


def make_sampler(
    sampler: str | BaseSampler | Callable[[int], BaseSampler],
    space: Mapping[str, Any] | Space,
    *,
    seed: int = 0,
    trials: int | None = None,
    batch: int | None = None,
) -> BaseSampler:
    """The sampler that ``sampler`` names, in Optuna's protocol.

    ================  ==================================================================================
    "random"          every value independently; the measure of all others
    "quasi-random"    Sobol's points, scrambled: random ones that leave no holes
    "grid"            :func:`grid` with as many values as ``trials`` allow
    "coarse-to-fine"  :func:`coarse_to_fine`
    "tpe"             Optuna's tree-structured Parzen estimator
    "gp"              Optuna's Gaussian process with log expected improvement
    "cma-es"          Optuna's covariance matrix adaptation, for numbers alone
    ================  ==================================================================================

    What one of these draws for a trial depends on the seed, the trial's number (those that were enqueued not
    counted) and the trials that the study then has, never on the process: workers that share a seed draw
    different points, and a study that was killed goes on as if it had not been. The first three do not look at
    results, so they are the same however trials are batched.

    Args:
      sampler: a name; or a function of a seed that makes a sampler, which is then made anew for each trial; or a
        sampler of Optuna's, which is taken as it is, with the random state that it keeps in the process.
      space: where to search.
      seed: of all draws.
      trials: how many there will be, which decides a grid's size.
      batch: how many are asked together; CMA-ES has at least as many in a generation.

    Raises:
      ValueError, TypeError: for an unknown name, numbers below 1, a grid without ``trials``, choices or
        conditionals with CMA-ES.
      ImportError: where Optuna, PyTorch (for "gp") or cmaes is not installed.

    >>> space = search.as_space({"lr": search.log_uniform(1e-5, 1.0), "width": search.choice([32, 64])})
    >>> import optuna
    >>> def first(seed):
    ...     return space.suggest(optuna.create_study(sampler=search.make_sampler("tpe", space, seed=seed)).ask())
    >>> first(0) == first(0), first(0) == first(1)
    (True, False)
    """
    optuna, space = require_optuna(), as_space(space)
    check_whole("make_sampler(seed=...)", seed, 0)
    for name, number in (("trials", trials), ("batch", batch)):
        if number is not None:
            check_whole(f"make_sampler({name}=...)", number, 1)
    if isinstance(sampler, str):
        if sampler not in SAMPLERS:
            raise unknown_name("sampler", sampler, SAMPLERS)
        return SAMPLERS[sampler](space, seed, trials, batch)
    kind = optuna.samplers.BaseSampler
    if isinstance(sampler, kind):
        return sampler  # pyright: ignore[reportReturnType]
    # A class takes the seed by name alone, so it is not the function that is meant.
    if not callable(sampler) or isinstance(sampler, type):
        raise TypeError(
            f"sampler must be a name ({', '.join(SAMPLERS)}), a sampler of Optuna's, or a function of a seed that "
            f"makes one, such as lambda seed: TPESampler(seed=seed), got {sampler!r}"
        )
    from nnkit.search.sampling import FreshSampler

    return FreshSampler(sampler, seed)


def _drawn(name: str, space: Space, seed: int, draw: Any) -> BaseSampler:
    from nnkit.search.sampling import DrawnSampler

    return DrawnSampler(name, space, seed, draw)


def _random(space: Space, seed: int, trials: int | None, batch: int | None) -> BaseSampler:
    def draw(study: Study, trial: FrozenTrial, turn: int, given: Flat) -> Flat:
        return fill(space, given, lambda path: space.dimensions[path].at(share(seed, turn, path)))

    return _drawn("random", space, seed, draw)


def _quasi_random(space: Space, seed: int, trials: int | None, batch: int | None) -> BaseSampler:
    from scipy.stats import qmc  # JAX needs SciPy, so it is there

    places = {path: i for i, path in enumerate(space.dimensions)}

    def draw(study: Study, trial: FrozenTrial, turn: int, given: Flat) -> Flat:
        sobol = qmc.Sobol(len(places), scramble=True, rng=seed)
        if turn:  # SciPy takes no number of points but powers of two at the start
            sobol.fast_forward(turn)
        at = sobol.random(1)[0]
        return fill(space, given, lambda path: space.dimensions[path].at(at[places[path]]))

    return _drawn("quasi-random", space, seed, draw)


def _grid(space: Space, seed: int, trials: int | None, batch: int | None) -> BaseSampler:
    if trials is None:
        raise ValueError(
            "the sampler 'grid' needs the number of trials to know how fine it is: pass trials=..., "
            "or say it: sampler=search.grid(space, {'lr': 8})"
        )
    return grid_for(space, trials, seed)


def _coarse_to_fine(space: Space, seed: int, trials: int | None, batch: int | None) -> BaseSampler:
    return coarse_to_fine(space, seed=seed)


def _tpe(space: Space, seed: int, trials: int | None, batch: int | None) -> BaseSampler:
    from optuna.samplers import TPESampler

    from nnkit.search.sampling import relative_draw

    return _drawn("tpe", space, seed, relative_draw(space, lambda number: TPESampler(seed=number), seed))


def _gp(space: Space, seed: int, trials: int | None, batch: int | None) -> BaseSampler:
    _need("torch", "the sampler 'gp' needs PyTorch: pip install 'nnkit[gp]'")
    from optuna.samplers import GPSampler

    from nnkit.search.sampling import on_one_thread, relative_draw

    draw = relative_draw(space, lambda n: GPSampler(seed=n), seed, robust=True)
    return _drawn("gp", space, seed, on_one_thread(draw))


def _cma_es(space: Space, seed: int, trials: int | None, batch: int | None) -> BaseSampler:
    for path, dimension in space.dimensions.items():
        if dimension.options is not None:
            raise ValueError(
                f"the sampler 'cma-es' knows numbers alone, and {path!r} is {dimension}: "
                "take 'tpe' or 'coarse-to-fine', or write a range"
            )
    _need("cmaes", "the sampler 'cma-es' needs cmaes: pip install 'nnkit[search]'")
    from optuna.samplers import CmaEsSampler

    from nnkit.search.sampling import relative_draw

    usual = 4 + int(3 * math.log(len(space.dimensions)))
    make = functools.partial(CmaEsSampler, popsize=max(usual, batch or 0))
    return _drawn("cma-es", space, seed, relative_draw(space, lambda n: make(seed=n), seed, renumbered=True))


def _need(module: str, message: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ImportError(message)


SAMPLERS: dict[str, Callable[[Space, int, int | None, int | None], BaseSampler]] = {
    "random": _random,
    "quasi-random": _quasi_random,
    "grid": _grid,
    "coarse-to-fine": _coarse_to_fine,
    "tpe": _tpe,
    "gp": _gp,
    "cma-es": _cma_es,
}
"""Named samplers: (space, seed, trials, batch) -> Optuna's protocol."""
