"""What ``import nnkit`` adds to ``import jax``: fresh processes, in turn, medians.

python -m benchmarks.import_time
"""

from __future__ import annotations

import statistics
import subprocess
import sys

__all__ = ["main", "measure"]

ROUNDS = 15
CODE = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"


def measure(modules: str) -> float:
    """Seconds that a fresh process takes to import ``modules``."""
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(modules)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    """Prints the medians and their difference."""
    pairs = [(measure("jax"), measure("jax, nnkit")) for _ in range(ROUNDS)]
    jax, both = (statistics.median(column) for column in zip(*pairs, strict=True))
    added = statistics.median(b - a for a, b in pairs)
    print(
        f"import jax {jax:.3f} s, import jax and nnkit {both:.3f} s; nnkit adds {added:.3f} s ({ROUNDS} rounds)"
    )


if __name__ == "__main__":
    main()
