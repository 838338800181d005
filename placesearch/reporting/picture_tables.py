"""Tables behind the pictures of a report: every placement tried, averages of effects, how the front improved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from placesearch.front import front
from placesearch.placement import BlockSetting, Placement
from placesearch.records import TrialRecord
from placesearch.reporting.tables import TRIAL_COLUMNS, accuracies, effects_frame, trials_frame
from placesearch.reporting.writing import Subject
from placesearch.search.findings import Findings

CANDIDATE_COLUMNS = {
    "trial": "int64",
    "placement": "str",
    "reference": "object",
    "on_front": "bool",
    "val_accuracy": "float64",
    "estimate": "float64",
    "estimate_low": "float64",
    "estimate_high": "float64",
    "replicates": "int64",
    **{name: TRIAL_COLUMNS[name] for name in ("macs", "macs_full", "params", "latency_predicted_ms", "epochs")},
}
"""Columns of candidates.csv and their types."""

AVERAGE_COLUMNS = {
    "of": "str",
    "value": "str",
    "block": "str",
    "effect": "float64",
    "effect_low": "float64",
    "effect_high": "float64",
}
"""Columns of effects.csv and their types."""

HISTORY_COLUMNS = {"trial": "int64", "cost": "str", "gain": "float64", "hypervolume": "float64"}
"""Columns of hypervolume.csv and their types."""

COLUMN_OF: Mapping[str, str] = {"accuracy": "val_accuracy", "latency_ms": "latency_predicted_ms"}
"""The column of an objective, where it is not called the same."""


@dataclass(frozen=True, slots=True)
class PictureTables:
    """All that the pictures of a report show.

    Args:
        candidates: Every placement that was trained, as in candidates.csv.
        effects: The effect of each setting at each site, then of the strongest pairs, as in sites.csv.
        averages: Averages of effects, as in effects.csv.
        history: How the front improved, as in hypervolume.csv.
    """

    candidates: pd.DataFrame
    effects: pd.DataFrame
    averages: pd.DataFrame
    history: pd.DataFrame

    @property
    def accuracy(self) -> "pd.Series[float]":
        """The accuracy of each candidate: what is expected of it, and without estimates what was observed."""
        return self.candidates.estimate.fillna(self.candidates.val_accuracy)

    def members(self, objectives: Sequence[str], best: int | None) -> pd.DataFrame:
        """Return the members of the front and the pick, by the first cost.

        Args:
            objectives: Names of the objectives.
            best: The trial that is the pick.
        """
        rows = self.candidates
        return rows[rows.on_front | (rows.trial == best)].sort_values([*costs_of(objectives), "trial"])

    @property
    def of_settings(self) -> dict[tuple[str, BlockSetting], tuple[float, float, float]]:
        """What each setting adds at each site by itself: the effect and the ends of its interval."""
        alone = self.effects[self.effects.with_site.isna()]
        settings = (
            BlockSetting(block, *(None if pd.isna(number) else int(number) for number in numbers))
            for block, *numbers in alone[["block", "reduction", "kernel_size"]].to_numpy()
        )
        numbers = alone[["effect", "effect_low", "effect_high"]].to_numpy(dtype=float)
        return {
            (site, setting): (effect, low, high)
            for site, setting, (effect, low, high) in zip(alone.site, settings, numbers.tolist(), strict=True)
        }


def picture_tables(subject: Subject, records: Sequence[TrialRecord], findings: Findings | None = None) -> PictureTables:
    """Return the tables behind the pictures of a study.

    Args:
        subject: What the report is about.
        records: Finished trials.
        findings: What they say.
    """
    return PictureTables(
        candidates_frame(records, subject.objectives, findings),
        effects_frame(findings, subject.cost),
        averages_frame(findings),
        history_frame(records, subject.objectives, findings),
    )


def costs_of(objectives: Sequence[str]) -> list[str]:
    """Return the columns of the objectives that are costs; those of params if there are none.

    Example:
        >>> costs_of(("accuracy", "latency_ms")), costs_of(("accuracy",))
        (['latency_predicted_ms'], ['params'])
    """
    return [COLUMN_OF.get(name, name) for name in objectives if name != "accuracy"] or ["params"]


def candidates_frame(
    records: Sequence[TrialRecord], objectives: tuple[str, ...], findings: Findings | None = None
) -> pd.DataFrame:
    """Return one row for each placement that was trained to the end, with the columns of candidates.csv.

    A placement is shown by its longest trial, and of equally long ones by the first, as on the front.

    Args:
        records: Finished trials.
        objectives: Names of the objectives.
        findings: What the trials say.
    """
    members = {member.placement: member for member in reversed(front(records, objectives, accuracies(findings)))}
    shown: dict[Placement, TrialRecord] = {}
    names: dict[Placement, str] = {}
    replicates: dict[Placement, int] = {}
    for record in records:
        if record.state != "COMPLETE":
            continue
        replicates[record.placement] = replicates.get(record.placement, 0) + 1
        if record.reference:
            names.setdefault(record.placement, record.reference)
        kept = shown.setdefault(record.placement, members.get(record.placement, record))
        if record.placement not in members and (record.epochs or 0) > (kept.epochs or 0):
            shown[record.placement] = record
    table = trials_frame(list(shown.values()))
    table["reference"] = [names.get(placement) for placement in shown]
    table["on_front"] = [placement in members for placement in shown]
    table["replicates"] = [replicates[placement] for placement in shown]
    for column, name in (("estimate", "estimate"), ("estimate_low", "low"), ("estimate_high", "high")):
        known = findings.accuracy if findings else {}
        table[column] = [getattr(known.get(placement), name, None) for placement in shown]
    return table.reindex(columns=list(CANDIDATE_COLUMNS)).astype(CANDIDATE_COLUMNS)


def averages_frame(findings: Findings | None) -> pd.DataFrame:
    """Return what each site, block, reduction and kernel size adds on average, with the columns of effects.csv.

    Args:
        findings: What the trials say; without any there are no rows.
    """
    rows = [
        (one.of, one.value, one.block, one.added.estimate, one.added.low, one.added.high)
        for one in (findings.averages if findings else ())
    ]
    return pd.DataFrame(rows, columns=list(AVERAGE_COLUMNS)).astype(AVERAGE_COLUMNS)


def history_frame(
    records: Sequence[TrialRecord], objectives: tuple[str, ...], findings: Findings | None = None
) -> pd.DataFrame:
    """Return how the front improved: one row for each complete trial and cost, with the columns of hypervolume.csv.

    After each trial the front is that of the placements tried so far, each at the accuracy that is expected of it now,
    at the end; without findings, at the one that was observed. Its hypervolume in the plane of accuracy and one cost
    is that over the accuracy of the plain network (the lowest, if that was not tried), up to the highest cost tried.
    The gain is the hypervolume by the range of that cost: how much accuracy over plain the front offers, on average
    over all limits that one may set to the cost.

    Args:
        records: Finished trials.
        objectives: Names of the objectives.
        findings: What the trials say.
    """
    complete = [record for record in records if record.state == "COMPLETE" and record.val_accuracy is not None]
    known = accuracies(findings) or {}
    accuracy = [known.get(record.placement, record.val_accuracy or 0.0) for record in complete]
    plain = [value for record, value in zip(complete, accuracy, strict=True) if not record.placement]
    rows: list[dict[str, Any]] = []
    for cost in costs_of(objectives):
        prices = [getattr(record, cost) for record in complete]
        if not complete or None in prices:
            continue
        level, low, high = plain[0] if plain else min(accuracy), min(prices), max(prices)
        steps: list[tuple[float, float]] = []
        for record, point in zip(complete, zip(prices, accuracy, strict=True), strict=True):
            steps = _with(steps, point)
            volume = hypervolume(steps, level, high)
            gain = volume / (high - low) if high > low else 0.0
            rows.append({"trial": record.trial, "cost": cost, "gain": gain, "hypervolume": volume})
    return pd.DataFrame(rows, columns=list(HISTORY_COLUMNS)).astype(HISTORY_COLUMNS)


def hypervolume(points: Sequence[tuple[float, float]], level: float, limit: float) -> float:
    """Return the area over an accuracy and below the points of a front, up to a cost.

    Args:
        points: Cost and accuracy of each, in any order.
        level: The accuracy from which on an area counts.
        limit: The cost up to which it does.

    Example:
        >>> hypervolume([(1, 0.5), (3, 1.0)], level=0.25, limit=5)  # 2 * 0.25 + 2 * 0.75
        2.0
    """
    area, best = 0.0, level
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if accuracy > best and cost < limit:
            area += (limit - cost) * (accuracy - best)
            best = accuracy
    return area


def _with(steps: list[tuple[float, float]], point: tuple[float, float]) -> list[tuple[float, float]]:
    """Add a point to the front of accuracy over one cost, and drop what it beats."""
    cost, accuracy = point
    if any(c <= cost and a >= accuracy for c, a in steps):
        return steps
    return [*((c, a) for c, a in steps if c < cost or a > accuracy), point]
