"""The additive table of costs: what a placement costs, without building or running anything.

A block costs the same wherever maps have the same shape, and blocks do not change each other's shapes. So the cost of a
placement is the plain network's plus what each block adds, exactly.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from placesearch.costs.counting import profile
from placesearch.errors import PlacementError, did_you_mean
from placesearch.models.backbones import load_backbone
from placesearch.models.blocks import make_block
from placesearch.models.graph import InputSize
from placesearch.models.sites import Site, every_site
from placesearch.placement import BlockSetting, Placement
from placesearch.records import Cost

PLAIN = "none"


class CostTable:
    """Costs of all placements in a backbone.

    Each distinct pair of a block setting and a site's shape is counted once, when it is first asked for.

    Args:
        backbone: A name that `load_backbone` takes, or a network.
        input_size: Channels, height and width of its input.
        stem: With a name, the stem to build it with.
        sites: The network's sites as `every_site` lists them, where they are known already.
        counted: What `content` returned for the same backbone, so that nothing is counted again.

    Raises:
        BackboneError: As `find_sites`.
        PlacementError: From its methods, if the network cannot take a placement.

    Example:
        >>> table = CostTable("resnet18", (3, 64, 64))
        >>> added = table.cost(Placement.parse("layer4.1.bn2=se(r=16)")).params - table.plain.params
        >>> added == 2 * 512 * 32 + 32 + 512
        True
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        input_size: InputSize = (3, 224, 224),
        stem: str = "original",
        *,
        sites: Sequence[Site] | None = None,
        counted: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        if isinstance(backbone, str):
            with torch.random.fork_rng(devices=[]):
                backbone = load_backbone(backbone, num_classes=1000, stem=stem)
        self._counted = {
            name: Cost(macs, full, params, tuple(map(str, uncounted)))
            for name, (macs, full, params, *uncounted) in (counted or {}).items()
        }
        if PLAIN not in self._counted:
            self._counted[PLAIN] = profile(backbone, input_size)
        sites = every_site(backbone, input_size) if sites is None else sites
        self._sites = {name: site for site in sites for name in (site.name, *site.aliases)}
        self._at: dict[tuple[str, BlockSetting], Cost] = {}

    @property
    def plain(self) -> Cost:
        """What the network costs without blocks."""
        return self._counted[PLAIN]

    def cost(self, placement: Placement) -> Cost:
        """Return what the network costs with these blocks."""
        plain, at = self.plain, self._at
        macs, macs_full, params, uncounted = plain.macs, plain.macs_full, plain.params, plain.uncounted
        for where in placement.items():
            added = at.get(where) or self.added(*where)
            macs += added.macs
            macs_full += added.macs_full
            params += added.params
            if added.uncounted:
                uncounted = tuple(sorted({*uncounted, *added.uncounted}))
        return Cost(macs, macs_full, params, uncounted)

    def added(self, site: str, setting: BlockSetting) -> Cost:
        """Return what a block adds at a site."""
        if (site, setting) not in self._at:
            if site not in self._sites:
                raise PlacementError(f"the network has no site '{site}'{did_you_mean(site, self._sites)}")
            found = self._sites[site]
            name = f"{setting} {found.channels}x{found.height}x{found.width}"
            if name not in self._counted:
                try:
                    with torch.random.fork_rng(devices=[]):
                        block = make_block(setting, found.channels)
                except PlacementError as error:
                    raise PlacementError(f"site '{site}' with {found.channels} channels: {error}") from None
                self._counted[name] = profile(block, (found.channels, found.height, found.width))
            self._at[site, setting] = self._counted[name]
        return self._at[site, setting]

    def content(self) -> dict[str, list[Any]]:
        """Return all that was counted so far as plain values: macs, macs_full, params and uncounted operators."""
        return {name: [cost.macs, cost.macs_full, cost.params, *cost.uncounted] for name, cost in self._counted.items()}

    def count(self, settings: Mapping[str, Iterable[BlockSetting]]) -> None:
        """Count blocks before they are asked for.

        Args:
            settings: Block settings by the name of a site.
        """
        for site, of_site in settings.items():
            for setting in of_site:
                self.added(site, setting)
