"""Attention blocks, and the one table of them.

A block is an `nn.Module` that takes and returns (batch, channels, height, width) and says which settings it has.
Adding one means a class here, a line in `BLOCKS` and a row in the tests.
"""

from collections.abc import Sequence
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor, nn

from placesearch.errors import PlacementError, did_you_mean
from placesearch.placement import BlockSetting


class SqueezeExcitation(nn.Module):
    """Weight each channel by what the whole map says (SE).

    Squeeze: the mean over the map. Excitation: FC(C -> C // r), ReLU, FC(C // r -> C), sigmoid; both layers have
    biases, as in the authors' later code. The input is multiplied by the result.

    Source: Hu et al. 2018, Squeeze-and-Excitation Networks, eq. 2-4 (arXiv:1709.01507).

    Args:
        channels: Channels C of the map.
        reduction: The divisor r, 1 <= r <= C.

    Shape:
        Input (batch, channels, height, width); output the same.

    Cost:
        2 * C * (C // r) + C // r + C parameters and 2 * C * (C // r) multiply-adds an image.

    Raises:
        PlacementError: If the reduction is below 1 or above the number of channels.

    Example:
        >>> SqueezeExcitation(64, reduction=16)(torch.zeros(1, 64, 8, 8)).shape
        torch.Size([1, 64, 8, 8])
    """

    settings: ClassVar[tuple[str, ...]] = ("reduction",)

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = hidden_channels(channels, reduction)
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted map."""
        gate = torch.sigmoid(self.expand(torch.relu(self.reduce(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class ChannelAttention(nn.Module):
    """Weight each channel by its mean and its maximum (the first half of CBAM).

    One MLP, FC(C -> C // r), ReLU, FC(C // r -> C), reads both; the sum goes through a sigmoid. The layers have
    biases, as in the authors' code.

    Source: Woo et al. 2018, CBAM, eq. 2 (arXiv:1807.06521).

    Args:
        channels: Channels C of the map.
        reduction: The divisor r, 1 <= r <= C.

    Shape:
        Input (batch, channels, height, width); output the same.

    Cost:
        2 * C * (C // r) + C // r + C parameters and 4 * C * (C // r) multiply-adds an image.

    Raises:
        PlacementError: If the reduction is below 1 or above the number of channels.

    Example:
        >>> ChannelAttention(64, reduction=16)(torch.zeros(1, 64, 8, 8)).shape
        torch.Size([1, 64, 8, 8])
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = hidden_channels(channels, reduction)
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted map."""
        mean = self.expand(torch.relu(self.reduce(x.mean((2, 3)))))
        peak = self.expand(torch.relu(self.reduce(x.amax((2, 3)))))
        return x * torch.sigmoid(mean + peak)[:, :, None, None]


class SpatialAttention(nn.Module):
    """Weight each pixel of a feature map (the second half of CBAM).

    The mean and the maximum over channels give two maps; one convolution turns them into a weight per pixel.

    Source: Woo et al. 2018, CBAM, eq. 3 (arXiv:1807.06521). As in the paper, no batch norm follows the convolution;
    the authors' code has one.

    Args:
        kernel_size: Side of the window in pixels. Odd, so that the map keeps its size.

    Shape:
        Input (batch, channels, height, width); output the same.

    Cost:
        2 * kernel_size**2 + 1 parameters and, per image, 2 * kernel_size**2 * height * width multiply-adds.

    Raises:
        PlacementError: If kernel_size is even or below 1.

    Example:
        >>> SpatialAttention(kernel_size=7)(torch.zeros(1, 64, 8, 8)).shape
        torch.Size([1, 64, 8, 8])
    """

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise PlacementError(f"kernel size {kernel_size} is not odd and positive")
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted map."""
        maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.conv(maps))


class CBAM(nn.Module):
    """Channel attention, then spatial attention, as in the paper.

    Source: Woo et al. 2018, CBAM: Convolutional Block Attention Module, eq. 1 (arXiv:1807.06521).

    Args:
        channels: Channels C of the map.
        reduction: The divisor r of the channel attention, 1 <= r <= C.
        kernel_size: Odd side of the window of the spatial attention.

    Shape:
        Input (batch, channels, height, width); output the same.

    Cost:
        The sum of its two parts.

    Raises:
        PlacementError: If a setting is out of range.

    Example:
        >>> CBAM(64, reduction=16, kernel_size=7)(torch.zeros(1, 64, 8, 8)).shape
        torch.Size([1, 64, 8, 8])
    """

    settings: ClassVar[tuple[str, ...]] = ("reduction", "kernel_size")

    def __init__(self, channels: int, reduction: int, kernel_size: int) -> None:
        super().__init__()
        self.channel = ChannelAttention(channels, reduction)
        self.spatial = SpatialAttention(kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted map."""
        return self.spatial(self.channel(x))  # type: ignore[no-any-return]


BLOCKS: dict[str, type[SqueezeExcitation] | type[CBAM]] = {"se": SqueezeExcitation, "cbam": CBAM}
"""Every block by the name it has in a placement."""


def hidden_channels(channels: int, reduction: int) -> int:
    """Return C // r, the width of the bottleneck.

    Raises:
        PlacementError: If the reduction is below 1 or above the number of channels.
    """
    if not 1 <= reduction <= channels:
        raise PlacementError(f"reduction {reduction} is not within 1..{channels}, the number of channels")
    return channels // reduction


def block_named(name: str) -> type[SqueezeExcitation] | type[CBAM]:
    """Return the class of a block.

    Raises:
        PlacementError: If no block has this name.
    """
    if name not in BLOCKS:
        raise PlacementError(f"unknown block '{name}'{did_you_mean(name, BLOCKS)}; known: {', '.join(BLOCKS)}")
    return BLOCKS[name]


def make_block(setting: BlockSetting, channels: int) -> nn.Module:
    """Build a block for a map of so many channels.

    Raises:
        PlacementError: If the block is unknown, lacks a setting, has one too many, or one is out of range.
    """
    block = block_named(setting.block)
    given = {name: value for name in ("reduction", "kernel_size") if (value := getattr(setting, name)) is not None}
    if set(given) != set(block.settings):
        raise PlacementError(f"block '{setting}' needs the settings {', '.join(block.settings)} and no others")
    return block(channels, **given)


def sensible_settings(
    name: str, channels: int, side: int, reductions: Sequence[int], kernel_sizes: Sequence[int]
) -> list[BlockSetting]:
    """List the settings of a block that make sense on a map, for a search to choose from.

    Left out are reductions above the number of channels, windows of which a part never meets the map (larger than
    2 * side - 1), and settings that build the same block as one before them (C // r equal).

    Args:
        name: The block.
        channels: Channels of the map.
        side: Longer side of the map in pixels.
        reductions: The reductions to choose from.
        kernel_sizes: The kernel sizes to choose from.

    Raises:
        PlacementError: If no block has this name.

    Example:
        >>> [str(setting) for setting in sensible_settings("cbam", 8, 2, [4, 16], [3, 7])]
        ['cbam(r=4,k=3)']
    """
    block = block_named(name)
    wide = {channels // reduction: reduction for reduction in reversed(reductions) if reduction <= channels}
    choices = {
        "reduction": [reduction for reduction in reductions if reduction in wide.values()],
        "kernel_size": [size for size in kernel_sizes if size <= 2 * side - 1],
    }
    return [
        BlockSetting(name, **dict(zip(block.settings, values, strict=True)))
        for values in product(*(choices[setting] for setting in block.settings))
    ]
