"""Loads a run that experiments/mnist.py left and evaluates it again on its test part.

    python experiments/predict.py runs/digits-mlp-seed0

The data are split and scaled as in training; the numbers must come out as recorded in result.json,
and the exit status is 1 where they do not. It is ``nnkit eval``; ``nnkit predict`` takes images of one's own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nnkit.cli.evaluate import Eval
from nnkit.cli.leaving import refused


def main(run: Path, data_dir: Path | None = None) -> int:
    """Evaluate a run again.

    Args:
      run: the run's folder.
      data_dir: where its data are now, if they have moved.
    """
    try:
        return Eval(run, data_dir=data_dir)()
    except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
        return refused(error)


if __name__ == "__main__":
    try:
        import tyro
    except ImportError:
        sys.exit("the command line needs tyro: pip install 'nnkit[experiments]'")
    sys.exit(tyro.cli(main, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,)))
