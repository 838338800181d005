"""When a training is hopeless: its candidate will not reach the front, whatever happens until the end.

Costs are known, so a candidate has to beat every candidate that costs no more. What its accuracy at a milestone
foretells of its accuracy in the end, earlier trainings of the same length tell: a straight line through their
accuracies at both, and how far they are from it. That distance is the noise, and holds also what the milestone
cannot know. A training is stopped where even a lucky end would leave it below the best candidate that costs no more,
were that one only lucky. Where the line tells nothing, nothing is stopped.

Source: the limit of a prediction from a fitted line, solved for where it begins, Fieller 1954 (J. R. Statist. Soc. B
16, 175-185).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from placesearch.records import Milestone

SHARE = 0.8
"""The milestone is after this share of the epochs, rounded: when the learning rate is high, accuracies jump."""

FEWEST = 10
"""So many trials of the same length have to have ended before one is stopped."""

DOUBT = 0.01
"""Probability of stopping a candidate that is as good as the best one that costs no more, if the line holds."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A training that was not stopped.

    Args:
        costs: Costs of its candidate.
        on_the_way: Accuracy at the milestone.
        accuracy: Accuracy in the end.
    """

    costs: tuple[float, ...]
    on_the_way: float
    accuracy: float


def milestone_epoch(epochs: int) -> int | None:
    """Return after which epoch trainings are looked at; None if they are too short to be stopped.

    Example:
        >>> [milestone_epoch(epochs) for epochs in (1, 2, 5, 20)]
        [None, 1, 4, 16]
    """
    return min(round(SHARE * epochs), epochs - 1) or None


def milestone(epoch: int, costs: Sequence[float], ended: Sequence[Ended]) -> Milestone:
    """Return where a training is looked at, and below which accuracy it is stopped.

    Args:
        epoch: After which epoch it is looked at.
        costs: Costs of its candidate.
        ended: Earlier trainings of the same length.
    """
    rivals = [other.accuracy for other in ended if all(a <= b for a, b in zip(other.costs, costs, strict=True))]
    if len(ended) < FEWEST or not rivals:
        return Milestone(epoch)
    x, y = np.array([other.on_the_way for other in ended]), np.array([other.accuracy for other in ended])
    spread = float(((x - x.mean()) ** 2).sum())
    if spread == 0:
        return Milestone(epoch)
    slope = float(((x - x.mean()) * y).sum()) / spread
    rest = y - y.mean() - slope * (x - x.mean())
    free = len(ended) - 2
    reach = float(student.ppf(1 - DOUBT, free)) ** 2 * float(rest @ rest) / free
    steep = slope**2 - reach / spread
    if slope <= 0 or steep <= 0:
        return Milestone(epoch)
    # The upper limit of what is to be expected at x.mean() + u is y.mean() + slope * u + sqrt(reach * (2 + 1 / n + u**2
    # / spread)), where 2 stands for the noise of this training and that of its rival. It is the rival's accuracy at:
    above, others = max(rivals) - float(y.mean()), 2 + 1 / len(ended)
    root = float(np.sqrt(reach / spread * above**2 + steep * reach * others))
    floor = float(x.mean()) + (above * slope - root) / steep
    return Milestone(epoch, max(floor, 0.0), float(y.mean()) - slope * float(x.mean()), slope)
