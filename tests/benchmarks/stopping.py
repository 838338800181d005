"""Does stopping hopeless candidates early pay? Learning curves of real trainings, then the stopping rule on them.

ResNet-18 with its ImageNet stem at 32x32 on CIFAR-10 as an image folder, 4,000 training and 5,000 validation images,
five epochs, validated after each: the setting of `fidelity.py`. Curves are added to `reports/benchmarks/stopping.csv`
one by one, about 45 seconds each on one core, so that the benchmark goes on where it was stopped. Then
`reports/benchmarks/stopping.md` is written from all of them: studies of these trials in many orders, with and without
stopping, and searches of simulated landscapes, some minutes altogether.

    python tests/benchmarks/stopping.py CIFAR10_FOLDER [MINUTES]
    python tests/benchmarks/stopping.py               write the report again
"""

import csv
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from fidelity import BATCH, PEAK, PLAIN, SIZE, Bench
from search import KINDS, SETTINGS, SIGNAL, hypervolume, known, placement_of

from placesearch.costs import CostTable
from placesearch.evaluation.candidate import steady
from placesearch.front import front, non_dominated
from placesearch.models.sites import find_sites
from placesearch.placement import Placement
from placesearch.records import Milestone, TrialRecord
from placesearch.reporting.tables import accuracies
from placesearch.search import stopping
from placesearch.search.effects import Model
from placesearch.search.evidence import Evidence, Score, Vocabulary
from placesearch.search.findings import find
from placesearch.search.samplers import LAG
from placesearch.search.space import make_space, reference_placements
from placesearch.search.stopping import Ended
from placesearch.search.suggesting import Suggester
from placesearch.training.datasets import Data
from placesearch.training.loop import Protocol, Trainer, pick_precision

EPOCHS, PLACEMENTS, SEEDS = 5, 47, 3
REPORTS = Path(__file__).parents[2] / "reports" / "benchmarks"
CURVES = REPORTS / "stopping.csv"
COLUMNS = ["placement", "reference", "seed", "epoch", "accuracy", "loss", "training_seconds", "validation_seconds"]
CPU = torch.device("cpu")

ORDERS, FEWEST_CURVES = 100, 30
"""Orders of the trials for each seed; seeds with fewer curves are left out of the replay."""

SIMULATED_SITES, NOISES, LANDSCAPES, BUDGET = 8, (0.25, 0.5, 1.0), 10, 100
"""Simulated: sites, noise by signal, landscapes of each kind, and how long each search is, in whole trainings."""

PLAIN_SCORE, LOOK, SHARED = 90.0, 0.04, 0.75
"""Score of the plain network in points; what a look on the way costs, in whole trainings, and how noise on the way and
in the end correlate, both about as in the real ones after the fourth epoch."""


def placements() -> dict[Placement, str]:
    """List the placements and what they are called: the references, then random ones from sparse to full."""
    sites = find_sites("resnet18", SIZE)
    chosen = {placement: name for name, placement in reference_placements(sites).items()}
    residual = [site for site in sites if "residual" in site.kinds]
    space, random = make_space(residual, ["se", "cbam"], [4, 8, 16], [3, 7]), np.random.default_rng(6)
    while len(chosen) < PLACEMENTS:
        share = random.uniform(0.1, 1)
        drawn = {
            site: str(random.choice(texts[1:])) for site, texts in space.choices.items() if random.random() < share
        }
        chosen.setdefault(space.placement(drawn), "")
    return chosen


