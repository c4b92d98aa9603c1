"""Loads a run that experiments/mnist.py left and evaluates it again on its test part.

    python experiments/predict.py runs/digits-mlp-seed0

The data are split and scaled as in training; the numbers must come out as recorded in result.json,
and the exit status is 1 where they do not.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from mnist import Settings, build_model, evaluate, load_splits, print_table

from nnkit import train


def main(run: Path, data_dir: Path | None = None) -> int:
    """Evaluate a run again.

    Args:
      run: the run's folder.
      data_dir: where its data are now, if they have moved.
    """
    try:
        config = read_config(run)
        if data_dir is not None:
            config = dataclasses.replace(config, data_dir=data_dir)
        test = load_splits(config).test
        assert test is not None
        model = build_model(config, len(test.classes))
        like = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(test.x[:1]))
        saved = train.load_tree(run / "model.npz", {"params": like[0], "state": like[1]})
        recorded = train.read_result(run)
    except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    outcome, _, _ = evaluate(model, saved["params"], saved["state"], test)
    print_table(str(run), {"now": outcome})
    changed = {
        name: (recorded.get(name), value)
        for name, value in outcome._asdict().items()
        if str(recorded.get(name)) != str(value)  # as text, in which NaN equals NaN
    }
    for name, (before, now) in changed.items():
        print(f"{name} was recorded as {before!r} and is now {now!r}", file=sys.stderr)
    return 1 if changed else 0


def read_config(run: Path) -> Settings:
    """The settings with which the run was made."""
    settings = dict(train.read_config(run)["config"])
    missing = {"dataset", "model", "hidden"} - set(settings)
    if missing:
        raise ValueError(
            f"{run} is no run of experiments/mnist.py: its configuration has no {sorted(missing)}"
        )
    settings["hidden"] = None if settings["hidden"] is None else tuple(settings["hidden"])
    for name in ("data_dir", "runs"):
        settings[name] = None if settings[name] is None else Path(settings[name])
    return Settings(**settings)


if __name__ == "__main__":
    try:
        import tyro
    except ImportError:
        sys.exit("the command line needs tyro: pip install 'nnkit[experiments]'")
    sys.exit(tyro.cli(main, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,)))
