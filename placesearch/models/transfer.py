"""Placements from one backbone to another: a block goes to the site of the same kind at the same relative depth."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from placesearch.config import full_input_size
from placesearch.errors import BackboneError, PlacementError
from placesearch.models.architecture import Architecture
from placesearch.models.backbones import load_backbone
from placesearch.models.blocks import block_named
from placesearch.models.sites import Site, every_site
from placesearch.placement import BlockSetting, Placement

_NARROWEST_FIRST = ("last", "head", "stage", "residual", "block")


@dataclass(frozen=True, slots=True)
class Move:
    """Where one block went.

    Args:
        site: Its site in the old backbone.
        depth: Where that is among the sites of its kind, 0 for the first and 1 for the last.
        setting: The block.
        kind: The kind of site, empty for a tensor of none.
        new_site: Its site in the new backbone; None if it was dropped.
        new_depth: Where that is among the sites of its kind.
        new_setting: The block there.
        note: What is worth knowing; empty if it went where it should, as it was.
    """

    site: str
    depth: float
    setting: BlockSetting
    kind: str
    new_site: str | None = None
    new_depth: float | None = None
    new_setting: BlockSetting | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Transfer:
    """A placement on another backbone, and how it came there.

    Args:
        architecture: The new architecture, without what was found of the old one and the factors of its trained gates.
        moves: Where each block went, in the order of the old placement.
        notes: What else is worth knowing, in sentences.
    """

    architecture: Architecture
    moves: tuple[Move, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Place:
    """A site among those of its kind."""

    site: Site
    index: int
    depth: float


@dataclass(slots=True)
class _Wish:
    """A block and the places that it may go to."""

    site: str
    setting: BlockSetting
    kind: str
    depth: float
    places: list[_Place]
    new_kind: str
    taken: _Place | None = None
    note: list[str] = field(default_factory=list)

    def distance(self, place: _Place) -> float:
        return abs(place.depth - self.depth)

    @property
    def nearest(self) -> _Place:
        """The place of the nearest depth, of two the earlier one."""
        return min(self.places, key=lambda place: (round(self.distance(place), 9), place.index))


def transfer(architecture: Architecture, backbone: str, input_size: int | tuple[int, ...] | None = None) -> Transfer:
    """Bring a placement to another backbone.

    A block goes to the site of its kind (of several kinds the narrowest: `last`, `head`, `stage`, `residual`, `block`)
    whose relative depth is nearest, of two equally near ones to the earlier. Relative depth counts the sites of that
    kind: 0 is the first, 1 the last. Where several blocks want one site, the nearest gets it and another one a free
    neighbour, if there is one; else it is dropped. Reduction and window stay what they are, except that a reduction
    above the new site's channels becomes their number, and a window of which parts would never meet the map becomes the
    largest that does. Nothing says that what helped in one backbone helps in another: measure it.

    Args:
        architecture: The architecture; its placement is carried over.
        backbone: The other backbone, a name that `load_backbone` takes.
        input_size: Its input, if another than the architecture's: a side, height and width, or channels before these.

    Raises:
        BackboneError: If the backbone is unknown or has no sites.
        PlacementError: If the architecture's own backbone cannot take the placement.

    Example:
        >>> found = Architecture(
        ...     backbone="resnet18", num_classes=10, input_size=(3, 64, 64),
        ...     placement=Placement.parse("layer1.0.bn2=se(r=16) layer4.1.bn2=cbam(r=8,k=3)"),
        ... )
        >>> str(transfer(found, "resnet50").architecture.placement)
        'layer1.0.bn3=se(r=16) layer4.2.bn3=cbam(r=8,k=3)'
    """
    size = full_input_size(input_size or architecture.input_size, architecture.input_size[0])
    with torch.random.fork_rng(devices=[]):
        old = every_site(load_backbone(architecture.backbone, 10, architecture.stem), architecture.input_size)
        new = every_site(load_backbone(backbone, 10, architecture.stem), size)
    wishes = [_wish(site, setting, old, new, backbone) for site, setting in architecture.placement.items()]
    _settle(wishes)
    moves = tuple(_move(wish) for wish in wishes)
    placement = Placement({move.new_site: move.new_setting for move in moves if move.new_site and move.new_setting})
    notes = []
    if architecture.factors:
        notes.append("what trained gates were multiplied by belongs to the old weights and is left out")
    if architecture.stem != "original":
        notes.append(f"the stem stays '{architecture.stem}'")
    carried: dict[str, Any] = {"backbone": backbone, "input_size": size, "placement": placement}
    carried |= {"factors": {}, "found": None}
    return Transfer(architecture.model_copy(update=carried), moves, tuple(notes))


def _wish(name: str, setting: BlockSetting, old: Sequence[Site], new: Sequence[Site], backbone: str) -> _Wish:
    """Find the kind of a block's site, and the sites of that kind in the new backbone."""
    site = next((site for site in old if name in (site.name, *site.aliases)), None)
    if site is None:
        raise PlacementError(f"the network has no site '{name}'")
    kinds = [kind for kind in _NARROWEST_FIRST if kind in site.kinds]
    kind = next((kind for kind in kinds if _places(new, kind)), kinds[0] if kinds else "")
    new_kind = kind if _places(new, kind) else next((k for k in ("residual", "block") if _places(new, k)), "")
    places = _places(new, new_kind)
    if not places:
        raise BackboneError(f"{backbone} has no sites")
    depth = next(place.depth for place in _places(old, kind) if place.site == site)
    wish = _Wish(name, setting, kind, depth, places, new_kind)
    if new_kind != kind:
        wish.note.append(f"no {kind} sites there, a {new_kind or 'nameless'} one taken")
    return wish


