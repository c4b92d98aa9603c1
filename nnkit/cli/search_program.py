"""The training function of a search: ``nnkit train``'s recipe with a trial's values, some of them traced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnkit import data, train
from nnkit.cli.recipe import build_model, build_trainer, raw_splits, stopping_rule
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
      parts: the data as published, and standardised by the training part.
      train_fn: what :func:`nnkit.search.sweep` takes. It sees the training and the validation part alone.

    Raises:
      ValueError, OSError, ImportError: for data that cannot be had, shares that leave no part for validation, or
        batches that are larger than the training part.
    """

    def __init__(self, config: Config, space: Space, *, pruned: bool = False):
        if not 0 < config.test < 1:
            raise ValueError(f"test must be a share between 0 and 1, got {config.test:g}")
        settings = resolved(config)
        raw = raw_splits(settings)
        if raw.validation is None:
            raise ValueError(
                f"a search chooses on the validation part, and --validation {settings.validation:g} leaves none"
            )
        self.config, self.parts = config, (raw, data.standardize(raw))
        sizes = space.dimensions.get("batch_size")
        sizes = (settings.batch_size,) if sizes is None else sizes.options or (sizes.high,)
        for size in sizes:
            data.check_batch_size(size, len(raw.train))
        self.train_fn: Any = self._by_epoch(settings) if pruned else self._whole

    def settings(self, values: Mapping[str, Any]) -> Settings:
        """All settings of a trial with these values by name; they may be traced."""
        return settings_of_trial(self.config, {name: values[name] for name in values})

    def network(self, settings: Settings) -> Layer:
        """A trial's network."""
        return build_model(settings, len(self.parts[1].train.classes))

    def trainer(self, settings: Settings) -> tuple[Trainer, Schedule]:
        """A trial's trainer, and its learning rate by step."""
        steps = data.num_batches(len(self.parts[1].train), settings.batch_size)
        return build_trainer(settings, self.network(settings), steps)

    def _whole(self, key: Array, hparams: Any) -> Any:
        settings, splits = self.settings(hparams), self.parts[1]
        return train.run(
            self.trainer(settings)[0],
            key,
            splits.train,
            settings.epochs,
            batch_size=settings.batch_size,
            validation=splits.validation,
            early_stopping=stopping_rule(self.config),
        )

    def _by_epoch(self, settings: Settings) -> Training:
        """The same, for a search that leaves a trial between epochs."""
        splits = self.parts[1]
        return training(
            lambda hparams: self.trainer(self.settings(hparams))[0],
            splits.train,
            settings.epochs,
            batch_size=lambda hparams: self.settings(hparams).batch_size,
            validation=splits.validation,
            early_stopping=stopping_rule(self.config),
        )
