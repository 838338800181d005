"""Attention blocks, and the one table of them.

A block is an `nn.Module` that takes and returns (batch, channels, height, width). Adding one means a class here, a line
in `BLOCKS` and a row in the tests.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor, nn

from placesearch.errors import PlacementError, did_you_mean
from placesearch.models.code import import_named, names_code
from placesearch.placement import BlockSetting

SETTINGS = ("reduction", "kernel_size")


class AttentionBlock(nn.Module):
    """A block that can start as the identity.

    Its gate is `factor` * sigmoid(...). The factor is 1 as the authors have it. A block that is made the identity gets
    a factor of 2, to make up for sigmoid(0) = 1/2, and its last layer before the sigmoid is set to zero. The factor is
    no weight: it is not part of a `state_dict`, architecture files record it where it is not 1.
    """

    first: ClassVar[str]
    """Name of the first layer, a linear map of the input up to a mean or a maximum."""

    last: ClassVar[str]
    """Name of the last layer before the sigmoid."""

    factor: float = 1.0

    def gate(self, x: Tensor) -> Tensor:
        """Return `factor` * sigmoid(x)."""
        return torch.sigmoid(x) if self.factor == 1.0 else self.factor * torch.sigmoid(x)

    def make_identity(self) -> None:
        """Change weights and factor so that the output equals the input, and training can start from there."""
        _zero(self.get_submodule(self.last))
        self.factor = 2.0

    def fold(self) -> float:
        """Set the factor back to 1 and divide the first layer by it; return by how much the input has to be scaled.

        The output on the scaled input then equals what it was on the input before.
        """
        factor, self.factor = self.factor, 1.0
        _divide(self.get_submodule(self.first), factor)
        return factor


class SqueezeExcitation(AttentionBlock):
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

    first, last = "reduce", "expand"

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = hidden_channels(channels, reduction)
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted map."""
        gate = self.gate(self.expand(torch.relu(self.reduce(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class ChannelAttention(AttentionBlock):
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

    first, last = "reduce", "expand"

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = hidden_channels(channels, reduction)
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted map."""
        mean = self.expand(torch.relu(self.reduce(x.mean((2, 3)))))
        peak = self.expand(torch.relu(self.reduce(x.amax((2, 3)))))
        return x * self.gate(mean + peak)[:, :, None, None]


class SpatialAttention(AttentionBlock):
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

    first, last = "conv", "conv"

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.conv = _window(2, kernel_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted map."""
        return x * self.gate(self.conv(_mean_and_peak(x)))


class ChannelThenSpatial(AttentionBlock):
    """Two attentions, one after the other: what the variants of CBAM have in common.

    Args:
        channel: The attention over channels.
        spatial: The attention over pixels.

    Shape:
        Input (batch, channels, height, width); output the same.
    """

    def __init__(self, channel: ChannelAttention, spatial: "SpatialAttention | NormedSpatialAttention") -> None:
        super().__init__()
        self.channel, self.spatial = channel, spatial

    @property
    def factor(self) -> float:
        """The product of the factors of both gates, which share it equally."""
        return self.channel.factor * self.spatial.factor

    @factor.setter
    def factor(self, value: float) -> None:
        self.channel.factor = self.spatial.factor = math.sqrt(value)

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted map."""
        return self.spatial(self.channel(x))  # type: ignore[no-any-return]

    def make_identity(self) -> None:
        """Open the gates of both parts."""
        self.channel.make_identity()
        self.spatial.make_identity()

    def fold(self) -> float:
        """Fold both parts; the channel one makes up for both, because the spatial one reads what it puts out."""
        factor = self.factor
        self.spatial.fold()
        self.channel.factor = 1.0
        _divide(self.channel.reduce, factor)
        return factor


class CBAM(ChannelThenSpatial):
    """Channel attention, then spatial attention, as in the paper: the variant that `cbam` stands for.

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

    def __init__(self, channels: int, reduction: int, kernel_size: int) -> None:
        super().__init__(ChannelAttention(channels, reduction), SpatialAttention(kernel_size))


class NormedSpatialAttention(AttentionBlock):
    """Spatial attention with a batch norm after its convolution, which then has no bias.

    Source: the authors' code of CBAM; the norm is not in the paper.

    Args:
        kernel_size: Odd side of the window in pixels.

    Shape:
        Input (batch, channels, height, width); output the same.

    Cost:
        2 * kernel_size**2 + 2 parameters and, per image, 2 * kernel_size**2 * height * width multiply-adds.

    Raises:
        PlacementError: If kernel_size is even or below 1.

    Example:
        >>> NormedSpatialAttention(kernel_size=7)(torch.zeros(1, 64, 8, 8)).shape
        torch.Size([1, 64, 8, 8])
    """

    first, last = (
        "conv",
        "norm",
    )  # a zero convolution would do, but the norm divides by its spread: its gradient explodes

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.conv = _window(2, kernel_size, bias=False)
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted map."""
        return x * self.gate(self.norm(self.conv(_mean_and_peak(x))))


class NormedCBAM(ChannelThenSpatial):
    """CBAM as in its authors' code: a batch norm follows the spatial convolution.

    Source: Woo et al. 2018, CBAM (arXiv:1807.06521), with the norm of their published code.

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
        >>> NormedCBAM(64, reduction=16, kernel_size=7)(torch.zeros(1, 64, 8, 8)).shape
        torch.Size([1, 64, 8, 8])
    """

    def __init__(self, channels: int, reduction: int, kernel_size: int) -> None:
        super().__init__(ChannelAttention(channels, reduction), NormedSpatialAttention(kernel_size))


class ResidualCBAM(CBAM):
    """CBAM whose input is added to its output, a form that spread through tutorials.

    Args, shape and cost are those of `CBAM`.

    Source: Woo et al. 2018, CBAM, eq. 1 (arXiv:1807.06521), plus the input, which is not in the paper.

    Example:
        >>> ResidualCBAM(64, reduction=16, kernel_size=7)(torch.zeros(1, 64, 8, 8)).shape
        torch.Size([1, 64, 8, 8])
    """

    factor: float = 1.0  # of the sum, not of the gates

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted map plus the map, times the factor."""
        weighted = super().forward(x)
        if self.factor == 1.0:
            return weighted + x
        # 0.8 * (weighted + x), written so that not even a rounding error is left where weighted is x / 4
        return x + self.factor * (weighted - 0.25 * x)

    def make_identity(self) -> None:
        """Zero the last layers of both parts; their gates stay at 1/2, so that the sum is 5/4 of the input."""
        _zero(self.channel.expand)
        _zero(self.spatial.conv)
        self.factor = 0.8

    def fold(self) -> float:
        """Scale the first layers of both parts instead of the sum."""
        factor, self.factor = self.factor, 1.0
        _divide(self.channel.reduce, factor)
        _divide(self.spatial.conv, factor)
        return factor


class EfficientChannelAttention(AttentionBlock):
    """Weight each channel by its mean and those of its neighbours (ECA).

    One convolution over the channels, without bias, turns the means into weights; there is no bottleneck.

    Source: Wang et al. 2020, ECA-Net, eq. 5-9 (arXiv:1910.03151).

    Args:
        kernel_size: Odd number of neighbouring channels, the channel itself included.

    Shape:
        Input (batch, channels, height, width); output the same.

    Cost:
        kernel_size parameters and kernel_size * channels multiply-adds an image.

    Raises:
        PlacementError: If kernel_size is even or below 1.

    Example:
        >>> EfficientChannelAttention(kernel_size=3)(torch.zeros(1, 64, 8, 8)).shape
        torch.Size([1, 64, 8, 8])
    """

    first, last = "conv", "conv"

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        _check_odd(kernel_size)
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted map."""
        gate = self.gate(self.conv(x.mean((2, 3))[:, None, :]))
        return x * gate[:, 0, :, None, None]


def _zero(layer: nn.Module) -> None:
    for weight in layer.parameters():
        nn.init.zeros_(weight)


def _divide(layer: nn.Module, factor: float) -> None:
    """Divide the weights of a layer, not its bias."""
    with torch.no_grad():
        layer.get_parameter("weight").div_(factor)


def _mean_and_peak(x: Tensor) -> Tensor:
    return torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)


def _window(channels: int, kernel_size: int, *, bias: bool) -> nn.Conv2d:
    _check_odd(kernel_size)
    return nn.Conv2d(channels, 1, kernel_size, padding=kernel_size // 2, bias=bias)


def _check_odd(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise PlacementError(f"kernel size {kernel_size} is not allowed; allowed are odd ones: 1, 3, 5, ...")


@dataclass(frozen=True, slots=True)
class Block:
    """A line of the table of blocks.

    Args:
        make: Builds the block for a number of channels, with its settings by name.
        settings: Which settings it has, of `reduction` and `kernel_size`.
        source: Where its formula comes from.
        over_channels: Whether the window of kernel_size runs over channels instead of pixels.
    """

    make: Callable[..., nn.Module]
    settings: tuple[str, ...]
    source: str
    over_channels: bool = False

    def legal(self, channels: int) -> dict[str, str]:
        """Say which values each of its settings may have at a site with so many channels."""
        values = {"reduction": f"1..{channels}", "kernel_size": "1, 3, 5, ..."}
        return {setting: values[setting] for setting in self.settings}

    def largest_window(self, channels: int, side: int) -> int:
        """Return the largest kernel size of which every part can meet the map."""
        return 2 * (channels if self.over_channels else side) - 1


_SE = "Hu et al. 2018, arXiv:1709.01507"
_CBAM = "Woo et al. 2018, arXiv:1807.06521"
_ECA = "Wang et al. 2020, arXiv:1910.03151"

BLOCKS: dict[str, Block] = {
    "se": Block(SqueezeExcitation, ("reduction",), _SE),
    "cbam": Block(CBAM, ("reduction", "kernel_size"), _CBAM),
    "cbam_bn": Block(NormedCBAM, ("reduction", "kernel_size"), f"{_CBAM}, with the norm of the authors' code"),
    "cbam_residual": Block(ResidualCBAM, ("reduction", "kernel_size"), f"{_CBAM}, plus the input, as in tutorials"),
    "channel": Block(ChannelAttention, ("reduction",), f"{_CBAM}, eq. 2"),
    "spatial": Block(lambda _channels, kernel_size: SpatialAttention(kernel_size), ("kernel_size",), f"{_CBAM}, eq. 3"),
    "eca": Block(lambda _channels, kernel_size: EfficientChannelAttention(kernel_size), ("kernel_size",), _ECA, True),
}
"""Every block by the name it has in a placement."""


def hidden_channels(channels: int, reduction: int) -> int:
    """Return C // r, the width of the bottleneck.

    Raises:
        PlacementError: If the reduction is below 1 or above the number of channels.
    """
    if not 1 <= reduction <= channels:
        raise PlacementError(f"reduction {reduction} is not allowed; allowed are 1..{channels}, the number of channels")
    return channels // reduction


def block_named(name: str) -> Block:
    """Return the line of a block in the table, or one for the user's own block, `package.module:Class`.

    A user's block takes `channels` and, if it has them, `reduction` and `kernel_size`.

    Raises:
        PlacementError: If no block has this name.
        InputError: If its code cannot be imported.
    """
    if names_code(name):
        made = import_named(name)
        taken = inspect.signature(made).parameters
        if "channels" not in taken:
            raise PlacementError(f"block '{name}' does not take 'channels'")
        return Block(made, tuple(setting for setting in SETTINGS if setting in taken), name)
    if name not in BLOCKS:
        known = f"{', '.join(BLOCKS)}, or your own as package.module:Class"
        raise PlacementError(f"unknown block '{name}'{did_you_mean(name, BLOCKS)}; known: {known}")
    return BLOCKS[name]


def make_block(setting: BlockSetting, channels: int) -> nn.Module:
    """Build a block for a map of so many channels.

    Raises:
        PlacementError: If the block is unknown, lacks a setting, has one too many, or one is out of range.
    """
    block = block_named(setting.block)
    given = {name: value for name in SETTINGS if (value := getattr(setting, name)) is not None}
    if set(given) != set(block.settings):
        legal = ", ".join(f"{name} ({values})" for name, values in block.legal(channels).items())
        needs = f"needs the settings {legal} and no others" if legal else "has no settings"
        raise PlacementError(f"block '{setting}' {needs}")
    return block.make(channels, **given)


def sensible_settings(
    name: str, channels: int, side: int, reductions: Sequence[int], kernel_sizes: Sequence[int]
) -> list[BlockSetting]:
    """List the settings of a block that make sense on a map, for a search to choose from.

    Left out are reductions above the number of channels, windows of which a part never meets the map (larger than
    2 * side - 1, for ECA 2 * channels - 1), and settings that build the same block as one before them (C // r equal).

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
    first = {channels // reduction: reduction for reduction in reversed(reductions) if reduction <= channels}
    largest = block.largest_window(channels, side)
    choices = {
        "reduction": [reduction for reduction in reductions if reduction in first.values()],
        "kernel_size": [size for size in kernel_sizes if size <= largest],
    }
    return [
        BlockSetting(name, **dict(zip(block.settings, values, strict=True)))
        for values in product(*(choices[setting] for setting in block.settings))
    ]
