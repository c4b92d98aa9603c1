"""``nnkit resume``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from nnkit.cli.leaving import ENDED, going_on
from nnkit.cli.recipe import run
from nnkit.cli.report import print_table
from nnkit.cli.trained import read_record, settings_of_run
from nnkit.train.events import Callback, View
from nnkit.train.files import write_atomically

__all__ = ["Resume"]


@dataclasses.dataclass(frozen=True)
class Resume:
    """Go on with a run that was ended, from its last checkpoint.

    It comes to the very numbers of a run that never stopped. A run that has ended can go on for more epochs.
    """

    run: Path
    """The run's folder."""
    epochs: int | None = None
    """Another number of passes for the whole run, those before included."""
    data_dir: Path | None = None
    """Where its data are now, if they have moved."""

    def __call__(self) -> int:
        config = settings_of_run(self.run)
        ended = (self.run / "result.json").exists() and (self.run / "model.npz").exists()
        if ended and self.epochs is None:
            print(
                f"the run in {self.run} has had its {config.epochs} epochs: --epochs gives it more, and nnkit eval "
                "shows what came of it"
            )
            return 0
        changes = {"epochs": self.epochs, "data_dir": self.data_dir}
        changes = {name: value for name, value in changes.items() if value is not None}
        config = dataclasses.replace(config, **changes)
        try:
            outcome = run(config, resume=True, callbacks=[_beginning(self.run, changes)])
        except ENDED as error:
            options = [word for n, v in changes.items() for word in (f"--{n.replace('_', '-')}", str(v))]
            return going_on(error, self.run, options)
        print_table(str(self.run), {f"seed {config.seed}": outcome})
        return 0


def _beginning(folder: Path, changes: dict[str, object]) -> Callback:
    """Makes the folder that of a run which has not ended, as soon as nothing of it can be refused any more."""

    def callback(event: str, view: View) -> None:
        if event == "start":
            # First: an end that is recorded beside settings for more epochs would stand for theirs.
            (folder / "result.json").unlink(missing_ok=True)
            if changes:
                _note(folder, changes)

    return callback


def _note(folder: Path, changes: dict[str, object]) -> None:
    """Puts changed settings into config.json, which says how the run is repeated."""
    found = read_record(folder, "config.json")
    found["config"] |= {name: str(v) if isinstance(v, Path) else v for name, v in changes.items()}
    write_atomically(folder / "config.json", json.dumps(found, indent=2, ensure_ascii=False).encode() + b"\n")
