"""How much of a whole study is training? The share of forward, backward and step in its wall time.

Runs (i) the default study of the digits and (ii) 30 trials of two epochs on a part of CIFAR-10 as an image folder, in
bf16 where the processor has it, one worker a core. A worker that is not training is getting ready, validating, waiting
for its next trial, or done before the others; the table says how much of each. What trials call training are steps of
our loop, which also draws, augments and normalises batches; how much of that is forward, backward and step is measured
beside, against the bare loop of `training_loop.py`. Writes `reports/benchmarks/whole_study.md`. About 8 minutes on two
cores.

    python tests/benchmarks/whole_study.py CIFAR10_FOLDER [TRIALS]
"""

import os
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from candidates_an_hour import part_of
from training_loop import bare, ours, timed

import placesearch as ps
from placesearch.records import StudyBegan, TrialBegan, TrialEnded
from placesearch.training.loop import pick_precision

CPU = torch.device("cpu")
ROUNDS, SECONDS = 15, 0.7
REPORT = Path(__file__).resolve().parents[2] / "reports" / "benchmarks" / "whole_study.md"


def network_share(side: int, batch: int) -> float:
    """Return which part of a step of our loop is forward, backward and step: the bare loop's time by ours."""
    loops = [make("resnet18", side, batch, CPU, pick_precision(CPU)) for make in (bare, ours)]
    once = [timed(steps, 3, CPU) for steps in loops]
    count = max(2, round(SECONDS / once[0]))
    ratios = []
    for index in range(ROUNDS):
        taken = {which: timed(loops[which], count, CPU) for which in ((0, 1) if index % 2 else (1, 0))}
        ratios.append(taken[0] / taken[1])
    return min(1.0, median(ratios))


def shares(**settings: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Run a study; return where the time of its workers went, as shares of search time x workers, and some seconds."""
    began: dict[int, float] = {}
    ended: dict[int, float] = {}
    planned, jobs = 0.0, 1

    def watch(event: object) -> None:
        nonlocal planned, jobs
        now = time.perf_counter()
        if isinstance(event, StudyBegan):
            planned, jobs = now, event.jobs
        elif isinstance(event, TrialBegan):
            began[event.task.trial] = now
        elif isinstance(event, TrialEnded):
            assert event.record.state == "COMPLETE", event.record.error
            ended[event.record.trial] = now

    start = time.perf_counter()
    study = ps.run(ps.StudyConfig(**settings), watch=watch)
    whole = time.perf_counter() - start
    records, all_of_it = study.records, study.seconds * jobs
    first, last = sorted(began)[:jobs], sorted(ended.values())[-jobs:]
    getting_ready = sum(ended[trial] - began[trial] - (records[trial].seconds or 0.0) for trial in first)
    training = sum(record.training_seconds or 0.0 for record in records)
    inside = sum(record.seconds or 0.0 for record in records)
    parts = {
        "training steps": training,
        "building and validation": inside - training,
        "workers getting ready": getting_ready,
        "done before the others": sum(last[-1] - end for end in last),
    }
    parts["between trials"] = all_of_it - sum(parts.values())
    seconds = {"trials": len(records), "whole run": whole, "planning": planned - start, "search": study.seconds}
    return {name: value / all_of_it for name, value in parts.items()}, seconds


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    source = Path(sys.argv[1]).resolve()
    trials = int(sys.argv[2]) if sys.argv[2:] else 30
    with tempfile.TemporaryDirectory() as made:
        os.chdir(made)
        part_of(source, Path(made) / "images")
        cifar = {"data": "images", "epochs": 2, "long_epochs": 0, "batch_size": 128, "input_size": 32}
        seen = [shares(backbone="resnet18"), shares(backbone="resnet18", trials=trials, **cifar)]
        os.chdir("/")
    names = list(seen[0][0])
    rows = []
    for label, side, batch, (parts, seconds) in zip(
        ("digits, the default study", "CIFAR-10, image folder"), (97, 32), (8, 128), seen, strict=True
    ):
        inner = network_share(side, batch)
        share = parts["training steps"] * inner
        rows.append(
            f"| {label} | {seconds['trials']:.0f} | {seconds['planning']:.1f} | {seconds['search']:.1f} | "
            f"{seconds['whole run'] - seconds['planning'] - seconds['search']:.1f} | {inner:.3f} | **{share:.3f}** | "
            f"{share * seconds['search'] / seconds['whole run']:.3f} |"
        )
        print(rows[-1], parts, flush=True)
    text = [
        "# How much of a whole study is training",
        "",
        f"ResNet-18, {platform.machine()}, {len(os.sched_getaffinity(0))} cores with a worker of one thread each, "
        f"{pick_precision(CPU)}, torch {torch.__version__}; one run of each study. (i) `placesearch run --backbone "
        "resnet18`: digits "
        "at 97x97, one epoch in batches of 8, 1,079 training and 359 validation images; (ii) CIFAR-10 (a JPEG copy) as "
        "an image folder, 4,000 training and 1,000 validation images at 32x32, two epochs in batches of 128, ImageNet "
        f"stem, {trials} trials. Made by `python tests/benchmarks/whole_study.py`.",
        "",
        "The search begins with the first suggestion and ends with the last trial's record; its share is seconds in "
        "forward, backward and step over seconds of search x workers. Workers start during the planning; what is left "
        "of their start counts as search. 'In a step' is the part of our training step that is forward, backward and "
        "step; the rest draws, augments and normalises the batch (the bare loop's time by ours, median of "
        f"{ROUNDS} rounds in turns). After the search, latencies of the front are measured and reports written.",
        "",
        "| study | trials | planning, s | search, s | after it, s | in a step | share of the search | "
        "share of the whole run |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *rows,
        "",
        "Where workers' time went, in percent of search x workers:",
        "",
        f"| study | {' | '.join(names)} |",
        f"|---|{'---:|' * len(names)}",
        *(
            f"| {label} | {' | '.join(f'{100 * parts[name]:.1f}' for name in names)} |"
            for label, (parts, _) in zip(("digits", "CIFAR-10"), seen, strict=True)
        ),
    ]
    REPORT.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
