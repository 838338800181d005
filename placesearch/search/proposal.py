"""Which placement to try next, given values for all effects: the one that adds most to the front.

Costs are known, and add up over sites. So for given effects the best placement at each cost is found by dynamic
programming over the sites, whatever the shape of the front (a multiple-choice knapsack: Kellerer, Pferschy and Pisinger
2004, chapter 11), and then improved site by site where pairs of blocks matter.

Drawing the effects from what they may be, and taking what is best if they were so, tries placements as often as they
are likely to be best (Thompson 1933, Biometrika 25, 285-294).
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from placesearch.placement import BlockSetting, Placement
from placesearch.search.effects import Effects
from placesearch.search.evidence import Array

STEPS = 256
"""Steps of cost in the dynamic programming; costs are rounded up to them."""

SWEEPS = 2
"""How often every site is looked at again, for what pairs of blocks add."""

CLIMBS = 20
"""How often the best one found may be made better by one more change at a single site."""

BEYOND = 1.1
"""Up to which cost gains are counted, in costs of the dearest placement."""

ATTEMPTS = 1000
"""Random changes that are tried where all that is worth trying was tried."""

Choice = NDArray[np.int64]


class Proposer:
    """Finds placements of a search space that are worth a trial.

    Args:
        choices: Settings by site; None, which is first, stands for no block.
        added: For each cost what each choice adds to it, by site; one array of the choices' length a site.
        room: How much may be added to each limited cost.
        limited: For each limited cost what each choice adds, by site.
    """

    def __init__(
        self,
        choices: Mapping[str, Sequence[BlockSetting | None]],
        added: Sequence[Sequence[Array]],
        room: Sequence[float] = (),
        limited: Sequence[Sequence[Array]] = (),
    ) -> None:
        self.sites, self.choices = tuple(choices), [tuple(settings) for settings in choices.values()]
        self._ranges = np.array([max(sum(float(of_site.max()) for of_site in cost), 1e-300) for cost in added])
        self._added, self._room, self._limited = added, np.array(room), limited

    def placement(self, chosen: Choice) -> Placement:
        """Return the placement that choices stand for."""
        settings = zip(self.sites, self.choices, chosen, strict=True)
        return Placement({site: of[index] for site, of, index in settings if of[index] is not None})

    def propose(
        self, effects: Effects, tried: Mapping[Placement, tuple[float, Sequence[float]]], random: np.random.Generator
    ) -> Placement:
        """Return the untried placement that would add most to the front, were the effects as given.

        The costs are weighed at random, if there are several.

        Args:
            effects: Values of the effects.
            tried: For each placement that was tried its accuracy under these effects, and its costs.
            random: Random numbers. A space in which all placements were tried never ends.
        """
        weights = self._weights(random)
        costs = self._weighed(weights)
        values = _Values(self.sites, self.choices, effects)
        found = self._best(values, costs)
        seen = np.array([[float(np.dot(weights, of_costs)), value] for value, of_costs in tried.values()])
        seen = seen.reshape(-1, 2)
        end = BEYOND * sum(float(of_site.max()) for of_site in costs)

        def gains_of(chosen: Choice) -> Array:
            points = np.column_stack([_total(costs, chosen), values.of(chosen)])
            return np.where(self._fits(chosen), _gains(seen, points, end), -1.0)

        gains = gains_of(found)
        for _ in range(CLIMBS):
            changed = self._changes(found[gains.argmax()])
            of_changed = gains_of(changed)
            if of_changed.max() <= gains.max():
                break
            found, gains = np.concatenate([found, changed]), np.concatenate([gains, of_changed])
        found, gains = found[gains >= 0], gains[gains >= 0]
        for index in np.argsort(-gains, kind="stable"):
            placement = self.placement(found[index])
            if placement not in tried:
                return placement
        return self.nearby(found, tried, random)

    def reached(
        self, effects: Effects, members: Mapping[Placement, Sequence[float]], random: np.random.Generator
    ) -> float:
        """Return how much of what the best front covers some placements cover, were the effects as given.

        Covered is what lies above the network without blocks and below the cost of the dearest placement.

        Args:
            effects: Values of the effects.
            members: Placements and their costs; the network without blocks is added to them.
            random: Weighs the costs, if there are several.

        Returns:
            A share of 0..1; 1 where nothing can be won.
        """
        weights = self._weights(random)
        costs = self._weighed(weights)
        values = _Values(self.sites, self.choices, effects)
        end = BEYOND * sum(float(of_site.max()) for of_site in costs)
        found = self._best(values, costs)
        found = found[self._fits(found)]
        plain = np.array([[0.0, float(effects.of([Placement()])[0])]])
        own = np.array([float(np.dot(weights, of_costs)) for of_costs in members.values()])
        seen = np.concatenate([plain, np.column_stack([own, effects.of(list(members))])])
        best = np.concatenate([seen, np.column_stack([_total(costs, found), values.of(found)])])
        most = _covered(best, end, plain[0, 1])
        return _covered(seen, end, plain[0, 1]) / most if most > 0 else 1.0

    def _weights(self, random: np.random.Generator) -> Array:
        return random.dirichlet(np.ones(len(self._ranges))) / self._ranges if len(self._ranges) else np.zeros(0)

    def _weighed(self, weights: Array) -> list[Array]:
        """Return what each choice adds to the weighed sum of the costs, by site."""
        return [
            np.asarray(sum((w * of[site] for w, of in zip(weights, self._added, strict=True)), np.zeros(len(settings))))
            for site, settings in enumerate(self.choices)
        ]

    def _best(self, values: "_Values", costs: Sequence[Array]) -> Choice:
        found = self._best_at_each_cost(values, costs)
        return np.unique(np.concatenate([found, self._improved(values, costs, found)]), axis=0)

    def _best_at_each_cost(self, values: "_Values", costs: Sequence[Array]) -> Choice:
        """Return the choices with the highest sum of effects at each step of cost, pairs left out."""
        total = sum(float(of_site.max()) for of_site in costs)
        unit = total / STEPS if total > 0 else 1.0
        steps = [np.ceil(of_site / unit - 1e-9).clip(0).astype(int) for of_site in costs]
        budgets = np.arange(1 + sum(int(of_site.max()) for of_site in steps))
        best, taken = np.zeros(len(budgets)), np.zeros((len(costs), len(budgets)), dtype=int)
        for site, (of_site, gain) in enumerate(zip(steps, values.added, strict=True)):
            left = budgets[None, :] - of_site[:, None]
            reached = np.where(left >= 0, best[left.clip(0)] + gain[:, None], -np.inf)
            taken[site] = reached.argmax(0)
            best = reached.max(0)
        budgets = budgets[np.r_[True, best[1:] > best[:-1]]]
        chosen = np.zeros((len(budgets), len(costs)), dtype=int)
        for site in reversed(range(len(costs))):
            chosen[:, site] = taken[site, budgets]
            budgets = budgets - steps[site][chosen[:, site]]
        return chosen

    def _improved(self, values: "_Values", costs: Sequence[Array], found: Choice) -> Choice:
        """Choose again at each site in turn, at the price of cost that holds on the front, counting pairs."""
        accuracy, cost = values.of(found), _total(costs, found)
        price = np.zeros(len(found))
        if len(found) > 1 and np.ptp(cost) > 0:
            price = np.maximum(np.gradient(accuracy, cost + 1e-12 * np.arange(len(cost))), 0.0)
        better, blocks = found.copy(), values.blocks(found)
        for _ in range(SWEEPS):
            for site, of_site in enumerate(costs):
                gains = values.at_site(blocks, site) - price[:, None] * of_site[None, :]
                better[:, site] = gains.argmax(1)
                values.put(blocks, site, better[:, site])
        return better

    def _changes(self, chosen: Choice) -> Choice:
        """Return all choices that differ at one site."""
        rows = []
        for site, settings in enumerate(self.choices):
            changed = np.tile(chosen, (len(settings), 1))
            changed[:, site] = np.arange(len(settings))
            rows.append(changed)
        return np.concatenate(rows)

    def _fits(self, found: Choice) -> NDArray[np.bool_]:
        fits = np.ones(len(found), dtype=bool)
        for room, limited in zip(self._room, self._limited, strict=True):
            fits &= _total(limited, found) <= room
        return fits

    def nearby(
        self, found: Choice, tried: Mapping[Placement, object], random: np.random.Generator, changes: int = 1
    ) -> Placement:
        """Return an untried placement that differs from one of those found at few sites.

        Args:
            found: Rows of choices.
            tried: What was tried.
            random: Random numbers.
            changes: At how many sites it may differ, to begin with.
        """
        if not len(found):
            found = np.zeros((1, len(self.sites)), dtype=np.int64)
        while True:
            for _ in range(ATTEMPTS):
                chosen = found[random.integers(len(found))].copy()
                for site in random.choice(len(self.sites), min(changes, len(self.sites)), replace=False):
                    anything = random.integers(1, len(self.choices[site]))
                    chosen[site] = anything if random.random() < 0.5 else 0  # with a block as often as without
                if self._fits(chosen[None])[0] and (placement := self.placement(chosen)) not in tried:
                    return placement
            changes += 1


class _Values:
    """The effects of a search space's choices, as arrays."""

    def __init__(
        self, sites: Sequence[str], choices: Sequence[Sequence[BlockSetting | None]], effects: Effects
    ) -> None:
        self._level, self._pairs = effects.level, effects.pairs
        self.added = [
            np.array([0.0 if setting is None else effects.added(site, setting) for setting in settings])
            for site, settings in zip(sites, choices, strict=True)
        ]
        column = {key: index for index, key in enumerate(effects.vocabulary.columns("site block"))}
        self._column = [
            np.array([-1 if setting is None else column[site, setting.block] for setting in settings])
            for site, settings in zip(sites, choices, strict=True)
        ]

    def of(self, chosen: Choice) -> Array:
        """Return the accuracy of each row of choices."""
        blocks = self.blocks(chosen)
        return np.asarray(self._level + _total(self.added, chosen) + ((blocks @ self._pairs) * blocks).sum(1) / 2)

    def at_site(self, blocks: Array, site: int) -> Array:
        """Return what each choice at a site adds, given the blocks of each row: (rows, choices)."""
        column = self._column[site]
        beside = blocks @ self._pairs[:, column.clip(0)]  # blocks of one site are no pair
        return self.added[site][None, :] + np.where(column[None, :] < 0, 0.0, beside)

    def blocks(self, chosen: Choice) -> Array:
        """Return which block stands where in each row of choices: (rows, effects of the group `site block`)."""
        blocks = np.zeros((len(chosen), len(self._pairs)))
        for site in range(len(self._column)):
            self.put(blocks, site, chosen[:, site])
        return blocks

    def put(self, blocks: Array, site: int, chosen: Choice) -> None:
        """Change which block stands at a site."""
        column = self._column[site]
        of_site = column[chosen]
        blocks[:, column[column >= 0]] = 0.0
        there = np.flatnonzero(of_site >= 0)
        blocks[there, of_site[there]] = 1.0


