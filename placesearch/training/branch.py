"""The branch point of a study: the plain network in the middle of its training, from where every candidate goes on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from placesearch.errors import StudyError
from placesearch.training.checkpoint import write_tensors


@dataclass(frozen=True, slots=True)
class Branch:
    """A network and its optimizer, stopped before the learning rate is annealed.

    Args:
        weights: Parameters and buffers by name.
        momentum: The optimizer's momentum by the name of the parameter.
    """

    weights: Mapping[str, Tensor]
    momentum: Mapping[str, Tensor]

    def save(self, path: Path) -> None:
        """Write it to a safetensors file, whole or not at all.

        Raises:
            OSError: If it cannot be written.
        """
        tensors = {f"weights.{name}": tensor.contiguous() for name, tensor in self.weights.items()}
        tensors |= {f"momentum.{name}": tensor.contiguous() for name, tensor in self.momentum.items()}
        write_tensors(path, tensors)


def load_branch(path: Path) -> Branch:
    """Read what `Branch.save` wrote.

    Raises:
        StudyError: If the file cannot be read.
    """
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise StudyError(f"{path} is damaged ({error}); remove it, the next run trains it again") from None
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "momentum": {}}
    for name, tensor in tensors.items():
        part, _, own = name.partition(".")
        parts[part][own] = tensor
    return Branch(**parts)
