"""The search space, one choice for each site, what fits into a budget, and the reference placements."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from placesearch.errors import InputError
from placesearch.models.blocks import sensible_settings
from placesearch.models.sites import Site
from placesearch.placement import BlockSetting, Placement

NONE = "none"

Added = Callable[[str, BlockSetting], Sequence[float]]
"""Returns what a block adds at a site, in each cost that has a limit."""


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """For each site the choices there, as texts: `none`, `se(r=4)`, ..., `cbam(r=16,k=7)`.

    Args:
        choices: Site names and their choices; the first one is `none`.
        room: How much blocks may add together, in each cost that has a limit; empty without limits.
        added: What each choice but `none` adds to these costs, by site.
    """

    choices: Mapping[str, tuple[str, ...]]
    room: tuple[float, ...] = ()
    added: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of placements, those that do not fit the budget included."""
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

    def trimmed(self, chosen: Mapping[str, str], random: np.random.Generator) -> dict[str, str]:
        """Take blocks away at random until the budget is kept."""
        trimmed = dict(chosen)
        order = [str(site) for site in random.permutation(sorted(trimmed))] if self.room else []
        left = self._left(trimmed)
        for site in order:
            if min(left) >= 0:
                break
            if trimmed[site] != NONE:
                left = [room + added for room, added in zip(left, self.added[site][trimmed[site]], strict=True)]
                trimmed[site] = NONE
        return trimmed

    def within_budget(self, choices: Mapping[str, Sequence[str]] | None = None) -> Iterator[dict[str, str]]:
        """Yield all choices that keep the budget, one after the other.

        Args:
            choices: The choices of the space in the order in which they are to be tried.
        """
        given = {site: list(texts) for site, texts in (choices or self.choices).items()}
        sites = list(given)

        def extended(index: int, chosen: dict[str, str], left: Sequence[float]) -> Iterator[dict[str, str]]:
            if index == len(sites):
                yield dict(chosen)
                return
            site = sites[index]
            for text in given[site]:
                rest = left if text == NONE else self._after(left, site, text)
                if all(room >= 0 for room in rest):
                    chosen[site] = text
                    yield from extended(index + 1, chosen, rest)

        yield from extended(0, {}, self.room)

    def _after(self, left: Sequence[float], site: str, text: str) -> Sequence[float]:
        return [room - added for room, added in zip(left, self.added[site][text], strict=True)] if left else left

    def _left(self, chosen: Mapping[str, str]) -> Sequence[float]:
        left: Sequence[float] = self.room
        for site, text in chosen.items():
            left = left if text == NONE else self._after(left, site, text)
        return left


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


def with_budget(space: SearchSpace, room: Sequence[float], added: Added) -> SearchSpace:
    """Return the space without the choices that do not fit a budget, and with what is needed to keep it.

    Args:
        space: A space without a budget.
        room: How much blocks may add together, in each cost that has a limit.
        added: What a block adds.

    Raises:
        InputError: If no block fits.
    """
    costs = {
        site: {text: tuple(added(site, BlockSetting.parse(text))) for text in texts if text != NONE}
        for site, texts in space.choices.items()
    }
    fitting = {
        site: (NONE, *(text for text, cost in of_site.items() if all(c <= r for c, r in zip(cost, room, strict=True))))
        for site, of_site in costs.items()
    }
    fitting = {site: texts for site, texts in fitting.items() if len(texts) > 1}
    if not fitting:
        raise InputError("no block fits into the budget at any site")
    return SearchSpace(fitting, tuple(room), costs)


def spread(space: SearchSpace, added: Callable[[str, BlockSetting], float]) -> float:
    """Return by how much a cost can grow over the whole space: the sum over sites of the dearest choice there.

    Args:
        space: The space.
        added: What a block adds to the cost at a site.
    """
    return math.fsum(
        max(added(site, BlockSetting.parse(text)) for text in texts if text != NONE)
        for site, texts in space.choices.items()
    )


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
