"""Who evaluates on a Ray cluster: actors, one for each trial at a time, wherever the cluster has room for them.

An actor holds a processor, or a share of a GPU, and evaluates just as a worker process does. The data are put into
Ray's object store once and are mapped by all actors of a node. A trial whose actor dies is given to another one once;
if that one dies too, the trial fails. The death of a whole node is rarely the fault of a trial, which may lose more
nodes than actors before it fails. Actors end with the process that started them, however that ends.

Ray itself ends a process that cannot reach the head of its cluster for a minute, without a word to those who wait in
it. Therefore a thread looks at the cluster, and the study ends in an orderly way before that.
"""

import contextlib
import importlib
import io
import logging
import os
import signal
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from placesearch.errors import DataError, InputError, PlacesearchError, StudyError, TrainingError, reason_of
from placesearch.evaluation.candidate import Evaluator, Watch, failed, is_out_of_memory
from placesearch.evaluation.own import OwnEvaluator
from placesearch.evaluation.versions import versions
from placesearch.evaluation.workers import Assignment
from placesearch.records import OutOfMemory, StepEnded, Task, Told, TrialRecord
from placesearch.training.datasets import Data, Split

LOOKED_AT_EVERY, ROOM_EVERY = 0.5, 1.0
"""Seconds between two looks at what actors do, and at how much room the cluster has."""

NOTICED_WITHIN = 5.0
"""Seconds after the death of an actor in which the death of its node becomes known."""

SILENCE = 25.0
"""Seconds without an answer after which the head of a cluster is taken for dead. After 60 Ray ends this process."""

MOST_NODES = 5
"""A trial that lost so many nodes fails: it may be what brings them down, by their memory say."""

MOST_STILLBORN = 5
"""So many actors in a row may die before they can begin anything."""

MOST_LINES = 100
"""So many lines that an evaluation prints between two looks are told, the last ones."""

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


class Spoken(io.TextIOBase):
    r"""Takes what is printed, and gives it by whole lines; of a line that is written over, as bars are, what is left.

    Example:
        >>> spoken = Spoken()
        >>> print("one\ntwo", file=spoken)
        >>> print("10 %\r20 %", end="", file=spoken)
        >>> spoken.taken(), spoken.taken(rest=True)
        (['one', 'two'], ['20 %'])
    """

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=MOST_LINES)
        self._open = ""

    def write(self, text: str) -> int:
        """Take a piece of text."""
        *lines, self._open = (line.rpartition("\r")[2] for line in (self._open + text).split("\n"))
        self._lines.extend(line for line in lines if line)
        return len(text)

    def taken(self, *, rest: bool = False) -> list[str]:
        """Give the lines since the last time, and no longer keep them; with the line that has no end yet, if asked."""
        if rest:
            self.write("\n")
        return [self._lines.popleft() for _ in range(len(self._lines))]


