"""Which brief protocol predicts long training? Scores of placements under several protocols, then what they agree on.

ResNet-18 with its ImageNet stem at 32x32 on CIFAR-10 as an image folder, 4,000 training and 5,000 validation images: a
size at which a processor can train until nearly every training image is right, which is what `long` does.
Every placement is trained long from scratch and under each brief protocol, on several seeds. Scores are added to
`reports/benchmarks/fidelity.csv` one by one, so that the benchmark goes on where it was stopped, on another day or
machine. Then `reports/benchmarks/fidelity.md` is written from all of them: Kendall's tau with a bootstrap interval over
placements, the standard deviation of a score over seeds, unpaired and as a paired difference from plain, signal to
noise, and information a second = signal variance / (noise variance * seconds). About 5 minutes a placement and seed on
one core.

    python tests/benchmarks/fidelity.py CIFAR10_FOLDER [MINUTES]
    python tests/benchmarks/fidelity.py               write the report again
"""

import csv
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import kendalltau, t

from placesearch.evaluation.candidate import Evaluator
from placesearch.models.architecture import Architecture
from placesearch.models.sites import find_sites
from placesearch.placement import BlockSetting, Placement
from placesearch.records import Task
from placesearch.search.space import make_space, reference_placements
from placesearch.training.datasets import Data, load_data
from placesearch.training.loop import Protocol, pick_precision

SIZE, BATCH, PEAK, TRAIN = (3, 32, 32), 128, 0.08, 4000
PROTOCOLS: dict[str, dict[str, Any]] = {
    "long": {"epochs": 20},
    "scratch-5": {"epochs": 5},
    "branch-5": {"epochs": 5, "start": "branch"},
    "branch-5-fast": {"epochs": 5, "start": "branch", "block_rate": 4.0},
    "scratch-5-fp32": {"epochs": 5, "precision": "fp32"},
}
"""What each protocol changes; `long` is what the others are to predict."""

EXTRA = ("scratch-5-fp32",)
"""Protocols for the first placements only."""

PLACEMENTS, SEEDS, AT_A_TIME = 24, 3, 8
REPORTS = Path(__file__).parents[2] / "reports" / "benchmarks"
SCORES = REPORTS / "fidelity.csv"
COLUMNS = ["placement", "protocol", "seed", "accuracy", "loss", "seconds"]
PLAIN = Architecture(backbone="resnet18", num_classes=10, input_size=SIZE)


def placements() -> list[Placement]:
    """List the placements: references, single stages, single sites, random ones from sparse to full."""
    sites = find_sites("resnet18", SIZE)
    residual = [site for site in sites if "residual" in site.kinds]
    named = reference_placements(sites)
    chosen = [named[name] for name in ("plain", "se-everywhere", "cbam-everywhere", "cbam-last-stage")]
    chosen += [
        Placement({site.name: setting for site in residual if site.name.startswith(stage)})
        for setting in (BlockSetting("se", 16), BlockSetting("cbam", 16, 3))
        for stage in ("layer1", "layer3")
    ]
    space = make_space(residual, ["se", "cbam"], [4, 8, 16], [3, 7])
    random = np.random.default_rng(0)
    while len(chosen) < PLACEMENTS:
        share = random.uniform(0.1, 1)
        drawn = {
            site: str(random.choice(texts[1:])) for site, texts in space.choices.items() if random.random() < share
        }
        chosen.append(space.placement(drawn))
    return chosen


@dataclass(frozen=True)
class Job:
    """One training."""

    placement: str
    protocol: str
    seed: int


def jobs() -> Iterator[Job]:
    """Yield the trainings, so that what was reached is balanced: few placements first, on all seeds."""
    every = [str(placement) for placement in placements()]
    parts = [every[at : at + AT_A_TIME] for at in range(0, len(every), AT_A_TIME)]
    usual = [name for name in PROTOCOLS if name not in EXTRA]
    first = [(part, seed, usual) for part in parts[:2] for seed in (0, 1)]
    then = [(parts[0], seed, EXTRA) for seed in (0, 1)]
    last = [
        (parts[2], 0, usual),
        (parts[2], 1, usual),
        *((part, seed, usual) for seed in range(2, SEEDS) for part in parts),
    ]
    for part, seed, protocols in (*first, *then, *last):
        for text in part:
            for protocol in protocols:
                yield Job(text, protocol, seed)


