"""``nnkit eval``."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Literal

from nnkit.cli.recipe import build_model, evaluate, load_splits
from nnkit.cli.report import print_table
from nnkit.cli.trained import load_parameters, read_record, settings_of_run

__all__ = ["Eval"]


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluate a run again on its data.

    The data are split and scaled as in training. On the test part the numbers must come out as recorded in
    result.json; the exit status is 1 where they do not.
    """

    run: Path
    """The run's folder."""
    part: Literal["test", "validation", "train"] = "test"
    """Which part of the data."""
    data_dir: Path | None = None
    """Where its data are now, if they have moved."""
    json: bool = False
    """Print the numbers as JSON."""

    def __call__(self) -> int:
        config = settings_of_run(self.run)
        if self.data_dir is not None:
            config = dataclasses.replace(config, data_dir=self.data_dir)
        recorded = read_record(self.run, "result.json")
        splits = load_splits(config)
        part = getattr(splits, self.part)
        if part is None:
            raise ValueError(f"the run {str(self.run)!r} held out no examples for validation")
        model = build_model(config, len(part.classes))
        params, state = load_parameters(self.run, model, part.x.shape[1:])
        outcome, _, _ = evaluate(model, params, state, part)
        if self.json:
            print(json.dumps({"part": self.part, "examples": len(part), **outcome._asdict()}))
        else:
            print_table(f"{self.run}, {self.part}", {"now": outcome})
        if self.part != "test":
            return 0
        changed = {
            name: (recorded.get(name), value)
            for name, value in outcome._asdict().items()
            if str(recorded.get(name)) != str(value)  # as text, in which NaN equals NaN
        }
        for name, (before, now) in changed.items():
            print(f"{name} was recorded as {before!r} and is now {now!r}", file=sys.stderr)
        return 1 if changed else 0
