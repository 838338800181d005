"""Weights to start from: pretrained ones of torchvision or timm, or a checkpoint file.

A checkpoint file is read as tensors only; one that holds anything else is refused, because reading it could run code.
"""

import importlib
import pickle
import warnings
from collections.abc import Collection, Mapping
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

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")


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


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load weights into a model, in place.

    Blocks that the checkpoint lacks keep their weights, and so does a classifier with another number of classes. A
    prefix that all names of the checkpoint share, such as `module.`, is taken off where the model's names lack it.

    Args:
        model: A backbone, with or without blocks.
        checkpoint: The weights.

    Raises:
        BackboneError: If the weights are those of another network.
    """
    own = model.state_dict()
    given = dict(checkpoint.tensors)
    while given and not set(given) & set(own) and len({name.split(".")[0] for name in given}) == 1:
        given = {name.partition(".")[2]: tensor for name, tensor in given.items()}
    given, blocks = own_names(model, given), weights_of_blocks(model)
    missing = [name for name in own if name not in given and not _may_lack(name, blocks)]
    unknown = [name for name in given if name not in own]
    other = [name for name in own if name in given and own[name].shape != given[name].shape]
    widths = {(given[name].shape[:1], own[name].shape[:1]) for name in other}
    if all(given[name].shape[1:] == own[name].shape[1:] for name in other) and len(widths) == 1:
        given = {name: tensor for name, tensor in given.items() if name not in other}  # another number of classes
        other = []
    parts = (("lacks", missing), ("has the unknown", unknown), ("has another shape of", other))
    problems = [
        f"{verb} '{names[0]}'" + (f" and {len(names) - 1} more" if names[1:] else "") for verb, names in parts if names
    ]
    if problems:
        raise BackboneError(f"the weights {checkpoint.name} do not fit the network: it {'; it '.join(problems)}")
    model.load_state_dict(given, strict=False)


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
