"""How much of a training step is the network's own work? Our loop against a bare one.

The bare loop does nothing but forward, backward and step, on one batch of random numbers that lies ready; ours draws,
augments and normalises its batches besides, follows the schedule and yields after each step. Same model, precision and
batch, one thread on a processor, in turns: some steps of one, some of the other; the order changes from round to round.
Writes `reports/benchmarks/training_loop.md`, for a GPU `training_loop_gpu.md`. About 3 minutes on one core.

    python tests/benchmarks/training_loop.py [cpu|cuda]
"""

import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from placesearch.costs.latency import median_interval
from placesearch.models.backbones import load_backbone
from placesearch.plan import device_name
from placesearch.training.datasets import Data, Split
from placesearch.training.loop import Protocol, Trainer, pick_precision

CASES = [("resnet18", 97, 8), ("resnet18", 32, 128), ("resnet50", 32, 64), ("mobilenet_v3_small", 64, 32)]
ROUNDS, SECONDS = 15, 0.7
REPORTS = Path(__file__).parents[2] / "reports" / "benchmarks"


def bare(name: str, side: int, batch: int, device: torch.device, precision: str) -> Iterator[None]:
    """Yield after each step of a loop that does nothing else."""
    torch.manual_seed(0)
    model = load_backbone(name, 10).to(device).to(memory_format=torch.channels_last).train()
    images = torch.randn(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=device)
    recipe = Protocol(epochs=1, batch_size=batch, learning_rate=0.01, seed=0, precision=precision)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=0.01,
        momentum=recipe.momentum,
        nesterov=True,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    while True:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(model(images), labels, label_smoothing=recipe.label_smoothing)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield


def ours(name: str, side: int, batch: int, device: torch.device, precision: str) -> Iterator[int]:
    """Yield after each step of our loop."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (batch * 50, side, side, 3), dtype=torch.uint8)
    split = Split(images, torch.randint(10, (len(images),)))
    data = Data({"train": split, "validation": split, "test": split}, tuple("0123456789"), flip=True)
    trainer = Trainer(data, Protocol(1000, batch, 0.01, 0, precision), device)
    yield from trainer.train(load_backbone(name, 10))


def timed(steps: Iterator[object], count: int, device: torch.device) -> float:
    """Return seconds a step."""
    began = time.perf_counter()
    for _ in range(count):
        next(steps)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / count


def main() -> None:
    device = torch.device(sys.argv[1] if sys.argv[1:] else "cpu")
    torch.set_num_threads(1)
    precision = pick_precision(device)
    lines = []
    for name, side, batch in CASES:
        makers: list[Callable[..., Iterator[object]]] = [bare, ours]
        loops = [make(name, side, batch, device, precision) for make in makers]
        once = [timed(steps, 3, device) for steps in loops]
        count = max(2, round(SECONDS / once[0]))
        ratios, times = [], []
        for index in range(ROUNDS):
            order = (0, 1) if index % 2 else (1, 0)
            taken = {which: timed(loops[which], count, device) for which in order}
            ratios.append(taken[0] / taken[1])
            times.append(taken)
        low, high = median_interval(ROUNDS)
        ratios.sort()
        rates = [batch / median(taken[which] for taken in times) for which in (0, 1)]
        lines.append(
            f"| {name} | {side} | {batch} | {rates[0]:.0f} | {rates[1]:.0f} | {median(ratios):.3f} "
            f"({ratios[low]:.3f} to {ratios[high]:.3f}) |"
        )
        print(lines[-1], flush=True)
    where = device_name(device) if device.type != "cpu" else f"{platform.machine()}, one thread"
    text = [
        "# Our training loop against a bare one",
        "",
        f"{where}, {precision}, torch {torch.__version__}, {ROUNDS} rounds in turns of about {SECONDS} s. The ratio is "
        "our steps a second by the bare loop's, median over rounds with a 95 % interval. Made by "
        f"`python tests/benchmarks/training_loop.py {device.type}`.",
        "",
        "| backbone | side | batch | images/s, bare | images/s, ours | ratio |",
        "|---|---:|---:|---:|---:|---:|",
        *lines,
    ]
    path = REPORTS / ("training_loop.md" if device.type == "cpu" else "training_loop_gpu.md")
    path.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
