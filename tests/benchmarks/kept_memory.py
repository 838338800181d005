"""What does it win that workers keep freed memory? Two workers in turns, one with `KEEPS_MEMORY` and one without.

Both train plain ResNet-18 with its ImageNet stem at 32x32 in batches of 128, one thread each, never at the same time;
the order changes from pair to pair. Writes `reports/benchmarks/kept_memory.md`. About 3 minutes on one core.

    python tests/benchmarks/kept_memory.py
"""

import platform
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch

from placesearch.costs.latency import median_interval
from placesearch.evaluation.workers import Assignment, Workers
from placesearch.models.architecture import Architecture
from placesearch.training.loop import Protocol, pick_precision

PAIRS, SECONDS = 60, 1.5
REPORT = Path(__file__).parents[2] / "reports" / "benchmarks" / "kept_memory.md"


def main() -> None:
    precision = pick_precision(torch.device("cpu"))
    plain = Architecture(backbone="resnet18", num_classes=10, input_size=(3, 32, 32))
    protocol = Protocol(epochs=1000, batch_size=128, learning_rate=1e-3, seed=0, precision=precision)
    assignment = Assignment(plain, protocol, "digits", "cpu")
    with Workers(1, assignment, lambda _: None) as keeping, Workers(1, assignment, lambda _: None) as usual:
        keeping.hire(1)
        with patch("placesearch.evaluation.workers.KEEPS_MEMORY", {}):
            usual.hire(1)
        for workers in (keeping, usual):
            workers.pace(1, SECONDS)
        ratios = []
        for pair in range(PAIRS):
            order = (keeping, usual) if pair % 2 else (usual, keeping)
            rates = {workers is keeping: workers.pace(1, SECONDS) for workers in order}
            ratios.append(rates[True] / rates[False])
    ratios.sort()
    low, high = median_interval(PAIRS)
    text = [
        "# Workers that keep freed memory",
        "",
        f"{platform.machine()}, one thread, {precision}, torch {torch.__version__}, {PAIRS} pairs in turns of "
        f"{SECONDS} s. ResNet-18, ImageNet stem, 32x32, batches of 128. Steps a second of a worker that keeps freed "
        "memory by "
        "those of one that does not, median over pairs with a 95 % interval. Made by "
        "`python tests/benchmarks/kept_memory.py`.",
        "",
        f"{median(ratios):.3f} ({ratios[low]:.3f} to {ratios[high]:.3f})",
    ]
    REPORT.write_text("\n".join(text) + "\n", encoding="utf-8")
    print(text[-1])


if __name__ == "__main__":
    main()
