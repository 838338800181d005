"""Copies of networks to look at: plain modules, whatever the original is wrapped in, in its dtype and on its device."""

import copy
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import checkpoint

from placesearch.errors import BackboneError, reason_of

InputSize = tuple[int, int, int]

_ABOUT_SHAPES = re.compile(
    r"\b(sizes?|shape[sd]?|channels?|dims?|dimensions?|elements|features|height|width|resolution)\b", re.IGNORECASE
)
_OF_INPUTS = (RuntimeError, ValueError, AssertionError, IndexError)
_OF_MODULES = {"_modules", "_parameters", "_buffers"}


def copy_of(model: nn.Module, input_size: InputSize | None = None, *, share: bool = False) -> nn.Module:
    """Return a copy of a network that is an ordinary module.

    What `torch.compile` made is copied without its wrapper, so that names have no `_orig_mod.`. A tensor that a module
    keeps and computed from parameters, as the old `weight_norm` does, is a constant in the copy until it is computed
    anew. Where an input size is given, lazy modules of the copy are initialised, by a run in eval mode on zeros; their
    weights come from torch's global random numbers.

    Args:
        model: The network; left as it is.
        input_size: Channels, height and width of its input.
        share: Whether the copy has the very parameters and buffers of the network.

    Raises:
        BackboneError: If it holds something that cannot be copied or a part by torch.jit, or is lazy and cannot be run.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            part = f"part '{name}' of {type(model).__name__}" if name else "network"
            raise BackboneError(f"the {part} was made by torch.jit and cannot be looked into; give it as it was before")
    memo = _memo(model, share)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:  # what a network holds may raise anything
        raise BackboneError(f"{type(model).__name__} cannot be copied: {_not_copied(model, error)}") from error
    if input_size is not None:
        initialise(copied, input_size)
    return copied


def initialise(model: nn.Module, input_size: InputSize) -> None:
    """Run a network once if it has lazy modules, in place, so that they get their shapes and weights.

    Their weights come from torch's global random numbers. Other buffers keep their values.

    Args:
        model: The network.
        input_size: Channels, height and width of its input.

    Raises:
        BackboneError: If it cannot be run, or no run reaches one of them.
    """
    if not _lazy(model):
        return
    was_training = {module: module.training for module in model.modules()}
    _, device = dtype_and_device(model)
    for training in (False, True):  # some parts, such as auxiliary heads, are run in training only
        buffers = {name: tensor.clone() for name, tensor in model.named_buffers() if not is_lazy(tensor)}
        dtype, _ = dtype_and_device(model)
        try:
            with torch.no_grad(), plainly():
                model.train(training)(torch.zeros(2, *input_size, dtype=dtype, device=device))
        except Exception as error:  # a network of the user's own may raise anything
            raise BackboneError(refusal(model, input_size, error)) from error
        with torch.no_grad():
            for name, tensor in model.named_buffers():
                if name in buffers:
                    tensor.copy_(buffers[name])
        if not _lazy(model):
            break
    for module, training in was_training.items():
        module.training = training
    if lazy := _lazy(model):
        raise BackboneError(f"'{lazy}' of {type(model).__name__} is lazy, and no run gives it a shape; give it one")


def dtype_and_device(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Return the floating dtype and the device of a network's first parameter, or else buffer.

    Example:
        >>> dtype_and_device(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 8, 3)).double())
        (torch.float64, device(type='cpu'))
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype, tensor.device
    return torch.get_default_dtype(), torch.device("cpu")


def moved(model: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None) -> nn.Module:
    """Bring a network to a device, in place; what had no memory (the `meta` device) becomes zeros there.

    Args:
        model: The network.
        device: Where to.
        dtype: What its floating numbers become; None leaves them.
    """

    def move(tensor: Tensor) -> Tensor:
        into = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if tensor.is_meta and torch.device(device).type != "meta":
            return torch.zeros_like(tensor, device=device, dtype=into)
        return tensor.to(device, into)

    model._apply(move)
    return model


@contextmanager
def plainly() -> Iterator[None]:
    """Run networks operation by operation: nothing is compiled, nothing is done again to save memory."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing can be compiled; importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        given = checkpoint.CheckpointFunction
        checkpoint.CheckpointFunction = _Unchecked  # type: ignore[misc,assignment]
        stack.callback(setattr, checkpoint, "CheckpointFunction", given)
        yield


class _Unchecked:
    """Takes the place of reentrant checkpointing, whose operations no tracer sees."""

    @staticmethod
    def apply(function: Any, _preserve: bool, *given: Any) -> Any:
        return function(*given)


def refusal(model: nn.Module, input_size: InputSize, error: Exception, where: str = "", mode: str = "") -> str:
    """Say in a line why a network could not be run; its input is blamed only where shapes are.

    Args:
        model: The network.
        input_size: Channels, height and width of the input.
        error: What it raised.
        where: The module that was running.
        mode: `in training` say, where that matters.
    """
    name, size = type(model).__name__, "x".join(map(str, input_size))
    mode = f" {mode}" if mode else ""
    running = dict(model.named_modules()).get(where) if where else None
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if isinstance(running, nn.Conv2d) and running is first and running.in_channels != input_size[0]:
        wants = running.in_channels
        return (
            f"{name} does not take an input of {size}: its first convolution '{where}' wants "
            f"{wants} channel{'s'[: wants > 1]}, not {input_size[0]}"
        )
    at = f"in '{where}': " if where else ""
    if isinstance(error, _OF_INPUTS) and _ABOUT_SHAPES.search(str(error)):
        return f"{name} does not take an input of {size}{mode}: {at}{reason_of(error)}"
    reason = reason_of(error)
    reason = reason if reason == type(error).__name__ else f"{type(error).__name__}: {reason}"
    return f"{name} cannot be run{mode}: {at}{reason}"


def _memo(model: nn.Module, share: bool) -> dict[int, Any]:
    """Return what a deep copy is to take in place of some objects, by their ids."""
    memo: dict[int, Any] = {}
    if share:
        memo |= {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if not is_lazy(tensor)}
    lazy: Any
    for lazy in filter(is_lazy, model.buffers()):  # which do not copy themselves, unlike lazy parameters
        persistent = getattr(lazy, "persistent", True)  # `half` and the like lose it
        memo[id(lazy)] = type(lazy)(device=lazy.device, dtype=lazy.dtype, persistent=persistent)
    for module in model.modules():
        for tensor in _tensors(vars(module)):
            if not is_lazy(tensor) and not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach() if share else tensor.detach().clone()
    compiled = [module for module in model.modules() if type(module).__name__ == "OptimizedModule"]
    for module in reversed(compiled):  # those within others first
        memo[id(module)] = copy.deepcopy(module._orig_mod, memo)
    return memo


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors within an attribute, but not those of the modules within."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item)


def _not_copied(model: nn.Module, error: Exception) -> str:
    """Name the attribute that cannot be copied, and say what to do."""
    kept = {id(part): part for part in (*model.modules(), *model.parameters(), *model.buffers())}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            try:
                if attribute not in _OF_MODULES:
                    copy.deepcopy(value, _memo(model, share=True) | kept)
            except Exception as problem:  # noqa: BLE001 - as above
                where = f"'{name}.{attribute}'" if name else f"'{attribute}'"
                return (
                    f"its attribute {where} holds what cannot be ({reason_of(problem)}); make it where it is used, "
                    "or leave it out by a __getstate__ of your own"
                )
    return reason_of(error)


def _lazy(model: nn.Module) -> str:
    """Return the name of a tensor that has no shape yet, or nothing."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return next((name for name, tensor in tensors if is_lazy(tensor)), "")