class Actor:
    """Evaluates one candidate after the other, somewhere in the cluster.

    Args:
        folder: Where the process that asks is. A node that has this folder, too, takes all paths from there.
    """

    def __init__(self, folder: str) -> None:
        try:
            os.chdir(folder)
            self._is_at_home = True
        except OSError:
            self._is_at_home = False
        warnings.simplefilter("ignore")  # what libraries deprecate was told, or hidden, by the process that asks
        self._spoken = Spoken()
        self._evaluator: Evaluator | OwnEvaluator | None = None
        self._began: float | None = None
        self._step: StepEnded | None = None

    def evaluate(
        self, task: Task, assignment: Assignment, images: Images | None, expected: Mapping[str, str]
    ) -> tuple[TrialRecord | DataError | str, list[str]]:
        """Evaluate a candidate, the first one only after getting ready; return a text if that is not possible.

        What is printed meanwhile comes with it, as far as `status` has not told it before.

        Args:
            task: The candidate.
            assignment: What to know about the study.
            images: The data; None if they are to be loaded here, or not needed.
            expected: The versions of all that results depend on.
        """
        with contextlib.redirect_stdout(self._spoken), contextlib.redirect_stderr(self._spoken):
            try:
                found = self._evaluated(task, assignment, images, expected)
            except DataError as error:
                found = error
            except (PlacesearchError, OSError) as error:
                found = str(error)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                found = failed(task, assignment.protocol, error, 0.0)
            finally:
                self._began = None
        return found, self._spoken.taken(rest=True)

    def _evaluated(
        self, task: Task, assignment: Assignment, images: Images | None, expected: Mapping[str, str]
    ) -> TrialRecord | DataError | str:
        if self._evaluator is None:
            here = versions()
            different = [f"{name} {there} -> {here[name]}" for name, there in expected.items() if here[name] != there]
            if different:
                return f"its results would not compare: {'; '.join(different)}"
            if assignment.branches and not self._is_at_home:
                assignment = replace(assignment, branches=tempfile.mkdtemp(prefix="placesearch-"))
            self._evaluator = assignment.evaluator(None if images is None else data_of(images))
        self._began, self._step = time.monotonic(), None
        return self._evaluator.evaluate(task, self._see)

    def where(self) -> str:
        """Return the identifier of the node."""
        return str(_ray().get_runtime_context().get_node_id())

    def status(self) -> tuple[float, StepEnded | None, list[str]]:
        """Return for how many seconds a task has been evaluated, its last step, and what was printed since."""
        began = self._began
        return (0.0 if began is None else time.monotonic() - began), self._step, self._spoken.taken()

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
        result: Where the record will be; None while it is in doubt whether the actor lives.
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


class _Nodes(threading.Thread):
    """Looks again and again which nodes a cluster has; in a thread, as the look does not end if the head is dead.

    Args:
        ray: Ray.
    """

    def __init__(self, ray: Any) -> None:
        super().__init__(name="placesearch-nodes", daemon=True)
        self._ray, self._over = ray, threading.Event()
        self._look()
        self.start()

    def _look(self) -> None:
        self.alive = {node["NodeID"]: node["Resources"] for node in self._ray.nodes() if node["Alive"]}
        self._heard = time.monotonic()

    def run(self) -> None:
        """Look until it is over."""
        while not self._over.wait(ROOM_EVERY):
            with contextlib.suppress(Exception):  # then there is no answer, which is told by the silence
                self._look()

    @property
    def is_silent(self) -> bool:
        """Whether there was no answer for so long that there will be none."""
        return time.monotonic() > self._heard + SILENCE

    def end(self) -> None:
        """Look no more."""
        self._over.set()
        self.join(0.0 if self.is_silent else None)


def room_on(resources: Mapping[str, float], gpus: float) -> int:
    """Return how many actors a node has room for.

    Args:
        resources: What it has in all.
        gpus: Share of a GPU that each holds, of one and the same GPU; 0 for a processor each.

    Example:
        >>> room_on({"CPU": 8.0, "GPU": 2.0}, 0.0), room_on({"GPU": 2.0}, 0.6), room_on({"GPU": 2.0}, 0.1)
        (8, 2, 20)
    """
    if not gpus:
        return int(resources.get("CPU", 0.0))
    return int(resources.get("GPU", 0.0)) * int(1 / gpus + 1e-6)


