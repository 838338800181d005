"""Blocks into networks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256

import torch
from torch import Tensor, nn

from placesearch.errors import PlacementError, did_you_mean
from placesearch.models.attachment import Attended, attach, block_of, homes_of
from placesearch.models.blocks import AttentionBlock, make_block
from placesearch.models.carrying import memory_of
from placesearch.models.copying import InputSize, copy_of
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
    `model.load_state_dict(checkpoint, strict=False)`. It also loads where a module cannot take a child
    (`Site.wrapped`): there a module that holds both, as its children `inner` and `attention`, comes in its place.

    A block goes over to what replaces its module later: other norms (`SyncBatchNorm.convert_sync_batchnorm`, a group
    norm), or the identity that a fused norm leaves behind. Where it would be lost or get to another place, that raises.

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
    model = copy_of(model, input_size if placement else None, share=share)
    if sites is None:
        sites = every_site(model, input_size) if placement else ()
    known = {alias: site for site in sites for alias in (site.name, *site.aliases)}
    blocks: dict[str, nn.Module] = {}
    for given, setting in placement.items():
        if given not in known:
            raise PlacementError(f"the network has no site '{given}'{did_you_mean(given, known)}")
        site = known[given]
        name, module = site.name, model.get_submodule(site.name)
        carriers = [module, *(model.get_submodule(alias) for alias in site.aliases)]
        if name in blocks or any(block_of(carrier) is not None for carrier in carriers):
            raise PlacementError(f"site '{given}' already has a block")
        try:
            block = _initialised(seed, name, setting, site.channels)
            if initial == "identity":
                _make_identity(block, setting)
        except PlacementError as error:
            raise PlacementError(f"site '{name}' with {site.channels} channels: {error}") from None
        weights = (weight for part in (module, model) for weight in part.parameters())
        reference = next((weight for weight in weights if weight.is_floating_point()), None)
        block.train(module.training)
        blocks[name] = block if reference is None else block.to(reference.device, reference.dtype)
    before, homes = dict(model.named_parameters(remove_duplicate=False)), homes_of(model)
    for name in sorted(blocks, key=lambda name: name.count("."), reverse=True):  # a wrapped one renames those in it
        attach(model, name, blocks[name], wrapped=known[name].wrapped, homes=homes)
    after = {id(weight): name for name, weight in model.named_parameters()}
    for name, block in blocks.items():
        scaled_by = [before[weight] for weight in known[name].scaled_by]
        vars(block)["scaled_by"] = tuple(after[id(weight)] for weight in scaled_by)  # for `fold`
    return model


def plain_names(model: nn.Module) -> dict[str, str]:
    """Return the modules of a network by name, and the names that they have in the network without blocks.

    Args:
        model: A network from `insert`.
    """
    plain, wrapped = {"": ""}, set()
    for name, module in model.named_modules():
        owner, _, own = name.rpartition(".")
        if name:
            inner = owner in wrapped and own == "inner"
            plain[name] = plain[owner] if inner else f"{plain[owner]}.{own}".removeprefix(".")
        if isinstance(module, Attended):
            wrapped.add(name)
    return plain


def own_names(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under the names of a network; they may have those of the network without blocks.

    Args:
        model: A network from `insert`.
        weights: Parameters and buffers by name, or what belongs to them.
    """
    own = dict(weights)
    for name, module in model.named_modules():
        if isinstance(module, Attended):
            module.rename(own, f"{name}.")
    return own


def weights_of_blocks(model: nn.Module) -> set[str]:
    """Return the names of all parameters and buffers of a network that belong to its blocks.

    Args:
        model: A network from `insert`, or one that was made of it.
    """
    prefixes = tuple(f"{name}.attention." for name, module in model.named_modules() if block_of(module) is not None)
    return {name for name in model.state_dict(keep_vars=True) if name.startswith(prefixes)}


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of a network by the names of their sites.

    Args:
        model: A network from `insert`, or one that was made of it.
    """
    plain, modules = plain_names(model), model.named_modules()
    return {plain[name]: block for name, module in modules if (block := block_of(module)) is not None}


def fold(model: nn.Module) -> nn.Module:
    """Return a copy in which blocks that started as the identity are stock blocks, with equal outputs.

    Where a block follows right on an affine layer (a norm, a convolution), its factor moves into that layer and into
    its own first layers. Elsewhere it stays: after an activation, say, or after a layer whose parameters are used a
    second time in a forward. Uses elsewhere, in a regulariser of one's own, are not seen.

    Args:
        model: A network from `insert`, not a part of it and not one that holds it; left unchanged.
    """
    model = copy_of(model)
    weights = dict(model.named_parameters(remove_duplicate=False))
    owners = Counter(memory_of(w) for part in model.modules() for w in part._parameters.values() if w is not None)
    for block in blocks_of(model).values():
        scaled_by = [weights.get(name) for name in getattr(block, "scaled_by", ())]
        alone = [w for w in scaled_by if w is not None and owners[memory_of(w)] == 1]
        if isinstance(block, AttentionBlock) and scaled_by and len(alone) == len(scaled_by):
            factor = block.fold()
            with torch.no_grad():
                for weight in alone:
                    weight.mul_(factor)
    return model


def factors_of(model: nn.Module) -> dict[str, float]:
    """Return what the gates of blocks are multiplied by, where that is not 1.

    Args:
        model: A network from `insert` or `fold`.

    Returns:
        Names of sites and the `factor` of the block there.
    """
    factors = {name: getattr(block, "factor", None) for name, block in blocks_of(model).items()}
    return {name: factor for name, factor in factors.items() if isinstance(factor, float) and factor != 1.0}


def set_factors(model: nn.Module, factors: Mapping[str, float]) -> None:
    """Set what the gates of blocks are multiplied by, in place.

    Args:
        model: A network from `insert`.
        factors: What `factors_of` returned for such a network.

    Raises:
        PlacementError: If a block has no factor.
    """
    blocks = blocks_of(model)
    for site, factor in factors.items():
        block = blocks.get(site)
        if block is None or not isinstance(getattr(block, "factor", None), float):
            raise PlacementError(f"site '{site}' has no block with a factor")
        block.factor = factor  # type: ignore[assignment]  # a number, as it is checked above


def _make_identity(block: nn.Module, setting: BlockSetting) -> None:
    make_identity = getattr(block, "make_identity", None)
    if make_identity is None:
        raise PlacementError(f"block '{setting}' cannot start as the identity: it has no method make_identity")
    make_identity()


def _initialised(seed: int | None, site: str, setting: BlockSetting, channels: int) -> nn.Module:
    if seed is None:
        return make_block(setting, channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(sha256(f"{seed} {site} {setting}".encode()).digest()[:7]))
        return make_block(setting, channels)
