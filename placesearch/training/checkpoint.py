"""Where a long training is, in a file that holds tensors and plain values only and appears whole or not at all."""

import errno
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from placesearch.errors import InputError

_PARTS = ("weights", "momentum", "average", "dice")
_FIRST = 10


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A training at the end of an epoch: all that is needed to go on as if it had not stopped.

    Args:
        told: What it is and what was measured so far, as JSON can hold it.
        weights: Parameters and buffers by name.
        momentum: The optimizer's momentum by the name of the parameter.
        average: The averaged weights, if the training keeps any.
        dice: The state of the random numbers, under `state`.
    """

    told: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    momentum: Mapping[str, Tensor]
    average: Mapping[str, Tensor] = field(default_factory=dict)
    dice: Mapping[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it to a safetensors file, whole or not at all.

        Raises:
            OSError: If it cannot be written.
        """
        tensors = {f"{part}.{name}": tensor for part in _PARTS for name, tensor in getattr(self, part).items()}
        write_tensors(path, tensors, {"told": json.dumps(self.told), "crc32": _sum(tensors)})


def load_snapshot(path: Path) -> Snapshot:
    """Read what `Snapshot.save` wrote.

    Raises:
        InputError: If the file cannot be read or was changed since.
    """
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    try:
        with safetensors.safe_open(path, "pt") as file:
            kept = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it cannot be iterated over
        told = json.loads(kept["told"])
        if kept["crc32"] != _sum(tensors):
            raise ValueError("what it holds was changed")
        for name, tensor in tensors.items():
            part, _, own = name.partition(".")
            parts[part][own] = tensor
    except (OSError, SafetensorError, ValueError, KeyError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise InputError(
            f"{path} is damaged or no checkpoint ({reason}); remove it to begin anew, or give another --output"
        ) from None
    return Snapshot(told, **parts)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all.

    Args:
        path: The file.
        tensors: Tensors on the processor, none of which shares its memory with another.
        told: What is said about them.

    Raises:
        OSError: If it cannot be written.
    """
    fresh = path.with_name(path.name + ".new")
    try:
        safetensors.torch.save_file(dict(tensors), fresh, dict(told) if told else None)
    except SafetensorError as error:
        raise OSError(errno.EIO, f"it could not be written ({error})", str(fresh)) from None
    fresh.replace(path)


def _sum(tensors: Mapping[str, Tensor]) -> str:
    """Return a checksum over names and contents, in the order of the names."""
    total = 0
    for name in sorted(tensors):
        content: Any = tensors[name].reshape(-1).view(torch.uint8).numpy()
        total = zlib.crc32(content, zlib.crc32(name.encode(), total))
    return str(total)


def follow(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Let averaged weights follow those of a model, in place: `average = d * average + (1 - d) * model`.

    d is the decay, but in the first steps at most (1 + step) / (10 + step), so that what the training began with is
    soon forgotten. Buffers are averaged as well, counters copied.

    Args:
        average: A copy of the model.
        model: The model.
        decay: Share of what was there that is kept each step, within 0..1.
        step: Steps that are done, from 1.

    Example:
        >>> average, model = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
        >>> _ = average.weight.data.fill_(0.0), model.weight.data.fill_(1.0)
        >>> follow(average, model, decay=0.9, step=8)
        >>> average.weight.item()  # 1 - (1 + 8) / (10 + 8)
        0.5
    """
    share = min(decay, (1 + step) / (_FIRST + step))
    with torch.no_grad():
        for kept, now in _pairs(average, model):
            if kept.is_floating_point():
                kept.lerp_(now, 1 - share)
            else:
                kept.copy_(now)


def _pairs(average: nn.Module, model: nn.Module) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(average.state_dict().values(), model.state_dict().values(), strict=True)
