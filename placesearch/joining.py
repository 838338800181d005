"""Working on a study that another process has begun, on this machine or on any other."""

import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout

from placesearch.config import StudyConfig
from placesearch.confirming import evaluation_of
from placesearch.definition import Definition, difference
from placesearch.errors import StudyError
from placesearch.evaluation.workers import Workers
from placesearch.models.weights import read_weights
from placesearch.plan import Plan, prepare
from placesearch.records import Event, Told, TrialBegan
from placesearch.search.trials import Trials
from placesearch.searching import begin, open_trials, search, stored_definition, study_began
from placesearch.staffing import Watch, assignment_of, jobs_for, staffed
from placesearch.storage_url import StorageUrl
from placesearch.study import device_named, nobody
from placesearch.training.datasets import load_data
from placesearch.training.loop import pick_precision

LEFT_SECONDS = 60.0
"""Age of a folder from which on it is removed if its process is gone; a younger one may be about to be locked."""


@dataclass(frozen=True, slots=True)
class Worked:
    """What a process did for a study.

    Args:
        name: The study.
        trials: How many trials it has begun.
        ended: Why it stopped.
    """

    name: str
    trials: int
    ended: str


def work(
    study: str,
    storage: StorageUrl | str,
    *,
    jobs: int | Literal["auto"] = "auto",
    device: str = "auto",
    data: str | None = None,
    timeout: float | None = None,
    wait: float = 0.0,
    allow: Collection[str] = (),
    watch: Watch | None = None,
) -> Worked:
    """Work on a study in a shared storage until it ends.

    The process asks for trials, evaluates them and stores what comes of them, just as the one that began the study, but
    writes no reports. It ends when the study has all its trials, when the process that runs the study ends, or on
    Ctrl-C; what it has begun by then, others take up. If it is killed, they notice that.

    Args:
        study: The study's name.
        storage: Where its trials are.
        jobs: How many trials to evaluate at a time.
        device: Where to train.
        data: The data set's path on this machine, if it is another than where the study began.
        timeout: Seconds after which no other trial is begun.
        wait: Seconds to wait for the study to begin, if there is none of that name.
        allow: Names `package.module:function` of code that the study names; it is imported only if repeated here.
        watch: Is told what happens, as it happens.

    Returns:
        What was done.

    Raises:
        InputError: If the storage cannot be reached, or the study names code that is not allowed.
        StudyError: If there is no such study, or if code, data, weights or device here are others than the study's.
    """
    watch = watch or nobody
    where = device_named(device)
    url = StorageUrl.parse(storage) if isinstance(storage, str) else storage
    stored = _awaited(study, url, wait, watch)
    here = evaluation_of(stored, None, allow)
    refuse_other_code(stored, where)
    config = StudyConfig(**stored.config.plain() | {"jobs": jobs, "device": device, "timeout": timeout, "storage": url})
    stored = replace(stored, config=config)
    plan = prepare(config, where, stored)
    loaded = None
    if here is None:
        loaded = load_data(data or config.data, stored.input_size, stored.skipped)
        plan = plan.with_data(loaded)
        if different := difference(stored, plan.definition):
            raise _no_worker(study, different)
    trials = open_trials(config, watch, make=False)
    plan = _aiming_at(plan, trials.goal())
    config = plan.definition.config
    begin(trials, plan)
    count = 0

    def counted(event: Event) -> None:
        nonlocal count
        count += isinstance(event, TrialBegan)
        watch(event)

    began = time.monotonic()
    with (
        _shared_folder() as folder,
        Workers(jobs_for(config, where), None, counted, config.trial_timeout) as workers,
    ):
        size = workers.size
        watch(study_began(plan, tuple(trials.records()), size, tuple(plan.lines(where, size))))
        assignment = replace(assignment_of(stored, where, folder), data=data or config.data)
        try:
            with staffed(assignment, plan.definition, loaded, here, workers, counted, folder) as evaluators:
                del loaded
                ended = search(plan, trials, evaluators, counted, began, _called_off(trials))
        finally:
            trials.leave()
    return Worked(study, count, ended)


@contextmanager
def _shared_folder() -> Iterator[Path]:
    """Give a folder for what the workers of this process share; remove those of processes that were killed."""
    for lock in Path(tempfile.gettempdir()).glob("placesearch-*/run.lock"):
        with suppress(OSError, Timeout):  # it is another user's, or in use
            if time.time() - lock.stat().st_mtime > LEFT_SECONDS:
                with FileLock(lock, timeout=0):
                    shutil.rmtree(lock.parent)
    with tempfile.TemporaryDirectory(prefix="placesearch-") as made, FileLock(Path(made) / "run.lock"):
        yield Path(made)


def _awaited(study: str, url: StorageUrl, wait: float, watch: Watch) -> Definition:
    """Return the definition of a study, waiting for it to begin."""
    until, told = time.monotonic() + wait, False
    while (stored := stored_definition(study, url)) is None:
        if time.monotonic() >= until:
            raise StudyError(
                f"no study '{study}' in {url.shown}; 'placesearch run --name {study} --storage ...' begins it, and "
                "--wait 10m waits for that"
            )
        if not told:
            watch(Told(f"waiting for study '{study}' to begin"))
        told = True
        time.sleep(min(1.0, max(0.0, until - time.monotonic())))
    return stored


def refuse_other_code(stored: Definition, device: torch.device) -> None:
    """Refuse to work on a study if results here would be others than where it began.

    Args:
        stored: The study.
        device: Where to train.

    Raises:
        StudyError: If the code, a package, the weights or the kind of device are others; with the difference.
    """
    changed = [f"{name} {was} -> {here}" for name, (was, here) in stored.changed_versions().items()]
    if stored.device and device.type != stored.device:
        changed.append(f"device {stored.device} -> {device.type}")
    elif pick_precision(device) != stored.protocol.precision:
        changed.append(f"precision {stored.protocol.precision} -> {pick_precision(device)}")
    if stored.config.weights and not changed:
        here = read_weights(stored.config.weights, stored.config.backbone).name
        if here != stored.weights:
            changed.append(f"weights {stored.weights} -> {here}")
    if changed:
        raise _no_worker(stored.name, "; ".join(changed))


def _no_worker(study: str, different: str) -> StudyError:
    return StudyError(f"this machine cannot work on study '{study}', its results would not compare: {different}")


def _aiming_at(plan: Plan, goal: Mapping[str, Any]) -> Plan:
    """Return the plan with the goal of the process that runs the study."""
    config = plan.definition.config
    limits = {"trials": goal.get("trials"), "until": goal.get("until"), "storage": config.storage}
    aimed = StudyConfig(**config.plain() | limits)
    return replace(plan, definition=replace(plan.definition, config=aimed))


def _called_off(trials: Trials) -> Callable[[], str]:
    """Return what tells why no other trial is to be begun, if that is so."""
    return lambda: "" if trials.goal().get("open", True) else "the process that runs the study has ended"
