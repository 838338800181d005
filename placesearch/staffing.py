"""Who evaluates the candidates of a study: how many workers, what they are told, and the data that they share."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from placesearch.config import StudyConfig
from placesearch.definition import Definition
from placesearch.evaluation.fitting import fit
from placesearch.evaluation.own import Evaluate
from placesearch.evaluation.ray_workers import RayWorkers
from placesearch.evaluation.workers import Assignment, Evaluators, ThisProcess, Workers
from placesearch.records import Event, Told
from placesearch.training.datasets import Data, share_data

MEMORY_OF_A_WORKER = 2 * 2**30
"""Bytes that a worker process may need; fewer workers are started where there is less."""

PACE_SECONDS = 3.0
"""How long each number of workers trains the plain network, to find out how many fill a GPU."""

Watch = Callable[[Event], None]
Pool = Workers | RayWorkers


def jobs_for(config: StudyConfig, device: torch.device) -> int:
    """Return how many trials run at a time: on processors one a core, as far as memory and the sampler allow.

    On a GPU with `auto` it is one until `staffed` has measured.
    """
    if config.jobs == "auto":
        if device.type != "cpu":
            return 1
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        jobs = min(cores, config.max_jobs, memory // MEMORY_OF_A_WORKER)
    else:
        jobs = config.jobs
    return max(1, min(jobs, config.trials or jobs))


def ray_workers(config: StudyConfig, device: torch.device, watch: Watch) -> RayWorkers:
    """Return workers on the Ray cluster that a study is to use.

    Raises:
        InputError: If Ray is not installed, or the cluster cannot be reached.
    """
    wanted = None if config.jobs == "auto" else config.jobs
    most = min(config.max_jobs, config.trials or config.max_jobs)
    gpus = config.gpus_per_worker if device.type == "cuda" else 0.0
    return RayWorkers(wanted, most, watch, config.address, gpus, config.trial_timeout)


def assignment_of(definition: Definition, device: torch.device, folder: Path) -> Assignment:
    """Return what a worker needs to know to evaluate the candidates of a study.

    Args:
        definition: The study.
        device: Where to train.
        folder: Where to keep branches.
    """
    branches = str(folder) if definition.protocol.start == "branch" else None
    return Assignment(
        plain=definition.plain,
        protocol=definition.protocol,
        data=definition.config.data,
        device=str(device),
        weights=definition.config.weights,
        branches=branches,
        evaluate=definition.config.evaluate,
        skipped=definition.skipped,
    )


@contextmanager
def staffed(
    assignment: Assignment,
    definition: Definition,
    data: Data | None,
    evaluate: Evaluate | None,
    workers: Pool,
    watch: Watch,
    folder: Path,
) -> Iterator[Evaluators]:
    """Give what evaluates; if candidates go on from a branch, the first to need it trains the plain network.

    Args:
        assignment: What they are to know.
        definition: The study.
        data: What to train on; None where the evaluation is the user's own.
        evaluate: The user's own evaluation.
        workers: Who evaluates, unless it is one without a time limit; then this process does.
        watch: Is told what happens.
        folder: Where to keep the data that workers share.
    """
    if isinstance(workers, RayWorkers):
        workers.assign(assignment, data)
        del data
        yield workers
        return
    device = torch.device(assignment.device)
    fits = _is_fitted(definition.config, device)
    if workers.size == 1 and workers.trial_timeout is None and not fits:
        yield ThisProcess(assignment.evaluator(data, evaluate), watch)
        return
    shared = folder / "data.safetensors"
    try:
        if data is not None and share_data(data, shared):
            assignment = replace(assignment, shared=str(shared))
        del data
        if fits:
            _fit(workers, assignment, definition.config, watch)
        else:
            workers.assign(assignment)
        with workers:
            yield workers
    finally:
        shared.unlink(missing_ok=True)


def _is_fitted(config: StudyConfig, device: torch.device) -> bool:
    """Tell whether the number of workers is found by measuring."""
    return config.jobs == "auto" and device.type == "cuda" and config.evaluate is None


def _fit(workers: Workers, assignment: Assignment, config: StudyConfig, watch: Watch) -> None:
    """Give workers their assignment, and find out how many of them fill the GPU. Not run on a GPU yet."""
    device = torch.device(assignment.device)
    watch(Told("measuring how many candidates to train at a time ..."))
    most = min(config.max_jobs, config.trials or config.max_jobs)

    def pace(count: int) -> float:
        if count == 1:
            workers.assign(assignment)
        return workers.pace(count, PACE_SECONDS)

    size, paces = fit(pace, lambda: _free_memory(device), most)
    workers.keep(size)
    measured = ", ".join(f"{count}: {rate:.1f}" for count, rate in enumerate(paces, 1))
    watch(Told(f"{size} at a time; steps of the plain network a second, by the number of workers: {measured}"))


def _free_memory(device: torch.device) -> float:
    """Return the bytes of memory that are free on a GPU."""
    return float(torch.cuda.mem_get_info(device)[0])
