"""Paired comparisons of two networks over training seeds and test images, and what to make of many of them.

What a difference of two test accuracies depends on, besides the networks: the seeds, because another training gives
another network, and the images, because another sample of the same kind has other easy and difficult ones for each.
Both are crossed: every seed is seen on every image. The difference d of correctness (1, 0, -1) of seed s on image i is

    d[s, i] = mean + seed[s] + image[i] + rest[s, i]

with all three random. A t test over the seed means alone takes the test images as all there are; a test over images
alone (McNemar's) takes the trainings as all there are. This is the two-way model of several readers of the same cases
(here seeds and images), with the standard error of the mean and the degrees of freedom that are usual there.
One variance for all networks of a study would find smaller differences, but claims too many where they differ in noise,
or each has difficult images of its own. How often each of these is wrong: `reports/benchmarks/verdict.md`.

Sources: Obuchowski & Rockette 1995, Commun. Stat. Simul. 24:285; Hillis 2007, Stat. Med. 26:596 (degrees of freedom);
Holm 1979, Scand. J. Stat. 6:65; Guilbaud 2008, Biom. J. 50:678 (intervals that go with it).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

LEVEL = 0.05
"""The probability of one wrong claim or more among all comparisons of a study, at most."""

POWER = 0.8
"""The probability with which a difference of the size called detectable is shown."""


@dataclass(frozen=True, slots=True)
class Paired:
    """A mean difference and how well it is known.

    Args:
        difference: The mean, over seeds and images.
        error: Its standard error; 0.0 if all differences are the same.
        freedom: Degrees of freedom of the error.
    """

    difference: float
    error: float
    freedom: float

    @property
    def p_value(self) -> float | None:
        """Probability of so large a difference, in either direction, between equals; None if nothing can be tested.

        Equal differences under every seed give no measure of chance: unless they are zero, nothing can be tested.
        """
        if self.error == 0:
            return 1.0 if self.difference == 0 else None
        return float(2 * stats.t.sf(abs(self.difference) / self.error, self.freedom))

    def interval(self, level: float) -> tuple[float, float]:
        """Return where the true difference is, but for a probability of `level`."""
        reach = self.error * float(stats.t.isf(level / 2, self.freedom))
        return self.difference - reach, self.difference + reach

    def detectable(self, level: float) -> float:
        """Return the true difference that a test of this level would show with a probability of `POWER`.

        From the noncentral t distribution, with the standard error taken as known.
        """
        bound = float(stats.t.isf(level / 2, self.freedom))

        def missing(effect: float) -> float:
            return float(stats.nct.sf(bound, self.freedom, effect)) - POWER

        return self.error * float(optimize.brentq(missing, 0.0, 3 * bound + 10))


def paired(differences: NDArray[np.float64]) -> Paired:
    """Return the mean of differences and how well it is known.

    With S seeds and N images the variance of the mean is estimated by

        max(V_seed, V_rest) + max(V_image - V_rest, 0)

    where V_seed is the variance of the seed means by S, V_image that of the image means by N, and V_rest that of what
    neither explains by S * N. The first term has S - 1 degrees of freedom, the second N - 1; those of the sum are
    Satterthwaite's. V_seed cannot be below V_rest in truth; the bound holds where few seeds agree by chance.
    With one number a seed it is the paired t test.

    Args:
        differences: One row a seed, at least two; one column an image, or one number a seed.

    Example:
        >>> paired(np.array([[0.01], [0.03], [0.02]])).difference
        0.02
    """
    seeds, images = differences.shape
    of_seeds, of_images = differences.mean(1), differences.mean(0)
    mean = float(differences.mean())
    if np.ptp(differences) == 0:
        return Paired(mean, 0.0, seeds - 1)
    by_seed = float(of_seeds.var(ddof=1)) / seeds
    by_image = 0.0
    if images > 1:
        rest = differences - of_seeds[:, None] - of_images + mean
        by_rest = float((rest**2).sum()) / ((seeds - 1) * (images - 1) * seeds * images)
        by_seed, by_image = max(by_seed, by_rest), max(float(of_images.var(ddof=1)) / images - by_rest, 0.0)
    variance = by_seed + by_image
    freedom = variance**2 / (by_seed**2 / (seeds - 1) + by_image**2 / max(images - 1, 1))
    return Paired(mean, variance**0.5, freedom)


def holm(p_values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Correct for the number of comparisons, so that any wrong claim among them has a probability of at most `LEVEL`.

    Args:
        p_values: One for each comparison.

    Returns:
        The corrected p-values, and for each comparison the level at which its interval leaves zero out exactly if the
        corrected p-value is at most `LEVEL`.

    Example:
        >>> holm([0.04, 0.01, 0.02])
        ([0.04, 0.03, 0.04], [0.05, 0.016666666666666666, 0.025])
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, levels = [0.0] * len(p_values), [0.0] * len(p_values)
    worst, level, claims = 0.0, LEVEL, True
    for rank, index in enumerate(order):
        left = len(order) - rank
        worst = max(worst, min(1.0, left * p_values[index]))
        if claims:
            level, claims = LEVEL / left, worst <= LEVEL
        corrected[index], levels[index] = worst, level
    return corrected, levels
