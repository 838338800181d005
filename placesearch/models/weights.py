"""Weights to start from: pretrained ones of torchvision or timm, or a checkpoint file.

A checkpoint file is read as tensors only; one that holds anything else is refused, because reading it could run code.
"""

import importlib
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from safetensors import SafetensorError
from torch import Tensor, nn

from placesearch.errors import BackboneError, InputError, reason_of
from placesearch.models.code import names_code
from placesearch.models.insertion import own_names, weights_of_blocks

DEFAULT = "DEFAULT"
"""Stands for the pretrained weights that torchvision or timm recommend."""

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights", "teacher", "student", "ema")

_COUNTERS = {"total_ops", "total_params"}
"""What thop leaves in every module that it has counted."""

_LATER = re.compile(r"ema|momentum|encoder_k|target|student")
"""In the prefix of a copy that is taken only where there is no other: averages, and of DINO the student."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights that were read.

    Args:
        name: What they are: a name of torchvision's or timm's, or the file's name with a part of its SHA-256.
        tensors: Parameters and buffers by name.
    """

    name: str
    tensors: Mapping[str, Tensor]


def read_weights(source: str | Path, backbone: str) -> Checkpoint:
    """Read weights for a backbone.

    Args:
        source: `DEFAULT`, or a file: safetensors, or what `torch.save` wrote of a `state_dict`, also one that lies
            within a mapping, under `state_dict` or `model` say.
        backbone: The backbone's name.

    Raises:
        InputError: If the file cannot be read or holds more than tensors, or `DEFAULT` cannot be had.
    """
    return _pretrained(backbone) if str(source) == DEFAULT else _from_file(Path(source).expanduser())


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Load weights into a model, in place.

    Names fit with the prefix taken off that makes the most of them fit, such as `module.`, `_orig_mod.`, `model.` or
    `encoder_q.`; where several copies fit equally well, the first that is no moving average, no momentum encoder and no
    student. What the checkpoint has beyond that is left out if it is a profiler's counters, if it lies outside of the
    prefix, if it is another copy, or if it belongs to no part of the model and is no convolution: a criterion, a
    projection head, also one in the place of the classifier. What it lacks keeps its fresh weights if that belongs to
    blocks or to a part with linear layers and no convolution, the classifier; and so does what is of another width
    alone. Anything else is refused: a convolution or a norm that is missing, weights unknown to a part that the model
    has, other shapes.

    Args:
        model: A backbone, with or without blocks.
        checkpoint: The weights.

    Returns:
        What was left out of the checkpoint, and what keeps fresh weights though it is no block, in sentences without
        a full stop; empty if everything was loaded.

    Raises:
        BackboneError: If the weights are those of another network.
    """
    own = model.state_dict()
    tensors = _without_compiler(checkpoint.tensors, own)
    named = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in _COUNTERS}
    fitting = _fitting(named, own)
    prefix = _prefix(fitting)
    copies = tuple(other for other, count in fitting.items() if other != prefix and 2 * count > fitting[prefix])
    given = {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
    given, blocks = own_names(model, given), weights_of_blocks(model)
    part_of = _parts(own)
    heads = _heads(own, part_of, blocks)
    filled = {part_of(name) for name in given if name in own}
    left = [name for name in tensors if name not in named or not name.startswith(prefix)]
    for name in [name for name in given if name not in own]:
        part = part_of(name)
        beside = part is None or (part in heads and part not in filled)
        if "." in name and (f"{prefix}{name}".startswith(copies) or (beside and given[name].dim() < 3)):
            left.append(f"{prefix}{name}")
            del given[name]
    missing = [name for name in own if name not in given and not _may_lack(name, blocks)]
    unknown = [name for name in given if name not in own]
    other = [name for name in own if name in given and own[name].shape != given[name].shape]
    widths = {(given[name].shape[:1], own[name].shape[:1]) for name in other}
    fresh = [name for name in missing if part_of(name) in heads and len(given) > len(unknown) + len(other)]
    missing = [name for name in missing if name not in fresh]
    if other and all(given[name].shape[1:] == own[name].shape[1:] for name in other) and len(widths) == 1:
        given = {name: tensor for name, tensor in given.items() if name not in other}  # another number of classes
        fresh, other = fresh + other, []
    parts = (("lacks", missing), ("has the unknown", unknown), ("has another shape of", other))
    problems = [
        f"{verb} '{names[0]}'" + (f" and {len(names) - 1} more" if names[1:] else "") for verb, names in parts if names
    ]
    if problems:
        raise BackboneError(f"the weights {checkpoint.name} do not fit the network: it {'; it '.join(problems)}")
    model.load_state_dict(given, strict=False)
    told = []
    if left:
        told.append(f"left out of {checkpoint.name}, as the network has no such weights: {_listed(left)}")
    if fresh:
        told.append(f"with fresh weights, as {checkpoint.name} has none of that shape: {_listed(fresh)}")
    return tuple(told)


def _without_compiler(tensors: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Take off what torch.compile puts before the names of a network or of a part of it."""
    compiled = any("_orig_mod." in name for name in own)
    return {name if compiled else name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}


