"""The evaluation of one candidate: build, train, validate."""

import base64
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from placesearch.errors import TrainingError
from placesearch.models.architecture import Architecture
from placesearch.models.insertion import factors_of, fold
from placesearch.models.sites import every_site
from placesearch.models.weights import Checkpoint
from placesearch.placement import Placement
from placesearch.records import StepEnded, Task, TrialRecord
from placesearch.training.branch import Branch
from placesearch.training.datasets import Data
from placesearch.training.loop import Protocol, Trainer

Watch = Callable[[Any], None]


class Evaluator:
    """Evaluates candidates of one study, one after the other.

    Args:
        plain: The backbone without blocks.
        protocol: How to train.
        data: What to train on.
        device: Where to.
        checkpoint: Weights that candidates start from, their blocks as the identity; None if they start from scratch.
        branches: By the epochs of a training where the plain network was stopped in it, for candidates to go on from
            there instead; as many trainings as candidates are to have.
    """

    def __init__(
        self,
        plain: Architecture,
        protocol: Protocol,
        data: Data,
        device: torch.device,
        checkpoint: Checkpoint | None = None,
        branches: Mapping[int, Branch] | None = None,
    ) -> None:
        self._plain, self._protocol, self._device = plain, protocol, device
        self._checkpoint, self._branches = checkpoint, branches or {}
        self._data = Data({name: split.on(device) for name, split in data.splits.items()}, data.classes, data.flip)
        self._trainers: dict[int, Trainer] = {}
        with torch.random.fork_rng(devices=[]):
            self._sites = every_site(plain.build(), plain.input_size)

    def evaluate(self, task: Task, watch: Watch) -> TrialRecord:
        """Evaluate a candidate; what goes wrong with it is its own failure, told in the record.

        Args:
            task: The candidate.
            watch: Is told of each finished step.
        """
        return tried(task, self._protocol, self._device, lambda measured: self._measure(task, watch, measured))

    def pace(self, seconds: float) -> float:
        """Train the plain network for so long, and return steps a second; 0.0 if it cannot be trained here."""
        try:
            with steady(self._device, self._protocol.threads):
                epochs = self._protocol.epochs
                model, trainer, branch = (
                    self._build(Placement(), epochs),
                    self._trainer(epochs),
                    self._branches.get(epochs),
                )
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

    def _trainer(self, epochs: int) -> Trainer:
        if epochs not in self._trainers:
            self._trainers[epochs] = Trainer(self._data, replace(self._protocol, epochs=epochs), self._device)
        return self._trainers[epochs]

    def _build(self, placement: Placement, epochs: int) -> nn.Module:
        branch = self._branches.get(epochs)
        checkpoint = Checkpoint("branch", branch.weights) if branch else self._checkpoint
        return self._plain.model_copy(update={"placement": placement}).build(
            weights=checkpoint,
            initial="identity" if checkpoint else "standard",
            seed=self._protocol.seed,
            sites=self._sites,
        )

    def _measure(self, task: Task, watch: Watch, measured: dict[str, Any]) -> None:
        epochs = task.epochs or self._protocol.epochs
        trainer, model = self._trainer(epochs), self._build(task.placement, epochs)
        measured["factors"] = factors_of(fold(model)) or None
        _forget_peak(self._device)
        spent, before = 0.0, time.perf_counter()
        sites = tuple(f"{site}.attention." for site in task.placement)
        blocks = {name for name, _ in model.named_parameters() if name.startswith(sites)}
        for step in trainer.train(model, self._branches.get(epochs), blocks):
            spent += time.perf_counter() - before
            watch(StepEnded(task.trial, step, trainer.steps, 1 + (step - 1) * epochs // trainer.steps))
            before = time.perf_counter()
        measured["train_memory_mb"] = _peak(self._device)
        _forget_peak(self._device)
        seen = trainer.validate(model)
        measured["inference_memory_mb"] = _peak(self._device)
        measured["correct"] = _packed(seen.correct)
        measured |= {"val_accuracy": seen.accuracy, "val_loss": seen.loss, "training_seconds": spent}


def tried(
    task: Task, protocol: Protocol, device: torch.device, measure: Callable[[dict[str, Any]], None]
) -> TrialRecord:
    """Evaluate a candidate; what goes wrong with it is its own failure, told in the record.

    Args:
        task: The candidate.
        protocol: How it is trained.
        device: Where to.
        measure: Evaluates it and puts what it measured into the mapping that it gets, by the names of `TrialRecord`.
    """
    began = time.perf_counter()
    measured: dict[str, Any] = {"epochs": task.epochs or protocol.epochs, "seed": protocol.seed}
    state, error = "COMPLETE", None
    try:
        with steady(device, protocol.threads):
            measure(measured)
    except TrainingError as problem:
        state, error = "FAIL", str(problem)
    except Exception as problem:  # noqa: BLE001 - the user's own code may raise anything, the search goes on
        state, error = "FAIL", f"{type(problem).__name__}: {' '.join(str(problem).split())[:500]}"
    return TrialRecord(
        trial=task.trial,
        state=state,
        placement=task.placement,
        reference=task.reference,
        error=error,
        seconds=time.perf_counter() - began,
        **measured,
    )


def make_branch(
    plain: Architecture, protocol: Protocol, data: Data, device: torch.device, checkpoint: Checkpoint | None = None
) -> Branch:
    """Train the plain network of a study up to the branch point.

    Args:
        plain: The backbone without blocks.
        protocol: How to train.
        data: What to train on.
        device: Where to.
        checkpoint: Weights that it starts from; None for scratch.

    Raises:
        TrainingError: If the loss is no longer finite.
    """
    with steady(device, protocol.threads):
        return Trainer(data, protocol, device).train_branch(plain.build(weights=checkpoint, seed=protocol.seed))


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
