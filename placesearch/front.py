"""The Pareto front of finished trials, and which of its members to pick."""

from collections.abc import Mapping, Sequence

import numpy as np

from placesearch.placement import Placement
from placesearch.records import TrialRecord


def non_dominated(points: Sequence[Sequence[float]]) -> list[bool]:
    """Tell for each point whether no other one dominates it. Smaller is better in every coordinate.

    A point dominates another if it is nowhere larger and somewhere smaller; so equal points do not dominate
    each other. A point with a NaN is never on the front and dominates nothing.

    Args:
        points: n points of d coordinates each.

    Returns:
        n truth values.

    Example:
        >>> non_dominated([(1, 2), (2, 1), (2, 2), (1, 2)])
        [True, True, False, True]
    """
    if not points:
        return []
    array = np.asarray(points, dtype=float)
    valid, members, count = ~np.isnan(array).any(axis=1), np.empty_like(array), 0
    on_front = [False] * len(array)
    for index in np.lexsort(array.T[::-1]):  # what dominates a point comes before it
        point = array[index]
        before = members[:count]
        if valid[index] and not ((before <= point).all(axis=1) & (before < point).any(axis=1)).any():
            members[count], on_front[index] = point, True
            count += 1
    return on_front


def front(
    records: Sequence[TrialRecord], objectives: tuple[str, ...], accuracy: Mapping[Placement, float] | None = None
) -> list[TrialRecord]:
    """Return the completed trials that no other one dominates, ordered by cost, objectives first.

    Args:
        records: Finished trials; failed ones are left out.
        objectives: Names of the objectives; their directions are those of `placesearch.records.DIRECTIONS`.
        accuracy: What each placement's accuracy is taken to be, in place of the observed one. Of the trials of a
            placement only the longest counts then, and of equally long ones the first.
    """
    complete = [record for record in records if record.state == "COMPLETE"]
    if accuracy is not None:
        first: dict[Placement, TrialRecord] = {}
        for record in complete:
            kept = first.setdefault(record.placement, record)
            if (record.epochs or 0) > (kept.epochs or 0):
                first[record.placement] = record
        complete = [record for record in first.values() if record.placement in accuracy]
    chosen = non_dominated([_values(record, objectives, accuracy) for record in complete])
    members = [record for record, on_front in zip(complete, chosen, strict=True) if on_front]
    costs = tuple(name for name in objectives if name != "accuracy")
    return sorted(
        members, key=lambda record: (record.objectives(costs), record.macs or 0, record.params or 0, record.trial)
    )


def knee(
    members: Sequence[TrialRecord], objectives: tuple[str, ...], accuracy: Mapping[Placement, float] | None = None
) -> TrialRecord:
    """Pick one member of a front: the nearest to the ideal point.

    Each objective is scaled over the front to 0 (best member) .. 1 (worst member), the costs among them are averaged
    into one, and the member with the smallest Euclidean distance to (best accuracy, lowest cost) is taken;
    of equally near ones the one found first. An objective in which all members are equal does not count.

    Args:
        members: The front, at least one trial.
        objectives: Names of the objectives.
        accuracy: What each placement's accuracy is taken to be, in place of the observed one.
    """
    values = np.array([_values(record, objectives, accuracy) for record in members])
    spread = np.ptp(values, axis=0)
    scaled = np.where(spread > 0, (values - values.min(axis=0)) / np.where(spread > 0, spread, 1.0), 0.0)
    is_cost = np.array([name != "accuracy" for name in objectives])
    cost = scaled[:, is_cost].mean(axis=1) if is_cost.any() else np.zeros(len(members))
    distance = np.hypot(scaled[:, ~is_cost].sum(axis=1), cost)
    return members[
        min(range(len(members)), key=lambda index: (round(float(distance[index]), 12), members[index].trial))
    ]


def _values(
    record: TrialRecord, objectives: tuple[str, ...], accuracy: Mapping[Placement, float] | None
) -> tuple[float, ...]:
    observed = record.objectives(objectives)
    if accuracy is None:
        return observed
    names = zip(objectives, observed, strict=True)
    return tuple(-accuracy[record.placement] if name == "accuracy" else value for name, value in names)