def _total(of_sites: Sequence[Array], chosen: Choice) -> Array:
    """Sum over sites what the choices of each row have."""
    return np.asarray(sum((of_site[chosen[:, site]] for site, of_site in enumerate(of_sites)), np.zeros(len(chosen))))


def _covered(points: Array, end: float, floor: float) -> float:
    """Return the area in a plane of cost and value that points cover above a value and up to a cost."""
    points = points[np.argsort(points[:, 0], kind="stable")]
    heights = np.maximum.accumulate(np.maximum(points[:, 1] - floor, 0.0))
    return float((heights * np.diff(np.append(points[:, 0], end))).sum())


def _gains(seen: Array, points: Array, end: float) -> Array:
    """Return by how much each point would enlarge the area that is covered in a plane of cost and value.

    Args:
        seen: Costs and values that are there already, (n, 2); cost is better small, value large.
        points: Costs and values of candidates, (m, 2).
        end: The cost up to which the area is counted. Values count from that of the cheapest one seen.
    """
    cheapest = seen[np.lexsort((-seen[:, 1], seen[:, 0]))[0], 1] if len(seen) else points[:, 1].min()
    order = np.argsort(seen[:, 0], kind="stable")
    best = np.maximum.accumulate(np.maximum(seen[order, 1], cheapest))
    rises = np.diff(best, prepend=cheapest) > 0  # the others are dominated, and there are many
    edges = np.r_[seen[order[rises], 0], end]
    heights = np.r_[cheapest, best[rises]]
    starts, ends = np.r_[-np.inf, edges[:-1]], edges
    width = np.maximum(ends[None, :] - np.maximum(starts[None, :], points[:, :1]), 0.0)
    return np.asarray((width * np.maximum(points[:, 1:] - heights[None, :], 0.0)).sum(1))