class Bench:
    """What a process keeps: the data, and the evaluators."""

    def __init__(self, folder: str) -> None:
        torch.set_num_threads(1)
        whole = load_data(folder, SIZE[1])
        train = whole.splits["train"]
        every = torch.arange(0, len(train.labels), len(train.labels) / TRAIN).long()[:TRAIN]  # sorted by class
        splits = {**whole.splits, "train": train.part(every)}
        self.data = Data(splits, whole.classes, whole.flip)
        self.evaluators: dict[tuple[str, int], Evaluator] = {}
        self.folder = TemporaryDirectory()

    def run(self, job: Job) -> list[object]:
        """Train and return a row of the table."""
        key = (job.protocol, job.seed)
        if key not in self.evaluators:
            cpu = torch.device("cpu")
            usual = {"batch_size": BATCH, "learning_rate": PEAK, "seed": job.seed, "precision": pick_precision(cpu)}
            protocol = Protocol(**{**usual, **PROTOCOLS[job.protocol]})
            branches = Path(self.folder.name) if protocol.start == "branch" else None
            self.evaluators[key] = Evaluator(PLAIN, protocol, self.data, cpu, branches=branches)
            self.evaluators[key].pace(0.0)  # trains the plain network up to the branch, which is no candidate's time
        began = time.process_time()
        record = self.evaluators[key].evaluate(Task(0, Placement.parse(job.placement), None), lambda _: None)
        if record.state != "COMPLETE":
            raise RuntimeError(record.error)
        scores = [record.val_accuracy, record.val_loss, round(time.process_time() - began, 2)]
        return [job.placement, job.protocol, job.seed, *scores]


BENCH: list[Bench] = []


def _prepare(folder: str) -> None:
    BENCH.append(Bench(folder))


def _run(job: Job) -> list[object]:
    return BENCH[0].run(job)


def collect(folder: str, minutes: float) -> None:
    """Run what is not in the table yet, two at a time, until the time is over."""
    if not SCORES.exists():
        SCORES.write_text(",".join(COLUMNS) + "\n")
    table = pd.read_csv(SCORES)
    done = {Job(row.placement, row.protocol, int(row.seed)) for row in table.itertuples()}
    waiting = [job for job in jobs() if job not in done]
    deadline = time.monotonic() + 60 * minutes
    cores = len(os.sched_getaffinity(0))
    with get_context("spawn").Pool(cores, _prepare, (folder,)) as pool, SCORES.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for row in pool.imap_unordered(_run, waiting):
            writer.writerow(row)
            file.flush()
            print(f"{time.strftime('%H:%M:%S')} {row}", flush=True)
            if time.monotonic() > deadline:
                pool.terminate()
                break


