"""What the trials of a study say, with intervals: of each placement, of each setting at each site, of pairs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from placesearch.placement import BlockSetting, Placement
from placesearch.records import TrialRecord
from placesearch.search.effects import Model
from placesearch.search.evidence import Array, Evidence, Score, Vocabulary
from placesearch.search.threads import ONE_BLAS_THREAD

FEWEST = 4
"""Scores below which nothing is said."""

REACH = 1.6449
"""Half the width of a 90 % interval in standard deviations."""

PAIRS = 10
"""So many pairs of blocks are told, those that differ from zero by the most standard deviations."""


@dataclass(frozen=True, slots=True)
class Interval:
    """What a quantity is expected to be, and where it is with a probability of 90 %.

    Args:
        estimate: The expectation.
        low: Lower end.
        high: Upper end.
    """

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Effect:
    """What a block adds to the accuracy; with another one, what both add beyond the sum of what they add alone.

    Args:
        site: Where it is.
        setting: Which it is; of a pair only the block.
        tried: In how many trials.
        added: The accuracy.
        with_site: Where the other one is.
        with_block: Which.
    """

    site: str
    setting: BlockSetting
    tried: int
    added: Interval
    with_site: str | None = None
    with_block: str | None = None


@dataclass(frozen=True, slots=True)
class Average:
    """What a choice adds to the accuracy on average, every other choice made in all ways.

    Args:
        of: `site` or `block`: what any block there, or this block anywhere, adds. `reduction` or `kernel_size`: what
            this value adds beyond the mean of all values that the same block can have at the same site.
        value: The name of the site, or the number; empty for a block.
        block: The block; empty for a site.
        added: The accuracy.
    """

    of: str
    value: str
    block: str
    added: Interval


@dataclass(frozen=True, slots=True)
class Findings:
    """What the trials of a study say.

    Args:
        accuracy: Of each placement that was trained, under the first seed, whatever was observed of it.
        effects: Of each setting at each site, those of one site together; then the strongest pairs.
        epochs: The training of which the accuracies speak, where there are several: the longest.
        noise: Standard deviation of one score around what it estimates.
        lack_of_fit: Share of the variance between placements that is no sum over sites.
        averages: Of sites, blocks and settings.
    """

    accuracy: Mapping[Placement, Interval]
    effects: tuple[Effect, ...]
    epochs: int | None
    noise: float
    lack_of_fit: float
    averages: tuple[Average, ...] = ()


def find(records: Sequence[TrialRecord], settings: Mapping[str, Sequence[BlockSetting]]) -> Findings | None:
    """Return what trials say; None if they are too few or all the same.

    Args:
        records: Finished trials; those that failed are not looked at.
        settings: By site, the settings of which effects are wanted, tried or not.
    """
    with ONE_BLAS_THREAD:
        fitted = _fitted(records, settings)
        return None if fitted is None else _find(*fitted)


def _find(model: Model, vocabulary: Vocabulary, longest: int | None) -> Findings:
    scores, accuracy = model.scores, _accuracies(model)
    alone = [(site, setting) for site, of_site in vocabulary.choices.items() for setting in of_site]
    added = _intervals(*model.added([Placement({site: setting}) for site, setting in alone]))
    tried = Counter(item for score in scores for item in score.placement.items())
    effects = [
        Effect(site, setting, tried[site, setting], interval)
        for (site, setting), interval in zip(alone, added, strict=True)
    ]
    averages = _averages(model, alone)
    return Findings(accuracy, (*effects, *_pairs(model, scores)), longest, model.noise, model.lack_of_fit, averages)


def estimates(
    records: Sequence[TrialRecord], settings: Mapping[str, Sequence[BlockSetting]]
) -> dict[Placement, Interval] | None:
    """Return of each placement that was trained what its accuracy is, as `find` has it, which takes twice the time.

    Args:
        records: Finished trials.
        settings: By site, the settings of the study.
    """
    with ONE_BLAS_THREAD:
        fitted = _fitted(records, settings)
        return None if fitted is None else _accuracies(fitted[0])


def _fitted(
    records: Sequence[TrialRecord], settings: Mapping[str, Sequence[BlockSetting]]
) -> tuple[Model, Vocabulary, int | None] | None:
    """Return the model of the scores, its effects, and the epochs of the longest; None without enough scores."""
    scores, longest = scores_of(records)
    if len(scores) < FEWEST or len({score.accuracy for score in scores}) < 2:
        return None
    vocabulary = vocabulary_of(settings, [score.placement for score in scores])
    return Model(Evidence(vocabulary, scores)), vocabulary, longest


def _accuracies(model: Model) -> dict[Placement, Interval]:
    """Return the estimated accuracy of each placement that has a score."""
    placements = list(dict.fromkeys(score.placement for score in model.scores))
    mean, deviation = model.estimate(placements)
    scores_of_it: dict[Placement, list[tuple[Score, bool]]] = {placement: [] for placement in placements}
    for score, raised in zip(model.scores, model.outliers.tolist(), strict=True):
        scores_of_it[score.placement].append((score, raised))
    for index, own in enumerate(scores_of_it.values()):
        if all(raised for _, raised in own):  # no sum of effects explains it; what was observed is the best guess
            mean[index], deviation[index] = np.mean([score.accuracy for score, _ in own]), model.noise
    return {
        placement: Interval(*(min(max(value, 0.0), 1.0) for value in (found.estimate, found.low, found.high)))
        for placement, found in zip(placements, _intervals(mean, deviation), strict=True)
    }


def scores_of(records: Sequence[TrialRecord]) -> tuple[list[Score], int | None]:
    """Return the scores of trials, of one that was stopped early its forecast, and the epochs of the longest."""
    complete = [record for record in records if record.state == "COMPLETE" and record.val_accuracy is not None]
    longest = max((record.epochs for record in complete if record.epochs is not None), default=None)
    scores = [
        Score(record.placement, accuracy, record.seed or 0, record.epochs != longest)
        for record in records
        for accuracy in [record.val_accuracy if record.state == "COMPLETE" else record.forecast]
        if accuracy is not None
    ]
    return scores, longest


def vocabulary_of(settings: Mapping[str, Sequence[BlockSetting]], others: Sequence[Placement] = ()) -> Vocabulary:
    """Return the effects of settings by site, and of what other placements have besides."""
    every = {site: dict.fromkeys(of_site) for site, of_site in settings.items()}
    for placement in others:
        for site, setting in placement.items():
            every.setdefault(site, {})[setting] = None
    return Vocabulary({site: list(of_site) for site, of_site in every.items()})


def _averages(model: Model, alone: Sequence[tuple[str, BlockSetting]]) -> tuple[Average, ...]:
    """Average the effects of settings at sites, each given by its place in a list of all of them."""
    sums: dict[tuple[str, str, str], list[Array]] = {}
    of_block: dict[tuple[str, str], list[int]] = {}
    of_cell: dict[tuple[str, str, str, int | None], list[int]] = {}  # what differs in one kind of setting alone
    for index, (site, setting) in enumerate(alone):
        of_block.setdefault((site, setting.block), []).append(index)
        of_cell.setdefault((site, setting.block, "reduction", setting.kernel_size), []).append(index)
        of_cell.setdefault((site, setting.block, "kernel_size", setting.reduction), []).append(index)
    one = np.eye(len(alone))
    for (site, block), members in of_block.items():
        sums.setdefault(("site", site, ""), []).append(one[members].mean(0))
        sums.setdefault(("block", "", block), []).append(one[members].mean(0))
    for (_, block, of, _), members in of_cell.items():
        for index in members if len(members) > 1 else ():
            beyond = one[index] - one[members].mean(0)
            sums.setdefault((of, str(getattr(alone[index][1], of)), block), []).append(beyond)
    weights = np.array([np.mean(weights, axis=0) for weights in sums.values()])
    found = _intervals(*model.added([Placement({site: setting}) for site, setting in alone], weights))
    return tuple(Average(*names, interval) for names, interval in zip(sums, found, strict=True))


def _pairs(model: Model, scores: Sequence[Score]) -> list[Effect]:
    means, deviations = model.interactions()
    names = model.vocabulary.columns("site block")
    sure = np.triu(np.divide(abs(means), deviations, out=np.zeros_like(means), where=deviations > 0), 1)
    effects = []
    for index in np.argsort(-sure, axis=None, kind="stable")[:PAIRS]:
        first, second = np.unravel_index(index, sure.shape)
        if sure[first, second] == 0:
            break
        (site, block), (other, with_block) = (tuple(map(str, names[at])) for at in (first, second))
        tried = sum(_has(score.placement, site, block) and _has(score.placement, other, with_block) for score in scores)
        interval = _intervals(means[first, second, None], deviations[first, second, None])[0]
        effects.append(Effect(site, BlockSetting(block), tried, interval, other, with_block))
    return effects


def _has(placement: Placement, site: str, block: str) -> bool:
    return site in placement and placement[site].block == block


def _intervals(means: np.ndarray, deviations: np.ndarray) -> list[Interval]:
    return [
        Interval(float(mean), float(mean - REACH * deviation), float(mean + REACH * deviation))
        for mean, deviation in zip(means, deviations, strict=True)
    ]
