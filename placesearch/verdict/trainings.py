"""The trainings of a confirmation: one line of JSON each, added when it has ended, never changed."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from placesearch.errors import PlacementError, StudyError
from placesearch.placement import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One training of a confirmation; None stands for "not measured".

    Args:
        placement: What was trained.
        backbone: In what, by name: the study's backbone, or the bigger plain network.
        reference: Names of the reference placement that this is; `bigger-plain` for the bigger network.
        start: `scratch`, `branch` or `pretrained`.
        epochs: Passes over the training split.
        seed: Seed of initialisation, data order and augmentation.
        state: COMPLETE or FAIL.
        accuracy: Share of test images classified correctly, 0..1.
        loss: Mean cross-entropy on the test split, in nats.
        images: Images in the test split; None where the evaluation is the user's own.
        correct: For each of them whether it was classified correctly, base64 of bits, the first one highest.
        params: Number of parameters.
        macs: Multiply-adds of convolutions and linear layers for one image.
        seconds: Wall time of the whole training.
        error: Why it failed, if it did.
    """

    placement: Placement
    backbone: str
    reference: str | None
    start: str
    epochs: int
    seed: int
    state: str
    accuracy: float | None = None
    loss: float | None = None
    images: int | None = None
    correct: str | None = None
    params: int | None = None
    macs: int | None = None
    seconds: float | None = None
    error: str | None = None


class TrainingFile:
    """The file that keeps trainings. One process at a time may add to it; any may read.

    Args:
        path: The file; made by the first training.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[Training]:
        """Return all trainings; a last line that a kill or a full disk tore is left out.

        Raises:
            StudyError: If a line before the last one is damaged.
        """
        return [training for training, _ in self._lines()]

    def mend(self) -> None:
        """Cut a torn last line off, so that the next one is not glued onto it."""
        if self._path.exists():
            os.truncate(self._path, sum(length for _, length in self._lines()))

    def add(self, training: Training) -> None:
        """Add a training; once this returns, it outlasts a crash.

        Raises:
            OSError: If it cannot be written.
        """
        content = asdict(training) | {"placement": str(training.placement)}
        with self._path.open("ab") as file:
            file.write(json.dumps(content).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _lines(self) -> Iterator[tuple[Training, int]]:
        if not self._path.exists():
            return
        lines = self._path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            training = _read(line)
            if training is not None:
                yield training, len(line)
            elif number < len(lines) or line.endswith(b"\n"):
                raise StudyError(f"{self._path} is damaged in line {number}; restore it from a copy, or remove it")


def _read(line: bytes) -> Training | None:
    try:
        content: dict[str, Any] = json.loads(line)
        return (
            Training(**content | {"placement": Placement.parse(content["placement"])}) if line[-1:] == b"\n" else None
        )
    except (ValueError, TypeError, KeyError, AttributeError, PlacementError):
        return None
