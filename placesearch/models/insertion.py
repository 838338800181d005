"""Blocks into networks."""

import copy
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from placesearch.errors import PlacementError, did_you_mean
from placesearch.models.blocks import AttentionBlock, make_block
from placesearch.models.graph import InputSize
from placesearch.models.sites import Site, every_site
from placesearch.placement import BlockSetting, Placement


def insert(
    model: nn.Module,
    placement: Placement,
    *,
    input_size: InputSize = (3, 224, 224),
    sites: Sequence[Site] | None = None,
    seed: int | None = None,
    initial: str = "standard",
    share: bool = False,
) -> nn.Module:
    """Return a copy of a network with blocks at the sites of a placement.

    A block becomes the child `attention` of the module that puts its site's tensor out and works on that module's
    output. So every parameter of the network keeps its name, and a checkpoint of the plain network loads with
    `model.load_state_dict(checkpoint, strict=False)`.

    Args:
        model: The network; left unchanged.
        placement: Which block goes where; a site may be named by any of its aliases.
        input_size: Channels, height and width of an input that the network takes, to look at its sites.
        sites: The network's sites, where they are known already.
        seed: Makes each block's first weights a function of this seed, its site and its settings alone, so that the
            same block at the same site starts the same in every placement. None takes torch's global random numbers.
        initial: `standard`: blocks start as their authors initialise them. `identity`: they start by changing nothing,
            so that a trained network stays what it is; `fold` turns them into stock blocks afterwards.
        share: Whether the copy has the very parameters and buffers of the network, which saves memory where several
            copies are only looked at.

    Raises:
        PlacementError: If a site does not exist, already has a block, or cannot take the settings, or a user's block
            cannot start as the identity.

    Example:
        >>> import torchvision
        >>> plain = torchvision.models.resnet18()
        >>> model = insert(plain, Placement.parse("layer4.1.bn2=se(r=16)"))
        >>> [name for name, _ in model.named_parameters() if "attention" in name][0]
        'layer4.1.bn2.attention.reduce.weight'
    """
    if initial not in ("standard", "identity"):
        raise PlacementError(f"blocks start as 'standard' or 'identity', not '{initial}'")
    model = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())} if share else None)
    if sites is None:
        sites = every_site(model, input_size) if placement else ()
    known = {alias: site for site in sites for alias in (site.name, *site.aliases)}
    for given, setting in placement.items():
        if given not in known:
            raise PlacementError(f"the network has no site '{given}'{did_you_mean(given, known)}")
        name = known[given].name
        module = model.get_submodule(name)
        if any(hasattr(model.get_submodule(alias), "attention") for alias in (name, *known[given].aliases)):
            raise PlacementError(f"site '{given}' already has a block")
        try:
            block = _initialised(seed, name, setting, known[name].channels)
            if initial == "identity":
                _make_identity(block, setting)
        except PlacementError as error:
            raise PlacementError(f"site '{name}' with {known[name].channels} channels: {error}") from None
        reference = next(module.parameters(), None)
        block.scaled_by = known[name].scaled_by  # type: ignore[assignment]  # for `fold`
        module.add_module("attention", block if reference is None else block.to(reference.device, reference.dtype))
        if not isinstance(module, nn.Sequential):  # which runs its last child anyway
            module.register_forward_hook(_attend)
    return model


def fold(model: nn.Module) -> nn.Module:
    """Return a copy in which blocks that started as the identity are stock blocks, with equal outputs.

    Where a block follows right on an affine layer (a norm, a convolution), its factor moves into that layer and into
    its own first layers. Elsewhere, after an activation say, it stays.

    Args:
        model: A network from `insert`, not a part of it and not one that holds it; left unchanged.
    """
    model = copy.deepcopy(model)
    for block in [module.attention for module in model.modules() if hasattr(module, "attention")]:
        scaled_by = getattr(block, "scaled_by", ())
        if isinstance(block, AttentionBlock) and scaled_by:
            factor = block.fold()
            with torch.no_grad():
                for name in scaled_by:
                    model.get_parameter(name).mul_(factor)
    return model


def factors_of(model: nn.Module) -> dict[str, float]:
    """Return what the gates of blocks are multiplied by, where that is not 1.

    Args:
        model: A network from `insert` or `fold`.

    Returns:
        Names of sites and the `factor` of the block there.
    """
    blocks = {name: getattr(module, "attention", None) for name, module in model.named_modules()}
    factors = {name: getattr(block, "factor", None) for name, block in blocks.items() if isinstance(block, nn.Module)}
    return {name: factor for name, factor in factors.items() if isinstance(factor, float) and factor != 1.0}


def set_factors(model: nn.Module, factors: Mapping[str, float]) -> None:
    """Set what the gates of blocks are multiplied by, in place.

    Args:
        model: A network from `insert`.
        factors: What `factors_of` returned for such a network.

    Raises:
        PlacementError: If a block has no factor.
    """
    blocks = {name: getattr(module, "attention", None) for name, module in model.named_modules()}
    for site, factor in factors.items():
        block = blocks.get(site)
        if block is None or not isinstance(getattr(block, "factor", None), float):
            raise PlacementError(f"site '{site}' has no block with a factor")
        block.factor = factor


def _make_identity(block: nn.Module, setting: BlockSetting) -> None:
    make_identity = getattr(block, "make_identity", None)
    if make_identity is None:
        raise PlacementError(f"block '{setting}' cannot start as the identity: it has no method make_identity")
    make_identity()


def _attend(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    return module.attention(output)  # type: ignore[no-any-return, operator]


def _initialised(seed: int | None, site: str, setting: BlockSetting, channels: int) -> nn.Module:
    if seed is None:
        return make_block(setting, channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(sha256(f"{seed} {site} {setting}".encode()).digest()[:7]))
        return make_block(setting, channels)
