"""What a block does at a site, from noisy scores: a Bayesian linear model with shrinkage.

The accuracy of a placement is taken as a sum of effects: of having any block at a site, of which block it is, of its
settings, each once for all sites together and once for the site by itself; of pairs of blocks; and of the placement as
such, which is what no sum explains. Effects of one group have one variance, zero mean, and are normal. The variances
and that of the noise are those that make the scores most probable, held near usual shares by a prior, because a study
has few trials. So settings of one site share most of their effect, and what the data do not show is shrunk to nothing.

A brief score is `scale` times the effect, plus a bias that has effects by block and site of its own, plus noise; a long
score is the effect plus noise. Without brief scores beside long ones, what there is counts as long.

What the scores of one seed have in common is in all of them alike. Estimates are of the accuracy under the first seed
of a study, which nearly all scores are about: so they compare with each other, and with plain, whatever seeds share.
How far the first seed is from others is for trainings under fresh seeds to tell.

As a Gaussian process this has a covariance that counts what two placements have in common. All counts are whole
numbers, so that nothing depends on the order in which they were added up.

Source: shrinkage by variance components, Henderson 1975 (Biometrics 31, 423-447); their estimate by the evidence,
MacKay 1992 (Neural Computation 4, 415-447); a linear link between fidelities, Kennedy and O'Hagan 2000 (Biometrika 87,
1-13); draws from the posterior, Wilson et al. 2020 (arXiv:2002.09309).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from mmap import mmap

import numpy as np
from scipy.linalg import cho_factor, cho_solve, lapack, solve_triangular
from scipy.optimize import minimize

from placesearch.placement import BlockSetting, Placement
from placesearch.search.evidence import SUMS, Array, Counts, Evidence, Vocabulary, keys_of

SHARES = {
    "block": 0.10,
    "setting": 0.05,
    "site": 0.15,
    "site block": 0.25,
    "site setting": 0.08,
    "pair": 0.05,
    "placement": 0.02,
}
"""Groups of effects, and the share of the variance of the scores that each is first taken to have."""

BIAS_SHARES = {"block": 0.2, "site block": 0.1}
"""The same for the bias of brief scores."""

OTHER_SHARES = {"seed": 0.05, "noise": 0.3, "brief noise": 0.3}
"""The same for what all scores of one seed have in common, and for the noise."""

NAMES = (*SHARES, *(f"bias {group}" for group in BIAS_SHARES), *OTHER_SHARES, "scale")
"""All that is estimated before the effects: variances, and the scale of brief scores."""

SPREAD = 1.5
"""How far, as a standard deviation of its logarithm, a variance may well be from what it is first taken to be."""

SCALE_SPREAD = 0.3
"""The same for the scale, which is first taken to be 1."""

LEVEL = 100.0
"""Variance of the level around which scores lie, in variances of the scores: as good as unknown."""

OUTLIER, FEWEST_TO_JUDGE = 5.0, 5
"""Scores further than so many standard deviations below the median, by the median deviation, are raised to there.

