"""Who evaluates: this process, or worker processes, one thread each, that live as long as the search.

A worker is a fresh Python process that talks through a pair of pipes. It ends by itself, with all that it started,
when the pipe to the process that started it closes, so nothing is left running after a kill. A trial whose worker dies
is given to a new worker once; if that one dies too, the trial fails. So does, at once, a trial that exceeds its time
limit; its worker is killed. A trial for which the memory of the GPU does not suffice runs again among fewer, the batch
size stays; it fails if it was alone.
"""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Protocol as Interface
from typing import Self

import torch

from placesearch.errors import DataError, StudyError, TrainingError
from placesearch.evaluation.candidate import Evaluator, Watch, failed
from placesearch.evaluation.own import Evaluate, OwnEvaluator, evaluation_named
from placesearch.models.architecture import Architecture
from placesearch.models.weights import Checkpoint, read_weights
from placesearch.records import OutOfMemory, StepEnded, Task, Told, TrialRecord
from placesearch.training.datasets import Data, load_data, shared_data
from placesearch.training.loop import Protocol

LOOKED_AFTER_EVERY = 1.0
"""Seconds between two looks for workers that died while something that they started holds their pipe open."""

FAREWELL = 5.0
"""Seconds that a worker whose pipe is closed may take to end by itself."""

KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**31), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
"""What makes the C library of Linux keep freed memory in the process. By default it returns gradients and activations
of some megabytes to the system in each step and has them mapped and cleared anew in the next: 7,000 pages a step in
ResNet-18 at 32x32 in batches of 128. Kept, one thread makes 1.02 times the steps, by `tests/benchmarks/kept_memory.py`.
"""


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker needs to know to evaluate the candidates of a study.

    Args:
        plain: The backbone without blocks.
        protocol: How to train.
        data: The data set's name or path; not loaded where the evaluation is the user's own.
        device: Where to train.
        weights: What the plain network starts from, as `read_weights` takes it; None for scratch.
        evaluate: Name of the user's own evaluation; None for the built-in training.
        branches: Folder of the branches from which candidates go on, if they do.
        shared: File from which the data are mapped, made by `share_data`; None if each worker loads them.
        skipped: Images that are left out, as `load_data` takes them.
    """

    plain: Architecture
    protocol: Protocol
    data: str
    device: str
    weights: str | None = None
    branches: str | None = None
    evaluate: str | None = None
    shared: str | None = None
    skipped: tuple[str, ...] = ()

    def evaluator(self, data: Data | None = None, evaluate: Evaluate | None = None) -> Evaluator | OwnEvaluator:
        """Load weights, and data and code if they are not loaded yet, and get ready."""
        evaluate = evaluate or (evaluation_named(self.evaluate) if self.evaluate else None)
        if evaluate is not None:
            return OwnEvaluator(self.plain, self.protocol, torch.device(self.device), evaluate, self._checkpoint())
        if data is None:
            size = self.plain.input_size
            data = shared_data(Path(self.shared)) if self.shared else load_data(self.data, size, self.skipped)
        branches = Path(self.branches) if self.branches else None
        return Evaluator(self.plain, self.protocol, data, torch.device(self.device), self._checkpoint(), branches)

    def _checkpoint(self) -> Checkpoint | None:
        """Read the weights, if there are any."""
        return read_weights(self.weights, self.plain.backbone) if self.weights else None


@dataclass(frozen=True, slots=True)
class Began:
    """Says that a worker, which is ready now, has begun its task; from here on the time of the trial counts."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Asks a worker for its pace: how many steps a second of the plain network it takes, while others do the same."""

    seconds: float


