"""Sites: the places in a network where a block may go, found by looking at what the network does."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from placesearch.errors import BackboneError
from placesearch.models.backbones import load_backbone
from placesearch.models.carrying import try_carrying
from placesearch.models.graph import NCHW, PERMUTING, Graph, InputSize, Node, record

_NORMS = {"batch_norm", "group_norm", "layer_norm", "instance_norm", "local_response_norm"}
_ACTIVATIONS = {"relu", "relu6", "silu", "gelu", "hardswish", "hardtanh", "leaky_relu", "elu", "mish", "prelu", "clamp"}
_CONVOLUTIONS = {"conv2d", "conv_transpose2d"}
_ADAPTIVE = {"adaptive_avg_pool2d", "adaptive_max_pool2d"}
_POOLS = _ADAPTIVE | {"avg_pool2d", "max_pool2d"}
_COPIES = {"clone", "contiguous", "detach", "to", "type_as"}


@dataclass(frozen=True, slots=True)
class Site:
    """A tensor (batch, channels, height, width) that a named module puts out.

    Args:
        name: The innermost module that puts it out.
        kinds: What kinds of site it is; see `find_sites`.
        channels: Its channels.
        height: Its height in pixels.
        width: Its width in pixels.
        aliases: Other modules that put the same tensor out.
        gates: Attention that the network has already: modules that weight a map by a global summary of a map (channel
            attention) or by a map of one channel (spatial attention), on the way to this site since the sites before.
        scaled_by: Where a norm or a convolution puts the tensor out, its weight and bias: scaling them scales it
            and nothing else. Empty elsewhere.
        wrapped: Whether a block gets into a module together with the one of this name, because a further child would
            change what that does: it runs its children in a loop, or has something of the block's name.
    """

    name: str
    kinds: frozenset[str]
    channels: int
    height: int
    width: int
    aliases: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()
    scaled_by: tuple[str, ...] = ()
    wrapped: bool = False


def find_sites(backbone: str | nn.Module, input_size: InputSize = (3, 224, 224), stem: str = "original") -> list[Site]:
    """Find the sites of a network, in the order in which data pass them.

    A copy of the network is run once in eval mode, without memory where that is possible; the argument is left as it
    is. A module that is called more than once names no site. The kinds:

    - `residual`: what is added to the skip path, right before the addition (where the authors of SE and CBAM put their
      blocks): of two maps that are added the one with the longer way from their nearest common ancestor, both where
      they are equally long, looked at before a drop-path, a dropout or a scale by a parameter;
    - `block`: what the module puts out that holds the whole residual unit, or, where none does, after the addition and
      its activation; in a network without such tensors, after each convolution with its norm and activation;
    - `stage`: the last `block` before the resolution falls, and the last of all;
    - `last`: the last feature map before the pooling or flattening that ends the convolutional part;
    - `head`: the map that is flattened into the first fully connected layer, if it has more than one pixel; else the
      same as `last`.

    Args:
        backbone: A name that `load_backbone` takes, or a network.
        input_size: Channels, height and width of its input.
        stem: With a name, the stem to build it with.

    Raises:
        BackboneError: If the name is unknown, or the network does not take this input or has no feature maps.

    Example:
        >>> [site.name for site in find_sites("resnet18", (3, 64, 64)) if "residual" in site.kinds][:2]
        ['layer1.0.bn2', 'layer1.1.bn2']
    """
    return [site for site in every_site(backbone, input_size, stem) if site.kinds]


def every_site(backbone: str | nn.Module, input_size: InputSize = (3, 224, 224), stem: str = "original") -> list[Site]:
    """Find all tensors that can be sites, also those of no kind; arguments and errors as for `find_sites`."""
    model = _loaded(backbone, stem)
    graph = record(model, input_size)
    if sum(node.operation in _CONVOLUTIONS for node in graph.nodes) < 2:
        raise BackboneError(
            f"{type(model).__name__} has no feature maps (batch, channels, height, width): fewer than two convolutions"
        )
    named = _names(graph)
    carrying = try_carrying(model, [first for first, *_ in named.values()], graph.calls, input_size)
    names = {node: names for node, names in named.items() if names[0] in carrying.wrapped}
    kinds = _kinds(graph, names)
    users = _users(graph)
    gates = _gates(graph, sorted(kinds, key=lambda node: node.index))
    return [
        Site(
            name=first,
            kinds=frozenset(kinds.get(node, ())),
            channels=node.shape[1],
            height=node.shape[2],
            width=node.shape[3],
            aliases=tuple(others),
            gates=tuple(gates.get(node, ())),
            scaled_by=_scaled_by(node, users, carrying.once),
            wrapped=carrying.wrapped[first],
        )
        for node, (first, *others) in sorted(names.items(), key=lambda item: item[0].index)
    ]


def last_map(backbone: str | nn.Module, input_size: InputSize, stem: str = "original") -> tuple[int, int] | None:
    """Return height and width of the last feature map before everything is pooled or flattened.

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
    last = _last(record(_loaded(backbone, stem), input_size))
    return (last.shape[2], last.shape[3]) if last else None


