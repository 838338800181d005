"""A network as a program of torch.export, a `.pt2` file, which runs without the code of the network."""

import io

import torch
from torch import nn

from placesearch.errors import InputError, reason_of
from placesearch.exporting.checking import check_program, images
from placesearch.models.graph import InputSize


def torch_program(model: nn.Module, input_size: InputSize) -> tuple[bytes, float]:
    """Return a network as a `.pt2` file for `torch.export.load`, for any number of images, checked by running it.

    Args:
        model: The network, in eval mode.
        input_size: Channels, height and width of an image.

    Returns:
        The file's content, and by how much its logits differ from the network's, relative to the largest.

    Raises:
        InputError: If torch.export cannot follow the network, or the program computes something else.
    """
    content = io.BytesIO()
    torch.export.save(exported_program(model, input_size), content)
    content.seek(0)
    program = torch.export.load(content).module()
    return content.getvalue(), check_program(model, program, input_size, "the pt2 program")


def exported_program(model: nn.Module, input_size: InputSize) -> torch.export.ExportedProgram:
    """Return a network as torch.export sees it, for any number of images.

    Args:
        model: The network, in eval mode.
        input_size: Channels, height and width of an image.

    Raises:
        InputError: If torch.export cannot follow the network.
    """
    example = images(2, input_size)
    try:
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # noqa: BLE001 - a network of the user's own may do anything
        raise InputError(f"torch.export cannot follow {type(model).__name__}: {reason_of(error)}") from None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, which are nobody else's business
    return program