def report() -> str:
    """Write what the scores say."""
    table = pd.read_csv(SCORES)
    long = table[table.protocol == "long"]
    lines = []
    for protocol in PROTOCOLS:
        own = table[table.protocol == protocol]
        for score, sign in (("accuracy", 1), ("loss", -1)):
            grid = sign * own.pivot_table(index="placement", columns="seed", values=score)
            target = long.pivot_table(index="placement", columns="seed", values="accuracy")
            grid, target = grid.dropna(), target.dropna()
            shared = grid.index.intersection(target.index)
            if len(shared) < 4 or grid.shape[1] < 2:
                continue
            lines.append(_row(protocol, score, grid.loc[shared], target.loc[shared], own.seconds.mean()))
    counts = table.groupby("protocol").size()
    trainings = ", ".join(f"{name} {counts.get(name, 0)}" for name in PROTOCOLS)
    head = [
        "# Which brief protocol predicts long training",
        "",
        f"ResNet-18, ImageNet stem, 32x32, CIFAR-10 (a JPEG copy), {TRAIN:,} training and 5,000 validation images, "
        f"batch {BATCH}, peak rate {PEAK}, {pick_precision(torch.device('cpu'))} on processors of this kind, one "
        f"thread a training, torch {torch.__version__}. Trainings so far: {trainings}. `long` is "
        f"{PROTOCOLS['long']['epochs']} epochs from scratch; `scratch-N` and `branch-N` are N epochs, the latter from "
        "a branch of the plain network, `fast` with four times the learning rate in the blocks. Made by "
        "`python tests/benchmarks/fidelity.py`.",
        "",
        "tau: Kendall's, between means over seeds of the brief score and of the long accuracy, with a 95 % bootstrap "
        "interval over placements. Repeat: the same between one seed and another of the protocol itself, mean over "
        "pairs of seeds; for `long` about as much of it as can be foretold at all. "
        "sd: of one score over seeds, within placements. Paired: of the difference from "
        "plain under the same seed, by root 2. Signal: standard deviation of the placements' means, the noise in "
        "them taken away. Seconds: processor time of one training and validation. "
        "Accuracies in points, losses in nats. Signal is all that tells placements apart under a protocol, also what "
        "long training does not confirm: information is about the brief score itself, only tau about the long one.",
        "",
        "| protocol | score | placements | seeds | tau | repeat | sd | paired | signal | s / n | seconds "
        "| information/s |",
        "|---|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    return "\n".join([*head, *lines, *_agreement(table), *_differences(table)]) + "\n"


def _differences(table: pd.DataFrame) -> list[str]:
    """List what each placement leads plain by, by protocol, mean over the seeds that all of these have."""
    kinds = [name for name in PROTOCOLS if name not in EXTRA]
    grid = table[table.protocol.isin(kinds)].pivot_table(
        index=["placement", "seed"], columns="protocol", values="accuracy"
    )
    grid = 100 * grid[kinds].dropna().unstack().dropna()
    means = grid.sub(grid.loc["none"]).T.groupby(level="protocol").mean().T[kinds].drop(index="none")
    names = {str(placement): name for name, placement in reference_placements(find_sites("resnet18", SIZE)).items()}
    return [
        "",
        "Accuracy less that of plain in points, mean over seeds:",
        "",
        f"| placement | {' | '.join(kinds)} |",
        f"|---|{'---:|' * len(kinds)}",
        *(
            f"| {names.get(str(text), text)} | {' | '.join(f'{value:+.2f}' for value in row)} |"
            for text, row in means.sort_values("long", ascending=False).iterrows()
        ),
    ]


def _agreement(table: pd.DataFrame) -> list[str]:
    """Say how far trainings in fp32 are from the same ones in the usual precision."""
    scores = table.set_index(["placement", "seed", "protocol"])[["accuracy", "loss"]].unstack()
    pairs = scores.dropna(subset=[("loss", "scratch-5-fp32"), ("loss", "scratch-5")])
    usual = pick_precision(torch.device("cpu"))
    if len(pairs) < 4 or usual == "fp32":
        return []
    told = []
    for score, unit, name in (("loss", 1, "nats of loss"), ("accuracy", 100, "points of accuracy")):
        difference = unit * (pairs[score, "scratch-5-fp32"] - pairs[score, "scratch-5"])
        reach = float(t.isf(0.025, len(pairs) - 1)) * difference.sem()
        told.append(f"{difference.mean():+.3f} ± {reach:.3f} {name} (sd of one pair {difference.std():.3f})")
    return [
        "",
        f"fp32 less {usual}, scratch-5, mean over {len(pairs)} pairs of the same placement and seed with a 95 % "
        f"interval: {' and '.join(told)}.",
    ]


def _row(protocol: str, score: str, grid: pd.DataFrame, target: pd.DataFrame, seconds: float) -> str:
    means, long = grid.mean(axis=1).to_numpy(), target.mean(axis=1).to_numpy()
    seeds = grid.shape[1]
    sd = float(np.sqrt(grid.var(axis=1, ddof=1).mean()))
    paired_grid = grid.sub(grid.loc["none"]).drop(index="none") if "none" in grid.index else grid
    paired = float(np.sqrt(paired_grid.var(axis=1, ddof=1).mean() / 2))
    signal = float(max(0.0, means.var(ddof=1) - min(sd, paired) ** 2 / seeds)) ** 0.5
    noise = min(sd, paired)
    tau = "" if protocol == "long" and score == "accuracy" else _tau(means, long)
    information = signal**2 / (noise**2 * seconds) if noise else float("nan")
    unit = 100 if score == "accuracy" else 1
    return (
        f"| {protocol} | {score} | {len(grid)} | {seeds} | {tau} | {_repeat(grid):.2f} | {unit * sd:.3f} "
        f"| {unit * paired:.3f} "
        f"| {unit * signal:.3f} | {signal / noise:.2f} | {seconds:.0f} | {information:.4f} |"
    )


def _repeat(grid: pd.DataFrame) -> float:
    pairs = combinations(grid.columns, 2)
    return float(np.mean([kendalltau(grid[one], grid[other]).statistic for one, other in pairs]))


def _tau(means: np.ndarray, long: np.ndarray) -> str:
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        chosen = random.integers(len(means), size=len(means))
        drawn.append(kendalltau(means[chosen], long[chosen]).statistic)
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return f"{kendalltau(means, long).statistic:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    if sys.argv[1:]:
        collect(sys.argv[1], float(sys.argv[2]) if sys.argv[2:] else 60.0)
    (REPORTS / "fidelity.md").write_text(report(), encoding="utf-8")


if __name__ == "__main__":
    main()
