"""Whether an exported program computes what its network does: both are run, and their logits compared."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from placesearch.errors import InputError, reason_of
from placesearch.models.graph import InputSize

LARGEST_DIFFERENCE = 1e-4
"""Of a program's logits, relative to the largest logit; above it nothing is written."""

BATCHES = (1, 3)
"""Numbers of images that programs are checked with. They are exported with another one."""

MOST_PIXELS = 3 * 2048 * 2048
"""Numbers in one image, at most: a program is run, and feature maps of larger images fill a memory."""


def images(number: int, input_size: InputSize) -> Tensor:
    """Return random images that are always the same.

    Args:
        number: How many.
        input_size: Channels, height and width.

    Raises:
        InputError: If they are too large for an export that is checked by running it.
    """
    channels, height, width = input_size
    if channels * height * width > MOST_PIXELS:
        raise InputError(
            f"an input of {channels}x{height}x{width} is too large for a program that is checked by running it; "
            "at most 3x2048x2048 will do"
        )
    return torch.randn(number, *input_size, generator=torch.Generator().manual_seed(number))


def difference(expected: Tensor, given: Tensor) -> float:
    """Return the largest difference between two tensors, relative to the largest number of the first.

    Example:
        >>> difference(torch.tensor([[1.0, -4.0]]), torch.tensor([[1.5, -4.0]]))
        0.125
    """
    if expected.shape != given.shape:
        return float("inf")
    distance = (expected.double() - given.double()).abs().max()
    return float(distance / expected.double().abs().max()) if distance else 0.0


def check_program(model: nn.Module, program: Callable[[Tensor], Any], input_size: InputSize, what: str) -> float:
    """Compare the logits of a program with those of its network, at several numbers of images.

    Args:
        model: The network, in eval mode.
        program: Returns the program's logits of some images.
        input_size: Channels, height and width of an image.
        what: What the program is, for the error.

    Returns:
        The largest difference, relative to the largest logit.

    Raises:
        InputError: If it is above 1e-4, or the network or the program cannot be run.
    """
    worst = 0.0
    for number in BATCHES:
        x = images(number, input_size)
        try:
            with torch.no_grad():
                expected, given = model(x), program(x)
        except Exception as error:  # noqa: BLE001 - onnxruntime and exported programs raise their own
            raise InputError(f"{what} does not run on {number} images: {reason_of(error)}") from None
        found = difference(expected, given)
        if not found <= LARGEST_DIFFERENCE:  # nor not a number
            raise InputError(
                f"{what} differs from the network by {found:.1e} of the largest logit on {number} images, more than "
                f"{LARGEST_DIFFERENCE:g}; nothing was written"
            )
        worst = max(worst, found)
    return worst
