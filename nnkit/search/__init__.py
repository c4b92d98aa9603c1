"""Hyper-parameter search: spaces, samplers, compiled sweeps, and a record of every trial."""

from nnkit.search.boundary import AtBoundary, boundary_warnings
from nnkit.search.choose import Comparison, Ranked, Ranking, best_of, compare
from nnkit.search.coarse_to_fine import coarse_to_fine
from nnkit.search.dimension import Dimension
from nnkit.search.dimensions import choice, conditional, integer, log_uniform, uniform
from nnkit.search.engine import Engine, Finished
from nnkit.search.export import read_table, write_table
from nnkit.search.final import FinalTest, final_test, final_tests
from nnkit.search.finish import finish
from nnkit.search.folds import fold_of
from nnkit.search.grids import grid
from nnkit.search.hparams import Hparams
from nnkit.search.parse import parse_space
from nnkit.search.plots_contour import plot_contour
from nnkit.search.plots_grid import plot_grid_and_random
from nnkit.search.plots_importance import importances, plot_importance
from nnkit.search.plots_parallel import plot_parallel
from nnkit.search.plots_progress import plot_progress
from nnkit.search.plots_rate import plot_rate
from nnkit.search.pool import Workers
from nnkit.search.progress import View
from nnkit.search.pruned import run_pruned
from nnkit.search.pruning import Pruner, median, successive_halving
from nnkit.search.records import Trial, known, tell, tell_repeat
from nnkit.search.samplers import make_sampler
from nnkit.search.score import health, score
from nnkit.search.space import Space, as_space, space_of
from nnkit.search.storage import open_storage
from nnkit.search.study import Study, begin_study, open_study
from nnkit.search.sweep import retrain, sweep
from nnkit.search.training import Training, training
from nnkit.search.workers import Lease, counted

__all__ = [
    "AtBoundary",
    "Comparison",
    "Dimension",
    "Engine",
    "FinalTest",
    "Finished",
    "Hparams",
    "Lease",
    "Pruner",
    "Ranked",
    "Ranking",
    "Space",
    "Study",
    "Training",
    "Trial",
    "View",
    "Workers",
    "as_space",
    "begin_study",
    "best_of",
    "boundary_warnings",
    "choice",
    "coarse_to_fine",
    "compare",
    "conditional",
    "counted",
    "final_test",
    "final_tests",
    "finish",
    "fold_of",
    "grid",
    "health",
    "importances",
    "integer",
    "known",
    "log_uniform",
    "make_sampler",
    "median",
    "open_storage",
    "open_study",
    "parse_space",
    "plot_contour",
    "plot_grid_and_random",
    "plot_importance",
    "plot_parallel",
    "plot_progress",
    "plot_rate",
    "read_table",
    "retrain",
    "run_pruned",
    "score",
    "space_of",
    "successive_halving",
    "sweep",
    "tell",
    "tell_repeat",
    "training",
    "uniform",
    "write_table",
]
