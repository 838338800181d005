"""Scores of placements, and what the placements have in common: counts of shared effects, group by group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placesearch.placement import BlockSetting, Placement

Array = NDArray[np.float64]
Counts = NDArray[np.float32]

SUMS = ("block", "setting", "site", "site block", "site setting")
"""Groups of effects that are sums over sites."""

GROUPS = (*SUMS, "pair", "placement")
"""All groups of effects."""


@dataclass(frozen=True, slots=True)
class Score:
    """One observed score.

    Args:
        placement: What was evaluated.
        accuracy: What came out, up is better.
        seed: Under which seed.
        brief: Whether it is a brief score beside long ones.
    """

    placement: Placement
    accuracy: float
    seed: int = 0
    brief: bool = False


class Vocabulary:
    """Columns of a linear model: every effect that a study may meet, in a fixed order.

    Args:
        choices: Settings by site.

    Attributes:
        position_of: By group the position of each effect.
        site_of: The site of each effect of the group `site block`, as a position in `choices`.
    """

    def __init__(self, choices: Mapping[str, Sequence[BlockSetting]]) -> None:
        self.choices = {site: tuple(settings) for site, settings in choices.items()}
        self.position_of: dict[str, dict[tuple[object, ...], int]] = {group: {} for group in SUMS}
        self._known: dict[Placement, NDArray[np.int16]] = {}
        for site, settings in self.choices.items():
            for setting in settings:
                for group, keys in keys_of(site, setting).items():
                    of_group = self.position_of[group]
                    for key in keys:
                        of_group.setdefault(key, len(of_group))
        ends = np.cumsum([0, *(len(of_group) for of_group in self.position_of.values())]).tolist()
        self._part = {group: slice(*ends[index : index + 2]) for index, group in enumerate(SUMS)}
        self.site_of = np.array([list(self.choices).index(str(key[0])) for key in self.position_of["site block"]])

    def columns(self, group: str) -> list[tuple[object, ...]]:
        """Return the effects of a group, in order."""
        return list(self.position_of[group])

    def rows(self, placements: Sequence[Placement]) -> dict[str, Array]:
        """Count the effects in placements: one matrix (placements, effects) for each group."""
        known = [self._row(placement) for placement in placements]
        counts = np.array(known, dtype=np.float64).reshape(len(known), self._part[SUMS[-1]].stop)
        return {group: counts[:, part] for group, part in self._part.items()}

    def _row(self, placement: Placement) -> NDArray[np.int16]:
        """Return the counts of all groups, one after the other; kept, and small because a study has many."""
        if placement not in self._known:
            row = np.zeros(self._part[SUMS[-1]].stop, dtype=np.int16)
            for site, setting in placement.items():
                for group, keys in keys_of(site, setting).items():
                    for key in keys:
                        row[self._part[group]][self.position_of[group][key]] += 1
            self._known[placement] = row
        return self._known[placement]


def keys_of(site: str, setting: BlockSetting) -> dict[str, list[tuple[object, ...]]]:
    """Name the effects that a block has at a site, by group."""
    block = setting.block
    given = [("r", setting.reduction), ("k", setting.kernel_size)]
    settings: list[tuple[object, ...]] = [(block, name, value) for name, value in given if value is not None]
    return {
        "block": [(block,)],
        "setting": settings,
        "site": [(site,)],
        "site block": [(site, block)],
        "site setting": [(site, *key) for key in settings],
    }


class Evidence:
    """Scores as they come in, with what their placements have in common.

    Args:
        vocabulary: The effects.
        scores: What was observed, in the order of the trials.
    """

    def __init__(self, vocabulary: Vocabulary, scores: Sequence[Score] = ()) -> None:
        self.vocabulary = vocabulary
        self.scores: list[Score] = []
        self._number_of: dict[Placement, int] = {}
        self._numbers = np.zeros(8, dtype=np.int64)
        self._rows = {group: np.zeros((8, len(vocabulary.columns(group))), np.float32) for group in SUMS}
        for score in scores:
            self.add(score)

    def __len__(self) -> int:
        return len(self.scores)

    def add(self, score: Score) -> None:
        """Add one more score."""
        at = len(self.scores)
        if at == len(self._numbers):
            self._numbers = np.pad(self._numbers, (0, at))
            self._rows = {group: np.pad(rows, ((0, at), (0, 0))) for group, rows in self._rows.items()}
        for group, row in self.vocabulary.rows([score.placement]).items():
            self._rows[group][at] = row
        self.scores.append(score)
        self._numbers[at] = self._number_of.setdefault(score.placement, len(self._number_of))

    def rows(self, size: int) -> dict[str, Counts]:
        """Return the effects in the first scores' placements: one matrix (size, effects) for each group of sums."""
        return {group: of_group[:size] for group, of_group in self._rows.items()}

    def numbers(self, size: int) -> NDArray[np.int64]:
        """Return a number for each of the first scores, equal for equal placements."""
        return self._numbers[:size]

    def among(self, start: int, stop: int) -> dict[str, Array]:
        """Count what some scores have in common with all up to the last of them: (stop - start, stop) by group."""
        rows = {group: of_group[start:stop] for group, of_group in self._rows.items()}
        return self._common(rows, self._numbers[start:stop], stop)

    def common(self, placements: Sequence[Placement], rows: Mapping[str, Array], size: int) -> dict[str, Array]:
        """Count what placements have in common with those of the first scores: matrices (placements, size) by group."""
        return self._common(rows, np.array([self._number_of.get(placement, -1) for placement in placements]), size)

    def _common(self, rows: Mapping[str, NDArray[Any]], numbers: NDArray[np.int64], size: int) -> dict[str, Array]:
        counts: dict[str, Array] = {}
        for group in SUMS:  # whole numbers, which are exact in half of the bytes and take half of the time
            count = rows[group].astype(np.float32, copy=False) @ self._rows[group][:size].T
            counts[group] = count.astype(np.float64)
        blocks = counts["site block"]
        same = (numbers[:, None] == self._numbers[:size]) * 1.0
        return {**counts, "pair": (blocks * blocks - blocks) / 2, "placement": same}