A training that went wrong says that its placement is bad. How bad is no sum of effects, and would drown all others.
"""

ROWS = 48
"""Scores or placements that are looked at together, which bounds the memory that it takes."""

MOST_TO_FIT = 300
"""Variances are estimated from at most so many scores, spread evenly over the study."""


@dataclass(frozen=True, slots=True)
class Effects:
    """Values of all effects: a draw from what they may be, or what is expected of them.

    Args:
        sums: By group, one value an effect.
        pairs: Symmetric matrix over (site, block): what two blocks at two sites add together.
        level: The score of a placement without any effect.
    """

    vocabulary: Vocabulary
    sums: Mapping[str, Array]
    pairs: Array
    level: float

    def of(self, placements: Sequence[Placement]) -> Array:
        """Return the accuracy of placements, without what is peculiar to each."""
        return self.at(self.vocabulary.rows(placements))

    def at(self, rows: Mapping[str, Array] | Mapping[str, Counts]) -> Array:
        """Return the same for placements whose effects were counted."""
        blocks = rows["site block"]
        pairs = ((blocks @ self.pairs) * blocks).sum(1) / 2
        return self.level + sum((rows[group] @ self.sums[group] for group in SUMS), pairs)

    def added(self, site: str, setting: BlockSetting) -> float:
        """Return what a block adds at a site, pairs left out."""
        position = self.vocabulary.position_of
        of_groups = keys_of(site, setting).items()
        return float(sum(self.sums[group][position[group][key]] for group, keys in of_groups for key in keys))


@dataclass(frozen=True, slots=True)
class Start:
    """What a model leaves to those that go on from it, with the same variances and more scores.

    Args:
        size: How many scores it had.
        variances: Its variances.
        unit: The variance of its scores.
        kinds: Whether they were of several seeds, and whether some were brief beside long ones.
        factor: The triangle of its Cholesky factor, in half of the memory (LAPACK's rectangular full packed format).
    """

    size: int
    variances: Array
    unit: float
    kinds: tuple[bool, bool]
    factor: Array


class Model:
    """What scores say about all placements.

    Args:
        evidence: The scores.
        size: How many of them to go by, from the first on; None for all. At least one.
        variances: Logarithms of the variances as another model of this vocabulary found them; None to find them.
        start: What a model of the first of these scores has left; its variances are taken.

    Example:
        >>> from placesearch.search.evidence import Score
        >>> se = BlockSetting("se", 16)
        >>> one, none = Placement({"a": se}), Placement()
        >>> scores = [Score(none, 0.50), Score(one, 0.60), Score(none, 0.51), Score(one, 0.61)] * 5
        >>> mean, deviation = Model(Evidence(Vocabulary({"a": [se], "b": [se]}), scores)).estimate([none, one])
        >>> bool(0.50 < mean[0] < 0.52 and 0.59 < mean[1] < 0.61)
        True
    """

    def __init__(
        self,
        evidence: Evidence,
        size: int | None = None,
        variances: Array | None = None,
        start: Start | None = None,
    ) -> None:
        self._evidence, self.size = evidence, len(evidence) if size is None else size
        self.vocabulary, self.scores = evidence.vocabulary, evidence.scores[: self.size]
        self._rows = evidence.rows(self.size)
        y = np.array([score.accuracy for score in self.scores])
        brief = np.array([score.brief for score in self.scores])
        self._brief = brief if brief.any() and not brief.all() else np.zeros_like(brief)
        floor = np.where(self._brief, floor_of(y[self._brief]), floor_of(y[~self._brief]))
        self.outliers = y < floor
        """Which scores are so low that they were raised."""
        self._y = np.maximum(y, floor)
        seeds = np.array([score.seed for score in self.scores])
        self._many_seeds = len(set(seeds.tolist())) > 1
        self._cells = np.unique(np.stack([seeds, self._brief]), axis=1, return_inverse=True)[1].reshape(-1)
        self._of_first = self._cells == self._cells[int(np.argmin(self._brief))]
        self._center = float(self._y[~self._brief].mean())
        parts = [self._y[part] for part in (self._brief, ~self._brief) if part.sum() > 1]
        self._unit = max([float(part.var()) for part in parts], default=0.0) or 1e-8
        if start is not None:
            self._unit, variances = start.unit, start.variances
        self.variances: Array = self._most_probable() if variances is None else variances
        self._factor = self._factored(start if start is not None and start.kinds == self._kinds else None), True
        self._weights = cho_solve(self._factor, self._y - self._center, check_finite=False)

    def _values(self, variances: Array) -> dict[str, float]:
        values = dict(zip(NAMES, np.exp(variances).tolist(), strict=True))
        return values if self._many_seeds else {**values, "seed": 0.0}

    def _loads(self, values: Mapping[str, float]) -> Array:
        """How much each score holds of the effect: 1 if it is long, the scale if it is brief."""
        return np.where(self._brief, values["scale"], 1.0)

    def _noises(self, values: Mapping[str, float]) -> Array:
        return np.where(self._brief, values["brief noise"], values["noise"]).astype(float)

    def _same_seed(self, start: int, stop: int) -> Array:
        return np.asarray((self._cells[start:stop, None] == self._cells[None, :stop]) * 1.0)

    @property
    def _kinds(self) -> tuple[bool, bool]:
        """What the covariance of two scores depends on besides them."""
        return self._many_seeds, bool(self._brief.any())

    def start(self) -> Start:
        """Return what models of these and more scores may go on from."""
        return Start(self.size, self.variances, self._unit, self._kinds, lapack.dtrttf(self._factor[0], uplo="L")[0])

    def _factored(self, start: Start | None) -> Array:
        """Return the Cholesky factor of the covariance of the scores: a lower triangle; what is above is not zero.

        The covariance is made a few rows at a time, because what goes into it takes many times the memory that it has
        itself. The first rows of the factor are those of the model before, if there is one.
        """
        values, known = self._values(self.variances), 0 if start is None else start.size
        held = mmap(-1, 8 * self.size**2)  # goes back to the system with the model; the heap would keep it, in pieces
        factor = np.ndarray((self.size, self.size), buffer=held, order="F")  # in that order factored in place
        for first in range(known, self.size, ROWS):
            stop = min(first + ROWS, self.size)
            counts = self._evidence.among(first, stop)
            factor[first:stop, :stop] = self._between(values, counts, _weighed(values, counts), first, stop)
        if start is None:
            return np.asarray(cho_factor(factor, lower=True, overwrite_a=True, check_finite=False)[0])
        factor[:known, :known] = lapack.dtfttr(known, start.factor, uplo="L")[0]
        if known < self.size:
            own = factor[known:, known:]
            left = solve_triangular(factor[:known, :known], factor[known:, :known].T, lower=True, check_finite=False)
            factor[known:, :known] = left.T
            own[:] = cho_factor(own - left.T @ left, lower=True, overwrite_a=True, check_finite=False)[0]
        return factor

    def _between(
        self, values: Mapping[str, float], counts: Mapping[str, Array], worth: Array, start: int, stop: int
    ) -> Array:
        """Return the covariance of some scores with all up to the last of them: (stop - start, stop).

        Args:
            values: The variances.
            counts: What the placements have in common, by group.
            worth: The covariance of what they are worth.
            start: The first of the scores.
            stop: The one after the last.
        """
        covariance = worth.copy()
        if self._brief.any():
            loads, own, others = self._loads(values), self._brief[start:stop], self._brief[:stop]
            covariance *= np.outer(loads[start:stop], loads[:stop])
            both = np.outer(own, others)
            for group in BIAS_SHARES:
                covariance += values[f"bias {group}"] * both * counts[group]
            covariance[own[:, None] == others[None, :]] += LEVEL * self._unit
        else:
            covariance += LEVEL * self._unit
        if self._many_seeds:
            covariance += values["seed"] * self._same_seed(start, stop)
        covariance[np.arange(stop - start), np.arange(start, stop)] += (
            self._noises(values)[start:stop] + 1e-9 * self._unit
        )
        return covariance

    def _first(self, counts: Mapping[str, Array]) -> Array:
        """Return what the variances are first taken to be: shares of the variance of the scores."""
        shares = {**SHARES, **{f"bias {group}": share for group, share in BIAS_SHARES.items()}, **OTHER_SHARES}
        first = []
        for name in NAMES:
            count = counts.get(name.removeprefix("bias "))
            explained = 1.0 if count is None else float(np.diag(count).mean() - count.mean())
            first.append(0.0 if name == "scale" else np.log(shares[name] * self._unit / max(explained, 0.05)))
        return np.array(first)

    def _most_probable(self) -> Array:
        """Return the variances that make the scores most probable."""
        if self.size > MOST_TO_FIT:
            every = np.linspace(0, self.size - 1, MOST_TO_FIT).round().astype(int)
            return Model(Evidence(self.vocabulary, [self.scores[index] for index in every])).variances
        counts = self._evidence.among(0, self.size)
        first, y = self._first(counts), self._y - self._center
        spread = np.array([SCALE_SPREAD if name == "scale" else SPREAD for name in NAMES])

        def loss(variances: Array) -> tuple[float, Array]:
            values = self._values(variances)
            worth = _weighed(values, counts)
            covariance = self._between(values, counts, worth, 0, self.size)
            factor = cho_factor(covariance, lower=True, check_finite=False)
            weights = cho_solve(factor, y, check_finite=False)
            outer = cho_solve(factor, np.eye(self.size), check_finite=False) - np.outer(weights, weights)
            own, loads = np.diag(outer), self._loads(values)
            scaled = outer * np.outer(loads, loads)
            slopes = {group: float(np.vdot(scaled, count)) for group, count in counts.items()}
            slopes["noise"] = float(own[~self._brief].sum())
            slopes["seed"] = float(np.vdot(outer, self._same_seed(0, self.size))) if self._many_seeds else 0.0
            slopes["brief noise"] = float(own[self._brief].sum())
            both = outer * np.outer(self._brief, self._brief)
            slopes |= {f"bias {group}": float(np.vdot(both, counts[group])) for group in BIAS_SHARES}
            slopes = {name: values[name] * slope for name, slope in slopes.items()}
            moved = np.where(self._brief, values["scale"], 0.0)
            slopes["scale"] = float(np.vdot(outer * np.outer(moved, loads), worth)) * 2
            away = (variances - first) / spread
            value = 0.5 * float(y @ weights) + float(np.log(np.diag(factor[0])).sum()) + 0.5 * float(away @ away)
            return value, 0.5 * np.array([slopes[name] for name in NAMES]) + away / spread

        bounds = [(value - 8, value + 8) for value in first]
        found = minimize(loss, first, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 40})
        return np.asarray(found.x)

    @property
    def noise(self) -> float:
        """Standard deviation of a score (a long one, where there are both) around what the placement is worth."""
        return float(np.sqrt(self._values(self.variances)["noise"]))

    @property
    def lack_of_fit(self) -> float:
        """Share of the variance between placements that is no sum over sites, but of pairs or peculiar to each."""
        values = self._values(self.variances)
        placements, explained = [score.placement for score in self.scores], dict.fromkeys(SHARES, 0.0)
        for start in range(0, self.size, ROWS):
            some = placements[start : start + ROWS]
            for group, count in self._evidence.common(some, self.vocabulary.rows(some), self.size).items():
                apart = count.diagonal(start).sum() / self.size - count.sum() / self.size**2
                explained[group] += values[group] * float(apart)
        total = sum(explained.values())
        return (explained["pair"] + explained["placement"]) / total if total > 0 else 0.0

    def estimate(self, placements: Sequence[Placement]) -> tuple[Array, Array]:
        """Return what the (long) accuracy of each placement under the first seed is expected to be, and how surely.

        Args:
            placements: The placements, n of them.

        Returns:
            Means and standard deviations, both (n,).
        """
        parts = [self._estimate(placements[start : start + ROWS]) for start in range(0, len(placements), ROWS)]
        means, deviations = zip(*parts, strict=True) if parts else ((np.zeros(0),), (np.zeros(0),))
        return np.concatenate(means), np.concatenate(deviations)

    def means(self, placements: Sequence[Placement]) -> Array:
        """Return the means alone, (n,), which takes a fraction of the time."""
        starts = range(0, len(placements), ROWS)
        some = [placements[start : start + ROWS] for start in starts]
        parts = [self._cross(these, self.vocabulary.rows(these)) @ self._weights for these in some]
        return self._center + np.concatenate([np.zeros(0), *parts])

    def _estimate(self, placements: Sequence[Placement]) -> tuple[Array, Array]:
        values, rows = self._values(self.variances), self.vocabulary.rows(placements)
        blocks = rows["site block"].sum(1)
        own = {**_squares(rows), "pair": (blocks * blocks - blocks) / 2, "placement": np.ones(len(blocks))}
        prior = sum(values[group] * own[group] for group in SHARES) + values["seed"]
        mean, deviation = self._given(self._cross(placements, rows), prior + LEVEL * self._unit)
        return self._center + mean, deviation

    def _cross(self, placements: Sequence[Placement], rows: Mapping[str, Array]) -> Array:
        """Return the covariance of the accuracy of placements with the scores: (placements, scores)."""
        values, counts = self._values(self.variances), self._evidence.common(placements, rows, self.size)
        cross = _weighed(values, counts) * self._loads(values) + values["seed"] * self._of_first
        return np.asarray(cross + LEVEL * self._unit * ~self._brief)

    def added(self, placements: Sequence[Placement], weights: Array | None = None) -> tuple[Array, Array]:
        """Return what the blocks of each placement add by themselves, without pairs, and its standard deviation.

        Args:
            placements: The placements.
            weights: A matrix (sums, placements): return these weighted sums over the placements in their place.
        """
        values = self._values(self.variances)
        rows = self.vocabulary.rows(placements)
        if weights is not None:  # what a sum adds has weighted counts of the same effects
            rows = {group: weights @ counts for group, counts in rows.items()}
        cross = sum(values[group] * (rows[group] @ self._rows[group].T) for group in SUMS) * self._loads(values)
        prior = sum((values[group] * own for group, own in _squares(rows).items()), np.zeros(len(cross)))
        return self._given(cross, prior)

    def interactions(self) -> tuple[Array, Array]:
        """Return what each two blocks at two sites add together, (effects, effects), and its standard deviation.

        Rows and columns are those of the group `site block`; where two are of one site, both matrices are zero.
        """
        value, sites = self._values(self.variances)["pair"], self.vocabulary.site_of
        blocks, loads = self._rows["site block"], self._loads(self._values(self.variances))
        first, second = np.triu_indices(len(sites), 1)
        apart = sites[first] != sites[second]
        first, second = first[apart], second[apart]
        cross = value * (blocks[:, first] * blocks[:, second]).T * loads
        both = self._given(cross, np.full(len(first), value))
        matrices = []
        for values in both:
            matrix = np.zeros((len(sites), len(sites)))
            matrix[first, second] = matrix[second, first] = values
            matrices.append(matrix)
        return matrices[0], matrices[1]

    def _given(self, cross: Array, prior: Array) -> tuple[Array, Array]:
        """Return mean and standard deviation, given the scores, of what has these covariances with them."""
        half = solve_triangular(self._factor[0], cross.T, lower=True, check_finite=False)
        return cross @ self._weights, np.sqrt(np.maximum(prior - (half**2).sum(0), 0.0))

    def expected(self) -> Effects:
        """Return what is expected of every effect."""
        return self._effects(self._weights, None, 0.0)

    def draw(self, random: np.random.Generator) -> Effects:
        """Draw all effects from what they may be, given the scores."""
        values, sites = self._values(self.variances), self.vocabulary.site_of
        sums = {g: np.sqrt(values[g]) * random.standard_normal(self._rows[g].shape[1]) for g in SUMS}
        drawn = np.triu(np.sqrt(values["pair"]) * random.standard_normal((len(sites), len(sites))), 1)
        prior = Effects(self.vocabulary, sums, (drawn + drawn.T) * (sites[:, None] != sites[None, :]), 0.0)
        level = float(np.sqrt(LEVEL * self._unit)) * random.standard_normal(2)
        peculiar = np.sqrt(values["placement"]) * random.standard_normal(self.size)[self._evidence.numbers(self.size)]
        seen = self._loads(values) * (prior.at(self._rows) + peculiar) + np.where(self._brief, level[1], level[0])
        first = 0.0
        if self._many_seeds:
            of_seed = np.sqrt(values["seed"]) * random.standard_normal(self.size)
            seen += of_seed[self._cells]
            first = float(of_seed[self._cells[self._of_first][0]])
        if self._brief.any():
            for group in BIAS_SHARES:
                bias = np.sqrt(values[f"bias {group}"]) * random.standard_normal(self._rows[group].shape[1])
                seen += self._brief * (self._rows[group] @ bias)
        seen += np.sqrt(self._noises(values)) * random.standard_normal(self.size)
        weights = cho_solve(self._factor, self._y - self._center - seen, check_finite=False)
        return self._effects(weights, prior, float(level[0]) + first)

    def _effects(self, weights: Array, prior: Effects | None, level: float) -> Effects:
        """Return effects from a draw of the prior, or none, and the weights of the scores that correct it."""
        values, sites = self._values(self.variances), self.vocabulary.site_of
        loaded = weights * self._loads(values)
        sums = {group: values[group] * (loaded @ self._rows[group]) for group in SUMS}
        blocks = self._rows["site block"]
        pairs = values["pair"] * ((blocks * loaded[:, None]).T @ blocks) * (sites[:, None] != sites[None, :])
        level += self._center + LEVEL * self._unit * float(weights[~self._brief].sum())
        level += values["seed"] * float(weights[self._of_first].sum())
        if prior is not None:
            sums = {group: prior.sums[group] + corrected for group, corrected in sums.items()}
            pairs = prior.pairs + pairs
        return Effects(self.vocabulary, sums, pairs, level)


def _weighed(values: Mapping[str, float], counts: Mapping[str, Array]) -> Array:
    """Return the covariance of what placements are worth, from what they have in common, by group."""
    return np.asarray(sum(values[group] * count for group, count in counts.items()))


def _squares(rows: Mapping[str, Array]) -> dict[str, Array]:
    return {group: (rows[group] ** 2).sum(1) for group in SUMS}


def floor_of(scores: Array) -> float:
    """Return below which value scores of one fidelity are outliers; minus infinity if they are too few to tell.

    Example:
        >>> round(floor_of(np.array([0.24, 0.95, 0.96, 0.97, 0.98])), 3)
        0.886
    """
    if len(scores) < FEWEST_TO_JUDGE:
        return -np.inf
    middle = float(np.median(scores))
    deviation = 1.4826 * float(np.median(abs(scores - middle)))  # that of normal ones
    return middle - OUTLIER * deviation if deviation > 0 else -np.inf
