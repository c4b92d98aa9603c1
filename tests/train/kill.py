"""Kills a training process by SIGKILL at random moments, resumes it, and compares with one never killed.

    python -m tests.train.kill --kills 100

A small network with batch norm and dropout is trained by ``train.fit(..., run_dir=..., resume=True)`` under
Adam, a plateau rule and early stopping, with a checkpoint every few steps. A run that reaches its end must
have left, bit for bit, what an undisturbed run leaves: the state that ``fit`` returns, the last checkpoint
(parameters, layer state, optimizer state, key, step, what early stopping remembers), metrics.csv and, but
for the clock, metrics.jsonl. Runs are begun until the kills are used up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np

from nnkit import layers, losses, metrics, optim, train
from nnkit.train.checkpoint_files import folders
from nnkit.train.checkpoints import steps
from nnkit.train.files import is_leftover

_AT_START = 0.15
"""The part of the kills that come before the first steps: while the run is opened, restored and compiled."""

_LIVES = 5
"""A process is killed within this part of the time that the undisturbed run takes from its first steps on."""


def train_once(run_dir: str, seed: int, final: str) -> None:
    """Begins the run or goes on with it, and saves what comes out at its end."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(220, 8)).astype("float32")
    y = (x @ rng.normal(size=(8, 3)) + rng.normal(size=(220, 3))).argmax(-1).astype("int32")
    model = layers.serial(
        layers.dense(16), layers.batch_norm(), layers.relu, layers.dropout(0.2), layers.dense(3)
    )
    optimizer = optim.chain(optim.adam(3e-2), optim.reduce_on_plateau(0.5, patience=1, monitor="val_loss"))
    trainer = train.trainer(
        model, losses.softmax_cross_entropy, optimizer, metrics={"accuracy": metrics.accuracy}
    )
    told = iter(["under way"])

    def tell(event: str, view: train.View) -> None:
        if event == "chunk":
            for line in told:
                print(line, flush=True)

    ts, history = train.fit(
        trainer,
        (x[:150], y[:150]),  # nine batches and a smaller one
        epochs=40,
        key=jax.random.key(seed),
        batch_size=16,
        validation=(x[150:], y[150:]),
        early_stopping=train.early_stopping(patience=8, restore_best=True),
        run_dir=run_dir,
        resume=True,
        checkpoint_every=3,
        keep_best=1,
        steps_per_call=2,
        callbacks=[tell],
        progress=False,
    )
    train.save_tree(final, {"state": ts, "epochs": len(history)})


def serve() -> None:
    """For each line of the input, a process that trains: forked, so that the imports are done once.

    The undisturbed run keeps its compiled programs for those after it, which only read them: a killed process
    spends its time on training.
    """
    for line in sys.stdin:
        child = os.fork()
        if not child:
            warnings.simplefilter("error")  # A damaged checkpoint is a warning.
            order = json.loads(line)
            _use_cache(order.pop("cache"), writes=order.pop("writes"))
            try:
                train_once(**order)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(f"process {child}", flush=True)
        print(f"ended {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)


def _use_cache(folder: str, *, writes: bool) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0 if writes else 1e9)


class Counts(NamedTuple):
    """What the kills hit.

    Attributes:
      kills: how many there were.
      runs: over how many runs.
      starting: of processes that had taken no step yet.
      saving: that left a checkpoint half written, or half removed.
    """

    kills: int = 0
    runs: int = 0
    starting: int = 0
    saving: int = 0


def kill_and_compare(kills: int, seed: int, folder: Path, *, tell: Any = print) -> Counts:
    """Kills so many processes; raises AssertionError where a run is not what an undisturbed one is."""
    moments, counts = random.Random(seed), Counts()
    with _server() as server:
        while counts.kills < kills:
            name = f"{counts.runs}"
            undisturbed = Run(folder / "undisturbed" / name, seed + counts.runs)
            assert undisturbed.go_on(server, None), "the undisturbed run did not reach its end"
            run = Run(folder / "killed" / name, seed + counts.runs)
            before, within = counts.kills, undisturbed.seconds / _LIVES
            while True:
                reached = run.step()
                moment = moments.uniform(0, within) if counts.kills < kills else None
                at_start = moments.random() < _AT_START
                if run.go_on(server, moment, at_start):
                    break
                # Where the machine has become slower than it was, processes must be let live longer.
                within = undisturbed.seconds / _LIVES if run.step() > reached else 1.5 * within
                counts = counts._replace(
                    kills=counts.kills + 1,
                    starting=counts.starting + (not run.took_steps),
                    saving=counts.saving + run.is_half_saved(),
                )
            counts = counts._replace(runs=counts.runs + 1)
            compare(undisturbed, run)
            killed = counts.kills - before
            tell(
                f"run {counts.runs}: killed {killed} times, {run.epochs()} epochs, the same bits", flush=True
            )
    return counts


