"""Sites: the places in a network where a block may go, found by looking at its traced graph."""

import copy
import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from placesearch.errors import BackboneError
from placesearch.models.backbones import load_backbone

InputSize = tuple[int, int, int]

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_MULTIPLICATIONS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_DROPS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.Identity)


@dataclass(frozen=True, slots=True)
class Site:
    """A tensor (batch, channels, height, width) that a named module puts out.

    Args:
        name: The innermost module that puts it out.
        kinds: What kinds of site it is; see the table of kinds in the README.
        channels: Its channels.
        height: Its height in pixels.
        width: Its width in pixels.
    """

    name: str
    kinds: frozenset[str]
    channels: int
    height: int
    width: int


def find_sites(backbone: str | nn.Module, input_size: InputSize = (3, 224, 224), stem: str = "original") -> list[Site]:
    """Find the sites of a network, in the order in which data pass them.

    The network is traced with torch.fx on a copy without memory, so nothing is computed and the argument is left as
    it is.

    A `residual` site is what is added to the skip path, right before the addition (where the authors of SE and CBAM put
    their blocks): of the two operands the one with the longer way from their nearest common ancestor, looked at before
    a dropout, a drop-path or a scale.

    Args:
        backbone: A name that `load_backbone` takes, or a network.
        input_size: Channels, height and width of its input.
        stem: With a name, the stem to build it with.

    Raises:
        BackboneError: If the name is unknown, or the network cannot be traced or does not take this input.

    Example:
        >>> [site.name for site in find_sites("resnet18", (3, 64, 64))][:2]
        ['layer1.0.bn2', 'layer1.1.bn2']
    """
    graph = _trace(_without_memory(backbone, stem), input_size)
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    found: dict[str, Site] = {}
    modules = dict(graph.owning_module.named_modules()) if graph.owning_module else {}
    for node in graph.nodes:
        for operand in _residual_operands(node):
            source = _before_scaling(operand, modules)
            if source.op != "call_module" or calls[str(source.target)] > 1:
                continue  # no module of its own to hang a block on
            _, channels, height, width = _shape(source)
            name = str(source.target)
            found.setdefault(name, Site(name, frozenset({"residual"}), channels, height, width))
    return list(found.values())


def last_map(backbone: str | nn.Module, input_size: InputSize, stem: str = "original") -> tuple[int, int] | None:
    """Return height and width of the last feature map before everything is pooled to 1x1 or flattened.

    Args:
        backbone: A name that `load_backbone` takes, or a network.
        input_size: Channels, height and width of its input.
        stem: With a name, the stem to build it with.

    Returns:
        The size of the last map, None if the network has no feature maps.

    Raises:
        BackboneError: As `find_sites`.

    Example:
        >>> last_map("resnet18", (3, 224, 224)), last_map("resnet18", (3, 32, 32))
        ((7, 7), (1, 1))
    """
    graph = _trace(_without_memory(backbone, stem), input_size)
    modules = dict(graph.owning_module.named_modules()) if graph.owning_module else {}
    convolutions = [
        node
        for node in graph.nodes
        if node.op == "call_module" and isinstance(modules[str(node.target)], nn.Conv2d) and _is_map(node)
    ]
    # the gates of built-in attention are convolutions on 1x1 maps; what counts is the trunk
    trunk = [node for node in convolutions if not _follows_pooling(node, modules)]
    return (_shape(trunk[-1])[2], _shape(trunk[-1])[3]) if trunk else None


def _follows_pooling(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    for _ in range(4):
        inputs = [parent for parent in node.all_input_nodes if _is_map(parent)]
        if not inputs:
            return False
        node = inputs[0]
        if node.op == "call_module" and isinstance(modules[str(node.target)], nn.AdaptiveAvgPool2d):
            return True
    return False


def _without_memory(backbone: str | nn.Module, stem: str) -> nn.Module:
    if isinstance(backbone, nn.Module):
        return copy.deepcopy(backbone).to("meta").eval()
    with torch.random.fork_rng(devices=[]):
        return load_backbone(backbone, num_classes=10, stem=stem).to("meta").eval()


def _trace(model: nn.Module, input_size: InputSize) -> fx.Graph:
    try:
        traced = fx.symbolic_trace(model)
    except Exception as error:
        raise BackboneError(f"cannot trace {type(model).__name__}: {_one_line(error)}") from error
    try:
        with torch.no_grad():
            _ShapeRecorder(traced).run(torch.empty(1, *input_size, device="meta"))
    except Exception as error:
        size = "x".join(map(str, input_size))
        raise BackboneError(f"{type(model).__name__} does not take an input of {size}: {_one_line(error)}") from error
    return traced.graph


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph and notes at each node the shape of its tensor."""

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        n.meta["shape"] = tuple(result.shape) if isinstance(result, Tensor) else ()
        return result


def _one_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def _shape(node: fx.Node) -> tuple[int, ...]:
    return node.meta.get("shape", ())  # type: ignore[no-any-return]


def _is_map(node: object) -> bool:
    return isinstance(node, fx.Node) and len(_shape(node)) == 4


def _residual_operands(node: fx.Node) -> list[fx.Node]:
    """Return the operand of an addition of two maps that is the residual; of two equally long ways, both."""
    if node.target not in _ADDITIONS or len(node.args) < 2:
        return []
    left, right = node.args[:2]
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node) and _is_map(node)):
        return []
    if left is right or _shape(left) != _shape(right):
        return []
    common = _ancestors(left) & _ancestors(right)
    if not common:
        return []
    order = {each: index for index, each in enumerate(node.graph.nodes)}
    nearest = max(common, key=order.__getitem__)
    ways = _way(nearest, left, order), _way(nearest, right, order)
    return [operand for operand, way in zip((left, right), ways, strict=True) if way == max(ways)]


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen, waiting = {node}, [node]
    while waiting:
        new = set(waiting.pop().all_input_nodes) - seen
        seen |= new
        waiting.extend(new)
    return seen


def _way(start: fx.Node, end: fx.Node, order: dict[fx.Node, int]) -> int:
    """Length in nodes of the longest way from start to end."""
    length = {start: 0}
    between = sorted((node for node in _ancestors(end) if order[node] > order[start]), key=order.__getitem__)
    for node in between:
        ways = [length[parent] + 1 for parent in node.all_input_nodes if parent in length]
        if ways:
            length[node] = max(ways)
    return length.get(end, 0)


def _before_scaling(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node:
    """Step back over dropout, drop-path and multiplication by something that is no map of the same size."""
    while True:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        is_drop = isinstance(module, _DROPS) or getattr(node.target, "__name__", "") in ("stochastic_depth", "dropout")
        if not is_drop and node.target not in _MULTIPLICATIONS:
            return node
        parents = [parent for parent in _nodes(node.args) if parent.op != "get_attr" and _shape(parent) == _shape(node)]
        if len(parents) != 1:
            return node
        node = parents[0]


def _nodes(arguments: Iterable[object]) -> list[fx.Node]:
    return [argument for argument in arguments if isinstance(argument, fx.Node)]
