"""How often is a verdict wrong, and how often does it find what is there? Simulated studies, and real trainings.

Each simulated study has seven networks (plain, SE and CBAM everywhere, a bigger plain one, three members of a front),
so 17 comparisons, trained on 5 or 10 seeds and tested on 1,000 images at 75 % accuracy. An image is classified right if

    level + difficulty[image] + own[network, image] + training[network, seed] + rest[network, seed, image] > 0,

all terms normal, the same for all networks unless said otherwise: equals. A wrong claim is any verdict other than "no
difference shown". Beside the test that `confirm` uses, three others that look natural. Then a network gets a level that
makes it better by what `detectable` says. The real part trains one tiny network on the digits under many seeds and
deals these trainings out to seven equals, again and again; and it deals out trainings with wrong labels to all but one.
Writes `reports/benchmarks/verdict.md`. About 15 minutes on one core.

    python tests/benchmarks/verdict.py
"""

import base64
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy
import torch
from scipy import stats

from placesearch.evaluation.candidate import Evaluator
from placesearch.models.architecture import Architecture
from placesearch.placement import Placement
from placesearch.records import Task
from placesearch.training.datasets import Data, Split, load_data
from placesearch.training.loop import Protocol
from placesearch.verdict.paired import LEVEL, Paired, holm, paired
from placesearch.verdict.trainings import Training
from placesearch.verdict.verdicts import BETTER, NOT_SHOWN, REFERENCES, judge

STUDIES = int(sys.argv[1]) if sys.argv[1:] else 1000
IMAGES, ACCURACY = 1000, 0.75
NETWORKS = 7
PAIRS = [(k, r) for k in (1, 2, 4, 5, 6) for r in range(4) if r < k and not (k < 3 and r == 3)]
PAIRS += [(1, 3), (2, 3)]  # SE and CBAM everywhere against the bigger one
TRAININGS, FAMILIES, EPOCHS, WRONG_LABELS = 120, 500, 8, 0.4
REPORTS = Path(__file__).resolve().parents[2] / "reports" / "benchmarks"


@dataclass(frozen=True)
class Noise:
    """What chance adds.

    Args:
        name: What to call it.
        training: Standard deviation of the accuracy between trainings, in points, by network.
        own: Standard deviation of what makes an image difficult for one network, by that of what does for all.
        rest: The same for one training of one network.
        tails: Degrees of freedom of the t distribution of trainings; 0 for a normal one.
    """

    name: str
    training: tuple[float, ...] = (0.5,) * NETWORKS
    own: float = 0.0
    rest: float = 0.4
    tails: int = 0


NOISES = (
    Noise("images change sides by chance, trainings are equally good", training=(0.0,) * NETWORKS),
    Noise("trainings differ, sd 0.5 points"),
    Noise("trainings differ, sd 1.5 points", training=(1.5,) * NETWORKS),
    Noise("sd 0.5 points; each network has difficult images of its own", own=0.3),
    Noise("sd 0.2 or 1.5 points, by network", training=(0.2, 1.5, 0.2, 0.2, 1.5, 0.2, 0.2)),
    Noise("sd 1.5 points with heavy tails (t, 3 degrees)", training=(1.5,) * NETWORKS, tails=3),
)


def correct(noise: Noise, seeds: int, gain: float, random: np.random.Generator) -> np.ndarray:
    """Return whether each network (axis 0) of a study gets each image (2) right under each seed (1)."""
    slope = stats.norm.pdf(stats.norm.ppf(ACCURACY)) / (1 + noise.own**2 + noise.rest**2) ** 0.5
    of_networks = np.array(noise.training) / 100 / slope
    accuracies = np.full(NETWORKS, ACCURACY)
    accuracies[-1] += gain
    level = stats.norm.ppf(accuracies) * (1 + noise.own**2 + noise.rest**2 + of_networks**2) ** 0.5
    shape = NETWORKS, seeds
    drawn = random.standard_t(noise.tails, shape) / 3**0.5 if noise.tails else random.standard_normal(shape)
    of_training = of_networks[:, None] * drawn
    margin = noise.rest * random.standard_normal((*shape, IMAGES), dtype=np.float32)
    margin += random.standard_normal(IMAGES, dtype=np.float32)
    margin += noise.own * random.standard_normal((NETWORKS, 1, IMAGES), dtype=np.float32)
    return (margin + (level[:, None] + of_training)[:, :, None] > 0).astype(float)