class Evaluators(Interface):
    """What evaluates tasks, several at a time."""

    size: int

    def submit(self, task: Task) -> None:
        """Begin a task, or keep it until there is time for it."""

    def results(self, timeout: float | None = None) -> list[TrialRecord]:
        """Wait until at least one task has ended and return the records of those that have.

        Args:
            timeout: Seconds after which to return without any; this process itself ends its task first.
        """

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class ThisProcess:
    """Evaluates in this process, one task after the other.

    Args:
        evaluator: What evaluates.
        watch: Is told of each finished step.
    """

    size = 1

    def __init__(self, evaluator: Evaluator | OwnEvaluator, watch: Watch) -> None:
        self._evaluator, self._watch = evaluator, watch
        self._tasks: deque[Task] = deque()

    def submit(self, task: Task) -> None:
        """Keep a task for `results`."""
        self._tasks.append(task)

    def results(self, timeout: float | None = None) -> list[TrialRecord]:  # noqa: ARG002 - a task is ended first
        """Evaluate the oldest task."""
        return [self._evaluator.evaluate(self._tasks.popleft(), self._watch)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tasks.clear()


@dataclass(slots=True)
class _Worker:
    """A worker process.

    Args:
        process: The process.
        pipe: Our end of the pipe to it.
        task: What it evaluates; None if it is idle.
        among: How many trials, this one included, could run at a time when it got the task.
        began: When it began the task, by `time.monotonic`; None if it has not.
    """

    process: subprocess.Popen[bytes]
    pipe: Connection
    task: Task | None = None
    among: int = 1
    began: float | None = None


class Workers:
    """Evaluates in worker processes.

    Args:
        size: How many; fewer once the memory of the GPU did not suffice.
        assignment: What they need to know; None if that is not known yet, then `assign` tells.
        watch: Is told of finished steps, and of trials that run again for want of memory.
        trial_timeout: Seconds after which a trial fails and its worker is killed; None for no such limit.
    """

    def __init__(
        self, size: int, assignment: Assignment | None, watch: Watch, trial_timeout: float | None = None
    ) -> None:
        self.size, self._assignment, self._watch, self.trial_timeout = size, assignment, watch, trial_timeout
        self._workers: list[_Worker] = []
        self._waiting: deque[Task] = deque()
        self._deaths: dict[int, int] = {}

    def hire(self, count: int) -> None:
        """Start so many processes ahead of their tasks: importing torch takes them seconds, which may be used."""
        for _ in range(count):
            self._hire()

    def assign(self, assignment: Assignment) -> None:
        """Tell all workers what they need to know, so that they get ready."""
        self._assignment = assignment
        for worker in self._workers:
            with suppress(OSError):  # it died; `results` notices and hires another
                worker.pipe.send(assignment)

    def pace(self, count: int, seconds: float) -> float:
        """Let so many idle workers train the plain network; return steps a second over all, 0.0 if one failed.

        Raises:
            StudyError: If a worker cannot get ready.
        """
        self.hire(count - len(self._workers))
        rates: list[float] = []
        for length in (0.0, seconds):  # first all of them get ready
            rates = self._paces(self._workers[:count], length)
        return sum(rates) if len(rates) == count and all(rates) else 0.0

    def _paces(self, workers: list[_Worker], seconds: float) -> list[float]:
        for worker in workers:
            with suppress(OSError):  # it died
                worker.pipe.send(Pace(seconds))
        rates = []
        for worker in workers:
            try:
                reply = worker.pipe.recv()
            except (EOFError, OSError):
                self._bury(worker)
                continue
            if isinstance(reply, DataError):
                raise reply
            if isinstance(reply, str):
                raise StudyError(f"a worker could not get ready: {reply}")
            rates.append(reply)
        return rates

    def keep(self, count: int) -> None:
        """Dismiss all idle workers but so many, and have no more than these from now on."""
        self.size = count
        for worker in self._workers[count:]:
            self._dismiss(worker)

    def submit(self, task: Task) -> None:
        """Give a task to an idle worker, or to a new one."""
        idle = next((worker for worker in self._workers if worker.task is None), None) or self._hire()
        idle.task, idle.among, idle.began = task, self.size, None
        with suppress(OSError):  # it died while idle; `results` notices and hires another
            idle.pipe.send(task)

    def results(self, timeout: float | None = None) -> list[TrialRecord]:
        """Wait until at least one task has ended.

        Args:
            timeout: Seconds after which to return without any.

        Raises:
            StudyError: If a worker cannot get ready.
            DataError: If an image cannot be read.
        """
        records: list[TrialRecord] = []
        until = None if timeout is None else time.monotonic() + timeout
        while not records:
            by_pipe = {worker.pipe: worker for worker in self._workers}
            for pipe in wait(list(by_pipe), self._patience(until)):
                records += self._heard(by_pipe[pipe])  # type: ignore[index]
            for worker in [worker for worker in self._workers if not worker.pipe.poll()]:  # it has nothing to say
                if worker.process.poll() is not None:
                    records += self._bury(worker)
                elif self._time_left(worker) <= 0:
                    records += self._given_up(worker)
            while self._waiting and sum(worker.task is not None for worker in self._workers) < self.size:
                self.submit(self._waiting.popleft())
            if until is not None and time.monotonic() >= until:
                break
        return records

    def _patience(self, until: float | None) -> float:
        """Return for how many seconds to wait for workers before looking after them."""
        ends = [self._time_left(worker) for worker in self._workers]
        if until is not None:
            ends.append(until - time.monotonic())
        return max(0.0, min([LOOKED_AFTER_EVERY, *ends]))

    def _time_left(self, worker: _Worker) -> float:
        """Return the seconds that a worker's trial has left."""
        if self.trial_timeout is None or worker.task is None or worker.began is None:
            return float("inf")
        return worker.began + self.trial_timeout - time.monotonic()

    def _heard(self, worker: _Worker) -> list[TrialRecord]:
        """Take a message of a worker; return the record that it is, or that becomes of its death."""
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            return self._bury(worker)
        if isinstance(message, StepEnded):
            self._watch(message)
        elif isinstance(message, Began):
            worker.began = time.monotonic()
        elif isinstance(message, OutOfMemory) and worker.among > 1:
            self._make_room(worker)
        elif isinstance(message, TrialRecord):
            worker.task = None
            return [message]
        elif isinstance(message, DataError):
            raise message
        else:
            raise StudyError(f"a worker could not get ready: {message}")
        return []

    def _make_room(self, worker: _Worker) -> None:
        """Have fewer trials at a time, and let the one for which memory did not suffice run again among them."""
        self._dismiss(worker)  # with the memory that it would keep
        self.size = min(self.size, worker.among - 1)
        task = worker.task
        if task is not None:
            self._waiting.append(task)
            self._watch(
                Told(
                    f"trial {task.trial}: out of memory on the GPU with {worker.among} trials at a time; "
                    f"it runs again, from now on {self.size} at a time"
                )
            )

    def _given_up(self, worker: _Worker) -> list[TrialRecord]:
        """Kill a worker whose trial takes too long; the trial fails."""
        self._dismiss(worker)
        return self._failure(worker, f"took longer than {self.trial_timeout:g} s, its time limit (--trial-timeout)")

    def _failure(self, worker: _Worker, reason: str) -> list[TrialRecord]:
        """Return the record of the trial of a worker that is gone."""
        if worker.task is None or self._assignment is None:
            return []
        seconds = 0.0 if worker.began is None else time.monotonic() - worker.began
        return [failed(worker.task, self._assignment.protocol, TrainingError(reason), seconds)]

    def _hire(self) -> _Worker:
        ours, theirs = Pipe()
        process = subprocess.Popen(  # noqa: S603 - this very program
            [sys.executable, "-m", "placesearch.evaluation.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=dict(os.environ) | {name: os.environ.get(name, value) for name, value in KEEPS_MEMORY.items()},
            start_new_session=True,  # Ctrl-C goes to all processes of a terminal; only this one is to act on it
        )
        theirs.close()
        if self._assignment is not None:
            ours.send(self._assignment)
        worker = _Worker(process, ours)
        self._workers.append(worker)
        return worker

    def _bury(self, worker: _Worker) -> list[TrialRecord]:
        """Take a dead worker away; its trial is tried once more, then fails."""
        with suppress(subprocess.TimeoutExpired):
            worker.process.wait(FAREWELL)
        code = self._dismiss(worker)
        task = worker.task
        if task is None:
            return []
        self._deaths[task.trial] = self._deaths.get(task.trial, 0) + 1
        if self._deaths[task.trial] < 2:
            self.submit(task)
            return []
        cause = f"signal {-code}" if code < 0 else f"exit code {code}"
        return self._failure(worker, f"its worker process died twice ({cause}); out of memory?")

    def _dismiss(self, worker: _Worker) -> int:
        """Kill a worker with all that it started, take it away and return its exit code."""
        self._workers.remove(worker)
        with suppress(ProcessLookupError, PermissionError):  # nothing of it is left
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.pipe.close()
        return worker.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in [*self._workers]:
            self._dismiss(worker)
        self._waiting.clear()
