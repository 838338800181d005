"""Who evaluates on a Ray cluster: actors, one for each trial at a time, wherever the cluster has room for them.

An actor holds a processor, or a share of a GPU, and evaluates just as a worker process does. The data are put into
Ray's object store once and are mapped by all actors of a node. A trial whose actor dies is given to another one once;
if that one dies too, the trial fails. The death of a whole node is nobody's fault: its trials are given to others as
often as that happens. Actors end with the process that started them, however that ends.
"""

import importlib
import logging
import os
import time
import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from placesearch.errors import DataError, InputError, PlacesearchError, StudyError, TrainingError, reason_of
from placesearch.evaluation.candidate import Evaluator, Watch, failed
from placesearch.evaluation.own import OwnEvaluator
from placesearch.evaluation.versions import versions
from placesearch.evaluation.workers import Assignment
from placesearch.records import OutOfMemory, StepEnded, Task, Told, TrialRecord
from placesearch.training.datasets import Data, Split

LOOKED_AT_EVERY, ROOM_EVERY = 0.5, 10.0
"""Seconds between two looks at what actors do, and at how much room the cluster has."""

NOTICED_WITHIN = 5.0
"""Seconds after the death of an actor in which the death of its node becomes known."""

Images = Mapping[str, Any]


def images_of(data: Data) -> Images | None:
    """Return data as Ray shares them between processes without a copy; None if they stay in their files."""
    splits = {}
    for name, split in data.splits.items():
        if not isinstance(split, Split):
            return None
        splits[name] = (split.images.cpu().contiguous().numpy(), split.labels.cpu().numpy())
    return {"splits": splits, "classes": data.classes, "flip": data.flip}


