"""What a network does, seen by running it once: its operations, and which module puts which tensor out.

The network runs in eval mode on tensors without memory (the `meta` device), or, where it does not work on those, on
zeros. Nothing has to be traceable: control flow, shared modules, functional operations and tuples are seen as they
happen.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from placesearch.errors import BackboneError, reason_of

InputSize = tuple[int, int, int]

NCHW = (0, 1, 2, 3)


@dataclass(eq=False, slots=True)
class Node:
    """A tensor that an operation made.

    Args:
        index: Position in the order of execution.
        operation: Name of the operation, such as `conv2d` or `add`.
        inputs: The tensors it was made from, without parameters and constants.
        shape: Its shape.
        order: Which dimension of (batch, channels, height, width) each of its four dimensions is; None if it has lost
            that meaning.
        within: The innermost module that was running.
        dims: The dimensions over which it was reduced, if the operation said so.
        parameters: Names of the model's parameters that the operation took; empty if it also took other tensors that
            are neither parameters nor buffers, such as a weight made of another one.
    """

    index: int
    operation: str
    inputs: tuple["Node", ...]
    shape: tuple[int, ...]
    order: tuple[int, ...] | None
    within: str = ""
    dims: tuple[int, ...] = ()
    parameters: tuple[str, ...] = ()

    @property
    def is_map(self) -> bool:
        """Whether it is a feature map (batch, channels, height, width)."""
        return len(self.shape) == 4 and self.order == NCHW


@dataclass(slots=True)
class Graph:
    """One run of a network.

    Args:
        nodes: Its tensors in the order in which they were made; the first is the input.
        calls: How often each module was called.
        outputs: Module names and the single tensor each call put out, in the order in which the calls ended.
        result: The first tensor of what the network returned.
    """

    nodes: list[Node] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    outputs: list[tuple[str, Node]] = field(default_factory=list)
    result: Node | None = None


def record(model: nn.Module, input_size: InputSize) -> Graph:
    """Run a copy of a network once and return what happened; the argument is left as it is.

    Args:
        model: The network.
        input_size: Channels, height and width of its input.

    Raises:
        BackboneError: If the network does not take such an input.
    """
    try:
        return _recorded(model, input_size, "meta")
    except Exception as without_memory:  # noqa: BLE001 - some networks look at numbers, which need memory
        try:
            return _recorded(model, input_size, "cpu")
        except Exception as error:  # noqa: BLE001 - a network of the user's own may raise anything
            size = "x".join(map(str, input_size))
            why = f"{type(model).__name__} does not take an input of {size}: {reason_of(error)}"
            raise BackboneError(why) from without_memory


def _recorded(model: nn.Module, input_size: InputSize, device: str) -> Graph:
    copied = copy.deepcopy(model).to(device).eval()
    recorder = _Recorder(copied)
    with torch.no_grad(), recorder:
        copied(recorder.begin(torch.zeros(1, *input_size, device=device)))
    return recorder.graph


_REDUCING = {"mean", "sum", "amax", "max", "std", "var"}
_SHAPE_CHANGING = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "unfold", "fold"}
PERMUTING = {"permute", "transpose", "swapaxes", "swapdims", "movedim"}


class _Recorder(TorchFunctionMode):
    """Notes each call of a torch function on tensors that come from the input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = Graph()
        self._at: dict[int, Node] = {}
        self._alive: list[Tensor] = []  # an id is only unique while its object lives
        self._running = [""]
        self._parameters = {id(tensor): name for name, tensor in model.named_parameters()}
        self._buffers = {id(tensor) for tensor in model.buffers()}
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._begin_call(name))
            module.register_forward_hook(self._end_call(name))

    def begin(self, image: Tensor) -> Tensor:
        self._note(image, "input", (), NCHW)
        return image

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {id(tensor): tensor for tensor in _tensors((args, kwargs))}
        sources = tuple(self._at[key] for key in given if key in self._at)
        versions = {key: tensor._version for key, tensor in given.items()} if sources else {}
        result = func(*args, **kwargs)
        if not sources:
            return result
        operation = _plain_name(func)
        if operation.endswith("_as"):  # the second tensor only lends its shape or type
            sources = sources[:1]
        dims = _dims(args, kwargs) if operation in _REDUCING else ()
        others = [key for key in given if key not in self._at and key not in self._buffers]
        known = all(key in self._parameters for key in others)
        parameters = tuple(self._parameters[key] for key in others) if known else ()
        for tensor in _tensors(result):
            if id(tensor) in self._at and versions.get(id(tensor)) == tensor._version:
                continue  # handed through unchanged, as a dropout does in eval mode
            order = _order(operation, sources, args, kwargs, tensor)
            self._note(tensor, operation, sources, order, dims, parameters)
        return result

    def _note(
        self,
        tensor: Tensor,
        operation: str,
        inputs: tuple[Node, ...],
        order: tuple[int, ...] | None,
        dims: tuple[int, ...] = (),
        parameters: tuple[str, ...] = (),
    ) -> None:
        number, shape = len(self.graph.nodes), tuple(tensor.shape)
        node = Node(number, operation, inputs, shape, order, self._running[-1], dims, parameters)
        self.graph.nodes.append(node)
        self._at[id(tensor)] = node
        self._alive.append(tensor)

    def _begin_call(self, name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _module, _inputs: self._running.append(name)

    def _end_call(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._running.pop()
            graph = self.graph
            graph.calls[name] = graph.calls.get(name, 0) + 1
            if name == "":
                graph.result = next((self._at[id(t)] for t in _tensors(output) if id(t) in self._at), None)
            elif isinstance(output, Tensor) and id(output) in self._at:
                graph.outputs.append((name, self._at[id(output)]))

        return note


def _plain_name(func: Callable[..., Any]) -> str:
    """Return `add` for `torch.add`, `Tensor.add_`, `Tensor.__iadd__` and `Tensor.__radd__` alike."""
    name = str(getattr(func, "__name__", func))
    if name.startswith("__") and name.endswith("__"):
        plain = name.strip("_")
        return plain[1:] if plain[:1] in "ir" and plain[1:] in ("add", "mul", "sub", "truediv") else plain
    return name.rstrip("_")


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _dims(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Return the dimensions that a reduction names, counted from 0 of 4; empty if it names none."""
    given = kwargs.get("dim", args[1] if len(args) > 1 else ())
    numbers = (given,) if isinstance(given, int) else given
    return tuple(int(number) % 4 for number in numbers) if isinstance(numbers, tuple | list) else ()


def _order(
    operation: str, inputs: tuple[Node, ...], args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
) -> tuple[int, ...] | None:
    """Say which of (batch, channels, height, width) each dimension of a result is."""
    if result.dim() != 4:
        return None
    if operation in ("conv2d", "conv_transpose2d"):
        return NCHW
    known = [node.order for node in inputs if node.order is not None and len(node.shape) == 4]
    if operation in _SHAPE_CHANGING or not known:
        return None
    if operation in PERMUTING:
        return tuple(known[0][index] for index in _moved(operation, args[1:], kwargs))
    return known[0]


def _moved(operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Return where each dimension of a permuted tensor comes from, by permuting one whose sizes tell them apart."""
    probe = torch.empty(2, 3, 4, 5, device="meta")
    shape = getattr(probe, operation)(*args, **{key: value for key, value in kwargs.items() if key != "input"}).shape
    return tuple(size - 2 for size in shape)