class RayWorkers:
    """Evaluates in actors of a Ray cluster; of the one that this process uses already, if it does.

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
        self._is_ours = not self._ray.is_initialized()
        self._address = address or "of this machine"
        if self._is_ours:
            options = {"address": address} if address else {"address": "local", "include_dashboard": False}
            try:
                with _in_silence():
                    self._ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
            except Exception as error:  # noqa: BLE001 - Ray raises many things here
                reason = " ".join(str(error).split())[:500]
                raise InputError(f"cannot use the Ray cluster {self._address}: {reason}") from None
        self._kind = self._ray.remote(num_cpus=0 if gpus else 1, num_gpus=gpus, max_concurrency=2)(Actor)
        self._nodes = _Nodes(self._ray)
        self._hands: list[_Hand] = []
        self._waiting: deque[Task] = deque()
        self._deaths: dict[int, int] = {}
        self._lost_nodes: dict[int, int] = {}
        self._stillborn = 0
        self._assignment: Assignment | None = None
        self._images: Any = None
        self._room = -1
        self.size = self._most
        self._fit_to_room()
        if not gpus and any(resources.get("GPU") for resources in self._nodes.alive.values()):
            watch(Told("the cluster has GPUs; they are not used, because --device is a processor, or none is here"))

    def assign(self, assignment: Assignment, data: Data | None) -> None:
        """Tell what actors need to know, and share the data with them."""
        images = None if data is None else images_of(data)
        self._images = None if images is None else self._ray.put(images)
        device = torch.device(assignment.device).type  # of a machine's GPUs an actor sees one alone
        self._assignment = replace(assignment, device=device)

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
            actor = self._kind.remote(str(Path.cwd()))
            self._hands.append(_Hand(actor, born=actor.where.remote()))

    def _welcome(self) -> None:
        """Take in the actors that have found room; send away those that are waiting in vain."""
        for hand in [hand for hand in self._hands if hand.node is None]:
            if self._ray.wait([hand.born], timeout=0)[0]:
                try:
                    hand.node = self._ray.get(hand.born)
                    self._stillborn = 0
                except self._ray.exceptions.RayError as error:
                    self._hands.remove(hand)
                    self._mourn(error)
            elif len(self._hands) > self.size:
                self._hands.remove(hand)
                self._ray.kill(hand.actor)

    def _mourn(self, error: Exception) -> None:
        """Bear that an actor died on its way, as its node may have; but not if none could begin there, or anywhere."""
        self._stillborn += 1
        lines = str(error).strip().splitlines()
        if getattr(error, "actor_init_failed", False):
            raise StudyError(
                f"an actor could not begin: {lines[-1]}; every node needs placesearch, and what it needs, at the same "
                "versions"
            )
        if self._stillborn >= MOST_STILLBORN:
            raise StudyError(f"{self._stillborn} actors in a row died before they could begin: {lines[-1]}")

    def results(self, timeout: float | None = None) -> list[TrialRecord]:
        """Wait until at least one task has ended.

        Args:
            timeout: Seconds after which to return without any.

        Raises:
            StudyError: If an actor cannot get ready, or the cluster is gone.
            DataError: If an image cannot be read.
        """
        until = None if timeout is None else time.monotonic() + timeout
        records: list[TrialRecord] = []
        while not records:
            self._fit_to_room()
            self._welcome()
            self._deal()
            busy = {hand.result: hand for hand in self._hands if hand.result is not None}
            pause = LOOKED_AT_EVERY if until is None else max(0.0, min(LOOKED_AT_EVERY, until - time.monotonic()))
            awaited = [*busy, *(hand.born for hand in self._hands if hand.node is None)]
            if not awaited:
                time.sleep(pause)
            for come in self._ray.wait(awaited, timeout=pause)[0] if awaited else []:
                records += self._ended(busy[come]) if come in busy else []
            for hand in [hand for hand in self._hands if hand.task is not None]:
                records += self._looked_at(hand)
            if until is not None and time.monotonic() >= until:
                break
        return records

    def _ended(self, hand: _Hand) -> list[TrialRecord]:
        """Take what came of the task of an actor."""
        try:
            found, lines = self._ray.get(hand.result)
        except self._ray.exceptions.ActorUnavailableError:  # it is cut off; why, Ray knows some seconds later
            hand.result = hand.status = None
            return []
        except self._ray.exceptions.RayError as error:
            return self._lost(hand, reason_of(error))
        self._tell(hand, lines)
        if isinstance(found, DataError):
            raise found
        if isinstance(found, str):
            raise StudyError(f"an actor could not get ready: {found}")
        if isinstance(found, OutOfMemory) and 0 < self._gpus < 1 and self.size > 1:
            return self._make_room(hand)
        hand.task = hand.result = None
        return [found]

    def _doubted(self, hand: _Hand) -> list[TrialRecord]:
        """Find out what became of an actor that was cut off; one that is there again may have lost its task."""
        if hand.status is None:
            hand.status = hand.actor.where.remote()
        if not self._ray.wait([hand.status], timeout=0)[0]:
            return []
        try:
            self._ray.get(hand.status)
        except self._ray.exceptions.ActorUnavailableError:
            hand.status = None
            return []
        except self._ray.exceptions.RayError as error:
            return self._lost(hand, reason_of(error))
        return self._lost(hand)

    def _lost(self, hand: _Hand, reason: str = "") -> list[TrialRecord]:
        """Take an actor away that is lost; its trial is tried again, but only once if its node did not die with it.

        Args:
            hand: The actor.
            reason: Why it died; empty if it only was cut off.
        """
        task = self._dismiss(hand)
        if reason and self._is_alive(hand.node):
            deaths = self._deaths[task.trial] = self._deaths.get(task.trial, 0) + 1
            if deaths >= 2:
                return self._failure(task, f"its actor died twice ({reason}); out of memory?")
        else:
            nodes = self._lost_nodes[task.trial] = self._lost_nodes.get(task.trial, 0) + 1
            if nodes >= MOST_NODES:
                return self._failure(task, f"its node died {nodes} times; out of memory?")
            self._watch(Told(f"trial {task.trial}: its node is gone; it runs again"))
        self._waiting.appendleft(task)
        return []

    def _is_alive(self, node: str | None) -> bool:
        """Tell whether a node is there; that one is gone, Ray may know some seconds after it knows it of an actor."""
        until = time.monotonic() + NOTICED_WITHIN
        while node in self._nodes.alive:
            if time.monotonic() > until:
                return True
            time.sleep(0.1)
        return False

    def _make_room(self, hand: _Hand) -> list[TrialRecord]:
        """Have fewer trials at a time, and let the one for which memory did not suffice run again among them."""
        task = self._dismiss(hand)
        self._most = self.size = self.size - 1
        self._waiting.appendleft(task)
        self._watch(Told(f"trial {task.trial}: out of memory on its GPU; it runs again, {self.size} at a time"))
        return []

    def _looked_at(self, hand: _Hand) -> list[TrialRecord]:
        """Ask an actor how far it is, and tell; end a trial that takes too long."""
        if hand.result is None:
            return self._doubted(hand)
        if hand.status is None:
            hand.status = hand.actor.status.remote()
        if not self._ray.wait([hand.status], timeout=0)[0]:
            return []
        try:
            seconds, step, lines = self._ray.get(hand.status)
        except self._ray.exceptions.RayError:
            return []  # it died; its result says so as well
        finally:
            hand.status = None
        self._tell(hand, lines)
        if step is not None and step != hand.step:
            hand.step = step
            self._watch(step)
        if self.trial_timeout is not None and seconds > self.trial_timeout:
            task = self._dismiss(hand)
            return self._failure(task, f"took longer than {self.trial_timeout:g} s, its time limit (--trial-timeout)")
        return []

    def _tell(self, hand: _Hand, lines: list[str]) -> None:
        """Tell what an evaluation printed."""
        if hand.task is not None:
            for line in lines:
                self._watch(Told(f"trial {hand.task.trial}: {line}"))

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
        if self._nodes.is_silent:
            raise StudyError(
                f"the Ray cluster {self._address} has not answered for {SILENCE:g} s; every finished trial is kept, "
                "the same command goes on"
            )
        room = sum(room_on(resources, self._gpus) for resources in self._nodes.alive.values())
        if room == self._room:
            return
        self._room, size = room, max(1, min(self._most, room))
        if not room:
            self._watch(Told("the Ray cluster has no room for a worker; waiting for a node to join"))
        elif size != self.size:
            self._watch(Told(f"{size} trials at a time: that is what the Ray cluster has room for"))
        self.size = size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._nodes.end()
        if not self._nodes.is_silent:
            for hand in self._hands:
                self._ray.kill(hand.actor)
        self._hands.clear()
        self._waiting.clear()
        if self._is_ours:
            self._ray.shutdown()


@contextlib.contextmanager
def _in_silence() -> Iterator[None]:
    """Connect to Ray in the block without what it would change: pages on the screen when something dies, SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    worker: Any = importlib.import_module("ray._private.worker")
    worker._worker_logs_enabled = False  # `log_to_driver` leaves what is said of deaths
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _ray() -> Any:
    """Import Ray, which is needed only here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise InputError("--engine ray needs Ray, which is not installed: pip install 'placesearch[ray]'") from None