def data_of(images: Images) -> Data:
    """Return shared data as they were."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # nothing writes to them
        splits = {name: Split(*map(torch.from_numpy, pair)) for name, pair in images["splits"].items()}
    return Data(splits, images["classes"], images["flip"])


class Actor:
    """Evaluates one candidate after the other, somewhere in the cluster."""

    def __init__(self) -> None:
        self._evaluator: Evaluator | OwnEvaluator | None = None
        self._began: float | None = None
        self._step: StepEnded | None = None

    def evaluate(
        self, task: Task, assignment: Assignment, images: Images | None, expected: Mapping[str, str]
    ) -> TrialRecord | DataError | str:
        """Evaluate a candidate; the first one only after getting ready. Return a text if that is not possible.

        Args:
            task: The candidate.
            assignment: What to know about the study.
            images: The data; None if they are to be loaded here, or not needed.
            expected: The versions of all that results depend on.
        """
        try:
            if self._evaluator is None:
                different = [f"{name} {version} -> {versions()[name]}" for name, version in expected.items()
                             if versions()[name] != version]  # fmt: skip
                if different:
                    return f"its results would not compare: {'; '.join(different)}"
                self._evaluator = assignment.evaluator(None if images is None else data_of(images))
            self._began, self._step = time.monotonic(), None
            return self._evaluator.evaluate(task, self._see)
        except DataError as error:
            return error
        except (PlacesearchError, OSError) as error:
            return str(error)
        finally:
            self._began = None

    def where(self) -> str:
        """Return the identifier of the node."""
        return str(_ray().get_runtime_context().get_node_id())

    def status(self) -> tuple[float, StepEnded | None]:
        """Return for how many seconds the present task has been evaluated, and the step that it ended last."""
        return (0.0 if self._began is None else time.monotonic() - self._began), self._step

    def _see(self, event: Any) -> None:
        if isinstance(event, StepEnded):
            self._step = event


@dataclass(slots=True, eq=False)
class _Hand:
    """An actor, and what it is doing.

    Args:
        actor: Ray's handle of it.
        born: Where the identifier of its node will be, once the cluster has room for it.
        node: That identifier; None before.
        task: What it evaluates; None if it is idle.
        result: Where the record will be.
        status: Where its status will be, if it was asked for.
        step: The step that was told last.
    """

    actor: Any
    born: Any
    node: str | None = None
    task: Task | None = None
    result: Any = None
    status: Any = None
    step: StepEnded | None = None


class RayWorkers:
    """Evaluates in actors of a Ray cluster.

    Args:
        wanted: How many at a time; None for as many as there is room for.
        most: The most that the study allows.
        watch: Is told of finished steps, and when the number of actors changes.
        address: Of the cluster; None for one that is started in this machine, and ends with this process.
        gpus: Share of a GPU that an actor holds; 0 for a processor each.
        trial_timeout: Seconds after which a trial fails and its actor is killed; None for no such limit.

    Raises:
        InputError: If Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(
        self,
        wanted: int | None,
        most: int,
        watch: Watch,
        address: str | None = None,
        gpus: float = 0.0,
        trial_timeout: float | None = None,
    ) -> None:
        self._ray = _ray()
        self._most, self._gpus, self._watch, self.trial_timeout = min(wanted or most, most), gpus, watch, trial_timeout
        options = {"address": address} if address else {"address": "local", "include_dashboard": False}
        try:
            self._ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **options)
        except Exception as error:  # noqa: BLE001 - Ray raises many things here
            raise InputError(f"cannot use the Ray cluster {address or 'of this machine'}: {reason_of(error)}") from None
        self._kind = self._ray.remote(num_cpus=0 if gpus else 1, num_gpus=gpus, max_concurrency=2)(Actor)
        self._hands: list[_Hand] = []
        self._waiting: deque[Task] = deque()
        self._deaths: dict[int, int] = {}
        self._assignment: Assignment | None = None
        self._images: Any = None
        self._asked = 0.0
        self.size = self._most
        self._fit_to_room()

    def assign(self, assignment: Assignment, data: Data | None) -> None:
        """Tell what actors need to know, and share the data with them."""
        images = None if data is None else images_of(data)
        self._assignment, self._images = assignment, None if images is None else self._ray.put(images)

    def submit(self, task: Task) -> None:
        """Give a task to an idle actor, or keep it until there is one."""
        self._waiting.append(task)
        self._deal()

    def _deal(self) -> None:
        """Give waiting tasks to idle actors; where there are too few, ask for more, which the cluster may not have."""
        for hand in self._hands:
            if hand.node is not None and hand.task is None and self._waiting:
                hand.task, hand.step = self._waiting.popleft(), None
                hand.result = hand.actor.evaluate.remote(hand.task, self._assignment, self._images, versions())
        coming = sum(hand.node is None for hand in self._hands)
        for _ in range(min(len(self._waiting) - coming, self.size - len(self._hands))):
            actor = self._kind.remote()
            self._hands.append(_Hand(actor, born=actor.where.remote()))

    def _welcome(self) -> None:
        """Take in the actors that have found room; send away those that are waiting in vain."""
        for hand in [hand for hand in self._hands if hand.node is None]:
            if self._ray.wait([hand.born], timeout=0)[0]:
                try:
                    hand.node = self._ray.get(hand.born)
                except self._ray.exceptions.RayError:  # it died on its way
                    self._hands.remove(hand)
            elif len(self._hands) > self.size:
                self._hands.remove(hand)
                self._ray.kill(hand.actor)

    def results(self, timeout: float | None = None) -> list[TrialRecord]:
        """Wait until at least one task has ended.

        Args:
            timeout: Seconds after which to return without any.

        Raises:
            StudyError: If an actor cannot get ready.
            DataError: If an image cannot be read.
        """
        until = None if timeout is None else time.monotonic() + timeout
        records: list[TrialRecord] = []
        while not records:
            self._fit_to_room()
            self._welcome()
            self._deal()
            busy = {hand.result: hand for hand in self._hands if hand.task is not None}
            pause = LOOKED_AT_EVERY if until is None else max(0.0, min(LOOKED_AT_EVERY, until - time.monotonic()))
            if not busy:
                time.sleep(pause)
            for result in self._ray.wait(list(busy), timeout=pause)[0] if busy else []:
                records += self._ended(busy[result])
            for hand in [hand for hand in self._hands if hand.task is not None]:
                records += self._looked_at(hand)
            if until is not None and time.monotonic() >= until:
                break
        return records

    def _ended(self, hand: _Hand) -> list[TrialRecord]:
        """Take what came of the task of an actor."""
        try:
            found = self._ray.get(hand.result)
        except self._ray.exceptions.RayError as error:
            return self._lost(hand, reason_of(error))
        if isinstance(found, DataError):
            raise found
        if isinstance(found, str):
            raise StudyError(f"an actor could not get ready: {found}")
        if isinstance(found, OutOfMemory) and 0 < self._gpus < 1 and self.size > 1:
            return self._make_room(hand)
        hand.task = None
        return [found]

    def _lost(self, hand: _Hand, reason: str) -> list[TrialRecord]:
        """Take a dead actor away; its trial is tried again, but only once if its node did not die with it."""
        task = self._dismiss(hand)
        if self._is_alive(hand.node):
            self._deaths[task.trial] = self._deaths.get(task.trial, 0) + 1
        else:
            self._watch(Told(f"trial {task.trial}: its node is gone; it runs again on another one"))
        if self._deaths.get(task.trial, 0) < 2:
            self._asked = 0.0  # the cluster has less room than it had
            self._waiting.append(task)
            return []
        return self._failure(task, f"its actor died twice ({reason}); out of memory?")

    def _is_alive(self, node: str | None) -> bool:
        """Tell whether a node is there; that one is gone, Ray may know some seconds after it knows it of an actor."""
        until = time.monotonic() + NOTICED_WITHIN
        while node in {known["NodeID"] for known in self._ray.nodes() if known["Alive"]}:
            if time.monotonic() > until:
                return True
            time.sleep(0.1)
        return False

    def _make_room(self, hand: _Hand) -> list[TrialRecord]:
        """Have fewer trials at a time, and let the one for which memory did not suffice run again among them."""
        task = self._dismiss(hand)
        self._most = self.size = self.size - 1
        self._waiting.append(task)
        self._watch(Told(f"trial {task.trial}: out of memory on its GPU; it runs again, {self.size} at a time"))
        return []

    def _looked_at(self, hand: _Hand) -> list[TrialRecord]:
        """Ask an actor how far it is, and tell; end a trial that takes too long."""
        if hand.status is None:
            hand.status = hand.actor.status.remote()
        if not self._ray.wait([hand.status], timeout=0)[0]:
            return []
        try:
            seconds, step = self._ray.get(hand.status)
        except self._ray.exceptions.RayError:
            return []  # it died; its result says so as well
        finally:
            hand.status = None
        if step is not None and step != hand.step:
            hand.step = step
            self._watch(step)
        if self.trial_timeout is not None and seconds > self.trial_timeout:
            task = self._dismiss(hand)
            return self._failure(task, f"took longer than {self.trial_timeout:g} s, its time limit (--trial-timeout)")
        return []

    def _failure(self, task: Task, reason: str) -> list[TrialRecord]:
        assert self._assignment is not None  # noqa: S101 - tasks come after it
        return [failed(task, self._assignment.protocol, TrainingError(reason), self.trial_timeout or 0.0)]

    def _dismiss(self, hand: _Hand) -> Task:
        """Kill a busy actor, take it away and return its task."""
        self._hands.remove(hand)
        self._ray.kill(hand.actor)
        assert hand.task is not None  # noqa: S101 - it is busy
        return hand.task

    def _fit_to_room(self) -> None:
        """Have as many actors as the cluster has room for now, and at least one, which waits for room."""
        if time.monotonic() < self._asked + ROOM_EVERY:
            return
        self._asked = time.monotonic()
        resources = self._ray.cluster_resources()
        room = int(resources.get("GPU", 0.0) / self._gpus) if self._gpus else int(resources.get("CPU", 0.0))
        size = max(1, min(self._most, room))
        if not room:
            self._watch(Told("the Ray cluster has no room for a worker; waiting for a node to join"))
        elif size != self.size:
            self._watch(Told(f"{size} trials at a time: that is what the Ray cluster has room for"))
        self.size = size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for hand in self._hands:
            self._ray.kill(hand.actor)
        self._hands.clear()
        self._waiting.clear()
        self._ray.shutdown()


def _ray() -> Any:
    """Import Ray, which is needed only here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise InputError("--engine ray needs Ray, which is not installed: pip install 'placesearch[ray]'") from None
