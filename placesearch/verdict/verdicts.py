"""From the trainings of a confirmation to verdicts: which placement is better than which reference."""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from placesearch.placement import Placement
from placesearch.verdict.paired import LEVEL, Paired, holm, paired
from placesearch.verdict.trainings import Training

PLAIN, BIGGER = "plain", "bigger-plain"
REFERENCES = (PLAIN, "se-everywhere", "cbam-everywhere", BIGGER)
"""What placements are compared with."""

BETTER, WORSE, NOT_SHOWN = "better", "worse", "no difference shown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What was trained, under one start.

    Args:
        placement: Which block is where.
        backbone: In which backbone.
        start: What trainings started from.
    """

    placement: Placement
    backbone: str
    start: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What fresh trainings say about a placement against a reference. All accuracies are shares of the test split.

    Args:
        placement: The placement.
        reference: Which reference it is itself, if it is one.
        against: The reference, by name.
        against_placement: Its placement.
        start: What trainings started from.
        seeds: Seeds under which both were trained.
        failed: Seeds under which one of both failed.
        difference: Accuracy of the placement less that of the reference, mean over seeds; None without a seed.
        low: Lower end of the interval of `difference`; None with fewer than two seeds.
        high: Upper end.
        error: Standard error of the difference.
        p_single: p-value of this comparison alone; None if nothing could be tested.
        p_value: The same, corrected for all comparisons of the study.
        verdict: `better`, `worse` or `no difference shown`.
        detectable: The smallest true difference that so many seeds would probably have shown.
    """

    placement: Placement
    reference: str | None = None
    against: str
    against_placement: Placement
    start: str
    seeds: int = 0
    failed: int = 0
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    error: float | None = None
    p_single: float | None = None
    p_value: float | None = None
    verdict: str = NOT_SHOWN
    detectable: float | None = None


@dataclass(frozen=True, slots=True)
class Confirmed:
    """What a confirmation says.

    Args:
        epochs: The trainings of which it speaks: the longest that there are.
        networks: Their trainings, by network, references first.
        verdicts: Every placement with blocks against every reference, each pair once.
        comparisons: Number of those that could be tested.
        bigger: The bigger plain network and its number of parameters; None if there is none.
    """

    epochs: int
    networks: dict[Network, tuple[Training, ...]]
    verdicts: tuple[Verdict, ...]
    comparisons: int
    bigger: tuple[str, int] | None

    @property
    def placements(self) -> set[Placement]:
        """All placements that were trained."""
        return {network.placement for network in self.networks}

    @property
    def better_than_plain(self) -> set[Placement]:
        """Placements that beat plain from at least one start, and lose to it from none."""
        against = [one for one in self.verdicts if one.against == PLAIN]
        losers = {one.placement for one in against if one.verdict == WORSE}
        return {one.placement for one in against if one.verdict == BETTER} - losers


