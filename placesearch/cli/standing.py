"""Who leads in a running study: the recommended front, and the best against plain; found rarely, for it takes time."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from placesearch.cli.course import Course
from placesearch.front import front
from placesearch.placement import Placement
from placesearch.records import StudyBegan, TrialRecord
from placesearch.search.findings import Interval, estimates

SHARE = 0.01
"""The share of the time that may go into finding out who leads."""


@dataclass(frozen=True, slots=True)
class Lead:
    """Who leads.

    Args:
        trials: After how many trials.
        members: The front, ordered by cost.
        estimates: What the accuracies are estimated to be; None while trials are too few. Then the front is that of
            observed ones.
        plain: The longest trial of the plain network; None if there is none that succeeded.
    """

    trials: int
    members: tuple[TrialRecord, ...]
    estimates: Mapping[Placement, Interval] | None
    plain: TrialRecord | None

    @property
    def best(self) -> TrialRecord | None:
        """The member of the highest accuracy; None if no trial succeeded."""
        return max(self.members, key=self.accuracy, default=None)

    def accuracy(self, record: TrialRecord) -> float:
        """Return the accuracy of a placement, estimated or observed as all others are."""
        if self.estimates is None:
            return record.val_accuracy or 0.0
        return self.estimates[record.placement].estimate


def lead_of(study: StudyBegan, records: Sequence[TrialRecord]) -> Lead:
    """Find out who leads, as the report at the end would have it.

    Args:
        study: The study.
        records: Its trials.
    """
    found = estimates(records, study.settings)
    accuracy = None if found is None else {placement: one.estimate for placement, one in found.items()}
    members = front(records, study.objectives, accuracy)
    plain = [record for record in records if record.placement == Placement() and record.state == "COMPLETE"]
    return Lead(len(records), tuple(members), found, max(plain, key=lambda record: record.epochs or 0, default=None))


class Standing:
    """Tells who leads, at most so often that it takes a hundredth of the time.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._not_before = clock, clock()
        self._lead: Lead | None = None

    def lead(self, course: Course) -> Lead | None:
        """Return who led when that was found out the last time; None in a study without objectives.

        Args:
            course: What was told so far.
        """
        study, records, now = course.study, course.records, self._clock()
        if study is None or not study.objectives:
            return None
        if now >= self._not_before and (self._lead is None or self._lead.trials != len(records)):
            self._lead = lead_of(study, records)
            ended = self._clock()
            self._not_before = ended + (ended - now) * (1 / SHARE - 1)
        return self._lead