def _loaded(backbone: str | nn.Module, stem: str) -> nn.Module:
    if isinstance(backbone, nn.Module):
        return backbone
    with torch.random.fork_rng(devices=[]):
        return load_backbone(backbone, num_classes=10, stem=stem)


def _names(graph: Graph) -> dict[Node, list[str]]:
    """Return for each map the modules that put it out, the innermost first."""
    named: dict[Node, list[str]] = {}
    for name, node in graph.outputs:
        if node.is_map and node.index and graph.calls[name] == 1:
            named.setdefault(node, []).append(name)
    return named


def _kinds(graph: Graph, names: dict[Node, list[str]]) -> dict[Node, set[str]]:
    kinds: dict[Node, set[str]] = {}
    users = _users(graph)
    additions = [node for node in graph.nodes if _is_residual_addition(node)]
    for addition in additions:
        for operand in _residuals(addition):
            site = _named_before(operand, names)
            if site is not None:
                kinds.setdefault(site, set()).add("residual")
    pooled = _pooled(graph)
    convolutions = [n for n in graph.nodes if n.operation in _CONVOLUTIONS and n.is_map and n not in pooled]
    blocks = _blocks(additions, names, users, whole=True) or _blocks(convolutions, names, users, whole=False)
    for block in blocks:
        kinds.setdefault(block, set()).add("block")
    for index, block in enumerate(blocks):
        following = blocks[index + 1 : index + 2]
        if all(_pixels(after) < _pixels(block) for after in following):
            kinds[block].add("stage")
    last = _last(graph, names)
    head = _head(graph, names) or last
    for node, kind in ((last, "last"), (head, "head")):
        if node is not None:
            kinds.setdefault(node, set()).add(kind)
    return kinds


def _blocks(
    starts: list[Node], names: dict[Node, list[str]], users: dict[Node, list[Node]], *, whole: bool
) -> list[Node]:
    """Return for each start what the module around it puts out (if whole), or what follows it; only what has a name."""
    blocks = set()
    for start in starts:
        around = [node for node, named in names.items() if whole and start.within in named]
        chain = [node for node in _with_norm_and_activation(start, users) if node in names]
        blocks.update((around or chain[::-1])[:1])
    return sorted(blocks, key=lambda node: node.index)


def _pixels(node: Node) -> int:
    return node.shape[2] * node.shape[3]


def _users(graph: Graph) -> dict[Node, list[Node]]:
    users: dict[Node, list[Node]] = {node: [] for node in graph.nodes}
    for node in graph.nodes:
        for source in node.inputs:
            users[source].append(node)
    return users


def _with_norm_and_activation(node: Node, users: dict[Node, list[Node]]) -> Iterator[Node]:
    """Yield a node, its norm if one follows at once, and its activation if one follows then."""
    yield node
    for following in (_NORMS, _ACTIVATIONS):
        after = users[node]
        if len(after) == 1 and after[0].operation in following:
            node = after[0]
            yield node


def _is_residual_addition(node: Node) -> bool:
    return (
        node.operation == "add"
        and node.is_map
        and len(node.inputs) == 2
        and all(source.shape == node.shape for source in node.inputs)
    )


def _residuals(addition: Node) -> list[Node]:
    """Return the operand with the longer way from the nearest common ancestor; of equally long ones both."""
    left, right = addition.inputs
    common = _ancestors(left) & _ancestors(right)
    if not common:
        return []
    start = max(common, key=lambda node: node.index)
    ways = _way(start, left), _way(start, right)
    return [operand for operand, way in zip((left, right), ways, strict=True) if way == max(ways)]


