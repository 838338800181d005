"""The search space, one choice for each site, and the reference placements."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from placesearch.errors import InputError
from placesearch.models.blocks import sensible_settings
from placesearch.models.sites import Site
from placesearch.placement import BlockSetting, Placement

NONE = "none"


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """For each site the choices there, as texts: `none`, `se(r=4)`, ..., `cbam(r=16,k=7)`.

    Args:
        choices: Site names and their choices; the first one is `none`.
    """

    choices: Mapping[str, tuple[str, ...]]

    @property
    def size(self) -> int:
        """Number of placements."""
        return math.prod(len(choices) for choices in self.choices.values())

    def placement(self, chosen: Mapping[str, str]) -> Placement:
        """Return the placement that these choices stand for."""
        return Placement({site: BlockSetting.parse(text) for site, text in chosen.items() if text != NONE})

    def chosen(self, placement: Placement) -> dict[str, str] | None:
        """Return the choices that stand for a placement, None if the space does not hold it."""
        if not set(placement) <= set(self.choices):
            return None
        chosen = {site: str(placement.get(site, NONE)) for site in self.choices}
        return chosen if all(chosen[site] in self.choices[site] for site in self.choices) else None


def make_space(
    sites: Sequence[Site], blocks: Sequence[str], reductions: Sequence[int], kernel_sizes: Sequence[int]
) -> SearchSpace:
    """Build the space of all sensible settings of these blocks at these sites.

    Raises:
        InputError: If a block is unknown, or a block, a reduction or a kernel size makes sense at no site.
    """
    settings = {
        site.name: [
            setting
            for block in blocks
            for setting in sensible_settings(
                block, site.channels, max(site.height, site.width), reductions, kernel_sizes
            )
        ]
        for site in sites
    }
    used = [setting for choices in settings.values() for setting in choices]
    for reduction in reductions:
        if not any(reduction <= site.channels for site in sites):
            most = max(site.channels for site in sites)
            raise InputError(f"no site can take reduction {reduction}; the sites have up to {most} channels")
    for block in blocks:
        if not any(setting.block == block for setting in used):
            side = max(max(site.height, site.width) for site in sites)
            raise InputError(
                f"no site can take block '{block}' with kernel sizes {','.join(map(str, kernel_sizes))}; "
                f"the largest map is {side} pixels wide, which allows up to {2 * side - 1}"
            )
    return SearchSpace({site: (NONE, *map(str, choices)) for site, choices in settings.items() if choices})


def reference_placements(sites: Sequence[Site]) -> dict[str, Placement]:
    """Return the placements that every study evaluates first, by name.

    From the papers: nothing (`plain`); SE at every residual site, r=16; CBAM at every residual site, r=16 and k=7; CBAM
    at the residual sites of the last stage only, that is, those with the resolution of the last one. In a network
    without residual sites its `block` sites take their place. Rules of thumb: CBAM after the last convolution, before
    the first fully connected layer, and after every block. A reduction above a site's channels becomes their number.
    Equal placements appear once, with their names joined by blanks.

    Args:
        sites: All of the network's sites, in the order in which data pass them.
    """
    usual = _of_kind(sites, "residual") or _of_kind(sites, "block")
    last = [site for site in usual if (site.height, site.width) == (usual[-1].height, usual[-1].width)]
    named = {
        "plain": Placement(),
        "se-everywhere": Placement({site.name: BlockSetting("se", min(16, site.channels)) for site in usual}),
        "cbam-everywhere": _cbam(usual),
        "cbam-last-stage": _cbam(last),
        "cbam-after-last-convolution": _cbam(_of_kind(sites, "last")),
        "cbam-before-head": _cbam(_of_kind(sites, "head")),
        "cbam-after-every-block": _cbam(_of_kind(sites, "block")),
    }
    names: dict[Placement, list[str]] = {}
    for name, placement in named.items():
        if placement or name == "plain":
            names.setdefault(placement, []).append(name)
    return {" ".join(joined): placement for placement, joined in names.items()}


def _of_kind(sites: Sequence[Site], kind: str) -> list[Site]:
    return [site for site in sites if kind in site.kinds]


def _cbam(sites: Sequence[Site]) -> Placement:
    return Placement({site.name: BlockSetting("cbam", min(16, site.channels), 7) for site in sites})