def differences(right: np.ndarray) -> list[np.ndarray]:
    return [right[k] - right[r] for k, r in PAIRS]


def crossed(right: np.ndarray) -> list[float]:
    """Seeds and images: what `confirm` does."""
    return [float(paired(d).p_value or 0.0) for d in differences(right)]


def seeds_alone(right: np.ndarray) -> list[float]:
    return [float(paired(d.mean(1, keepdims=True)).p_value or 0.0) for d in differences(right)]


def images_alone(right: np.ndarray) -> list[float]:
    """A test over images on accuracies averaged over seeds; with one seed nearly McNemar's."""
    return [float(paired(d.mean(0)[:, None]).p_value or 0.0) for d in differences(right)]


def pooled(right: np.ndarray) -> list[float]:
    """Seeds, with one variance for all networks: more degrees of freedom if it is the same one."""
    scores = right.mean(2)
    rest = scores - scores.mean(1, keepdims=True) - scores.mean(0) + scores.mean()
    freedom = (scores.shape[0] - 1) * (scores.shape[1] - 1)
    error = (2 * (rest**2).sum() / freedom / scores.shape[1]) ** 0.5
    means = scores.mean(1)
    return [float(2 * stats.t.sf(abs(means[k] - means[r]) / error, freedom)) for k, r in PAIRS]


TESTS: dict[str, Callable[[np.ndarray], list[float]]] = {
    "confirm": crossed,
    "t over seeds": seeds_alone,
    "over images": images_alone,
    "pooled over networks": pooled,
}


def rate(count: int, of: int) -> str:
    """Return a share in percent with its 95 % interval (Wilson)."""
    low, high = stats.binomtest(count, of).proportion_ci(method="wilson")
    return f"{100 * count / of:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def simulated(noise: Noise, seeds: int) -> tuple[str, str]:
    """Return the table rows on wrong claims and on the power of one kind of noise."""
    random = np.random.default_rng(seeds)
    wrong, better = dict.fromkeys(TESTS, 0), 0
    last = next(index for index, pair in enumerate(PAIRS) if pair == (NETWORKS - 1, 0))
    errors, freedoms = [], []
    for _ in range(STUDIES):
        right = correct(noise, seeds, 0.0, random)
        for name, test in TESTS.items():
            corrected, _ = holm(test(right))
            wrong[name] += min(corrected) <= LEVEL
            if name == "confirm":
                better += any(
                    p <= LEVEL and right[k].mean() > right[r].mean() for p, (k, r) in zip(corrected, PAIRS, strict=True)
                )
        found = paired(differences(right)[last])
        errors.append(found.error)
        freedoms.append(found.freedom)
    error, freedom = float(np.mean(np.square(errors)) ** 0.5), float(np.median(freedoms))
    gain = Paired(0.0, error, freedom).detectable(LEVEL / len(PAIRS))
    shown = 0
    for _ in range(STUDIES):
        corrected, _ = holm(crossed(correct(noise, seeds, gain, random)))
        shown += corrected[last] <= LEVEL
    text = " | ".join([rate(wrong["confirm"], STUDIES), rate(better, STUDIES)])
    text += " | " + " | ".join(f"{100 * wrong[name] / STUDIES:.1f} %" for name in list(TESTS)[1:])
    power = (
        f"| {noise.name} | {seeds} | {100 * error:.2f} | {freedom:.1f} | {100 * gain:.2f} | {rate(shown, STUDIES)} |"
    )
    return f"| {noise.name} | {seeds} | {text} |", power


