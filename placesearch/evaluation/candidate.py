"""The evaluation of one candidate: build, train, validate."""

import base64
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from placesearch.errors import DataError, StudyError, TrainingError
from placesearch.models.architecture import Architecture
from placesearch.models.insertion import factors_of, fold, own_names, weights_of_blocks
from placesearch.models.sites import every_site
from placesearch.models.weights import Checkpoint
from placesearch.placement import Placement
from placesearch.records import Milestone, OutOfMemory, StepEnded, Task, TrialRecord
from placesearch.training.branch import Branch, load_branch
from placesearch.training.datasets import Data
from placesearch.training.loop import Protocol, Trainer

Watch = Callable[[Any], None]

BRANCHES = 2
"""So many branches are kept in memory."""


class Evaluator:
    """Evaluates candidates of one study, one after the other.

    Args:
        plain: The backbone without blocks.
        protocol: How to train.
        data: What to train on.
        device: Where to.
        checkpoint: Weights that candidates start from, their blocks as the identity; None if they start from scratch.
        branches: Folder of the branches that candidates go on from instead: the plain network, stopped in the midst of
            a training of so many epochs under such a seed. One that is not there is trained when it is needed, by one
            process, for all that share the folder.
    """

    def __init__(
        self,
        plain: Architecture,
        protocol: Protocol,
        data: Data,
        device: torch.device,
        checkpoint: Checkpoint | None = None,
        branches: Path | None = None,
    ) -> None:
        self._plain, self._protocol, self._device = plain, protocol, device
        self._checkpoint, self._folder = checkpoint, branches
        self._branches: dict[Protocol, Branch] = {}
        self._data = Data({name: split.on(device) for name, split in data.splits.items()}, data.classes, data.flip)
        self._any_trainer: Trainer | None = None
        with torch.random.fork_rng(devices=[]):
            self._sites = every_site(plain.build(), plain.input_size)

    def evaluate(self, task: Task, watch: Watch) -> TrialRecord:
        """Evaluate a candidate; what goes wrong with it is its own failure, told in the record.

        Args:
            task: The candidate.
            watch: Is told of each finished step.

        Raises:
            DataError: If an image cannot be read, which is no candidate's failure.
        """
        return tried(task, self._protocol, self._device, lambda measured: self._measure(task, watch, measured))

    def pace(self, seconds: float) -> float:
        """Train the plain network for so long, and return steps a second; 0.0 if it cannot be trained here."""
        try:
            with steady(self._device, self._protocol.threads):
                branch, trainer = self._branch(self._protocol), self._trainer(self._protocol)
                model = self._build(Placement(), self._protocol, branch)
                next(trainer.train(model, branch), None)  # the first step includes much that is done once
                _finish(self._device)
                done, began = 0, time.perf_counter()
                while time.perf_counter() - began < seconds:
                    for _ in trainer.train(model, branch):
                        done += 1
                        if time.perf_counter() - began >= seconds:
                            break
                _finish(self._device)
                return done / (time.perf_counter() - began)
        except (TrainingError, RuntimeError):  # RuntimeError: out of memory
            return 0.0

    def _trainer(self, protocol: Protocol) -> Trainer:
        if self._any_trainer is None:
            self._any_trainer = Trainer(self._data, protocol, self._device)
        return self._any_trainer.under(protocol)

    def _branch(self, protocol: Protocol) -> Branch | None:
        if self._folder is None:
            return None
        if protocol not in self._branches:
            if len(self._branches) >= BRANCHES:
                del self._branches[next(iter(self._branches))]
            path = self._folder / f"branch-{protocol.epochs}-{protocol.seed}.safetensors"
            with FileLock(path.with_name(path.name + ".lock")):
                self._branches[protocol] = self._stored_branch(path, protocol)
        return self._branches[protocol]

    def _stored_branch(self, path: Path, protocol: Protocol) -> Branch:
        if path.exists():
            with suppress(StudyError):  # damaged: it is trained again, and will be the same
                return load_branch(path)
        model = self._plain.build(weights=self._checkpoint, seed=protocol.seed)
        branch = self._trainer(protocol).train_branch(model)
        with suppress(OSError):  # no room for it: who needs it trains it
            branch.save(path)
        return branch

    def _build(self, placement: Placement, protocol: Protocol, branch: Branch | None) -> nn.Module:
        checkpoint = Checkpoint("branch", branch.weights) if branch else self._checkpoint
        return self._plain.model_copy(update={"placement": placement}).build(
            weights=checkpoint,
            initial="identity" if checkpoint else "standard",
            seed=protocol.seed,
            sites=self._sites,
        )

    def _measure(self, task: Task, watch: Watch, measured: dict[str, Any]) -> None:
        protocol = protocol_of(task, self._protocol)
        trainer, branch, epochs = self._trainer(protocol), self._branch(protocol), protocol.epochs
        model = self._build(task.placement, protocol, branch)
        measured["factors"] = factors_of(fold(model)) or None
        _forget_peak(self._device)
        spent, before = 0.0, time.perf_counter()
        blocks = weights_of_blocks(model)
        branch = replace(branch, momentum=own_names(model, branch.momentum)) if branch else None
        look = task.milestone.epoch * trainer.steps // epochs if task.milestone else None
        for step in trainer.train(model, branch, blocks):
            spent += time.perf_counter() - before
            watch(StepEnded(task.trial, step, trainer.steps, 1 + (step - 1) * epochs // trainer.steps))
            if task.milestone and step == look and _is_stopped(task.milestone, trainer, model, measured):
                measured["training_seconds"] = spent
                return
            before = time.perf_counter()
        measured["train_memory_mb"] = _peak(self._device)
        _forget_peak(self._device)
        seen = trainer.validate(model, task.split)
        measured["inference_memory_mb"] = _peak(self._device)
        measured["correct"] = _packed(seen.correct)
        measured |= {"val_accuracy": seen.accuracy, "val_loss": seen.loss, "training_seconds": spent}


def _is_stopped(milestone: Milestone, trainer: Trainer, model: nn.Module, measured: dict[str, Any]) -> bool:
    """Look at a training on its way; tell whether it is to be stopped, and put down what was seen."""
    with torch.random.fork_rng(devices=[]):  # a network may draw random numbers in validation, too
        try:
            accuracy = trainer.validate(model).accuracy
        except TrainingError:  # the loss is not finite yet, which says nothing about the end
            return False
    measured["curve"] = (accuracy,)
    if accuracy >= milestone.floor:
        return False
    forecast = milestone.intercept + milestone.slope * accuracy
    measured |= {"state": "PRUNED", "stopped_after": milestone.epoch, "forecast": min(max(forecast, 0.0), 1.0)}
    return True


def protocol_of(task: Task, protocol: Protocol) -> Protocol:
    """Return the protocol of a study with the epochs and the seed of a task, where it has its own."""
    seed = protocol.seed if task.seed is None else task.seed
    return replace(protocol, epochs=task.epochs or protocol.epochs, seed=seed)


def tried(
    task: Task, protocol: Protocol, device: torch.device, measure: Callable[[dict[str, Any]], None]
) -> TrialRecord:
    """Evaluate a candidate; what goes wrong with it is its own failure, told in the record.

    Args:
        task: The candidate.
        protocol: How it is trained.
        device: Where to.
        measure: Evaluates it and puts what it measured into the mapping that it gets, by the names of `TrialRecord`.

    Raises:
        DataError: If an image cannot be read, which is no candidate's failure.
    """
    began = time.perf_counter()
    own = protocol_of(task, protocol)
    measured: dict[str, Any] = {"epochs": own.epochs, "seed": own.seed}
    try:
        with steady(device, protocol.threads):
            measure(measured)
    except DataError:
        raise
    except Exception as problem:  # noqa: BLE001 - the user's own code may raise anything, the search goes on
        return failed(task, protocol, problem, time.perf_counter() - began, measured)
    return TrialRecord(
        trial=task.trial,
        state=measured.pop("state", "COMPLETE"),
        placement=task.placement,
        reference=task.reference,
        seconds=time.perf_counter() - began,
        **measured,
    )


def failed(
    task: Task, protocol: Protocol, problem: Exception, seconds: float, measured: Mapping[str, Any] | None = None
) -> TrialRecord:
    """Return the record of a trial that failed; it says if that was for want of memory on the GPU.

    Args:
        task: The candidate.
        protocol: How it was to be trained.
        problem: Why it failed.
        seconds: How long it took.
        measured: What was measured all the same, by the names of `TrialRecord`.
    """
    text = " ".join(str(problem).split())[:500]
    own = protocol_of(task, protocol)
    kind = OutOfMemory if is_out_of_memory(problem) else TrialRecord
    return kind(
        trial=task.trial,
        state="FAIL",
        placement=task.placement,
        reference=task.reference,
        error=str(problem) if isinstance(problem, TrainingError) else f"{type(problem).__name__}: {text}",
        seconds=seconds,
        **{"epochs": own.epochs, "seed": own.seed, **(measured or {})},
    )


def is_out_of_memory(problem: Exception) -> bool:
    """Tell whether the memory of the GPU did not suffice; torch says so, or the driver, where it allocates by itself.

    Example:
        >>> is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory.")), is_out_of_memory(RuntimeError("no"))
        (True, False)
    """
    return isinstance(problem, torch.OutOfMemoryError) or (
        isinstance(problem, RuntimeError) and "CUDA error: out of memory" in str(problem)
    )


def _packed(correct: Tensor) -> str:
    """Return truth values as base64 of their bits, the first one highest."""
    return base64.b64encode(np.packbits(correct.numpy()).tobytes()).decode()


def _finish(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> float | None:
    """Return the peak of memory in use on a GPU, data included, in MiB; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


@contextmanager
def steady(device: torch.device, threads: int) -> Iterator[None]:
    """Fix what a score depends on besides the protocol: threads on a processor, algorithms on a GPU.

    The process's own random numbers go on afterwards as if nothing had happened.

    Args:
        device: Where candidates are trained.
        threads: Processor threads a trial.
    """
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(threads)
    try:
        devices = [device] if device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
        ):
            yield
    finally:
        torch.set_num_threads(before)
