"""The additive strategy: every suggestion follows from a model of all effects, and from what is known of costs.

It asks what would add most to the front: in turns if the effects were as a draw from all that they may be, and if they
were as expected. So what is tried is what may be best, and what most likely is, and the placements that a study
recommends are among them. Where there are long trials, these go by what is expected. Now and then the least certain
member of the front is trained again, under the next seed.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from placesearch.front import non_dominated
from placesearch.placement import BlockSetting, Placement
from placesearch.search.effects import Model, Start
from placesearch.search.evidence import Array, Evidence, Score
from placesearch.search.findings import vocabulary_of
from placesearch.search.proposal import Proposer

FEWEST = 2
"""Scores from which on a model is made; before that, placements are drawn at random."""

SPARSE = 20
"""So many trials after the references are mostly brief."""

REPEATED_FROM, REPEATED_EVERY = 24, 8
"""From which trial after the references on every eighth repeats one."""

DRAWS = 24
"""Draws over which is averaged how much of the best front was reached."""

GROWTH = 1.2
"""Variances are estimated anew whenever there are so many times the scores as at the last time."""


class Suggester:
    """Suggests placements; what it suggests depends on nothing but what it is given.

    Args:
        choices: Settings by site; None, which is first, stands for no block.
        added: For each cost what each choice adds to it, by site.
        others: Placements outside of the space that may have scores, such as references.
        room: How much may be added to each limited cost.
        limited: For each limited cost what each choice adds, by site.
    """

    def __init__(
        self,
        choices: Mapping[str, Sequence[BlockSetting | None]],
        added: Sequence[Sequence[Array]],
        others: Sequence[Placement] = (),
        room: Sequence[float] = (),
        limited: Sequence[Sequence[Array]] = (),
    ) -> None:
        self._choices = {site: tuple(settings) for site, settings in choices.items()}
        self.costs = len(added)
        self._proposer = Proposer(choices, added, room, limited)
        self._evidence = Evidence(vocabulary_of(_settings(choices), others))
        self._start: Start | None = None

    def suggest(
        self,
        scores: Sequence[Score],
        tried: Mapping[Placement, Sequence[float]],
        waiting: Collection[Placement],
        position: int,
        random: np.random.Generator,
    ) -> Placement:
        """Return an untried placement, or one to repeat.

        Args:
            scores: All scores to go by, in the order of the trials; those of the last call, and more.
            tried: Every placement that was tried, also where its score is not to be used yet, and its costs.
            waiting: Placements which are not to be repeated, because their last scores are not to be used yet.
            position: Position among the trials after the references, from 0.
            random: Random numbers.
        """
        if len(scores) < FEWEST:
            return self._at_random(tried, random)
        model = self.model(scores)
        if is_repeat(position) and (least_certain := self._least_certain(model, tried, waiting)) is not None:
            return least_certain
        effects = model.expected() if position % 2 else model.draw(random)
        values = effects.of(list(tried))
        known = {p: (float(value), costs) for value, (p, costs) in zip(values, tried.items(), strict=True)}
        return self._proposer.propose(effects, known, random)

    def reached(self, scores: Sequence[Score], costs: Mapping[Placement, Sequence[float]], seed: int) -> float:
        """Return how much of the best front the recommended one is expected to reach, as a share of the area covered.

        Args:
            scores: All scores to go by, in the order of the trials; at least two.
            costs: Costs of the placements that have scores.
            seed: Seed of the draws.
        """
        model, random = self.model(scores), np.random.default_rng(seed)
        placements = list(dict.fromkeys(score.placement for score in scores))
        mean = model.means(placements)
        on_front = non_dominated([(*costs[p], -value) for p, value in zip(placements, mean, strict=True)])
        members = {p: costs[p] for p, chosen in zip(placements, on_front, strict=True) if chosen}
        draws = [self._proposer.reached(model.draw(random), members, random) for _ in range(DRAWS)]
        return float(np.mean(draws))

    def model(self, scores: Sequence[Score]) -> Model:
        """Return what the scores say; it goes on from the model of the last time that variances were estimated."""
        for score in scores[len(self._evidence) :]:
            self._evidence.add(score)
        size = last_estimate(len(scores))
        if self._start is None or size != self._start.size:
            self._start = Model(self._evidence, size).start()
        return Model(self._evidence, len(scores), start=self._start)

    def _least_certain(
        self, model: Model, costs: Mapping[Placement, Sequence[float]], waiting: Collection[Placement]
    ) -> Placement | None:
        """Return the member of the front of which least is known, of those in the space and not waiting."""
        placements = list(dict.fromkeys(score.placement for score in model.scores))
        mean = model.means(placements)
        on_front = non_dominated([(*costs[p], -value) for p, value in zip(placements, mean, strict=True)])
        members = [
            placement
            for placement, is_on_front in zip(placements, on_front, strict=True)
            if is_on_front and placement not in waiting and self._holds(placement)
        ]
        return members[int(model.estimate(members)[1].argmax())] if members else None

    def _holds(self, placement: Placement) -> bool:
        return all(setting in self._choices.get(site, ()) for site, setting in placement.items())

    def _at_random(self, tried: Mapping[Placement, object], random: np.random.Generator) -> Placement:
        return self._proposer.nearby(
            np.zeros((1, len(self._choices)), dtype=np.int64), tried, random, len(self._choices)
        )


def _settings(choices: Mapping[str, Sequence[BlockSetting | None]]) -> dict[str, list[BlockSetting]]:
    return {site: [setting for setting in of_site if setting is not None] for site, of_site in choices.items()}


def long_number(position: int) -> int | None:
    """Return which of the long trials is at a position, from 0; None if the one there is brief.

    Of the first trials every fifth is long, later every other one, the odd ones: at first much can be learned from
    brief ones, in the end what is left to learn is what they cannot tell.

    Args:
        position: Position among the trials after the references, from 0.

    Example:
        >>> [position for position in range(30) if long_number(position) is not None]
        [4, 9, 14, 19, 21, 23, 25, 27, 29]
    """
    if position < 0:
        return None
    if position < SPARSE:
        return position // 5 if position % 5 == 4 else None
    return (SPARSE // 5) + (position - SPARSE) // 2 if (position - SPARSE) % 2 else None


def is_repeat(position: int) -> bool:
    """Tell whether a placement is to be repeated at a position; where there are long trials, such a one is long.

    Args:
        position: Position among the trials after the references, from 0.

    Example:
        >>> [position for position in range(50) if is_repeat(position)]
        [31, 39, 47]
    """
    return position >= REPEATED_FROM and position % REPEATED_EVERY == REPEATED_EVERY - 1


def last_estimate(size: int) -> int:
    """Return with how many scores the variances were estimated the last time, if there are so many now.

    Example:
        >>> [last_estimate(size) for size in (2, 3, 9, 10, 11, 12)]
        [2, 3, 9, 10, 10, 12]
    """
    at = FEWEST
    while (following := max(at + 1, int(at * GROWTH))) <= size:
        at = following
    return at