def _ancestors(node: Node) -> set[Node]:
    """Return a node and everything that it was made from."""
    seen, waiting = {node}, [node]
    while waiting:
        new = set(waiting.pop().inputs) - seen
        seen |= new
        waiting.extend(new)
    return seen


def _way(start: Node, end: Node) -> int:
    """Return the number of operations on the longest way from start to end."""
    length = {start: 0}
    for node in sorted(_ancestors(end), key=lambda node: node.index):
        ways = [length[source] + 1 for source in node.inputs if source in length]
        if ways and node is not start:
            length[node] = max(ways)
    return length.get(end, 0)


def _named_before(operand: Node, names: dict[Node, list[str]]) -> Node | None:
    """Step back over copies and scales by a parameter; return the first of these tensors that has a name."""
    way = [operand]
    while len(operand.inputs) == 1 and operand.operation in {"mul", *_COPIES}:
        operand = operand.inputs[0]
        way.append(operand)
    return next((node for node in reversed(way) if node in names), None)


def _pooled(graph: Graph) -> set[Node]:
    """Return what comes after a global pooling, on all of its ways: gates of built-in attention and classifiers."""
    pooled: set[Node] = set()
    for node in graph.nodes:
        sources = [source for source in node.inputs if len(source.shape) > 1]
        if _is_global_pooling(node) or (sources and all(source in pooled for source in sources)):
            pooled.add(node)
    return pooled


def _scaled_by(node: Node, users: dict[Node, list[Node]], once: frozenset[str]) -> tuple[str, ...]:
    """Return the parameters that scale a tensor and nothing else; a permutation may come between, as in ConvNeXt."""
    while node.operation in PERMUTING and users[node.inputs[0]] == [node]:
        node = node.inputs[0]
    affine = node.operation in _CONVOLUTIONS | {"linear", "batch_norm", "group_norm", "instance_norm", "layer_norm"}
    own = any(name.rpartition(".")[2] == "weight" for name in node.parameters)
    return node.parameters if affine and own and once.issuperset(node.parameters) else ()


def _gates(graph: Graph, sites: list[Node]) -> dict[Node, list[str]]:
    """Return the modules with attention of their own, under the first site that each leads to."""
    pooled = _pooled(graph)
    leading: dict[Node, list[str]] = {}
    for node in graph.nodes:
        if node.operation != "mul" or len(node.inputs) != 2 or node in pooled:
            continue
        over_channels = any(source in pooled for source in node.inputs)
        over_pixels = node.is_map and {source.shape[1:2] for source in node.inputs} == {(1,), node.shape[1:2]}
        if over_channels or (over_pixels and node.shape[1] > 1):
            site = next((site for site in sites if site.index >= node.index and node in _ancestors(site)), None)
            if site is not None and node.within not in leading.setdefault(site, []):
                leading[site].append(node.within)
    return leading


def _is_global_pooling(node: Node) -> bool:
    if not node.inputs or len(node.inputs[0].shape) != 4 or node.inputs[0].order not in (NCHW, None):
        return False
    if node.operation in _POOLS:
        whole = node.inputs[0].shape[2:] != (1, 1) or node.operation in _ADAPTIVE
        return node.shape[2:] == (1, 1) and whole
    return {2, 3} <= set(node.dims)


def _last(graph: Graph, names: dict[Node, list[str]] | None = None) -> Node | None:
    """Return the last map on the way to the result, before pooling; with names, the last one that has one."""
    if graph.result is None:
        return None
    pooled, way = _pooled(graph), _ancestors(graph.result)
    ends = {
        node for node in way if node.is_map and node not in pooled and node.operation not in _ADAPTIVE and node.index
    }
    if names is not None:
        ends &= set(names)
    return max(ends, key=lambda node: node.index, default=None)


def _head(graph: Graph, names: dict[Node, list[str]]) -> Node | None:
    """Return the map that is flattened into the first fully connected layer, if it has a name and several pixels."""
    last = _last(graph)
    linear = next((n for n in graph.nodes if n.operation == "linear" and last and last in _ancestors(n)), None)
    if linear is None:
        return None
    node = linear
    while node.inputs and not node.is_map:
        node = max(node.inputs, key=lambda source: source.index)
    return node if node in names and _pixels(node) > 1 else None