NETWORK = """
from torch import nn

def tiny(num_classes):
    units = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(2)]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, num_classes)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), *units, *head)
"""


def trained(data: Data, count: int) -> list[Training]:
    """Train the tiny network on so many seeds."""
    plain = Architecture(backbone="tiny_of_verdict:tiny", num_classes=10, input_size=(3, 32, 32))
    protocol = Protocol(epochs=EPOCHS, batch_size=64, learning_rate=0.05, seed=0, precision="fp32")
    evaluator = Evaluator(plain, protocol, data, torch.device("cpu"))
    images = len(data.splits["test"].labels)
    trainings = []
    for seed in range(count):
        record = evaluator.evaluate(Task(seed, Placement(), None, seed=seed, split="test"), lambda _: None)
        assert record.state == "COMPLETE", record.error
        trainings.append(
            Training(
                placement=Placement(), backbone="tiny", reference=None, start="scratch", epochs=EPOCHS, seed=seed,
                state="COMPLETE", accuracy=record.val_accuracy, images=images, correct=record.correct,
            )
        )  # fmt: skip
    return trainings


def with_wrong_labels(data: Data, share: float) -> Data:
    """Give a share of the training images a random label, always the same ones."""
    train = data.splits["train"]
    assert isinstance(train, Split)
    random = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(train.labels), generator=random) < share
    drawn = torch.randint(len(data.classes), train.labels.shape, generator=random)
    labels = torch.where(wrong, drawn, train.labels)
    return Data({**data.splits, "train": Split(train.images, labels)}, data.classes, data.flip)


def dealt(pools: list[list[Training]], seeds: int, random: np.random.Generator) -> list[Training]:
    """Deal trainings out to seven networks, each from its pool, none twice."""
    placements = ["none", "a=se(r=16)", "a=cbam(r=16,k=7)", "none", "a=se(r=1)", "a=se(r=2)", "a=se(r=3)"]
    orders = {id(pool): list(random.permutation(len(pool))) for pool in pools}
    dealing = []
    for network, (pool, text) in enumerate(zip(pools, placements, strict=True)):
        reference = REFERENCES[network] if network < len(REFERENCES) else None
        for seed in range(seeds):
            one = pool[orders[id(pool)].pop()]
            backbone = "bigger" if network == 3 else "tiny"
            dealing.append(
                replace(one, placement=Placement.parse(text), reference=reference, seed=seed, backbone=backbone)
            )
    return dealing


def accuracies(pool: list[Training]) -> np.ndarray:
    return np.array([one.accuracy for one in pool])


def matrix(pool: list[Training]) -> np.ndarray:
    rows = [np.frombuffer(base64.b64decode(str(one.correct)), np.uint8) for one in pool]
    return np.array([np.unpackbits(row, count=one.images) for row, one in zip(rows, pool, strict=True)], float)


