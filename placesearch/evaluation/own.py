"""The user's own evaluation in place of the built-in training."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from placesearch.errors import DataError, InputError, TrainingError
from placesearch.evaluation.candidate import Watch, protocol_of, tried
from placesearch.models.architecture import Architecture
from placesearch.models.code import import_named
from placesearch.models.weights import Checkpoint
from placesearch.placement import Placement
from placesearch.records import Task, TrialRecord
from placesearch.training.loop import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What the user's own evaluation gets.

    Args:
        architecture: The backbone with its blocks.
        seed: Seed of the study; equal for all candidates, so that they differ in nothing but their blocks. Replicates,
            and what is confirmed, have others.
        epochs: How long to train, in whatever the evaluation takes for an epoch.
        device: Where to.
        split: What to measure on: `validation` in a search, `test` when its result is confirmed.
        checkpoint: Weights that the study starts from; None for scratch.
    """

    architecture: Architecture
    seed: int
    epochs: int
    device: torch.device
    split: str = "validation"
    checkpoint: Checkpoint | None = None

    @property
    def placement(self) -> Placement:
        """Which block goes where."""
        return self.architecture.placement

    def build(self, num_classes: int | None = None) -> nn.Module:
        """Build the model; equal candidates get equal weights.

        Args:
            num_classes: Width of the classifier, if another than the architecture's own.
        """
        initial = "identity" if self.checkpoint else "standard"
        return self.architecture.build(num_classes, weights=self.checkpoint, initial=initial, seed=self.seed)


Evaluate = Callable[[Candidate], float | Mapping[str, Any]]
"""Returns an accuracy, or a mapping with `accuracy` and perhaps `loss` and `curve`, the accuracies on the way.

Accuracies are within 0..1, up is better.
"""


class OwnEvaluator:
    """Evaluates candidates by the user's own function.

    Args:
        plain: The backbone without blocks.
        protocol: Seed, epochs and threads.
        device: Where to.
        evaluate: The function.
        checkpoint: Weights to start from.
    """

    def __init__(
        self,
        plain: Architecture,
        protocol: Protocol,
        device: torch.device,
        evaluate: Evaluate,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self._plain, self._protocol, self._device = plain, protocol, device
        self._evaluate, self._checkpoint = evaluate, checkpoint

    def evaluate(self, task: Task, _: Watch) -> TrialRecord:
        """Evaluate a candidate; whatever the function raises is the trial's own failure, told in the record."""
        return tried(task, self._protocol, self._device, lambda measured: self._measure(task, measured))

    def _measure(self, task: Task, measured: dict[str, Any]) -> None:
        began = time.perf_counter()
        protocol = protocol_of(task, self._protocol)
        candidate = Candidate(
            architecture=self._plain.model_copy(update={"placement": task.placement}),
            seed=protocol.seed,
            epochs=protocol.epochs,
            device=self._device,
            split=task.split,
            checkpoint=self._checkpoint,
        )
        torch.manual_seed(candidate.seed)
        try:
            returned = self._evaluate(candidate)
        except DataError as error:  # those of the function are its own, not the study's
            raise TrainingError(f"DataError: {error}") from error
        scores = _scores(returned)
        measured |= {**scores, "training_seconds": time.perf_counter() - began}


def _scores(returned: Any) -> dict[str, Any]:
    """Check what the function returned; return it by the names of `TrialRecord`."""
    given = returned if isinstance(returned, Mapping) else {"accuracy": returned}
    if given.get("accuracy") is None:
        raise TrainingError("the evaluation returned no accuracy; expected a number within 0..1, up is better")
    loss = None if given.get("loss") is None else _number("loss", given["loss"])
    if loss is not None and not math.isfinite(loss):
        raise TrainingError(f"the evaluation returned loss {loss}")
    curve = given.get("curve")
    if curve is not None:
        try:
            curve = tuple(curve)
        except TypeError:
            raise TrainingError(f"the evaluation returned curve {curve!r:.80}, which is no list of numbers") from None
        curve = tuple(_accuracy("curve with", value) for value in curve)
    return {"val_accuracy": _accuracy("accuracy", given["accuracy"]), "val_loss": loss, "curve": curve or None}


def _accuracy(name: str, value: Any) -> float:
    accuracy = _number(name, value)
    if not 0 <= accuracy <= 1:
        raise TrainingError(f"the evaluation returned {name} {accuracy}; expected a number within 0..1, up is better")
    return accuracy


def _number(name: str, value: Any) -> float:
    try:
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise TrainingError(f"the evaluation returned {name} {value!r:.80}, which is no number") from None


def name_of(evaluate: Evaluate | str) -> str:
    """Return `package.module:function` of a function, or the name as it is.

    Raises:
        InputError: If a name has another form.
    """
    if callable(evaluate):
        return f"{evaluate.__module__}:{getattr(evaluate, '__qualname__', type(evaluate).__qualname__)}"
    if ":" not in evaluate:
        raise InputError(f"'{evaluate}' names no code; an evaluation is given as package.module:function")
    return evaluate


def check_importable(evaluate: Evaluate) -> None:
    """Refuse a function that other processes cannot import by its name, as workers do.

    Raises:
        InputError: If it is a method of an object, a lambda, one that is defined in another function, or one of the
            main script.
    """
    name = name_of(evaluate)
    try:
        found = None if name.startswith("__main__:") else import_named(name)
    except InputError:
        found = None
    if found is None or found != evaluate:
        raise InputError(
            f"workers cannot import the evaluation '{name}'; give a function at the top of a module that can be "
            "imported, or leave it to this process: jobs=1 and no trial_timeout"
        )


def evaluation_named(name: str) -> Evaluate:
    """Import the user's own evaluation.

    Raises:
        InputError: If it cannot be found.
    """
    if name.startswith("__main__:"):
        raise InputError(f"'{name}' is in the main script, which only that script knows; put it into a module")
    return import_named(name)
