"""What a network does, seen by running it once: its operations, and which module puts which tensor out.

The network runs in eval mode on tensors without memory (the `meta` device), or, where it does not work on those, on
zeros. Nothing has to be traceable: control flow, shared modules, functional operations and tuples are seen as they
happen.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from placesearch.errors import BackboneError
from placesearch.models.copying import InputSize as InputSize
from placesearch.models.copying import copy_of, dtype_and_device, moved, plainly, refusal

Path = tuple[int | str, ...]
"""Where in an output a tensor is: keys, indices and names of attributes, from the outermost to the innermost."""

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
        result: The first tensor of what the network returned that comes from the input.
        returned: All tensors of what it returned: where they are in it, their shapes, and the nodes of those that come
            from the input.
    """

    nodes: list[Node] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    outputs: list[tuple[str, Node]] = field(default_factory=list)
    result: Node | None = None
    returned: list[tuple[Path, tuple[int, ...], Node | None]] = field(default_factory=list)


def record(model: nn.Module, input_size: InputSize, *, training: bool = False) -> Graph:
    """Run a copy of a network once and return what happened; the argument is left as it is.

    The input has the network's dtype. Lazy modules of the copy are initialised first.

    Args:
        model: The network.
        input_size: Channels, height and width of its input.
        training: Whether to run it in train mode, on two images, in place of eval mode, on one.

    Raises:
        BackboneError: If the network cannot be copied, or cannot be run on such an input.
    """
    with torch.random.fork_rng(devices=[]):
        dtype, device = dtype_and_device(model)
        try:
            return _recorded(copy_of(model, input_size, share=True), input_size, dtype, torch.device("meta"), training)
        except _RunError as without_memory:  # some networks look at numbers, which need memory
            try:
                device = torch.device("cpu") if device.type == "meta" else device
                return _recorded(copy_of(model, input_size), input_size, dtype, device, training)
            except _RunError as error:
                raise BackboneError(str(error)) from without_memory


class _RunError(Exception):
    """A network could not be run; says why, in a line."""


def _recorded(
    copied: nn.Module, input_size: InputSize, dtype: torch.dtype, device: torch.device, training: bool
) -> Graph:
    names: dict[int, str] = {}
    tied = {
        name: names.setdefault(id(weight), name) for name, weight in copied.named_parameters(remove_duplicate=False)
    }
    moved(copied, device).train(training)
    recorder = _Recorder(copied, tied)
    image = torch.zeros(1 + training, *input_size, dtype=dtype, device=device)
    try:
        with torch.no_grad(), plainly(), recorder:
            copied(recorder.begin(image))
    except Exception as error:  # a network of the user's own may raise anything
        mode = "in training" if training else ""
        raise _RunError(refusal(copied, input_size, error, recorder.running, mode)) from error
    return recorder.graph


_REDUCING = {"mean", "sum", "amax", "max", "std", "var"}
_SHAPE_CHANGING = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "unfold", "fold"}
_ORDERED = {
    **dict.fromkeys(("div", "divide", "true_divide", "truediv", "addcmul"), ("input",)),
    "lerp": ("input", "end"),
}
"""Operations that mean something else where these of their arguments are constants."""
PERMUTING = {"permute", "transpose", "swapaxes", "swapdims", "movedim"}


