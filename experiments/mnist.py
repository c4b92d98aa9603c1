"""Trains the lecture's network on small images and leaves a run folder to look at.

    python experiments/mnist.py                                    # the bundled digits
    python experiments/mnist.py --dataset mnist --data-dir DIR     # a folder of IDX files
    python experiments/mnist.py --dataset cifar10                  # TensorFlow Datasets

``runs/<name>/`` then holds config.json, metrics.csv, result.json, curves.png, confusion.png,
mistakes.png and the trained parameters; experiments/predict.py evaluates them again. It is
``nnkit train``, whose recipe is in nnkit/cli/recipe.py.
"""

from __future__ import annotations

import sys

from nnkit.cli.recipe import Outcome, build_model, evaluate, load_splits, run
from nnkit.cli.settings import Config, Settings, resolved
from nnkit.cli.train import train as main

__all__ = [
    "Config",
    "Outcome",
    "Settings",
    "build_model",
    "evaluate",
    "load_splits",
    "main",
    "resolved",
    "run",
]

if __name__ == "__main__":
    try:
        import tyro
    except ImportError:
        sys.exit("the command line needs tyro: pip install 'nnkit[experiments]'")
    sys.exit(main(tyro.cli(Config, description=__doc__)))