def judge(trainings: Sequence[Training]) -> Confirmed | None:
    """Compare every placement that has blocks with every reference under the seeds that both have, each pair once.

    Comparisons are corrected for their number together (Holm). A failed training takes its seed out of a comparison,
    which flatters who failed: a network that failed more often than the other is never called the better one.

    Args:
        trainings: All that there are; those of the most epochs are looked at, and the largest of bigger networks.

    Returns:
        The verdicts, or None without trainings.
    """
    if not trainings:
        return None
    trainings = sorted(trainings, key=lambda t: (t.seed, str(t.placement), t.backbone))  # they end in any order
    epochs = max(training.epochs for training in trainings)
    longest = [training for training in trainings if training.epochs == epochs]
    bigger = max((t for t in longest if t.reference == BIGGER), key=lambda t: t.params or 0, default=None)
    of: dict[Network, dict[int, Training]] = {}
    names: dict[Network, str | None] = {}
    for training in longest:
        if bigger is None or training.reference != BIGGER or training.backbone == bigger.backbone:
            network = Network(placement=training.placement, backbone=training.backbone, start=training.start)
            of.setdefault(network, {})[training.seed] = training
            names[network] = next((name for name in REFERENCES if name in (training.reference or "").split()), None)
    rank = {name: number for number, name in enumerate(REFERENCES)}
    order = sorted(of, key=lambda network: (network.start != "scratch", rank.get(names[network] or "", len(rank))))
    pairs = [
        (network, reference, str(names[reference]))
        for network in sorted(order, key=lambda network: (network.start != "scratch", bool(names[network])))
        for reference in order
        if network.placement and names[reference] and network.start == reference.start and network != reference
        if not _is_mirrored(names[network], names[reference])
    ]
    tested = []
    for network, reference, name in pairs:
        question = Verdict(
            placement=network.placement,
            reference=names[network],
            against=name,
            against_placement=reference.placement,
            start=network.start,
        )
        tested.append(_tested(question, of[network], of[reference]))
    verdicts = _corrected(tested)
    return Confirmed(
        epochs,
        {network: tuple(of[network].values()) for network in order},
        tuple(verdicts),
        sum(one.p_value is not None for one in verdicts),
        (bigger.backbone, bigger.params or 0) if bigger else None,
    )


def _is_mirrored(name: str | None, against: str | None) -> bool:
    """Tell whether a pair of references is looked at from the other side."""
    with_blocks = [name for name in REFERENCES if name not in (PLAIN, BIGGER)]
    return name in with_blocks and against in with_blocks and with_blocks.index(name) < with_blocks.index(against)


def _tested(
    question: Verdict, own: dict[int, Training], other: dict[int, Training]
) -> tuple[Verdict, Paired | None, bool, bool]:
    """Compare two networks by their trainings by seed; also tell whether the one, or the other, failed more often."""
    seeds = [seed for seed in own if seed in other]
    good = [seed for seed in seeds if own[seed].state == other[seed].state == "COMPLETE"]
    fails, others = (sum(side[seed].state != "COMPLETE" for seed in seeds) for side in (own, other))
    verdict = replace(question, seeds=len(good), failed=len(seeds) - len(good))
    if not good:
        return verdict, None, fails > others, others > fails
    differences = _matrix([own[seed] for seed in good]) - _matrix([other[seed] for seed in good])
    verdict = replace(verdict, difference=float(differences.mean()))
    return verdict, paired(differences) if len(good) > 1 else None, fails > others, others > fails


def _matrix(trainings: Iterable[Training]) -> NDArray[np.float64]:
    """Return whether each image was classified correctly, a row a training; its accuracy alone if that is all."""
    rows = []
    for training in trainings:
        if training.correct is None or training.images is None:
            rows.append(np.array([training.accuracy]))
        else:
            bits = np.frombuffer(base64.b64decode(training.correct), np.uint8)
            rows.append(np.unpackbits(bits, count=training.images))
    return np.array(rows, dtype=np.float64)


def _corrected(tested: Sequence[tuple[Verdict, Paired | None, bool, bool]]) -> list[Verdict]:
    """Put p-values, intervals and words to comparisons, all together."""
    values = [found.p_value if found else None for _, found, *_ in tested]
    known = [index for index, value in enumerate(values) if value is not None]
    corrected, levels = holm([float(values[index] or 0.0) for index in known])
    verdicts = [verdict for verdict, *_ in tested]
    for index, p_value, level in zip(known, corrected, levels, strict=True):
        verdict, found, fails, others_fail = tested[index]
        assert found is not None  # noqa: S101 - it has a p-value
        word = NOT_SHOWN
        if p_value <= LEVEL and not (fails if found.difference > 0 else others_fail):
            word = BETTER if found.difference > 0 else WORSE
        low, high = found.interval(level)
        verdicts[index] = replace(
            verdict,
            low=max(low, -1.0),
            high=min(high, 1.0),
            error=found.error,
            p_single=values[index],
            p_value=p_value,
            verdict=word,
            detectable=found.detectable(LEVEL / len(known)) if found.error else None,
        )
    return verdicts