def _places(sites: Iterable[Site], kind: str) -> list[_Place]:
    """List the sites of a kind with their relative depths; without a kind all sites. A single one is the last."""
    chosen = [site for site in sites if not kind or kind in site.kinds]
    last = len(chosen) - 1
    return [_Place(site, index, index / last if last else 1.0) for index, site in enumerate(chosen)]


def _settle(wishes: Sequence[_Wish]) -> None:
    """Give each block the nearest place that is free: its own one, or a neighbour of it; nearer ones first."""
    taken: dict[str, str] = {}
    pairs = [
        (round(wish.distance(place), 9), number, place.index, wish, place)
        for number, wish in enumerate(wishes)
        for place in wish.places
        if abs(place.index - wish.nearest.index) <= 1
    ]
    for own in (True, False):  # first those that can have what they want
        for *_, wish, place in sorted(pairs, key=lambda pair: pair[:3]):
            wanted = wish.nearest
            if wish.taken is None and place.site.name not in taken and (place == wanted) is own:
                wish.taken = place
                taken[place.site.name] = wish.site
                if not own:
                    wish.note.append(f"{wanted.site.name} was taken by {taken[wanted.site.name]}")
    for wish in wishes:
        if wish.taken is None:
            name = wish.nearest.site.name
            wish.note.append(f"dropped: {name} was taken by {taken[name]}, and so were its neighbours")


def _move(wish: _Wish) -> Move:
    move = Move(wish.site, wish.depth, wish.setting, wish.kind)
    if wish.taken is None:
        return replace(move, note="; ".join(wish.note))
    setting, clipped = _clipped(wish.setting, wish.taken.site)
    note = "; ".join([*wish.note, *clipped])
    return replace(move, new_site=wish.taken.site.name, new_depth=wish.taken.depth, new_setting=setting, note=note)


def _clipped(setting: BlockSetting, site: Site) -> tuple[BlockSetting, list[str]]:
    """Return a setting that makes sense at a site, and what had to change for that."""
    told = []
    if setting.reduction is not None and setting.reduction > site.channels:
        told.append(f"r={setting.reduction} became {site.channels}, the number of channels")
        setting = replace(setting, reduction=site.channels)
    if setting.kernel_size is not None:
        largest = block_named(setting.block).largest_window(site.channels, max(site.height, site.width))
        if setting.kernel_size > largest:
            told.append(f"k={setting.kernel_size} became {largest}, the largest that meets the map")
            setting = replace(setting, kernel_size=largest)
    return setting, told
