"""Sites: the places in a network where a block may go, found by looking at what the network does."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from placesearch.errors import BackboneError
from placesearch.models.backbones import load_backbone
from placesearch.models.carrying import try_carrying
from placesearch.models.copying import copy_of
from placesearch.models.graph import NCHW, PERMUTING, Graph, InputSize, Node, ancestors, is_sum_of_stack, record

_NORMS = {"batch_norm", "group_norm", "layer_norm", "instance_norm", "local_response_norm"}
_ACTIVATIONS = {"relu", "relu6", "silu", "gelu", "hardswish", "hardtanh", "leaky_relu", "elu", "mish", "prelu", "clamp"}
_CONVOLUTIONS = {"conv2d", "conv_transpose2d"}
_ADAPTIVE = {"adaptive_avg_pool2d", "adaptive_max_pool2d"}
_POOLS = _ADAPTIVE | {"avg_pool2d", "max_pool2d"}
_COPIES = {"clone", "contiguous", "detach", "to", "type_as", "type", "float", "double", "half", "bfloat16"}
_COPIES_OF_SAME_SHAPE = {"getitem", "pad", "view", "reshape", "expand", "view_as", "reshape_as", "expand_as", "narrow"}
_SCALES = {"mul", "multiply", "div", "divide", "true_divide", "truediv", "neg", "negative"}
_SHIFTS = {"add", "sub", "subtract", "rsub"}
_SUMS = {"add", "addcmul", "lerp"}
_DIFFERENCES = {"sub", "subtract", "rsub"}
_PRODUCT = "what is added is a product of two maps, which no module puts out"


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
      they are equally long, looked at before a drop-path, a dropout, a copy, and a scale or a shift by parameters or
      constants. `x - y`, `torch.lerp`, `addcmul` and the sum of a stack are such additions, too;
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
    model, graph = _seen(backbone, input_size, stem)
    if sum(node.operation in _CONVOLUTIONS for node in graph.nodes) < 2:
        if graph.result is None:
            raise BackboneError(f"{type(model).__name__} puts out nothing that operations of torch make of its input")
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
    last = _last(_seen(backbone, input_size, stem)[1])
    return (last.shape[2], last.shape[3]) if last else None


def unplaced_additions(
    backbone: str | nn.Module, input_size: InputSize = (3, 224, 224), stem: str = "original"
) -> list[str]:
    """Say how many residual additions have no site of kind `residual`, where, and why.

    Arguments and errors as for `find_sites`.

    Returns:
        A sentence for each reason, without a full stop; empty if every residual addition has its site.
    """
    _, graph = _seen(backbone, input_size, stem)
    names, pooled = _names(graph), _pooled(graph)
    reasons: dict[str, list[str]] = {}
    for addition, operands in _residual_additions(graph, names):
        nameless = [operand for operand in operands if _named_before(operand, names) is None]
        some = len(nameless) < len(operands) == 2  # of two equally long ways one has a site
        if nameless and not some and addition not in pooled and _is_learned(operands, addition):
            reasons.setdefault(_why_nameless(nameless[-1], graph), []).append(addition.within)
    for node in graph.nodes:
        gated = node.operation in ("addcmul", "lerp") and len(node.inputs) > 2
        if gated and node.is_map and node not in pooled and _is_learned(list(node.inputs), node):
            reasons.setdefault(_PRODUCT, []).append(node.within)
    return [_told(places, reason) for reason, places in reasons.items()]


def _seen(backbone: str | nn.Module, input_size: InputSize, stem: str) -> tuple[nn.Module, Graph]:
    """Return a network as an ordinary module, whose names a placement uses, and what it does."""
    with torch.random.fork_rng(devices=[]):
        model = backbone if isinstance(backbone, nn.Module) else load_backbone(backbone, num_classes=10, stem=stem)
        model = copy_of(model, input_size, share=True)
    return model, record(model, input_size)


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
    additions = []
    for addition, operands in _residual_additions(graph, names):
        additions.append(addition)
        for operand in operands:
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


def _residual_additions(graph: Graph, names: dict[Node, list[str]]) -> Iterator[tuple[Node, list[Node]]]:
    """Yield each addition of maps of one shape, and which of them are the residual."""
    users = _users(graph)
    for node in graph.nodes:
        terms = _terms(node) if node.is_map else []
        residuals = _residuals(terms, longest=True)
        if residuals and not any(_named_before(operand, names) for operand in residuals):
            every = _flat(node, users)
            start = _start(every)
            if len(every) > len(terms) and any(start in _before(term) for term in every):
                residuals = _residuals(every, longest=False)  # of x + y + z the first sum is no module's either
        # a difference may also be what a pooling or a blur leaves, a stack what a gate chooses from
        if terms and (node.operation == "add" or _is_learned(residuals, node)):
            yield node, residuals


def _terms(node: Node) -> list[Node]:
    """Return the maps that an operation adds, or subtracts from each other; none if it does something else."""
    terms = list(node.inputs)
    if is_sum_of_stack(node.operation, node.inputs, node.shape):
        terms = list(node.inputs[0].inputs)
    elif node.operation not in _SUMS | _DIFFERENCES or len(terms) != 2:
        return []
    return terms if all(term.shape == node.shape for term in terms) and len(terms) > 1 else []


def _flat(node: Node, users: dict[Node, list[Node]]) -> list[Node]:
    """Return the terms of a sum, with those of sums that are made for it alone."""
    flat = []
    for term in _terms(node):
        inner = len(users[term]) == 1 and term.within == node.within and _terms(term)
        flat += _flat(term, users) if inner else [term]
    return flat


def _residuals(terms: list[Node], *, longest: bool) -> list[Node]:
    """Return the terms with the longest way from the nearest common ancestor, or all but those with the shortest."""
    start = _start(terms)
    if start is None:
        return []
    terms = [term for term in terms if term is start or start not in _before(term)]  # it scaled is still the skip
    ways = [_way(start, term) for term in terms]
    if longest or len(set(ways)) == 1:
        return [term for term, way in zip(terms, ways, strict=True) if way == max(ways) > 0]
    return [term for term, way in zip(terms, ways, strict=True) if way > min(ways)]


def _start(terms: list[Node]) -> Node | None:
    """Return the nearest common ancestor."""
    common = set.intersection(*map(ancestors, terms)) if terms else set()
    return max(common, key=lambda node: node.index, default=None)


def _is_learned(residuals: list[Node], addition: Node) -> bool:
    """Tell whether convolutions make what is added to a map, or to a projection of it; parts of it do not count."""
    terms = _terms(addition) or residuals
    start = _start(terms)
    if start is None or not residuals:
        return False

    def depth(term: Node) -> int:
        return sum(node.operation in _CONVOLUTIONS and node.index > start.index for node in ancestors(term))

    skip = min(terms, key=depth)
    whole = len(start.shape) == 4 and start.shape[1] == skip.shape[1]
    return depth(skip) < depth(max(terms, key=depth)) and (depth(skip) == 1 or (depth(skip) == 0 and whole))


def _why_nameless(operand: Node, graph: Graph) -> str:
    """Say why no module puts out what an addition adds."""
    before = _before(operand)[-1]
    if before in [node for _, node in graph.outputs]:
        name = next(name for name, node in graph.outputs if node is before)
        if graph.calls[name] > 1:
            return f"what is added is put out by a module that is called {graph.calls[name]} times"
        return "what is added is put out by a module that cannot carry a block"
    if len(before.inputs) == 2 and before.operation in ("mul", "multiply"):
        return _PRODUCT
    return f"what is added comes out of the operation '{before.operation}', which no module puts out"


def _told(places: list[str], reason: str) -> str:
    shown = [f"'{place}'" if place else "the network's own forward" for place in dict.fromkeys(places)]
    more = f" and {len(shown) - 3} more" if shown[3:] else ""
    count = "1 residual addition has" if len(places) == 1 else f"{len(places)} residual additions have"
    return f"{count} no site, in {', '.join(shown[:3])}{more}: {reason}"


def _way(start: Node, end: Node) -> int:
    """Return the number of operations on the longest way from start to end."""
    length = {start: 0}
    for node in sorted(ancestors(end), key=lambda node: node.index):
        ways = [length[source] + 1 for source in node.inputs if source in length]
        if ways and node is not start:
            length[node] = max(ways)
    return length.get(end, 0)


def _named_before(operand: Node, names: dict[Node, list[str]]) -> Node | None:
    """Step back over copies, scales and shifts; return the first of these tensors that has a name."""
    return next((node for node in reversed(_before(operand)) if node in names), None)


def _before(operand: Node) -> list[Node]:
    """Return a tensor and those that it is a copy of, scaled and shifted by parameters or constants."""
    way = [operand]
    while len(operand.inputs) == 1:
        source = operand.inputs[0]
        same = operand.operation in _COPIES_OF_SAME_SHAPE and source.shape == operand.shape
        if not same and operand.operation not in _SCALES | _SHIFTS | _COPIES:
            break
        operand = source
        way.append(operand)
    return way


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
            site = next((site for site in sites if site.index >= node.index and node in ancestors(site)), None)
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
    pooled, way = _pooled(graph), ancestors(graph.result)
    ends = {
        node for node in way if node.is_map and node not in pooled and node.operation not in _ADAPTIVE and node.index
    }
    if names is not None:
        ends &= set(names)
    return max(ends, key=lambda node: node.index, default=None)


def _head(graph: Graph, names: dict[Node, list[str]]) -> Node | None:
    """Return the map that is flattened into the first fully connected layer, if it has a name and several pixels."""
    last = _last(graph)
    linear = next((n for n in graph.nodes if n.operation == "linear" and last and last in ancestors(n)), None)
    if linear is None:
        return None
    node = linear
    while node.inputs and not node.is_map:
        node = max(node.inputs, key=lambda source: source.index)
    return node if node in names and _pixels(node) > 1 else None
