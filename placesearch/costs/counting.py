"""Multiply-adds and parameters, counted by fvcore."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from placesearch.models.blocks import make_block
from placesearch.models.graph import InputSize
from placesearch.models.sites import Site
from placesearch.placement import BlockSetting
from placesearch.records import Cost

with warnings.catch_warnings():
    # on import fvcore 0.1.5 uses torch.jit.script, which torch deprecates; no newer fvcore exists
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    from fvcore.nn import FlopCountAnalysis

COUNTED = ("conv", "linear", "addmm")
"""fvcore's names of convolutions and linear layers, which make up `macs`: the figure that papers print."""


def profile(model: nn.Module, input_size: InputSize) -> Cost:
    """Count the multiply-adds of convolutions and linear layers for one image, and the parameters.

    fvcore traces an eval copy; what it calls flops are multiply-adds. The argument is left as it is.

    Args:
        model: The network.
        input_size: Channels, height and width of its input.

    Example:
        >>> import torchvision
        >>> cost = profile(torchvision.models.resnet18(), (3, 224, 224))
        >>> f"{cost.macs:,} {cost.params:,}"
        '1,814,073,344 11,689,512'
    """
    copied = copy.deepcopy(model).cpu().eval()
    with warnings.catch_warnings():
        # torch deprecates torch.jit.trace, with which fvcore 0.1.5 looks at the network; no newer fvcore exists
        warnings.simplefilter("ignore")
        analysis = FlopCountAnalysis(copied, torch.zeros(1, *input_size))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        counts = analysis.by_operator()
    return Cost(
        macs=int(sum(counts[name] for name in COUNTED)), params=sum(weight.numel() for weight in model.parameters())
    )


def block_costs(sites: Sequence[Site], settings: Mapping[str, BlockSetting]) -> dict[str, list[Cost]]:
    """Count what a block adds at each site.

    Args:
        sites: The sites.
        settings: Block settings by a name of the caller's choice; a reduction above a site's channels becomes the
            number of channels.

    Returns:
        For each name one cost a site, in the order of the sites.
    """
    counted: dict[tuple[str, int, int, int], Cost] = {}
    costs: dict[str, list[Cost]] = {name: [] for name in settings}
    for name, setting in settings.items():
        for site in sites:
            shape = (site.channels, site.height, site.width)
            if (name, *shape) not in counted:
                reduction = setting.reduction and min(setting.reduction, site.channels)
                block = make_block(replace(setting, reduction=reduction), site.channels)
                counted[name, *shape] = profile(block, shape)
            costs[name].append(counted[name, *shape])
    return costs