class _Recorder(TorchFunctionMode):
    """Notes each call of a torch function on tensors that come from the input."""

    def __init__(self, model: nn.Module, tied: Mapping[str, str]) -> None:
        super().__init__()
        self.graph = Graph()
        self._at: dict[int, Node] = {}
        self._alive: list[Tensor] = []  # an id is only unique while its object lives
        self._running = [""]
        self._parameters = {id(weight): tied[name] for name, weight in model.named_parameters(remove_duplicate=False)}
        self._buffers = {id(tensor) for tensor in model.buffers()}
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._begin_call(name))
            module.register_forward_hook(self._end_call(name))

    @property
    def running(self) -> str:
        """The innermost module that is running, or was when an error ended the run."""
        return self._running[-1]

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
        dims = _dims(args, kwargs, len(sources[0].shape)) if operation in _REDUCING else ()
        if operation in _ORDERED and not self._leads(_ORDERED[operation], args, kwargs):
            operation += " of a constant"
        others = [key for key in given if key not in self._at and key not in self._buffers]
        known = all(key in self._parameters for key in others)
        parameters = tuple(self._parameters[key] for key in others) if known else ()
        for tensor in _tensors(result):
            if id(tensor) in self._at and versions.get(id(tensor)) == tensor._version:
                continue  # handed through unchanged, as a dropout does in eval mode
            order = _order(operation, sources, args, kwargs, tensor)
            self._note(tensor, operation, sources, order, dims, parameters)
        return result

    def _leads(self, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Tell whether the first arguments come from the input, as the others need not."""
        leading = [args[index] if index < len(args) else kwargs.get(name) for index, name in enumerate(names)]
        return all(id(tensor) in self._at for tensor in leading)

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
                graph.returned = [(path, tuple(t.shape), self._at.get(id(t))) for path, t in tensors_in(output)]
                graph.result = next((node for _, _, node in graph.returned if node is not None), None)
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


def tensors_in(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yield the tensors in an output and where they are: in mappings, sequences, data classes and other objects.

    Args:
        value: The output.
        path: Where it is itself.

    Example:
        >>> [path for path, _ in tensors_in({"out": torch.zeros(1), "more": (torch.zeros(2), None)})]
        [('out',), ('more', 0)]
    """
    if isinstance(value, Tensor):
        yield path, value
        return
    parts: Any = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, tuple | list):
        parts = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [(part.name, getattr(value, part.name, None)) for part in fields(value)]
    elif type(value).__module__ != "builtins" and len(path) < _DEEPEST and not isinstance(value, type | nn.Module):
        parts = getattr(value, "__dict__", {}).items()
    for name, part in parts:
        yield from tensors_in(part, (*path, name if isinstance(name, int) else str(name)))


_DEEPEST = 4
"""Levels of objects that are neither mappings nor sequences nor data classes, which may hold each other."""


def _tensors(value: Any) -> Iterator[Tensor]:
    for _, tensor in tensors_in(value):
        yield tensor


def _dims(args: tuple[Any, ...], kwargs: dict[str, Any], rank: int) -> tuple[int, ...]:
    """Return the dimensions that a reduction of a tensor of some rank names, counted from 0; empty if it names none."""
    given = kwargs.get("dim", args[1] if len(args) > 1 else ())
    numbers = (given,) if isinstance(given, int) else given
    return tuple(int(number) % rank for number in numbers) if isinstance(numbers, tuple | list) and rank else ()


def _order(
    operation: str, inputs: tuple[Node, ...], args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
) -> tuple[int, ...] | None:
    """Say which of (batch, channels, height, width) each dimension of a result is."""
    if result.dim() != 4:
        return None
    if operation in ("conv2d", "conv_transpose2d") or is_sum_of_stack(operation, inputs, tuple(result.shape)):
        return NCHW
    known = [node.order for node in inputs if node.order is not None and len(node.shape) == 4]
    if operation in _SHAPE_CHANGING or not known:
        return None
    if operation in PERMUTING:
        return tuple(known[0][index] for index in _moved(operation, args[1:], kwargs))
    return known[0]


def ancestors(node: Node) -> set[Node]:
    """Return a node and everything that it was made from."""
    seen, waiting = {node}, [node]
    while waiting:
        new = set(waiting.pop().inputs) - seen
        seen |= new
        waiting.extend(new)
    return seen


def is_sum_of_stack(operation: str, inputs: tuple[Node, ...], shape: tuple[int, ...]) -> bool:
    """Tell whether an operation adds, or averages, feature maps of a shape that were stacked for that."""
    return (
        operation in ("sum", "mean")
        and len(inputs) == 1
        and inputs[0].operation == "stack"
        and all(source.is_map and source.shape == shape for source in inputs[0].inputs)
    )


def _moved(operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Return where each dimension of a permuted tensor comes from, by permuting one whose sizes tell them apart."""
    probe = torch.empty(2, 3, 4, 5, device="meta")
    shape = getattr(probe, operation)(*args, **{key: value for key, value in kwargs.items() if key != "input"}).shape
    return tuple(size - 2 for size in shape)
