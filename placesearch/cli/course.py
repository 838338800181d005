"""What was told of a running study so far, and how long it will still take."""

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from statistics import fmean

from placesearch.records import Event, StepEnded, StudyBegan, TrialBegan, TrialEnded, TrialRecord, seconds_an_epoch
from placesearch.search.suggesting import long_number

LATEST = 16
"""So many trials of a length tell how long further ones take: those to come are more like the latest than the first."""

GAPS = 8
"""So many of the latest suggestions tell how long further ones take."""

BEGINNING = 0.1
"""Before this share of its steps is done, a training's own pace tells little."""

AHEAD = 2000
"""So many trials are looked ahead; those after them are taken to be like them."""


@dataclass(slots=True)
class Running:
    """A trial that runs.

    Args:
        began: What it is.
        since: When it began.
        step: Its latest step; None before the first one, and always with an evaluation of the user's own.
        first: The first step that was told, and when.
        heard: When the latest step was told.
    """

    began: TrialBegan
    since: float
    step: StepEnded | None = None
    first: tuple[int, float] = (0, 0.0)
    heard: float = 0.0

    def hear(self, step: StepEnded, now: float) -> None:
        """Take a step in; one that is earlier than the last begins anew, after its worker died."""
        if self.step is None or step.step < self.step.step:
            self.first = (step.step, now)
        self.step, self.heard = step, now

    @property
    def share(self) -> float:
        """The share of its steps that are done."""
        return self.step.step / self.step.steps if self.step else 0.0

    @property
    def pace(self) -> float | None:
        """Seconds that all of its steps take, by those so far; None if they are too few to tell."""
        number, when = self.first
        if self.step is None or self.share < BEGINNING or self.step.step == number:
            return None
        return (self.heard - when) * self.step.steps / (self.step.step - number)

    def left(self, usual: float, now: float) -> float:
        """Return for how many seconds more it will run.

        Args:
            usual: How many seconds such a trial takes.
            now: What time it is.
        """
        if self.step is None:
            return max(0.0, usual - (now - self.since))
        return max(0.0, (self.pace or usual) * (1 - self.share) - (now - self.heard))


