"""The training function of a search: ``nnkit train``'s recipe with a trial's values, some of them traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from nnkit import data, train
from nnkit.cli.recipe import build_model, build_trainer, folded, raw_splits, stopping_rule, together
from nnkit.cli.search_space import settings_of_trial
from nnkit.cli.settings import Config, Settings, resolved
from nnkit.search.space import Space
from nnkit.search.training import Training, training
from nnkit.types import Array, Layer, Schedule, Trainer

__all__ = ["Program"]


class Program:
    """What a search trains: the data, and a pure function of a key and a trial's values.

    Args:
      config: the settings that all trials share; its seed decides the split.
      space: what is searched; sizes of batches must suit the data.
      pruned: whether trials are to be stopped between epochs.

    Attributes:
      train_fn: what :func:`nnkit.search.sweep` takes. It sees the training and the validation part alone.

    Raises:
      ValueError, OSError, ImportError: for data that cannot be had, shares that leave no part for validation, or
        batches that are larger than the training part.
    """

    def __init__(self, config: Config, space: Space, *, pruned: bool = False):
        if not 0 < config.test < 1:
            raise ValueError(f"test must be a share between 0 and 1, got {config.test:g}")
        self.config, settings = config, resolved(config)
        self._all = raw_splits(dataclasses.replace(settings, folds=None))
        raw, self._standard = self.parts(0)
        if raw.validation is None:
            raise ValueError(
                f"a search chooses on the validation part, and --validation {settings.validation:g} leaves none"
            )
        sizes = space.dimensions.get("batch_size")
        sizes = (settings.batch_size,) if sizes is None else sizes.options or (sizes.high,)
        for size in sizes:
            data.check_batch_size(size, len(raw.train))
        self._of_fold = None if config.folds is None else self._folds(config.folds)
        self.train_fn: Any = self._by_epoch(settings) if pruned else self._whole
        if self._of_fold is not None and not pruned:
            self.train_fn = self._on_a_fold

    def parts(self, fold: int) -> tuple[data.Splits, data.Splits]:
        """The data as published, and standardised by the training part; without folds there is the fold 0 alone."""
        raw = self._all
        if self.config.folds is not None:
            raw = folded(raw, dataclasses.replace(resolved(self.config), fold=fold))
        return raw, data.standardize(raw)

    def settings(self, values: Mapping[str, Any]) -> Settings:
        """All settings of a trial with these values by name; they may be traced."""
        return settings_of_trial(self.config, {name: values[name] for name in values})

    def network(self, settings: Settings) -> Layer:
        """A trial's network."""
        return build_model(settings, len(self._standard.train.classes))

    def trainer(self, settings: Settings) -> tuple[Trainer, Schedule]:
        """A trial's trainer, and its learning rate by step."""
        steps = data.num_batches(len(self._standard.train), settings.batch_size)
        return build_trainer(settings, self.network(settings), steps)

    def _whole(self, key: Array, hparams: Any) -> Any:
        return self._trained(key, hparams, self._standard.train, self._standard.validation)

    def _on_a_fold(self, key: Array, hparams: Any, fold: Array) -> Any:
        assert self._of_fold is not None
        return self._trained(key, hparams, *self._of_fold(fold))

    def _trained(self, key: Array, hparams: Any, training: Any, held_out: Any) -> Any:
        settings = self.settings(hparams)
        return train.run(
            self.trainer(settings)[0],
            key,
            training,
            settings.epochs,
            batch_size=settings.batch_size,
            validation=held_out,
            early_stopping=stopping_rule(self.config),
        )

    def _by_epoch(self, settings: Settings) -> Training:
        """The same, for a search that leaves a trial between epochs."""
        fixed = self._of_fold is None
        return training(
            lambda hparams: self.trainer(self.settings(hparams))[0],
            self._standard.train if fixed else self._of_fold,
            settings.epochs,
            batch_size=lambda hparams: self.settings(hparams).batch_size,
            validation=self._standard.validation if fixed else None,
            early_stopping=stopping_rule(self.config),
        )

    def _folds(self, folds: int) -> Callable[[Array], tuple[Any, Any]]:
        """The training and the validation part of a traced fold, standardised by the former.

        The images are there once: of a fold there are places, and the numbers of its training part.
        """
        pool = together(self._all)
        config = resolved(self.config)
        numbered = self._all._replace(
            train=dataclasses.replace(pool, x=np.arange(len(pool))), validation=None
        )
        cuts = [folded(numbered, dataclasses.replace(config, fold=fold)) for fold in range(folds)]
        statistics = [data.channel_statistics(pool.x[cut.train.x]) for cut in cuts]
        # A channel that does not vary becomes 0.
        scales = [np.where(s.std > 0, 1 / np.where(s.std > 0, s.std, 1), 0) for s in statistics]
        means, scales = jnp.asarray([s.mean for s in statistics], "f"), jnp.asarray(scales, "f")
        places = [jnp.asarray([getattr(cut, part).x for cut in cuts]) for part in ("train", "validation")]
        x, y = jnp.asarray(pool.x), jnp.asarray(pool.y)

        def of_fold(fold: Array) -> tuple[Any, Any]:
            found = [place[fold] for place in places]
            taken, held_out = (
                ((x[at].astype(jnp.float32) - means[fold]) * scales[fold], y[at]) for at in found
            )
            return taken, held_out

        return of_fold
