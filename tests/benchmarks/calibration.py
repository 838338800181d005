"""Do 90 % intervals hold the truth in 90 % of cases where the model holds, and what widens them where it does not?

Studies with `additive` on simulated truths, 8 and 16 sites, budgets of 50 to 300 units, as in `search.py`:

`drawn`: the truth is drawn as the model takes it to be. The shares that groups of effects, seeds and noise have in the
variance of scores are drawn around those that the model first takes them to have, as far from these as it takes for
likely, and again until they add up to about 1 over random placements (0.8 to 1.25; those of brief scores to 1.25 at
most); then the effects. The truth is the accuracy under the first seed, of which estimates speak. Here a Bayesian
interval has to be right on average over draws, whatever was evaluated.

`drawn+brief`: the same with brief scores at a quarter of the cost: scale, bias and noise of their own.

`additive`: a landscape of `search.py`, noise once or twice the signal. Nothing in it belongs to pairs of blocks, to a
placement as such or to a seed, which the model allows for. The intervals are worked out once more from the same trials
by a model that does not allow for these.

From the real trainings of `reports/benchmarks/fidelity.csv` it estimates one seed's scores from another's.

Source: averages over draws from the prior as a check of Bayesian software, Cook, Gelman and Rubin 2006 (Journal of
Computational and Graphical Statistics 15, 675-692). Rows are kept in `reports/benchmarks/calibration.csv`; those that
are there are not run again. Writes `reports/benchmarks/calibration.md`.

    python tests/benchmarks/calibration.py [--seeds 12] [--minutes 60] [--processes 2]
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.search import (
    BUDGETS,
    SETTINGS,
    SIGNAL,
    Choices,
    Space,
    Trial,
    estimated,
    make_landscape,
    make_space,
    model_of,
    our_strategy,
    placement_of,
    random_placements,
    scores_of,
    seed_of,
)

from placesearch.front import non_dominated
from placesearch.placement import Placement
from placesearch.search.effects import BIAS_SHARES, NAMES, OTHER_SHARES, SCALE_SPREAD, SHARES, SPREAD, Effects, Model
from placesearch.search.evidence import SUMS, Evidence, Vocabulary
from placesearch.search.findings import FEWEST, REACH

REPORTS = Path(__file__).parents[2] / "reports" / "benchmarks"
ROWS, REPORT = REPORTS / "calibration.csv", REPORTS / "calibration.md"
TRAININGS = REPORTS / "fidelity.csv"
VERDICTS = ("resnet18-cifar10", "resnet18-digits")
SITES, KINDS = (8, 16), ("drawn", "drawn+brief", "additive x1", "additive x2")
LEVELS = {"long": 90.0, "brief": 65.0}
UNIT = (2 * SIGNAL) ** 2
"""Variance of the scores of drawn truths, about."""

WITHOUT: dict[str, tuple[str, ...]] = {
    "all": (),
    "no pairs, nothing peculiar": ("pair", "placement"),
    "no pairs, nothing peculiar, no seeds": ("pair", "placement", "seed"),
}
"""What the model allows for, and what it is told not to."""


class Truth(Protocol):
    """What scores are about."""

    def long(self, placements: Sequence[Choices]) -> np.ndarray:
        """Return the true long accuracy of placements under the first seed, in points."""

    def score(self, chosen: Choices, fidelity: str, seed: int, number: int, /) -> float:
        """Return the score of the n-th trial."""


class Landscape:
    """A landscape of `search.py` with its noise.

    Args:
        sites: Number of sites.
        noise: Standard deviation of the noise, in those of the signal.
        seed: Which of the many.
    """

    def __init__(self, sites: int, noise: int, seed: int) -> None:
        self._landscape, self._noise, self._seed = make_landscape("additive", sites, seed), noise, seed

    def long(self, placements: Sequence[Choices]) -> np.ndarray:
        return self._landscape.truth(placements)

    def score(self, chosen: Choices, _fidelity: str, _seed: int, number: int, /) -> float:
        deviation = SIGNAL * self._noise
        return float(self.long([chosen])[0]) + normal(deviation**2, "noise", self._seed, self._noise, number)


class Drawn:
    """A truth drawn as the model takes it to be.

    Args:
        space: The space.
        seed: Which of the many.
    """

    def __init__(self, space: Space, seed: int) -> None:
        random = np.random.default_rng(seed_of("drawn", len(space.sites), len(space.units), seed))
        self._vocabulary, self._name = Vocabulary(dict.fromkeys(space.sites, SETTINGS)), (len(space.sites), seed)
        self.variances = drawn_variances(space, self._vocabulary, random)
        sums = {group: self._effects(group, random) for group in SUMS}
        sites = self._vocabulary.site_of
        pairs = np.triu(random.normal(0, self.variances["pair"] ** 0.5, (len(sites), len(sites))), 1)
        pairs = (pairs + pairs.T) * (sites[:, None] != sites[None, :])
        self._worth = Effects(self._vocabulary, sums, pairs, LEVELS["long"])
        self._bias = {group: self._effects(group, random, "bias ") for group in BIAS_SHARES}

    def _effects(self, group: str, random: np.random.Generator, prefix: str = "") -> np.ndarray:
        return random.normal(0, self.variances[prefix + group] ** 0.5, len(self._vocabulary.columns(group)))

    def long(self, placements: Sequence[Choices]) -> np.ndarray:
        return self._of(placements) + normal(self.variances["seed"], "seed", *self._name, 0, "long")

    def _of(self, placements: Sequence[Choices]) -> np.ndarray:
        of = [placement_of(chosen) for chosen in placements]
        peculiar = [normal(self.variances["placement"], "placement", *self._name, str(placement)) for placement in of]
        return np.asarray(self._worth.of(of) + peculiar)

    def score(self, chosen: Choices, fidelity: str, seed: int, number: int, /) -> float:
        value = float(self._of([chosen])[0])
        if fidelity == "brief":
            rows = self._vocabulary.rows([placement_of(chosen)])
            value = LEVELS["brief"] + self.variances["scale"] * (value - LEVELS["long"])
            value += sum(float(rows[group][0] @ bias) for group, bias in self._bias.items())
        value += normal(self.variances["seed"], "seed", *self._name, seed, fidelity)
        noise = self.variances["brief noise" if fidelity == "brief" else "noise"]
        return value + normal(noise, "noise", *self._name, number)


def normal(variance: float, *name: object) -> float:
    """Return the normal number of a name."""
    return float(variance**0.5 * np.random.default_rng(seed_of(*name)).standard_normal())


def drawn_variances(space: Space, vocabulary: Vocabulary, random: np.random.Generator) -> dict[str, float]:
    """Draw variances, and the scale of brief scores, from what the model takes them to be."""
    matrix = random_placements(300, len(space.sites), np.random.default_rng(0))
    placements = [placement_of(space.texts(row)) for row in matrix]
    evidence = Evidence(vocabulary, scores_of([Trial(space.texts(row), "long", 0.0) for row in matrix]))
    counts = evidence.common(placements, vocabulary.rows(placements), len(placements))
    explained = {group: float(np.diag(count).mean() - count.mean()) for group, count in counts.items()}
    shares = {**SHARES, **{f"bias {group}": share for group, share in BIAS_SHARES.items()}, **OTHER_SHARES}
    while True:
        of = {name: share * np.exp(SPREAD * random.standard_normal()) for name, share in shares.items()}
        scale = float(np.exp(SCALE_SPREAD * random.standard_normal()))
        worth = sum(of[name] for name in SHARES)
        brief = scale**2 * worth + sum(
            share for name, share in of.items() if name.startswith(("bias", "brief", "seed"))
        )
        if 0.8 <= worth + of["seed"] + of["noise"] <= 1.25 and brief <= 1.25:
            break
    values = {
        name: share * UNIT / max(explained.get(name.removeprefix("bias "), 1.0), 0.05) for name, share in of.items()
    }
    return {**values, "scale": scale}


def less(model: Model, without: Sequence[str]) -> Model:
    """Return a model of the same scores that does not allow for some groups of effects."""
    variances = model.variances.copy()
    scores = [score.accuracy for score in model.scores]
    variances[[NAMES.index(name) for name in without]] = np.log(1e-12 * np.var(scores))
    return Model(Evidence(model.vocabulary, model.scores), variances=variances)


class Job(NamedTuple):
    """One study."""

    kind: str
    sites: int
    seed: int


def study(truth: Truth, space: Space, seed: int, budget: int) -> list[Trial]:
    """Spend a budget and return the trials."""
    ask, history, spent = our_strategy()(space, seed), list[Trial](), 0
    seeds: dict[tuple[Placement, str], int] = {}
    waiting = [(chosen, space.cheapest) for chosen in space.references()]
    while True:
        chosen, fidelity = waiting.pop(0) if waiting else ask(history)
        spent += space.units[fidelity]
        if spent > budget:
            return history
        key = placement_of(chosen), fidelity
        seeds[key] = seeds.get(key, -1) + 1  # as `scores_of` counts them
        history.append(Trial(chosen, fidelity, truth.score(chosen, fidelity, seeds[key], len(history))))


def rows_of(job: Job) -> list[dict[str, object]]:
    """Run a study and count, for each budget, which intervals hold the truth."""
    space = make_space(job.sites, brief=job.kind.endswith("brief"))
    noise = int(job.kind[-1]) if job.kind.startswith("additive") else 0
    truth = Landscape(job.sites, noise, job.seed) if noise else Drawn(space, job.seed)
    history = study(truth, space, seed_of(*job), BUDGETS[-1])
    spent = np.cumsum([space.units[trial.fidelity] for trial in history])
    rows = []
    for budget, (allowing, without) in product(BUDGETS, WITHOUT.items()):
        if without and not noise:
            continue
        seen = history[: int((spent <= budget).sum())]
        found = estimated(less(model_of(seen, space), without), seen, space)
        true, costs = truth.long(found.choices), space.cost(space.matrix(found.choices)).tolist()
        held = (found.low <= true) & (true <= found.high)
        on_front = non_dominated([(cost, -value) for cost, value in zip(costs, found.values.tolist(), strict=True)])
        rows.append({
            **job._asdict(), "budget": budget, "allowing": allowing,
            "covered_front": round(float(held[on_front].mean()), 4), "covered_all": round(float(held.mean()), 4),
            "front": int(np.sum(on_front)), "trained": len(held),
            "half_width": round(float((found.high - found.low)[on_front].mean() / 2), 5),
        })  # fmt: skip
    return rows


def collect(waiting: Sequence[Job], minutes: float, processes: int) -> None:
    """Run what is not in the table yet until the time is over."""
    table = pd.read_csv(ROWS) if ROWS.exists() else pd.DataFrame(columns=Job._fields)
    done = set(table[list(Job._fields)].itertuples(index=False, name=None))
    left, until = [job for job in waiting if job not in done], time.monotonic() + 60 * minutes
    with get_context("spawn").Pool(processes) as pool:
        for number, rows in enumerate(pool.imap(rows_of, left), start=1):
            table = pd.concat([table, pd.DataFrame(rows)], ignore_index=True)
            table.to_csv(ROWS, index=False)
            print(f"{time.strftime('%H:%M:%S')} {number}/{len(left)} {rows[-1]}", flush=True)
            if time.monotonic() > until:
                break


def jobs(seeds: int) -> Iterator[Job]:
    """Yield the studies seed by seed, so that what was reached is balanced."""
    for seed, kind, sites in product(range(seeds), KINDS, SITES):
        yield Job(kind, sites, 1000 + seed)  # not the landscapes of search.py


def replay(table: pd.DataFrame) -> pd.DataFrame:
    """Estimate from the scores of one seed of real trainings, ResNet-18's, and compare with those of the others.

    Args:
        table: Accuracies by placement, protocol and seed.

    Returns:
        One row for each protocol and seed, errors in points.
    """
    space, rows = make_space(8, brief=False), []
    references = dict(
        zip(("none", "se-everywhere", "cbam-everywhere", "cbam-last-stage"), space.references(), strict=True)
    )
    for (protocol, seed), own in table.groupby(["protocol", "seed"]):
        others = table[(table.protocol == protocol) & (table.seed != seed)].groupby("placement").accuracy.mean() * 100
        own = own[own.placement.isin(others.index)]
        if len(own) < FEWEST:
            continue
        chosen = [references.get(text) or chosen_of(space, text) for text in own.placement]
        observed, other = 100 * own.accuracy.to_numpy(), others[own.placement].to_numpy()
        model = model_of([Trial(one, "long", score) for one, score in zip(chosen, observed, strict=True)], space)
        mean, deviation = model.estimate([placement_of(one) for one in chosen])
        reach = REACH * np.hypot(deviation, model.noise)
        rows.append({
            "protocol": protocol, "seed": seed, "placements": len(own),
            "error observed": np.mean((observed - other) ** 2) ** 0.5,
            "error estimated": np.mean((mean - other) ** 2) ** 0.5,
            "best observed": (observed - other)[observed.argmax()], "best estimated": (mean - other)[mean.argmax()],
            "held": np.mean(abs(mean - other) <= reach),
        })  # fmt: skip
    return pd.DataFrame(rows)


def chosen_of(space: Space, text: str) -> Choices:
    """Read a placement as `fidelity.csv` has it."""
    return {**dict.fromkeys(space.sites, "none"), **dict(pair.split("=", 1) for pair in text.split())}


def between_seeds(confirmed: pd.DataFrame) -> tuple[int, int, float]:
    """Compare the variance between seeds with all other.

    Source: variance components of a two-way layout, Henderson 1953 (Biometrics 9, 226-252).

    Args:
        confirmed: Accuracies of networks under the same seeds, as a verdict has them.

    Returns:
        Networks, seeds, and the variance between seeds as a share of that between networks and of what is left. It is
        estimated as a difference, so it can be below zero.
    """
    named = confirmed.assign(network=confirmed.placement + " " + confirmed.backbone)
    table = named.pivot_table(index="network", columns="seed", values="test_accuracy").dropna().to_numpy()
    networks, seeds = table.shape
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    left = (rest**2).sum() / ((networks - 1) * (seeds - 1))
    of_seeds = table.mean(0).var(ddof=1) - left / networks
    of_networks = table.mean(1).var(ddof=1) - left / seeds
    return networks, seeds, float(of_seeds / (max(of_networks, 0.0) + left))


@cache
def seed_share(job: Job) -> float:
    """Return the share in the variance of scores that those of one seed have in common."""
    if not job.kind.startswith("drawn"):
        return 0.0
    return Drawn(make_space(job.sites, brief=job.kind.endswith("brief")), job.seed).variances["seed"] / UNIT


def report() -> str:
    """Write what was found."""
    table = pd.read_csv(ROWS)
    lines = [
        "# Do intervals hold the truth?",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}. Made by "
        "`python tests/benchmarks/calibration.py`, whose text says how truths are drawn. Percentage of 90 % intervals "
        "that hold the true accuracy, mean over studies ± its standard error: of the members of the recommended front "
        "/ of all trained candidates. Half a width: of the intervals of the front, in points; random placements of "
        f"`additive` have a standard deviation of {SIGNAL}.",
        "",
        "| truth | the model allows for | studies | after 50 | after 100 | after 200 | after 300 | half a width, 300 |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    table["truth"] = table.kind.str.partition(" ")[0]
    first = OTHER_SHARES["seed"]
    few = pd.Series([seed_share(Job(*job)) <= first for job in table[list(Job._fields)].itertuples(index=False)])
    parts = [(*names, part) for names, part in table.groupby(["truth", "allowing"], sort=False)]
    for kind in ("drawn", "drawn+brief"):
        for told, chosen in ((f"at most {first:g}", few), (f"more than {first:g}", ~few)):
            parts.append((f"{kind}, share of seeds {told}", "all", table[(table.kind == kind) & chosen]))
    for truth, allowing, part in parts:
        cells = []
        for budget in BUDGETS:
            own = 100 * part[part.budget == budget][["covered_front", "covered_all"]]
            cells.append(" / ".join(f"{own[name].mean():.1f} ± {own[name].sem():.1f}" for name in own))
        width = part[part.budget == BUDGETS[-1]].half_width.mean()
        studies = len(part[list(Job._fields)].drop_duplicates())
        lines.append(f"| {truth} | {allowing} | {studies} | {' | '.join(cells)} | {width:.3f} |")
    lines += [
        "",
        "## Real trainings",
        "",
        "Those of [the fidelity benchmark](fidelity.md), ResNet-18 on a part of CIFAR-10: from the scores of one seed "
        "it is estimated what the other one's are, for the same placements; mean over both ways. Error: root of the "
        "mean square. Best: by how much the best score, or the best estimate, is above what the other seed has for "
        "that placement. Held: percentage of scores in the 90 % interval of estimate and noise. Accuracies in points.",
        "",
        "| protocol | placements | error, observed | error, estimated | best, observed | best, estimated | held |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    replayed = replay(pd.read_csv(TRAININGS))
    for protocol, own in replayed.groupby("protocol", sort=False):
        mean = own.drop(columns=["protocol", "seed"]).mean()
        lines.append(
            f"| {protocol} | {mean.placements:.0f} | {mean['error observed']:.2f} | {mean['error estimated']:.2f} | "
            f"{mean['best observed']:+.2f} | {mean['best estimated']:+.2f} | {100 * mean.held:.0f} |"
        )
    held = 100 * np.average(replayed.held, weights=replayed.placements)
    lines += [
        "",
        f"Of all {replayed.placements.sum()} scores {held:.0f} % were held.",
        "",
        "How much of the variance of accuracies under fresh seeds lies between seeds, in the verdicts of two studies: "
        "analysis of variance of networks by seeds, as a share of what lies between networks and of what is left.",
        "",
        "| study | networks | seeds | between seeds |",
        "|---|---:|---:|---:|",
    ]
    for study_name in VERDICTS:
        networks, seeds, share = between_seeds(pd.read_csv(REPORTS.parent / study_name / "confirmed.csv"))
        lines.append(f"| {study_name} | {networks} | {seeds} | {100 * share:.1f} % |")
    kept = REPORT.read_text(encoding="utf-8") if REPORT.exists() else ""
    _, heading, discussion = kept.partition("\n## What")
    return "\n".join([*lines, *(["", (heading + discussion).strip("\n")] if heading else [])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=12, help="studies of each kind and size")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no study after so many")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of those that run studies
    collect(list(jobs(given.seeds)), given.minutes, given.processes)
    REPORT.write_text(report(), encoding="utf-8")


if __name__ == "__main__":
    main()