class Course:
    """What was told of a running study so far; one thread may tell while another one asks.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.RLock()
        self.study: StudyBegan | None = None
        self._records: list[TrialRecord] = []
        self._running: dict[int, Running] = {}
        self._most = 0
        self._began = self._turned = clock()
        self._gaps: deque[float] = deque(maxlen=GAPS)
        self._seconds: dict[int, deque[float]] = {}
        self._earlier: dict[int, deque[float]] = {}

    def hear(self, event: Event) -> None:
        """Take an event in."""
        with self._lock:
            now = self._clock()
            match event:
                case StudyBegan():
                    self.study, self._records, self._began = event, list(event.finished), now
                    for record in event.finished:
                        _keep(self._earlier, record.epochs, record.seconds)
                case TrialBegan():
                    if self._most:  # the first one waits for the workers, not for a suggestion
                        self._gaps.append(now - self._turned)
                    self._turned = now
                    self._running[event.task.trial] = Running(event, now)
                    self._most = max(self._most, len(self._running))
                case StepEnded():
                    if event.trial in self._running:
                        self._running[event.trial].hear(event, now)
                case TrialEnded():
                    self._turned = now
                    self._records.append(event.record)
                    ended, seconds = self._running.pop(event.record.trial, None), event.record.seconds
                    if ended is not None:
                        _keep(self._seconds, ended.began.epochs, now - ended.since if seconds is None else seconds)

    @property
    def records(self) -> tuple[TrialRecord, ...]:
        """The trials that ended by themselves, those of earlier runs first."""
        with self._lock:
            return tuple(self._records)

    @property
    def running(self) -> tuple[Running, ...]:
        """The trials that run, the oldest first."""
        with self._lock:
            return tuple(self._running.values())

    def seconds_of(self, running: Running) -> float:
        """Return for how many seconds a trial has been running."""
        return self._clock() - running.since

    @property
    def measured(self) -> bool:
        """Whether it is known how long a trial takes, so that the time left is more than what a limit leaves."""
        with self._lock:
            return self.study is not None and self.usual_seconds(self.study.epochs) is not None

    def usual_seconds(self, epochs: int) -> float | None:
        """Return how long a trial takes, by those seen so far; None if there is nothing to go by.

        Args:
            epochs: Its passes over the training split. If none of this length was seen, others tell by their epochs.
        """
        with self._lock:
            paces = {one.began.epochs: one.pace for one in self._running.values() if one.pace is not None}
            seen = {length: fmean(seconds) for length, seconds in (self._earlier | self._seconds).items()}
            if epochs in self._seconds or (epochs in seen and epochs not in paces):
                return seen[epochs]
            if epochs in paces:
                return paces[epochs]
            rates = [seconds / max(length, 1) for length, seconds in (seen or paces).items()]
            return max(epochs, 1) * fmean(rates) if rates else None

    def share_done(self) -> float | None:
        """Return which share of the trials is done, or of the time, if that is more; None if both have no end."""
        with self._lock:
            shares = []
            if self.study is not None and self.study.trials:
                done = len(self._records) + sum(running.share for running in self._running.values())
                shares.append(done / self.study.trials)
            if self.study is not None and self.study.seconds_left:
                shares.append((self._clock() - self._began) / self.study.seconds_left)
            return min(1.0, max(shares)) if shares else None

    def seconds_left(self) -> float | None:
        """Estimate the time until the last trial ends; None if there is no limit, or nothing to go by yet.

        The rest of the study is played through: position by position, each as long as the latest of its length, on as
        many workers as there are, begun when the search would begin them. That the front settles before, or the space
        runs out of placements, is not foreseen.
        """
        with self._lock:
            if self.study is None or (self.study.trials is None and self.study.seconds_left is None):
                return None
            now = self._clock()
            limit = float("inf") if self.study.seconds_left is None else self._began + self.study.seconds_left - now
            lengths = {self.study.epochs, self.study.long_epochs or self.study.epochs}
            lengths |= {running.began.epochs for running in self._running.values()}
            usual: dict[int, float] = {}
            for length in lengths:
                seconds = self.usual_seconds(length)
                if seconds is None:
                    return None if self.study.seconds_left is None else max(0.0, limit)
                usual[length] = seconds
            ends = [(one.left(usual[one.began.epochs], now), trial) for trial, one in self._running.items()]
            return self._played(self.study, ends, usual, limit)

    def _played(
        self, study: StudyBegan, ends: list[tuple[float, int]], usual: Mapping[int, float], limit: float
    ) -> float:
        """Play the rest of a study; return after how many seconds its last trial ends.

        Args:
            study: The study.
            ends: After how many seconds each running trial ends, and its position.
            usual: How many seconds a trial takes, by its epochs.
            limit: After how many seconds its time is up.
        """
        rest = None if study.trials is None else max(0, study.trials - len(self._records) - len(self._running))
        jobs, gap, epoch = (
            self._most or study.jobs,
            fmean(self._gaps) if self._gaps else 0.0,
            seconds_an_epoch(self._records),
        )
        heapq.heapify(ends)
        at, last = 0.0, max(ends, default=(0.0, 0))[0]
        for number, position in enumerate(islice(self._positions(), rest)):
            if number == AHEAD:
                return max(0.0, limit if rest is None else min(limit, last * rest / number))
            while len(ends) >= jobs or _must_wait(study, ends, position):
                at = max(at, heapq.heappop(ends)[0])
            epochs = _epochs_at(study, position)
            if at >= limit or at + epochs * epoch > limit:
                break
            at += gap
            last = max(last, at + usual[epochs])
            heapq.heappush(ends, (at + usual[epochs], position))
        return last

    def _positions(self) -> Iterator[int]:
        """Yield the positions of the trials to come: first those that were lost, then those after the last."""
        taken = {record.trial for record in self._records} | set(self._running)
        return (position for position in count() if position not in taken)


def _keep(seconds_of: dict[int, deque[float]], epochs: int | None, seconds: float | None) -> None:
    if seconds is not None:
        seconds_of.setdefault(epochs or 1, deque(maxlen=LATEST)).append(seconds)


def _must_wait(study: StudyBegan, running: list[tuple[float, int]], position: int) -> bool:
    """Tell whether a trial may not begin yet because its suggestion may depend on one that runs."""
    return study.split != "test" and any(other < position - study.lag for _, other in running)


def _epochs_at(study: StudyBegan, position: int) -> int:
    is_long = study.long_epochs is not None and long_number(position - study.references) is not None
    return study.long_epochs if is_long and study.long_epochs else study.epochs
