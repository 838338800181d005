"""What a network puts out: which of its tensors are the logits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from placesearch.errors import BackboneError
from placesearch.models.copying import InputSize
from placesearch.models.graph import Graph, Node, Path, ancestors, record, tensors_in

_EXPECTED = "alone, under the key 'logits' or 'out', or as the first of a tuple"


def logits_of(output: Any, images: int, classes: int) -> Tensor:
    """Return the logits in what a network put out.

    Logits are a tensor (images, classes), perhaps with further dimensions of 1. Where there are several, those under
    the key `logits` are meant, else those under `out`, else the first of a tuple, as in GoogLeNet, which puts out
    auxiliary ones after them in training.

    Args:
        output: What the network returned: a tensor, or tensors in mappings, sequences, data classes and other objects.
        images: Images in the batch.
        classes: Number of classes.

    Returns:
        The logits (images, classes).

    Raises:
        BackboneError: If it is not plain which tensor is meant, or none is.

    Example:
        >>> logits_of({"out": torch.zeros(2, 10, 1, 1), "features": torch.zeros(2, 64)}, 2, 10).shape
        torch.Size([2, 10])
    """
    if isinstance(output, Tensor) and output.shape == (images, classes):
        return output
    tensors = list(tensors_in(output))
    path = _chosen([(path, tuple(tensor.shape)) for path, tensor in tensors], images, classes)
    if path is None:
        came = [(path, tuple(tensor.shape)) for path, tensor in tensors]
        raise BackboneError(f"the network puts out {_came(came, images, classes)}")
    return dict(tensors)[path].reshape(images, classes)


def check_outputs(model: nn.Module, input_size: InputSize, classes: int) -> tuple[str, ...]:
    """See whether a network puts out logits, in eval mode and in training; the argument is left as it is.

    Args:
        model: The network.
        input_size: Channels, height and width of its input.
        classes: Number of classes.

    Returns:
        A sentence without a full stop if something else than logits alone comes out; else nothing.

    Raises:
        BackboneError: If no logits come out, or it is not plain which of several they are, or it cannot be run.
    """
    told: dict[str, str] = {}
    for training in (False, True):
        try:
            graph = record(model, input_size, training=training)
        except BackboneError as error:
            if training and _is_out_of_memory(error):  # a trial, which has fewer or more images, tells better
                continue
            raise
        came, images = [(path, shape) for path, shape, _ in graph.returned], 1 + training
        mode = " in training" if training else ""
        path = _chosen(came, images, classes)
        if path is None:
            raise BackboneError(f"{type(model).__name__} puts out{mode} {_came(came, images, classes)}")
        if later := _made_of(path, graph, images, classes):
            raise BackboneError(
                f"{type(model).__name__} puts out{mode} {_named(path)} and, made of that, {_named(later)}, both of "
                f"shape (images, {classes}); put the logits out {_EXPECTED}"
            )
        several = f"of the {len(came)} tensors" if len(came) > 1 else "of what"
        if len(came) > 1 or path:
            told[mode] = f"{several} the network puts out{{}}, {_named(path)} is taken as logits"
        elif len(came[0][1]) > 2:
            told[mode] = "the logits that the network puts out{} have further dimensions of 1, which are taken off"
    if len(told) == 2 and len(set(told.values())) == 1:
        return (told[""].format(""),)
    return tuple(text.format(mode) for mode, text in told.items())


def put_out_logits(model: nn.Module, input_size: InputSize, classes: int) -> None:
    """Let a network put out its logits alone, in place, if it puts out more; names of its weights stay.

    Args:
        model: The network.
        input_size: Channels, height and width of its input.
        classes: Number of classes.

    Raises:
        BackboneError: If it is not plain which tensor the logits are.
    """
    if [(path, shape) for path, shape, _ in record(model, input_size).returned] != [((), (1, classes))]:
        model.register_forward_hook(lambda _, given, output: logits_of(output, given[0].shape[0], classes))


def _chosen(came: Sequence[tuple[Path, tuple[int, ...]]], images: int, classes: int) -> Path | None:
    """Return where the logits are, None if that is not plain."""
    fitting = [path for path, shape in came if _fits(shape, images, classes)]
    if len(fitting) == 1:
        return fitting[0]
    for key in ("logits", "out"):
        if named := sorted((path for path in fitting if path[-1:] == (key,)), key=len):
            return named[0] if [len(path) for path in named].count(len(named[0])) == 1 else None
    first = came[0][0] if came else ()
    return first if first[:1] == (0,) and first in fitting else None


def _fits(shape: tuple[int, ...], images: int, classes: int) -> bool:
    alone = images == 1 and shape == (classes,)  # all dimensions of 1 were squeezed away
    return alone or (shape[:2] == (images, classes) and all(size == 1 for size in shape[2:]))


def _made_of(path: Path, graph: Graph, images: int, classes: int) -> Path | None:
    """Return where another tensor of that shape is that layers make of the chosen one, which then is none of logits."""
    nodes: dict[Path, Node | None] = {path: node for path, _, node in graph.returned}
    chosen = nodes[path]
    if path[-1:] in (("logits",), ("out",)) or chosen is None:
        return None
    for other, shape, node in graph.returned:
        if node is not None and _fits(shape, images, classes) and chosen in ancestors(node):
            between = ancestors(node) - ancestors(chosen)
            if any(step.parameters for step in between):
                return other
    return None


def _came(came: Sequence[tuple[Path, tuple[int, ...]]], images: int, classes: int) -> str:
    """Say what came and what is expected."""
    if len(came) == 1 and len(came[0][1]) >= 2 and not any(size != 1 for size in came[0][1][2:]):
        values = came[0][1][1]
        named = f" in {_named(came[0][0])}" if came[0][0] else ""
        return f"{values} value{'s'[: values != 1]}{named} for {classes} class{'es' if classes != 1 else ''}"
    shown = [f"{_named(path)} of shape {_shape(shape, images)}" for path, shape in came[:4]]
    listed = ", ".join(shown) + (f" and {len(came) - 4} more" if came[4:] else "") or "no tensor"
    return f"{listed}; expected are logits of shape (images, {classes}), {_EXPECTED}"


def _shape(shape: tuple[int, ...], images: int) -> str:
    sizes = ["images" if index == 0 and size == images else str(size) for index, size in enumerate(shape)]
    return f"({', '.join(sizes)})"


def _named(path: Path) -> str:
    if not path:
        return "a tensor"
    if len(path) == 1 and isinstance(path[0], int):
        return ("the first", "the second", "the third")[path[0]] if path[0] < 3 else f"number {path[0] + 1}"
    return f"'{'.'.join(map(str, path))}'"


def _is_out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__
    return False