def _fitting(given: Collection[str], own: Collection[str]) -> "Counter[str]":
    """Count how many names of a checkpoint fit once a prefix is taken off, for each prefix with which any does."""
    fitting: Counter[str] = Counter()
    for name in given:
        parts = name.split(".")
        rests = (".".join(parts[index:]) for index in range(len(parts)))
        fitting.update(name[: len(name) - len(rest)] for rest in rests if rest in own)
    return fitting


def _prefix(fitting: Mapping[str, int]) -> str:
    """Return the prefix with which most names fit; of several the shortest, or the first that is no later copy."""
    best = [prefix for prefix, count in fitting.items() if count == max(fitting.values())]  # in the order of the file
    return min(best, key=lambda prefix: (prefix != "", _LATER.search(prefix) is not None), default="")


def _parts(own: Mapping[str, Tensor]) -> Callable[[str], str | None]:
    """Return what tells which part of a network a name belongs to: a child below what all names share; None if to none.

    Example:
        >>> own = {"net.conv.weight": torch.zeros(8, 3, 3, 3), "net.head.fc.weight": torch.zeros(10, 8)}
        >>> [_parts(own)(name) for name in ("net.head.mlp.0.weight", "net.loss.center", "loss.center")]
        ['net.head', None, None]
    """
    split = [name.split(".") for name in own]
    depth = 1
    while all(depth + 1 < len(name) and name[:depth] == split[0][:depth] for name in split):
        depth += 1
    known = {".".join(name[:depth]) for name in split}

    def part_of(name: str) -> str | None:
        part = ".".join(name.split(".")[:depth])
        return part if part in known else None

    return part_of


def _heads(own: Mapping[str, Tensor], part_of: Callable[[str], str | None], blocks: Collection[str]) -> set[str | None]:
    """Return the parts of a network that have linear layers and no convolutions."""
    dims: dict[str | None, set[int]] = {}
    for name, tensor in own.items():
        if not _may_lack(name, blocks):
            dims.setdefault(part_of(name), set()).add(tensor.dim())
    return {part for part, of_part in dims.items() if 2 in of_part and max(of_part) == 2}


def _listed(names: list[str]) -> str:
    """Return the first names and how many more there are.

    Example:
        >>> _listed(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if names[3:] else "")


def has_blocks(model: nn.Module, checkpoint: Checkpoint) -> bool:
    """Tell whether weights are those of a network with blocks where a model has some, not of the plain one."""
    blocks, given = weights_of_blocks(model), own_names(model, checkpoint.tensors)
    return any(f".{name}".endswith(f".{block}") for block in blocks for name in given)


def _may_lack(name: str, blocks: Collection[str]) -> bool:
    """Tell whether a checkpoint may lack a name: blocks are new, and old checkpoints do not count batches."""
    return name in blocks or name.endswith("num_batches_tracked")


def _pretrained(backbone: str) -> Checkpoint:
    if names_code(backbone):
        raise InputError(f"'{backbone}' has no {DEFAULT} weights; give a checkpoint: --weights FILE")
    try:
        if backbone.startswith("timm:"):
            network = importlib.import_module("timm").create_model(backbone.removeprefix("timm:"), pretrained=True)
            tag = network.pretrained_cfg.get("tag", "")
            return Checkpoint(f"{backbone.split('.')[0]}.{tag}".rstrip("."), network.state_dict())
        weights = torchvision.models.get_model_weights(backbone).DEFAULT
        tensors = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # noqa: BLE001 - no network, no such weights, a damaged download: each raises its own
        raise InputError(
            f"the {DEFAULT} weights of {backbone} could not be had ({reason_of(error)}); download them yourself "
            "and give the file: --weights FILE"
        ) from None
    return Checkpoint(str(weights), tensors)


def _from_file(path: Path) -> Checkpoint:
    try:
        digest = sha256(path.read_bytes()).hexdigest()[:16]
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # on formats of old releases, which load all the same
                content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read weights {path}: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} is damaged, or holds more than tensors, which is not read because that could run code; "
            "save model.state_dict() instead"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged or no checkpoint: {reason_of(error)}") from None
    if isinstance(content, Mapping):
        content = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path} is no checkpoint: expected tensors by name, as model.state_dict() has them")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return Checkpoint(f"{path.name} (sha256 {digest})", tensors)
