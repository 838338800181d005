"""Who evaluates: this process, or worker processes, one thread each, that live as long as the search.

A worker is a fresh Python process that talks through a pair of pipes. It ends by itself when the pipe to the process
that started it closes, so nothing is left running after a kill. A trial whose worker dies is given to a new worker
once; if that one dies too, the trial fails.
"""

import os
import pickle
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

from placesearch.errors import PlacesearchError, StudyError
from placesearch.evaluation.candidate import Evaluator, Watch
from placesearch.evaluation.own import Evaluate, OwnEvaluator, evaluation_named
from placesearch.models.architecture import Architecture
from placesearch.models.weights import Checkpoint, read_weights
from placesearch.records import StepEnded, Task, TrialRecord
from placesearch.training.datasets import Data, load_data, shared_data
from placesearch.training.loop import Protocol

TOLD_EVERY = 0.2
"""Seconds between two reports of a worker on its steps."""

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
    """

    plain: Architecture
    protocol: Protocol
    data: str
    device: str
    weights: str | None = None
    branches: str | None = None
    evaluate: str | None = None
    shared: str | None = None

    def evaluator(self, data: Data | None = None, evaluate: Evaluate | None = None) -> Evaluator | OwnEvaluator:
        """Load weights, and data and code if they are not loaded yet, and get ready."""
        evaluate = evaluate or (evaluation_named(self.evaluate) if self.evaluate else None)
        if evaluate is not None:
            return OwnEvaluator(self.plain, self.protocol, torch.device(self.device), evaluate, self._checkpoint())
        if data is None:
            data = shared_data(Path(self.shared)) if self.shared else load_data(self.data, self.plain.input_size[1])
        branches = Path(self.branches) if self.branches else None
        return Evaluator(self.plain, self.protocol, data, torch.device(self.device), self._checkpoint(), branches)

    def _checkpoint(self) -> Checkpoint | None:
        """Read the weights, if there are any."""
        return read_weights(self.weights, self.plain.backbone) if self.weights else None


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
    process: subprocess.Popen[bytes]
    pipe: Connection
    task: Task | None = None


class Workers:
    """Evaluates in worker processes.

    Args:
        size: How many.
        assignment: What they need to know; None if that is not known yet, then `assign` tells.
        watch: Is told of finished steps.
    """

    def __init__(self, size: int, assignment: Assignment | None, watch: Watch) -> None:
        self.size, self._assignment, self._watch = size, assignment, watch
        self._workers: list[_Worker] = []
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
            if isinstance(reply, str):
                raise StudyError(f"a worker could not get ready: {reply}")
            rates.append(reply)
        return rates

    def keep(self, count: int) -> None:
        """Dismiss all idle workers but so many, and have no more than these from now on."""
        self.size = count
        for worker in self._workers[count:]:
            worker.process.kill()
            self._bury(worker)

    def submit(self, task: Task) -> None:
        """Give a task to an idle worker, or to a new one."""
        idle = next((worker for worker in self._workers if worker.task is None), None) or self._hire()
        idle.task = task
        with suppress(OSError):  # it died while idle; `results` notices and hires another
            idle.pipe.send(task)

    def results(self, timeout: float | None = None) -> list[TrialRecord]:
        """Wait until at least one task has ended.

        Args:
            timeout: Seconds after which to return without any.

        Raises:
            StudyError: If a worker cannot get ready.
        """
        records: list[TrialRecord] = []
        until = None if timeout is None else time.monotonic() + timeout
        while not records:
            by_pipe = {worker.pipe: worker for worker in self._workers}
            left = None if until is None else max(0.0, until - time.monotonic())
            ready = wait(list(by_pipe), left)
            if not ready:
                break
            for pipe in ready:
                worker = by_pipe[pipe]  # type: ignore[index]
                try:
                    message = worker.pipe.recv()
                except (EOFError, OSError, pickle.UnpicklingError):
                    records += self._bury(worker)
                    continue
                if isinstance(message, StepEnded):
                    self._watch(message)
                elif isinstance(message, TrialRecord):
                    worker.task = None
                    records.append(message)
                else:
                    raise StudyError(f"a worker could not get ready: {message}")
        return records

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
        self._workers.remove(worker)
        worker.pipe.close()
        code = worker.process.wait()
        task = worker.task
        if task is None:
            return []
        self._deaths[task.trial] = self._deaths.get(task.trial, 0) + 1
        if self._deaths[task.trial] < 2:
            self.submit(task)
            return []
        cause = f"signal {-code}" if code < 0 else f"exit code {code}"
        error = f"its worker process died twice ({cause}); out of memory?"
        return [
            TrialRecord(trial=task.trial, state="FAIL", placement=task.placement, reference=task.reference, error=error)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
            worker.pipe.close()
        self._workers.clear()


def serve(pipe: Connection) -> None:
    """Evaluate the tasks that come through a pipe until it closes; the body of a worker process.

    Args:
        pipe: First brings an `Assignment`, then tasks; takes steps, records and, if getting ready fails, a text.
    """
    last = 0.0

    def tell(event: object) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= TOLD_EVERY:
            last = now
            pipe.send(event)

    try:
        try:
            evaluator = pipe.recv().evaluator()
        except (PlacesearchError, OSError) as error:
            pipe.send(str(error))
            return
        while True:
            asked = pipe.recv()
            if isinstance(asked, Pace) and isinstance(evaluator, Evaluator):
                pipe.send(evaluator.pace(asked.seconds))
            else:
                pipe.send(evaluator.evaluate(asked, tell))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the process that started this one is gone
