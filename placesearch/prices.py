"""What placements cost, what a budget leaves of a search, which costs tell candidates apart; before any training."""

from dataclasses import dataclass
from typing import Any

from placesearch.config import StudyConfig, limit_of
from placesearch.costs import CostTable
from placesearch.costs.latency import LatencyTable
from placesearch.errors import InputError
from placesearch.placement import BlockSetting, Placement
from placesearch.search.space import SearchSpace, spread, with_budget

COUNTED = ("macs", "macs_full", "params")
"""Costs that are counted."""

FLAT = 0.005
"""A cost that grows by less than this share over the whole space tells candidates hardly apart."""


@dataclass(frozen=True, slots=True)
class Prices:
    """All that is known of the cost of placements before anything is trained.

    Args:
        table: Counted costs.
        latencies: Predicted latencies, if the study goes by them.
    """

    table: CostTable
    latencies: LatencyTable | None

    def of(self, placement: Placement) -> dict[str, Any]:
        """Return the costs of a placement, as fields of a `TrialRecord`."""
        cost = self.table.cost(placement)
        counted = {name: getattr(cost, name) for name in COUNTED}
        return counted | ({"latency_predicted_ms": self.latencies.predicted(placement)} if self.latencies else {})

    def plain(self, name: str) -> float:
        """Return a cost of the plain backbone by the name of the objective."""
        if name == "latency_ms" and self.latencies is not None:
            return self.latencies.plain_ms
        return float(getattr(self.table.plain, name))

    def added(self, name: str, site: str, setting: BlockSetting) -> float:
        """Return what a block adds to a cost at a site."""
        if name == "latency_ms" and self.latencies is not None:
            return self.latencies.added(site, setting)
        return float(getattr(self.table.added(site, setting), name))

    def total(self, name: str, placement: Placement) -> float:
        """Return a cost of a placement."""
        return self.plain(name) + sum(self.added(name, site, setting) for site, setting in placement.items())


def limits_of(config: StudyConfig, prices: Prices) -> dict[str, float]:
    """Return the most that a candidate may cost, by the name of the cost."""
    given = {name: getattr(config, f"max_{name.removesuffix('_ms')}") for name in (*COUNTED, "latency_ms")}
    return {name: limit_of(text, prices.plain(name)) for name, text in given.items() if text is not None}


def within_budget(
    config: StudyConfig,
    limits: dict[str, float],
    space: SearchSpace,
    references: dict[str, Placement],
    prices: Prices,
) -> tuple[SearchSpace, dict[str, Placement], list[str]]:
    """Leave out what the budget forbids, and say what that is."""
    if not limits:
        return space, references, []
    digits = {name: ".4g" if name == "latency_ms" else ",.10g" for name in limits}
    for name, limit in limits.items():
        if prices.plain(name) > limit:
            field_name = f"max_{name.removesuffix('_ms')}"
            option = f"--{field_name.replace('_', '-')} {getattr(config, field_name)}"
            plain = f"{prices.plain(name):{digits[name]}} {name}"
            raise InputError(f"{config.backbone} has {plain} without any block, more than {option}")
    room = [limit - prices.plain(name) for name, limit in limits.items()]
    kept = {
        reference: placement
        for reference, placement in references.items()
        if all(prices.total(name, placement) <= limit for name, limit in limits.items())
    }
    notes = ["budget: at most " + ", ".join(f"{limit:{digits[name]}} {name}" for name, limit in limits.items())]
    if len(kept) < len(references):
        notes.append(f"over the budget and left out: {', '.join(name for name in references if name not in kept)}")

    def added(site: str, setting: BlockSetting) -> list[float]:
        return [prices.added(name, site, setting) for name in limits]

    return with_budget(space, room, added), kept, notes


def flat_axes(config: StudyConfig, space: SearchSpace, prices: Prices) -> list[str]:
    """Name objectives that hardly vary, and suggest one that does."""
    known = [*COUNTED, *(["latency_ms"] if prices.latencies else [])]
    shares = {
        name: spread(space, lambda site, setting, name=name: prices.added(name, site, setting)) / prices.plain(name)  # type: ignore[misc]
        for name in known
    }
    unknown = ", ".join(prices.table.plain.uncounted)
    notes = [f"note: operators that no rule counts, so that macs_full is too low: {unknown}"] if unknown else []
    for name in known:
        if name in config.objectives and shares[name] < FLAT:
            better = max(known, key=lambda other: shares[other])
            hint = f"{better} vary by {100 * shares[better]:.2g} %" if better != name else "no other cost varies more"
            little = f"{name} vary by only {100 * shares[name]:.2g} % over the whole space, too little to choose by"
            notes.append(f"note: {little}; {hint}")
    return notes