def real() -> list[str]:
    """Return what real trainings say."""
    module = type(sys)("tiny_of_verdict")
    exec(NETWORK, module.__dict__)  # noqa: S102 - the text above
    sys.modules["tiny_of_verdict"] = module
    data = load_data("digits", 32)
    good, bad = trained(data, TRAININGS), trained(with_wrong_labels(data, WRONG_LABELS), TRAININGS)
    gap = accuracies(good).mean() - accuracies(bad).mean()
    means, spreads = zip(*((100 * a.mean(), 100 * a.std(ddof=1)) for a in map(accuracies, (good, bad))), strict=True)
    lines = [
        f"A network of 8 channels on the digits at 32x32, {EPOCHS} epochs, {TRAININGS} seeds: test accuracy "
        f"{means[0]:.2f} % (sd over seeds {spreads[0]:.2f}) on 359 images. With {100 * WRONG_LABELS:.0f} % of the "
        f"training labels drawn anew: {means[1]:.2f} % (sd {spreads[1]:.2f}), {100 * gap:.2f} points less. "
        f"{FAMILIES:,} studies dealt from these trainings, so that what is equal in truth is known; studies share "
        "trainings, which the intervals leave out.",
        "",
        "| seeds | wrong claim among equals | the one without wrong labels found better than plain | expected |",
        "|---:|---|---|---:|",
    ]
    for seeds in (5, 10):
        random = np.random.default_rng(seeds)
        wrong = shown = 0
        for _ in range(FAMILIES):
            found = judge(dealt([good] * NETWORKS, seeds, random))
            assert found is not None
            assert found.comparisons == len(PAIRS)
            wrong += any(one.verdict != NOT_SHOWN for one in found.verdicts)
            found = judge(dealt([bad] * (NETWORKS - 1) + [good], seeds, random))
            assert found is not None
            one = next(v for v in found.verdicts if str(v.placement) == "a=se(r=3)" and v.against == "plain")
            shown += one.verdict == BETTER
        # the power that the true error and the usual degrees of freedom give, at the level of the first step of Holm
        every = matrix(good), matrix(bad)
        by_seed = sum(rows.mean(1).var(ddof=1) for rows in every) / seeds
        common = every[0].mean(0) - every[1].mean(0)
        by_image = max(common.var(ddof=1) - sum(rows.var(0, ddof=1).mean() / len(rows) for rows in every), 0) / 359
        error = (by_seed + by_image) ** 0.5
        freedom = error**4 / (by_seed**2 / (seeds - 1) + by_image**2 / 358)
        bound = stats.t.isf(LEVEL / len(PAIRS) / 2, freedom)
        expected = f"{100 * stats.nct.sf(bound, freedom, gap / error):.0f} %"
        lines.append(f"| {seeds} | {rate(wrong, FAMILIES)} | {rate(shown, FAMILIES)} | {expected} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    began = time.monotonic()
    tables: tuple[list[str], list[str]] = ([], [])
    for noise in NOISES:
        for seeds in (5, 10):
            for table, row in zip(tables, simulated(noise, seeds), strict=True):
                table.append(row)
                print(row, flush=True)
    of_real = real()
    text = [
        "# Verdicts: how often wrong, how often right",
        "",
        f"{STUDIES:,} simulated studies a row, seven networks, {len(PAIRS)} comparisons, "
        f"random numbers seeded with the number of seeds, {IMAGES:,} test images, accuracy {100 * ACCURACY:.0f} %; "
        f"{platform.machine()}, one of "
        f"{len(os.sched_getaffinity(0))} cores, numpy {np.__version__}, scipy {scipy.__version__}, torch "
        f"{torch.__version__}; {(time.monotonic() - began) / 60:.0f} minutes. Made by "
        "`python tests/benchmarks/verdict.py`, which states the model.",
        "",
        "## Seven equals: studies with a wrong claim",
        "",
        "Shares of studies in which at least one of the comparisons claimed a difference, with 95 % intervals; the "
        "limit is 5 %. A wrong win is a claim that a placement is better than a reference. The other tests are "
        "corrected by Holm too: a t test over the seed means takes these images as all there are, a test over images "
        "takes these trainings as all there are, and the pooled one takes the noise of all networks for the same.",
        "",
        "| noise | seeds | `confirm`: wrong claim | wrong win | t over seeds | over images | pooled over networks |",
        "|---|---:|---|---|---:|---:|---:|",
        *tables[0],
        "",
        "## One is better by what is called detectable: studies that find it better than plain",
        "",
        "The stated power is 80 %, with the standard error taken as known. "
        "Error: root mean square of the standard error of a difference; degrees: median.",
        "",
        "| noise | seeds | error, points | degrees | gain, points | found |",
        "|---|---:|---:|---:|---:|---|",
        *tables[1],
        "",
        "## Real trainings",
        "",
        *of_real,
    ]
    (REPORTS / "verdict.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