def curve(data: Data, placement: Placement, seed: int) -> list[list[float]]:
    """Train; return for each epoch its number, accuracy, loss, and processor seconds in steps and in validation."""
    trainer = Trainer(data, Protocol(EPOCHS, BATCH, PEAK, seed, pick_precision(CPU)), CPU)
    model = PLAIN.model_copy(update={"placement": placement}).build(seed=seed)
    rows, training, began = [], 0.0, time.process_time()
    for step in trainer.train(model):
        training += time.process_time() - began
        began = time.process_time()
        if step % (trainer.steps // EPOCHS) == 0:
            seen = trainer.validate(model)
            model.train()
            spent = time.process_time() - began
            rows.append([len(rows) + 1, seen.accuracy, seen.loss, round(training, 2), round(spent, 2)])
            began = time.process_time()
    return rows


def collect(folder: str, minutes: float) -> None:
    """Train what is not in the table yet, one after the other, until the time is over."""
    if not CURVES.exists():
        CURVES.write_text(",".join(COLUMNS) + "\n")
    rows = pd.read_csv(CURVES)
    counts = rows.groupby(["placement", "seed"]).size()
    done = {key for key, count in counts.items() if count == EPOCHS}
    deadline, data = time.monotonic() + 60 * minutes, Bench(folder).data
    with CURVES.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for seed in range(SEEDS):
            for placement, name in placements().items():
                if time.monotonic() > deadline:
                    return
                if (str(placement), seed) in done:
                    continue
                with steady(CPU, 1):
                    of_epochs = curve(data, placement, seed)
                writer.writerows([str(placement), name, seed, *row] for row in of_epochs)
                file.flush()
                print(f"{time.strftime('%H:%M:%S')} {seed} {placement} {of_epochs[-1]}", flush=True)


@dataclass(frozen=True)
class Curve:
    """What was measured of a placement.

    Args:
        placement: The placement.
        reference: Its name, if it has one.
        params: What its blocks add to the number of parameters.
        accuracies: After each epoch.
        training: Processor seconds until the end of each epoch, in training steps.
        validation: Processor seconds of one validation.
    """

    placement: Placement
    reference: str
    params: int
    accuracies: tuple[float, ...]
    training: tuple[float, ...]
    validation: float


@dataclass(frozen=True)
class Rule:
    """When a training is stopped.

    Args:
        name: What it is called.
        epoch: After which epoch it is looked at.
        stop: Takes the epoch, costs, earlier trainings; returns where it is looked at.
    """

    name: str
    epoch: int
    stop: Callable[[int, Sequence[float], Sequence[Ended]], Milestone]


def forecasting(doubt: float) -> Callable[[int, Sequence[float], Sequence[Ended]], Milestone]:
    """Stop as the package does, with a given probability of stopping an equal."""

    def stop(epoch: int, costs: Sequence[float], ended: Sequence[Ended]) -> Milestone:
        with patch.object(stopping, "DOUBT", doubt):
            return stopping.milestone(epoch, costs, ended)

    return stop


def below_all(epoch: int, costs: Sequence[float], ended: Sequence[Ended]) -> Milestone:
    """Stop what is below every training that costs no more, noise left out: the most that this can stop."""
    found = stopping.milestone(epoch, costs, ended)
    seen = [other.on_the_way for other in ended if other.costs <= tuple(costs)]
    return replace(found, floor=min(seen) if len(ended) >= stopping.FEWEST else 0.0)


DOUBTS = (0.01, 0.05, 0.25)

RULES = [Rule(f"doubt {doubt}", epoch, forecasting(doubt)) for epoch in (2, 3, 4) for doubt in DOUBTS]
RULES += [Rule("below all", epoch, below_all) for epoch in (2, 3, 4)]


def curves(seed: int) -> list[Curve]:
    """Return the complete curves of a seed, in the order of the table, references first."""
    table = pd.read_csv(CURVES, keep_default_na=False)
    costs = CostTable("resnet18", SIZE)
    found = []
    for text, rows in table[table.seed == seed].groupby("placement", sort=False):
        if len(rows) == EPOCHS:
            placement = Placement.parse(str(text))
            params = costs.cost(placement).params - costs.plain.params
            times = tuple(rows.training_seconds), float(rows.validation_seconds.median())
            found.append(Curve(placement, rows.reference.iloc[0], params, tuple(rows.accuracy), *times))
    return found


def replayed(order: Sequence[Curve], rule: Rule) -> tuple[list[TrialRecord], float]:
    """Run a study of these trials under a rule as `Trials` does; return its records and processor seconds."""
    records: list[TrialRecord] = []
    seconds, at = 0.0, rule.epoch - 1
    for position, curve in enumerate(order):
        ended = [
            Ended((float(other.params),), other.accuracies[at], other.accuracies[-1])
            for other, record in list(zip(order, records, strict=False))[: max(0, position - LAG)]
            if record.state == "COMPLETE"
        ]
        milestone = Milestone(rule.epoch) if curve.reference else rule.stop(rule.epoch, (float(curve.params),), ended)
        seen, fields = curve.accuracies[at], {"trial": position, "placement": curve.placement, "params": curve.params}
        seconds += curve.training[at] + curve.validation
        if seen < milestone.floor:
            forecast = milestone.intercept + milestone.slope * seen
            records.append(TrialRecord(state="PRUNED", forecast=forecast, epochs=EPOCHS, seed=0, **fields))
        else:
            accuracy = curve.accuracies[-1]
            records.append(TrialRecord(state="COMPLETE", val_accuracy=accuracy, epochs=EPOCHS, seed=0, **fields))
            seconds += curve.training[-1] - curve.training[at] + curve.validation
    return records, seconds


def recommended(records: Sequence[TrialRecord]) -> list[Placement]:
    """Return the front that a study would recommend."""
    members = front(records, ("accuracy", "params"), accuracies(find(records, {})))
    return [record.placement for record in members]


def covered(members: Sequence[Placement], truth: Mapping[Placement, float], params: Mapping[Placement, int]) -> float:
    """Return the area between a front and the plain network's accuracy, up to the dearest placement's parameters."""
    gains = np.array([truth[placement] - truth[Placement()] for placement in members])
    return hypervolume(gains, np.array([params[placement] for placement in members]), max(params.values()))


@cache
def simulated(kind: str, noise: float, seed: int, doubt: float | None) -> tuple[int, int, float]:
    """Search a landscape of known truth with and without stopping, for the same time.

    At the milestone a training scores its truth plus a noise as large as in the end, most of it shared with the end.

    Args:
        kind: A landscape of `search.py`.
        noise: Standard deviation of the noise by that of the truth.
        seed: Which landscape, and the noise.
        doubt: With which doubt hopeless trainings are stopped; None if they are not.

    Returns:
        Number of trials, number of those that were stopped, share of the best hypervolume that is reached.
    """
    landscape, best, _ = known(kind, SIMULATED_SITES, seed)
    space, random = landscape.space, np.random.default_rng(seed)
    suggester = Suggester({site: [None, *SETTINGS] for site in space.sites}, [list(space.params.astype(float))])
    references = [placement_of(chosen) for chosen in space.references()]
    trials: list[Placement] = []
    costs: dict[Placement, list[float]] = {}
    scores: list[Score] = []
    ended: list[Ended | None] = []
    spent = 0.0
    while spent < BUDGET:
        position = len(trials)
        seen = max(0, position - LAG)
        if position < len(references):
            placement = references[position]
        else:
            after, own = position - len(references), np.random.default_rng((seed, position))
            placement = suggester.suggest(scores[:seen], costs, set(trials[seen:]), after, own)
        matrix = space.matrix([{site: str(placement.get(site, "none")) for site in space.sites}])
        cost, truth = float(space.cost(matrix)[0]), PLAIN_SCORE + float(landscape.gains(matrix)[0])
        at_end, apart = noise * SIGNAL * random.standard_normal(2)
        on_the_way = truth + SHARED * at_end + (1 - SHARED**2) ** 0.5 * apart
        repeated = trials.count(placement)
        trials.append(placement)
        costs[placement] = [cost]
        found = Milestone(0)
        if doubt is not None and position >= len(references) and not repeated:
            found = forecasting(doubt)(0, (cost,), [one for one in ended[:seen] if one])
        if on_the_way < found.floor:
            scores.append(Score(placement, found.intercept + found.slope * on_the_way, repeated))
            ended.append(None)
        else:
            scores.append(Score(placement, truth + at_end, repeated))
            ended.append(Ended((cost,), on_the_way, truth + at_end))
        spent += (1.0 if ended[-1] else stopping.SHARE) + (LOOK if doubt is not None else 0.0)
    model = Model(Evidence(Vocabulary(dict.fromkeys(space.sites, SETTINGS)), scores))
    whole = list(dict.fromkeys(placement for placement, one in zip(trials, ended, strict=True) if one))
    chosen = [{site: str(placement.get(site, "none")) for site in space.sites} for placement in whole]
    matrix, values = space.matrix(chosen), model.estimate(whole)[0]
    params = space.cost(matrix).astype(float)
    members = non_dominated(list(zip(params, -values, strict=True)))
    reached = hypervolume(landscape.gains(matrix)[members], params[members], space.dearest) / best
    return len(trials), ended.count(None), reached


def report() -> str:
    """Write what the curves and the simulation say."""
    of_seed = [found for found in map(curves, range(SEEDS)) if len(found) >= FEWEST_CURVES]
    counts = ", ".join(f"{len(found)} under seed {found_seed}" for found_seed, found in enumerate(of_seed))
    named = sum(bool(curve.reference) for curve in of_seed[0])
    lines = [
        "# Does stopping hopeless candidates early pay",
        "",
        "ResNet-18, ImageNet stem, 32x32, CIFAR-10 (a JPEG copy), 4,000 training and 5,000 validation images, "
        f"{EPOCHS} epochs from scratch, batch {BATCH}, peak rate {PEAK}, {pick_precision(CPU)}, one thread of a "
        f"processor that others used as well ({platform.machine()}, {os.cpu_count()} cores), "
        f"torch {torch.__version__}. Curves: {counts}; {named} references, the others random, from sparse to full. "
        "Made by `python tests/benchmarks/stopping.py`.",
        "",
        "## What an epoch foretells of the end",
        "",
        *_foretold(of_seed),
        "",
        "## Replay",
        "",
        f"{ORDERS} studies for each seed: the references, then the other placements in a random order; each trial is "
        "stopped or not by the function that the package uses, from the trials that a study may use. Objectives are "
        "accuracy and params. Rules differ in when they look and in the probability (doubt) of stopping an equal; "
        f"`placesearch run --stop-early` looks after {stopping.SHARE:g} of the epochs with a doubt of "
        f"{stopping.DOUBT:g}. `below all` stops what is, at the milestone, below every trial that costs no more, noise "
        "left out: the most that such a rule can stop.",
        "",
        "Saved: processor time of all trials, against the same study without stopping. A look on the way has its price "
        f"({_price(of_seed):.1f} % of a trial here; less with more training images), so that it may be negative. Loss: "
        "of the true hypervolume of the front that is recommended afterwards, against that of the front without "
        "stopping, above the plain network and up to the dearest placement. For true are taken the accuracies that the "
        "model expects from all scores of all seeds; so that truth is made of the same scores, and luck that both "
        "fronts share is not seen. Means over orders, with the 5th and the 95th percentile. Forgotten: the loss if the "
        "model is not told what was expected of a stopped trial.",
        "",
        "| rule | after epoch | stopped | saved % | loss % | orders with loss > 1 % | forgotten: loss % | pays |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
        *(_replay_row(rule, of_seed) for rule in RULES),
        "",
        "Pays: time is saved, and less than 1 % of the hypervolume is lost, on average. Rules were chosen among on "
        "this table, so that the best of them look somewhat better than they are.",
        "",
        "## Simulated search",
        "",
        f"Landscapes of known truth from `search.py`: {SIMULATED_SITES} sites, one fidelity, {len(KINDS)} kinds and "
        f"{LANDSCAPES} of each. Our sampler searches for the time of {BUDGET} whole trainings, with and without "
        f"stopping. On the way, after {stopping.SHARE:g} of the training, a score is the truth and a noise as large as "
        f"in the end, with a correlation of {SHARED:g} (assumed, about as above). "
        f"A look costs {LOOK:g} trainings. Here the sampler avoids what is "
        "bad, and the time that is saved goes into further trials. Gain: share of the best hypervolume reached with "
        "stopping less that without, paired, with a 95 % interval.",
        "",
        "| doubt | noise / signal | trials | stopped | without | with | gain |",
        "|---:|---:|---:|---:|---:|---:|---:|",
        *(_simulated_row(doubt, noise) for doubt in DOUBTS for noise in NOISES),
        "",
        "## Limits",
        "",
        "One backbone, one data set, one brief training from scratch, in which spread is several times the noise; in "
        "a long one placements differ less, and less is stopped. The placements of the replay are random: a search "
        "that learns tries fewer hopeless ones. What it learns less from stopped trials shows in the simulation alone. "
        "A trial is compared with trials of its own length: a brief one is stopped by what brief trainings say.",
    ]
    return "\n".join(lines) + "\n"


def _price(of_seed: Sequence[Sequence[Curve]]) -> float:
    every = [curve for found in of_seed for curve in found]
    return float(np.mean([100 * curve.validation / (curve.training[-1] + curve.validation) for curve in every]))


def _foretold(of_seed: Sequence[Sequence[Curve]]) -> list[str]:
    lines = [
        "Correlation over placements of the accuracy after an epoch with that in the end, and the standard deviation "
        "of the end around a straight line through both, in points.",
        "",
        "| seed | placements | spread in the end | " + " | ".join(f"epoch {at + 1}" for at in range(EPOCHS - 1)) + " |",
        "|---:|---:|---:|" + "---:|" * (EPOCHS - 1),
    ]
    for seed, found in enumerate(of_seed):
        values = np.array([curve.accuracies for curve in found])
        cells = []
        for at in range(EPOCHS - 1):
            slope, level = np.polyfit(values[:, at], values[:, -1], 1)
            rest = (values[:, -1] - level - slope * values[:, at]).std(ddof=2)
            cells.append(f"{np.corrcoef(values[:, at], values[:, -1])[0, 1]:.2f}, {100 * rest:.2f}")
        lines.append(f"| {seed} | {len(found)} | {100 * values[:, -1].std(ddof=1):.2f} | " + " | ".join(cells) + " |")
    return lines


def _replay_row(rule: Rule, of_seed: Sequence[Sequence[Curve]]) -> str:
    every = [_whole(curve, index, seed) for seed, found in enumerate(of_seed) for index, curve in enumerate(found)]
    truth = accuracies(find(every, {})) or {}
    params = {curve.placement: curve.params for found in of_seed for curve in found}
    rows = []
    for seed, found in enumerate(of_seed):
        usual = sum(curve.training[-1] + curve.validation for curve in found)
        best = covered(recommended([_whole(curve, i, 0) for i, curve in enumerate(found)]), truth, params)
        references = [curve for curve in found if curve.reference]
        others = [curve for curve in found if not curve.reference]
        random = np.random.default_rng(seed)
        for _ in range(ORDERS):
            order = references + [others[index] for index in random.permutation(len(others))]
            records, seconds = replayed(order, rule)
            whole = [record for record in records if record.state == "COMPLETE"]
            losses = [1 - covered(recommended(part), truth, params) / best for part in (records, whole)]
            rows.append([len(records) - len(whole), 1 - seconds / usual, *losses])
    stopped, saved, loss, forgotten = np.array(rows).T
    pays = "yes" if saved.mean() > 0 and loss.mean() < 0.01 else "no"
    return (
        f"| {rule.name} | {rule.epoch} | {stopped.mean():.1f} | {_spread(saved)} | {_spread(loss)} "
        f"| {100 * (loss > 0.01).mean():.0f} % | {_spread(forgotten)} | {pays} |"
    )


def _whole(curve: Curve, position: int, seed: int) -> TrialRecord:
    fields = {"placement": curve.placement, "val_accuracy": curve.accuracies[-1], "params": curve.params}
    return TrialRecord(trial=position, state="COMPLETE", epochs=EPOCHS, seed=seed, **fields)


def _spread(shares: np.ndarray) -> str:
    mean, low, high = (round(100 * value, 1) + 0.0 for value in (shares.mean(), *np.percentile(shares, [5, 95])))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def _simulated_row(doubt: float, noise: float) -> str:
    pairs = [
        [*simulated(kind, noise, seed, doubt), simulated(kind, noise, seed, None)[2]]
        for kind in KINDS
        for seed in range(LANDSCAPES)
    ]
    trials, stopped, reached, without = np.array(pairs).T
    gain = reached - without
    half = 1.96 * gain.std(ddof=1) / len(gain) ** 0.5
    return (
        f"| {doubt} | {noise:g} | {trials.mean():.0f} | {stopped.mean():.0f} | {without.mean():.3f} "
        f"| {reached.mean():.3f} | {gain.mean():+.3f} ({gain.mean() - half:+.3f} to {gain.mean() + half:+.3f}) |"
    )


def main() -> None:
    if sys.argv[1:]:
        collect(sys.argv[1], float(sys.argv[2]) if sys.argv[2:] else 60.0)
    (REPORTS / "stopping.md").write_text(report(), encoding="utf-8")


if __name__ == "__main__":
    main()
