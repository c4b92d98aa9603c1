"""Workers of one study that are killed at random, and a count at the end: nothing lost, nothing doubled.

    python -m tests.search.kill                            # four workers, 200 trials, on each kind of storage
    python -m tests.search.kill --storage postgresql --workers 8 --trials 1000
    python -m tests.search.kill --storage sqlite --wrong reclaim          # a wrong one, which must be found out

A worker is a process that asks, trains and tells. It is killed by SIGKILL, from outside at random moments and by its
own hand before or after a random call of the storage, which no clock would hit; a new one takes its place. Every
second worker has a folder for temporary files of its own, as if it ran on another machine, so that the others learn
of its death by its silence alone. Now and then one is stopped for longer than the others wait and then goes on, like
a machine that was asleep. A PostgreSQL server is stopped once, in the way of a power cut, and started again.

What a worker was told to have been counted it writes into a file of its own, and so at the end it can be said:

- exactly the trials that were asked for are told, with the numbers 0, 1, 2, ...;
- each has the configuration that a single worker's study has under this number, and the value that belongs to it;
- every trial of which a worker heard that it counts is in the study, as that worker told it, and no two heard it;
- no trial is left running;
- a trial was asked for once, and once more for each time that it was taken back.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from nnkit import search
from nnkit.search import loop, patience, workers
from nnkit.search.patience import PatientStorage
from nnkit.search.workers import Lease

__all__ = ["Seen", "main", "run"]

SPACE = {
    "lr": search.log_uniform(1e-4, 1.0),
    "optimizer": search.conditional(
        {"sgd": {"momentum": search.uniform(0.0, 0.99)}, "adam": {"b1": search.uniform(0.8, 0.99)}}
    ),
}
NAME = "killed"
KINDS = ("postgresql", "sqlite", "journal")
WRONG = {
    "reclaim": "nobody takes back what a dead worker had",
    "enqueue": "a dead worker's trial is failed, and a new one is made",
    "target": "a worker asks without looking at how many there are",
    "claim": "a worker takes a waiting trial whatever the storage answers",
    "finish": "a trial is told without looking at whose it is, and one that is finished passes for told",
    "lock": "SQLite's transactions begin as Optuna's do",
}


class Settings(NamedTuple):
    spec: str
    folder: str
    trials: int
    batch: int
    seconds: float
    itself: float
    sweep: bool
    wrong: str | None
    interval: float = 0.5
    grace: float = 4.0


class Seen(NamedTuple):
    """What was seen: ``wrong`` has a sentence for each thing that must not be."""

    wrong: list[str]
    numbers: dict[str, Any]


def run(
    kind: str,
    *,
    workers: int = 4,
    trials: int = 200,
    batch: int = 4,
    seconds: float = 0.15,
    every: float = 6.0,
    itself: float = 0.004,
    seed: int = 0,
    sweep: bool = False,
    wrong: str | None = None,
    limit: float = 300.0,
) -> Seen:
    """Runs it on a storage of ``kind`` "postgresql", "sqlite" or "journal".

    Args:
      seconds: that a training lasts.
      every: trials told between two kills from outside, in the mean.
      itself: probability with which a worker kills itself at a call of the storage, before or after it.
      sweep: whether the workers call ``search.sweep`` and train by a compiled program.
      wrong: a key of ``WRONG``.
      limit: seconds after which the study is taken to have got stuck.
    """
    with contextlib.ExitStack() as stack:
        folder = tempfile.mkdtemp(prefix="nnkit-kill-")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        server: Any = None
        if kind == "postgresql":
            from tests.search import postgres

            server = stack.enter_context(postgres.server())
        spec = {"sqlite": f"{folder}/study.db", "journal": f"journal:{folder}/study.log"}.get(kind)
        settings = Settings(
            server.url if server else str(spec), folder, trials, batch, seconds, itself, sweep, wrong
        )
        crowd = _Crowd(settings, workers, seed)
        stack.callback(crowd.end)
        study = _join(settings).optuna
        began = time.monotonic()
        crowd.begin()
        restart: float = math.inf if server is None else 0.4 * trials  # at so many told
        next_kill, next_stop, away_since = every, 0.2 * trials, None
        while crowd.alive() and time.monotonic() - began < limit:
            time.sleep(0.05)
            crowd.replace_the_dead()
            crowd.wake()
            if away_since is not None:
                if time.monotonic() > away_since + 1.0:
                    server.start()
                    away_since = None
                continue
            done = len(search.counted(study))
            if done >= next_kill:
                # Some moment of what it is at, and not always the one after a trial was told.
                time.sleep(crowd.random.uniform(0.0, seconds))
                crowd.kill_one()
                next_kill = done + crowd.random.expovariate(1 / every)
            if done >= next_stop:
                crowd.stop_one()
                next_stop = done + 0.2 * trials
            if done >= restart:
                server.stop(immediate=True)
                away_since, restart = time.monotonic(), math.inf
        took = time.monotonic() - began
        stuck = crowd.alive()
        crowd.end()
        if away_since is not None:
            server.start()
        seen = _check(settings, _join(settings).optuna, crowd)
        if stuck:
            seen.wrong.insert(0, f"not finished after {limit:.0f} s")
        if server is not None and restart < math.inf:
            seen.wrong.append("the server was not restarted")
        return Seen(seen.wrong, {"storage": kind, "seconds": round(took, 1)} | seen.numbers)


_IMPORTED = [
    *(f"nnkit.search.{name}" for name in ("loop", "patience", "samplers", "relational")),
    "psycopg",
]


class _Crowd:
    """The workers: forked from a server that has imported everything, as an import takes longer than a trial."""

    def __init__(self, settings: Settings, workers: int, seed: int):
        self.settings, self.random = settings, random.Random(seed)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(_IMPORTED)
        self.slots: list[Any] = [None] * workers
        self.started = self.killed = self.killed_itself = self.stopped = 0
        self.asleep: list[tuple[Any, float]] = []
        self.failed: list[str] = []

    def begin(self) -> None:
        for slot in range(len(self.slots)):
            self._start(slot)

    def alive(self) -> bool:
        return any(process is not None for process in self.slots)

    def replace_the_dead(self) -> None:
        for slot, process in enumerate(self.slots):
            if process is None or process.is_alive():
                continue
            process.join()
            self.slots[slot] = None
            if process.exitcode == -signal.SIGKILL:
                self.killed_itself += 1
                self._start(slot)
            elif process.exitcode != 0:
                self.failed.append(f"worker {process.name} ended with {process.exitcode}")

    def kill_one(self) -> None:
        slot = self._one()
        if slot is not None:
            self.slots[slot].kill()
            self.slots[slot].join()
            self.killed += 1
            self._start(slot)

    def stop_one(self) -> None:
        """Stops one for longer than the others wait for it."""
        slot = self._one()
        if slot is not None and not self.asleep:
            os.kill(self.slots[slot].pid, signal.SIGSTOP)
            self.asleep.append((self.slots[slot], time.monotonic() + 1.5 * self.settings.grace))
            self.stopped += 1

    def wake(self) -> None:
        for process, until in self.asleep:
            if time.monotonic() >= until and process.is_alive():
                os.kill(process.pid, signal.SIGCONT)
        self.asleep = [(process, until) for process, until in self.asleep if time.monotonic() < until]

    def _one(self) -> int | None:
        """One that has begun."""
        diary = f"{self.settings.folder}/worker-{{}}.jsonl".format
        living = [
            slot
            for slot, process in enumerate(self.slots)
            if process is not None and process.is_alive() and os.path.exists(diary(process.name))
        ]
        return self.random.choice(living) if living else None

    def end(self) -> None:
        for process in self.slots:
            if process is not None:
                process.kill()
                process.join()
        self.slots = [None] * len(self.slots)

    def _start(self, slot: int) -> None:
        # Every second one elsewhere: it does not see the others' locks, and they do not see its.
        elsewhere = slot % 2 == 1
        self.slots[slot] = process = self.context.Process(
            target=_work, args=(self.settings, self.started, elsewhere), name=str(self.started)
        )
        self.started += 1
        process.start()


def _work(settings: Settings, number: int, elsewhere: bool) -> None:
    sys.stdout = sys.stderr = open(f"{settings.folder}/output-{number}", "w", buffering=1)  # noqa: SIM115
    if elsewhere:
        tempfile.tempdir = f"{settings.folder}/machine-{number}"
        os.mkdir(tempfile.tempdir)
    write = _Diary(settings.folder, number)

    class Logged(Lease):
        def __init__(self, study: Any):
            super().__init__(study, interval=settings.interval, grace=settings.grace)
            write("begun", worker=self.id)

        def ask(self, target: int, batch: int, **how: Any) -> Any:
            given = super().ask(target, batch, **how)
            write("asked", numbers=[trial.number for trial in given])
            return given

        def _put_back(self, trial_id: int, had: str | None) -> bool:
            write("puts back", trial=trial_id)
            done = super()._put_back(trial_id, had)
            write("has put back" if done else "has not put back", trial=trial_id)
            return done

    loop.Lease = workers.Lease = Logged  # type: ignore[misc]
    _make_wrong(settings.wrong)
    _make_deadly(settings.itself, number)
    train = _sweep if settings.sweep else _ask_and_tell
    train(settings, write)
    write("ended")


class _Diary:
    """What a worker has done, in a file: one write for each line, which its death cannot take back."""

    def __init__(self, folder: str, number: int):
        self.file = os.open(f"{folder}/worker-{number}.jsonl", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)

    def __call__(self, what: str, **more: Any) -> None:
        os.write(self.file, json.dumps({"what": what, **more}).encode() + b"\n")


def _ask_and_tell(settings: Settings, write: Any) -> None:
    space = search.as_space(SPACE)
    study = _join(settings).optuna
    with workers.Lease(study) as lease:
        while not lease.finished(settings.trials):
            lease.reclaim()
            batch = lease.ask(settings.trials, settings.batch, then=space.suggest)
            for trial in batch:
                flat = space.suggest(trial)
                time.sleep(settings.seconds)
                record = {"nnkit": {"worker": lease.id}}
                if search.finish(study, trial, _value(flat), worker=lease.id, attrs=record):
                    write("told", number=trial.number)
                else:
                    write("refused", number=trial.number)
            if not batch:
                lease.pause()


def _sweep(settings: Settings, write: Any) -> None:
    def note(event: str, view: search.View) -> None:
        if event == "trial" and view.trial is not None:
            write("told", number=view.trial.number)

    _swept(settings.spec, settings.trials, settings.batch, settings.seconds, note)


def _swept(spec: str | None, trials: int, batch: int | None, seconds: float, note: Any = ()) -> search.Study:
    def train_fn(key: Any, hparams: Any) -> dict[str, Any]:
        kind = hparams["optimizer"]["kind"]
        rest = hparams["optimizer"]["momentum" if kind == "sgd" else "b1"]
        loss = (jnp.log10(hparams["lr"]) + 2.0) ** 2 + rest + jax.random.normal(key)
        zero = jax.pure_callback(
            lambda _: time.sleep(seconds) or jnp.float32(0).__array__(), jnp.float32(0), loss
        )
        return {"val_loss": loss + zero}

    return search.sweep(
        train_fn,
        SPACE,
        sampler="random",
        trials=trials,
        batch=batch,
        storage=spec,
        name=NAME,
        members="exact",
        workers=1,
        progress=False,
        callbacks=note,
    )


def _join(settings: Settings) -> search.Study:
    space = search.as_space(SPACE)
    study = search.begin_study(space, metric="val_loss", sampler="random", storage=settings.spec, name=NAME)
    study.optuna.sampler = search.make_sampler("random", space, seed=0)
    return study


def _value(flat: dict[str, Any]) -> float:
    rest = flat.get("optimizer/sgd/momentum", flat.get("optimizer/adam/b1"))
    return (math.log10(flat["lr"]) + 2.0) ** 2 + rest


def _make_deadly(probability: float, number: int) -> None:
    """At a call of the storage this worker kills itself, before it or after it; in a journal also while it writes."""
    chance = random.Random(number)

    def perhaps() -> None:
        if chance.random() < probability:
            os.kill(os.getpid(), signal.SIGKILL)

    def deadly(call: Any) -> Any:
        def dies(*args: Any, **kwargs: Any) -> Any:
            perhaps()
            answer = call(*args, **kwargs)
            perhaps()
            return answer

        return dies

    for name in patience.CALLS:
        setattr(PatientStorage, name, deadly(getattr(PatientStorage, name)))
    os.fsync = deadly(os.fsync)


def _make_wrong(which: str | None) -> None:
    """Puts one fault into this worker: see ``WRONG``."""
    here: Any = workers
    lease: Any = workers.Lease
    if which == "reclaim":
        lease.reclaim = lambda self: []
    elif which == "enqueue":

        def put_back(self: Any, trial_id: int, had: str | None) -> bool:
            trial = self._storage.get_trial(trial_id)
            with contextlib.suppress(UpdateFinishedTrialError):
                self._storage.set_trial_state_values(trial_id, TrialState.FAIL)
                new = create_trial(state=TrialState.WAITING, system_attrs={"fixed_params": trial.params})
                self.study.add_trial(new)
            return True

        lease._put_back = put_back
    elif which == "target":
        asked = lease.ask
        lease.ask = lambda self, target, batch, **how: asked(self, 10**6, batch, **how)
    elif which == "claim":

        def claim(storage: Any, trial_id: int, worker: str) -> bool:
            with contextlib.suppress(UpdateFinishedTrialError):
                storage.set_trial_state_values(trial_id, TrialState.RUNNING)
                storage.set_trial_user_attr(trial_id, "worker", worker)
            return True

        here._claim = claim
    elif which == "finish":

        def finish(study: Any, trial: Any, value: float, *, attrs: Any, **_: Any) -> bool:
            with contextlib.suppress(UpdateFinishedTrialError):
                for name, content in attrs.items():
                    study._storage.set_trial_user_attr(trial._trial_id, name, content)
                study._storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [value])
            return True

        search.finish = search.records.finish = finish  # type: ignore[attr-defined]
    elif which == "lock":
        here = patience
        here._lock_before_reading = lambda engine: None


def _check(settings: Settings, study: Any, crowd: _Crowd) -> Seen:
    diaries = _diaries(settings.folder)
    trials: list[FrozenTrial] = study.get_trials(deepcopy=False)
    by_number = {trial.number: trial for trial in trials}
    told = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    running = [trial.number for trial in trials if trial.state == TrialState.RUNNING]
    failed = [trial.number for trial in trials if trial.state == TrialState.FAIL]
    waiting = [trial.number for trial in trials if trial.state == TrialState.WAITING]
    wrong = list(crowd.failed)
    if len(told) != settings.trials:
        wrong.append(f"{len(told)} trials count instead of {settings.trials}")
    if len(by_number) != len(trials):
        wrong.append(f"{len(trials) - len(by_number)} trials have the number of another one")
    if running:
        wrong.append(f"left running: {running}")
    if failed:
        wrong.append(f"failed: {failed}")
    lost = [number for number in waiting if number < settings.trials]
    if lost:
        wrong.append(f"left waiting: {lost}")
    alone = _alone(settings)
    for number, (params, value) in enumerate(alone):
        trial = by_number.get(number)
        if trial is None or trial.params != params:
            wrong.append(f"trial {number} is not what a single worker has under this number")
        elif trial.state == TrialState.COMPLETE and trial.value != value:
            wrong.append(f"trial {number} has the value {trial.value} instead of {value}")
    configurations = collections.Counter(json.dumps(trial.params, sort_keys=True) for trial in told)
    doubled = sum(count > 1 for count in configurations.values())
    if doubled:
        wrong.append(f"{doubled} configurations are there more than once")
    heard: dict[int, list[str]] = collections.defaultdict(list)
    for diary in diaries:
        for line in diary:
            if line["what"] == "told":
                heard[line["number"]].append(diary[0]["worker"])
    for number, who in sorted(heard.items()):
        trial = by_number.get(number)
        if len(who) > 1:
            wrong.append(f"{len(who)} workers heard that their trial {number} counts")
        elif trial is None or trial.state != TrialState.COMPLETE or _teller(trial) != who[0]:
            wrong.append(
                f"trial {number}, which {who[0]} was told to have been counted, is not there from it"
            )
    asked = collections.Counter(n for line in _lines(diaries, "asked") for n in line["numbers"])
    ids = {trial._trial_id: trial.number for trial in trials}
    begun = collections.Counter(ids.get(line["trial"]) for line in _lines(diaries, "puts back"))
    refused = collections.Counter(ids.get(line["trial"]) for line in _lines(diaries, "has not put back"))
    for number, times in sorted(asked.items()):
        if times > 1 + begun[number] - refused[number]:
            wrong.append(
                f"trial {number} was given out {times} times and taken back {begun[number] - refused[number]} times"
            )
    return Seen(
        wrong,
        {
            "told": len(told),
            "workers started": crowd.started,
            "killed from outside": crowd.killed,
            "killed at a call": crowd.killed_itself,
            "stopped for a while": crowd.stopped,
            "taken back": len(_lines(diaries, "has put back")),
            "given out again": sum(asked.values()) - len(asked),
            "refused when told late": len(_lines(diaries, "refused")),
            "told, but killed before it heard so": len(told) - len(heard),
            "beyond the target, waiting": len(waiting) - len(lost),
        },
    )


def _teller(trial: FrozenTrial) -> str | None:
    return trial.user_attrs["nnkit"]["worker"]


def _alone(settings: Settings) -> list[tuple[dict[str, Any], float]]:
    """Parameters and value of each trial of a study that has one worker, which nobody disturbs."""
    if settings.sweep:
        study = _swept(None, settings.trials, None, 0.0).optuna
        return [(trial.params, trial.value) for trial in study.get_trials(deepcopy=False)]
    space = search.as_space(SPACE)
    study = _join(settings._replace(spec=None)).optuna  # type: ignore[arg-type]
    with Lease(study) as lease:
        given = lease.ask(settings.trials, settings.trials)
        return [(trial.params, _value(flat)) for trial in given for flat in [space.suggest(trial)]]


def _diaries(folder: str) -> list[list[dict[str, Any]]]:
    found = []
    for file in sorted(Path(folder).glob("worker-*.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        if lines:
            found.append(lines)
    return found


def _lines(diaries: list[list[dict[str, Any]]], what: str) -> list[dict[str, Any]]:
    return [line for diary in diaries for line in diary if line["what"] == what]


def main() -> None:
    parser = argparse.ArgumentParser(description="Workers of one study that are killed at random.")
    parser.add_argument("--storage", choices=KINDS, help="by default one after the other")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.15, help="that a training lasts")
    parser.add_argument("--every", type=float, default=6.0, help="trials between two kills from outside")
    parser.add_argument("--itself", type=float, default=0.004, help="probability of a kill at a storage call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sweep", action="store_true", help="workers call search.sweep")
    parser.add_argument("--wrong", choices=sorted(WRONG), help="put a fault in, which must be found")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which it is stuck")
    arguments = vars(parser.parse_args())
    if arguments["wrong"]:
        print(f"with a fault: {WRONG[arguments['wrong']]}")
    kind = arguments.pop("storage")
    found = [_reported(run(kind, **arguments)) for kind in ([kind] if kind else KINDS)]
    sys.exit(any(found))


def _reported(seen: Seen) -> bool:
    """Prints what was seen, and says whether something is wrong."""
    for name, number in seen.numbers.items():
        print(f"{name:>36}: {number}")
    for sentence in seen.wrong[:20]:
        print(f"WRONG: {sentence}")
    found = f"{len(seen.wrong)} things are wrong"
    print(found if seen.wrong else "nothing lost, nothing doubled, none left running", flush=True)
    return bool(seen.wrong)


if __name__ == "__main__":
    main()
