"""Which hyper-parameters matter, as Optuna's evaluators see it."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

from nnkit.checks import unknown_name
from nnkit.diagnose.figure import BLUE, new_figure, saved
from nnkit.search.drawing import with_states
from nnkit.search.storage import require_optuna

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nnkit.search.study import Study

__all__ = ["importances", "plot_importance"]


def importances(study: Study, evaluator: Any = "ped-anova") -> dict[str, float]:
    """The hyper-parameters' importances by path, the highest first; they sum to 1.

    "ped-anova" (S. Watanabe et al. 2023) asks how much the best trials' values differ from all trials',
    conditional hyper-parameters included. Its best are the best tenth, and at least five. "fanova" (F.
    Hutter et al. 2014) asks how much of the metric's variance over the whole space is due to a
    hyper-parameter, and "impurity" how much a random forest gains by it; both fit a forest, need scikit-learn
    and leave out conditional hyper-parameters. The samples should cover the space: random or quasi-random
    search gives such, TPE and coarse-to-fine search do not. Trials that diverged are left out.

    Args:
      study: from :func:`sweep` or :func:`open_study`.
      evaluator: "ped-anova", "fanova", "impurity", or one of Optuna's evaluators.

    Raises:
      ValueError: an unknown evaluator, or fewer than ten complete trials.
      ImportError: scikit-learn is needed and not there.

    >>> def train_fn(key, hparams):
    ...     return {"val_loss": (hparams["a"] - 0.4) ** 2 + 0.001 * hparams["b"]}
    >>> space = {"a": search.uniform(0, 1), "b": search.uniform(0, 1)}
    >>> found = search.importances(search.sweep(train_fn, space, trials=40))
    >>> list(found), found["a"] > 0.8
    (['a', 'b'], True)
    """
    optuna = require_optuna()
    n = len(with_states(study, "complete"))
    if n < _LEAST:
        raise ValueError(
            f"the importance of hyper-parameters needs {_LEAST} complete trials, better 50, and there are {n}"
        )
    if isinstance(evaluator, str):
        evaluator = _evaluator(evaluator, n)
    with warnings.catch_warnings():
        # What it warns of is a branch of a conditional that few trials took: its importance is a low one.
        warnings.simplefilter("ignore", UserWarning)
        found = optuna.importance.get_param_importances(study.optuna, evaluator=evaluator)
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def plot_importance(
    study: Study,
    path: str | os.PathLike[str] | None = None,
    *,
    evaluator: Any = "ped-anova",
    title: str = "",
) -> Figure:
    """The hyper-parameters' importances as bars, the highest on top: see :func:`importances`.

    Args:
      study: from :func:`sweep` or :func:`open_study`.
      path: the PNG file, if it is to be saved.
      evaluator: as for :func:`importances`.
      title: above the picture.

    Raises:
      ValueError, ImportError: as :func:`importances`.

    >>> def train_fn(key, hparams):
    ...     return {"val_loss": (hparams["a"] - 0.4) ** 2 + 0.001 * hparams["b"]}
    >>> space = {"a": search.uniform(0, 1), "b": search.uniform(0, 1)}
    >>> ax = search.plot_importance(search.sweep(train_fn, space, trials=40)).axes[0]
    >>> [text.get_text() for text in ax.get_yticklabels()]
    ['a', 'b']
    """
    found = importances(study, evaluator)
    figure = new_figure(6.2, 0.42 * len(found) + 1.4, title)
    ax = figure.subplots()
    bars = ax.barh(range(len(found)), list(found.values()), color=BLUE, height=0.65)
    ax.bar_label(bars, [f"{100 * value:.0f}%" for value in found.values()], padding=4, fontsize=9)
    ax.set_yticks(range(len(found)), list(found), parse_math=False)
    ax.invert_yaxis()
    name = evaluator if isinstance(evaluator, str) else type(evaluator).__name__
    ax.set_xlabel(f"share of the importance for {study.metric} ({name})", parse_math=False)
    ax.set(xlim=(0, 1.08 * max(found.values())), xticks=[])
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    return saved(figure, path)


_LEAST = 10


def _evaluator(name: str, n: int) -> Any:
    from optuna import importance

    if name == "ped-anova":
        return importance.PedAnovaImportanceEvaluator(target_quantile=max(0.1, 5 / n))
    forests = {
        "fanova": importance.FanovaImportanceEvaluator,
        "impurity": importance.MeanDecreaseImpurityImportanceEvaluator,
    }
    if name not in forests:
        raise unknown_name("evaluator", name, ["ped-anova", *forests])
    try:
        return forests[name](seed=0)
    except ImportError as error:
        raise ImportError(
            f"the {name} of hyper-parameters needs scikit-learn: pip install nnkit[search]"
        ) from error
