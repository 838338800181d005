"""How much of a lead in a brief training on the digits is only a faster start?

Trains plain ResNet-18, SE everywhere and CBAM everywhere from scratch for one epoch of the digits at 97x97, in batches
of 16 and of 8 images at the same peak learning rate, on a few seeds, two trainings at a time. Writes a table to
`reports/benchmarks/brief_training.md`. About 6 minutes on two cores.

    python tests/benchmarks/brief_training.py [SEEDS]
"""

import platform
import sys
from pathlib import Path
from statistics import mean, stdev

import torch

from placesearch.evaluation.workers import Assignment, Workers
from placesearch.models.architecture import Architecture
from placesearch.models.sites import find_sites
from placesearch.records import Task
from placesearch.search.space import reference_placements
from placesearch.training.loop import Protocol

SIZE, PEAK, BATCHES = (3, 97, 97), 0.02, (16, 8)
REPORT = Path(__file__).parents[2] / "reports" / "benchmarks" / "brief_training.md"


def main() -> None:
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    references = reference_placements(find_sites("resnet18", SIZE))
    plain = Architecture(backbone="resnet18", num_classes=10, input_size=SIZE)
    scores: dict[tuple[int, str], list[float]] = {}
    seconds: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for batch in BATCHES:
        for seed in seeds:
            assignment = Assignment(plain, Protocol(1, batch, PEAK, seed, "fp32"), "digits", "cpu")
            with Workers(2, assignment, lambda _: None) as workers:
                waiting = [Task(index, references[name], name) for index, name in enumerate(references)][:3]
                left = len(waiting)
                for task in waiting[:2]:
                    workers.submit(task)
                del waiting[:2]
                while left:
                    for record in workers.results():
                        left -= 1
                        scores.setdefault((batch, str(record.reference)), []).append(
                            record.val_accuracy or float("nan")
                        )
                        seconds[batch].append(record.seconds or 0.0)
                        print(batch, seed, record.reference, record.val_accuracy, flush=True)
                        if waiting:
                            workers.submit(waiting.pop())
    lines = [
        "# A brief training on the digits: who learns fast?",
        "",
        f"ResNet-18, digits at 97x97, one epoch from scratch, peak learning rate {PEAK}, fp32, one thread a training, "
        f"two at a time; {len(seeds)} seeds. Validation accuracy in percent, mean and range over seeds, on 359 images.",
        "",
        f"{platform.machine()}, {torch.get_num_threads()} cores, torch {torch.__version__}. "
        "Made by `python tests/benchmarks/brief_training.py`.",
        "",
        "| batch | steps | placement | accuracy | range | ahead of plain, points |",
        "|---:|---:|---|---:|---|---:|",
    ]
    for (batch, name), values in scores.items():
        lead = 100 * (mean(values) - mean(scores[batch, "plain"]))
        spread = f"{100 * min(values):.1f}-{100 * max(values):.1f}"
        lines.append(f"| {batch} | {1079 // batch} | {name} | {100 * mean(values):.1f} | {spread} | {lead:+.1f} |")
    lines += ["", "Seconds a training: " + ", ".join(
        f"batch {batch}: {mean(times):.0f} (sd {stdev(times):.0f})" for batch, times in seconds.items()
    ) + "."]  # fmt: skip
    REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(REPORT.read_text())


if __name__ == "__main__":
    main()
