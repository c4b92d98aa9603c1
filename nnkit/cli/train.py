"""``nnkit train``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nnkit.cli.leaving import ENDED, going_on, refused
from nnkit.cli.recipe import Outcome, run
from nnkit.cli.report import print_table
from nnkit.cli.settings import Config, Settings, as_toml, resolved

__all__ = ["Train", "train"]


@dataclasses.dataclass(frozen=True)
class Train(Config):
    """Train a network on small images, and leave a run folder.

    Settings that are not given come from the data set: the lecture's (14 epochs of batches of 64,
    Adam at 1e-4 that falls by 0.9 an epoch) for sets of MNIST's size. The 1,797 bundled digits have
    others, chosen by validation accuracy: 60 epochs of batches of 32 at 3e-3 that falls by 0.93 an
    epoch, dropout 0.25, label smoothing 0.1.

    SIGTERM and Ctrl-C save and end the run with status 143 and 130; "nnkit resume RUN" goes on with it.
    """

    config: Path | None = None
    """Settings to begin with: a run folder, its config.json, or a TOML file; other options go before it. The
    run's own name is not taken from it: without --name it is repeated beside the first."""
    show_config: bool = False
    """Print the settings as TOML, to be edited and given as --config, and train nothing."""

    def __call__(self) -> int:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(Config)}
        config = Config(**given)
        if self.show_config:
            full = resolved(config)
            spelled_out = {f.name: getattr(full, f.name) for f in dataclasses.fields(Config)}
            print(as_toml(Config(**{**spelled_out, "name": config.name})), end="")
            return 0
        if self.config is not None and config.name is None:
            config = dataclasses.replace(config, name=_free_name(resolved(config), config.repeats))
        return train(config)


def train(config: Config) -> int:
    """Trains with one seed or several, prints what came of it, and returns the exit status."""
    outcomes: dict[str, Outcome] = {}
    full = resolved(config)
    if config.repeats < 1:
        return refused(f"repeats must be at least 1, got {config.repeats}")
    network = full.model + (f" {full.hidden}" if full.hidden else "")
    held_out = f"{full.validation:.0%}" if full.folds is None else f"fold {full.fold} of {full.folds}"
    network += f", dropout {full.dropout:g}" if full.dropout is not None else ""
    print(
        f"{full.dataset}, {network}: {full.epochs} epochs, batches of "
        f"{full.batch_size}, {full.optimizer} at {full.learning_rate:g} times {full.decay:g} an epoch, label "
        f"smoothing {full.label_smoothing:g}, {held_out} for validation",
        flush=True,
    )
    for seed in range(config.seed, config.seed + config.repeats):
        name = f"{config.name}-seed{seed}" if config.name and config.repeats > 1 else config.name
        one = resolved(dataclasses.replace(config, seed=seed, name=name, repeats=1))
        try:
            outcomes[f"seed {seed}"] = run(one)
        except ENDED as error:
            return going_on(error, one.folder)
        print(f"seed {seed}: test accuracy {outcomes[f'seed {seed}'].accuracy:.2%}, in {one.folder}")
    print_table(f"{full.dataset}, {full.model}", outcomes)
    return 0


def _free_name(config: Settings, repeats: int) -> str:
    """The first of NAME-2, NAME-3 ... under which there is no run."""
    number = 2
    while True:
        name = f"{config.name}-{number}"
        taken = [f"{name}-seed{config.seed + i}" for i in range(repeats)] if repeats > 1 else [name]
        if not any((config.runs / one).exists() for one in taken):
            return name
        number += 1