class Run:
    """A run folder, and where the end result goes."""

    def __init__(self, folder: Path, seed: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.cache = folder.parent.parent / "cache"
        self.seconds, self.took_steps = 0.0, False
        self.run_dir, self.final, self.seed = folder / "run", folder / "final.npz", seed

    def go_on(self, server: subprocess.Popen[str], moment: float | None, at_start: bool = False) -> bool:
        """Starts a process and kills it at the moment, if any; whether it came to its end before."""
        pipe_in, pipe_out = _pipes(server)
        order = {"run_dir": str(self.run_dir), "seed": self.seed, "final": str(self.final)}
        order |= {"cache": str(self.cache), "writes": moment is None}
        print(json.dumps(order), file=pipe_in, flush=True)
        process = int(pipe_out.readline().split()[1])
        said = "" if at_start else pipe_out.readline()
        under_way = time.monotonic()
        if moment is not None and not said.startswith("ended"):
            time.sleep(moment)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        while not said.startswith("ended"):
            said = pipe_out.readline()
            assert said, "the server of training processes ended"
            at_start &= said.startswith("ended")
        self.took_steps = not at_start
        self.seconds = time.monotonic() - under_way
        status = int(said.split()[1])
        assert status in (0, -signal.SIGKILL), "a training process failed: its error stands above"
        return status == 0

    def step(self) -> int:
        """Of the last checkpoint."""
        return max(steps(self.run_dir / "checkpoints"), default=-1)

    def is_half_saved(self) -> bool:
        checkpoints = self.run_dir / "checkpoints"
        return checkpoints.is_dir() and any(
            is_leftover(p) or p.suffix == ".replaced" for p in checkpoints.iterdir()
        )

    def epochs(self) -> int:
        return len(train.read_metrics(self.run_dir))


def compare(undisturbed: Run, killed: Run) -> None:
    """Raises AssertionError where the two runs did not leave the same bits."""
    one, other = undisturbed.run_dir, killed.run_dir
    assert undisturbed.final.read_bytes() == killed.final.read_bytes(), "fit returned another state"
    kept, left = ({path.name: path for path in folders(run / "checkpoints")} for run in (one, other))
    # A kill between the last save and the removal of older ones leaves these too.
    assert next(iter(kept)) == next(iter(left)), "another last checkpoint"
    assert kept.keys() <= left.keys(), f"checkpoints {[*left]} are left, and not {[*kept]}"
    for name, path in kept.items():
        assert (path / "state.npz").read_bytes() == (left[name] / "state.npz").read_bytes(), f"another {name}"
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes(), "another metrics.csv"
    assert _without_clock(one) == _without_clock(other), "another metrics.jsonl"


def _without_clock(run: Path) -> list[dict[str, Any]]:
    clock = {"seconds", "time"}
    return [{name: v for name, v in row.items() if name not in clock} for row in train.read_records(run)]


@contextlib.contextmanager
def _server() -> Iterator[subprocess.Popen[str]]:
    if not hasattr(os, "fork"):
        raise SystemExit("this needs a system that has fork and SIGKILL")
    command = [sys.executable, "-W", "ignore", "-m", "tests.train.kill", "--serve"]
    environment = {
        "JAX_PLATFORMS": "cpu",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    root = Path(__file__).parent.parent.parent
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, env=environment
    ) as server:
        yield server
        _pipes(server)[0].close()


def _pipes(server: subprocess.Popen[str]) -> tuple[TextIO, TextIO]:
    assert server.stdin is not None
    assert server.stdout is not None
    return server.stdin, server.stdout  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description="Kills training processes at random moments.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the runs")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = kill_and_compare(arguments.kills, arguments.seed, Path(folder))
    print(
        f"{counts.kills} kills in {counts.runs} runs, {counts.starting} of them before the first step and "
        f"{counts.saving} in the middle of a save: the same bits as undisturbed runs "
        f"({time.monotonic() - began:.0f} s)"
    )
    return None


if __name__ == "__main__":
    main()
