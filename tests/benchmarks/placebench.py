"""PlaceBench: what every placement of SE and CBAM in a small residual network reaches in real trainings.

Trains `ResNet(BasicBlock, [1, 1, 1, 1])` on CIFAR-10 at 32x32 with nothing, `se(r=16)` or `cbam(r=16,k=7)` at each of
its four residual sites, 81 placements, by the project's own training loop, one thread a process. Goes on where it
stopped: a training that has ended is a line in `LOG/trainings.jsonl` or a row in `reports/placebench`, and is not
repeated; what is killed loses the running trainings alone. All placements come under one seed before the next seed.

    python tests/benchmarks/placebench.py train --data FOLDER --log LOG [--protocol NAME ...] [--jobs 2] [--minutes M]
    python tests/benchmarks/placebench.py export --log LOG [--into reports/placebench]
    python tests/benchmarks/placebench.py pilot --log LOG
"""

import argparse
import base64
import csv
import json
import multiprocessing
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torchvision.models.resnet import BasicBlock, ResNet

from placesearch.models.architecture import Architecture
from placesearch.placement import BlockSetting, Placement
from placesearch.plan import AT_BATCH_SIZE, LEARNING_RATE
from placesearch.training.datasets import Data, load_data
from placesearch.training.loop import Protocol, Trainer, pick_device, pick_precision

ROOT = Path(__file__).parents[2] / "reports" / "placebench"
SITES = tuple(f"layer{stage}.0.bn2" for stage in (1, 2, 3, 4))
SETTINGS = (None, BlockSetting("se", 16), BlockSetting("cbam", 16, 7))
WIDTH, BATCH, SUBSET_SEED, CURVE = 64, 128, 2026, 1000
"""Channels of the first stage; images a step; seed of the order; validation images behind each point of a curve."""


@dataclass(frozen=True, slots=True)
class Regime:
    """A protocol of the table.

    Args:
        images: Training images; a fixed part of the training split, the smaller ones part of the larger.
        epochs: Passes over them, in one whole one-cycle schedule. A prefix of the curve of a longer one is not a brief
            training: its learning rate has not come down.
        seeds: Seeds from 0.
        every: Takes each `every`-th of the placements.
    """

    images: int
    epochs: int
    seeds: int = 4
    every: int = 1


PROTOCOLS = {
    "5000x12": Regime(5000, 12, every=11),
    "10000x6": Regime(10000, 6, every=11),
    "20000x3": Regime(20000, 3, every=11),
}
"""Every protocol by name. The three of the pilot cost about the same; the one chosen becomes `full` with `every=1`."""

SHORT = ("placement", "seed", "protocol", "epochs", "images", "width", "val_accuracy", "val_loss", "test_accuracy")
COLUMNS = (*SHORT, "seconds", "precision", "device", "torch")
Key = tuple[str, int, int, int]


def network(num_classes: int = 10) -> ResNet:
    """Return the plain network, `resnet18[1,1,1,1]`."""
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)


def placements() -> list[Placement]:
    """Return all 81 placements; the first is plain, and the last site changes fastest."""
    return [
        Placement((site, setting) for site, setting in zip(SITES, choice, strict=True) if setting is not None)
        for choice in product(SETTINGS, repeat=len(SITES))
    ]


def chosen(regime: Regime) -> list[Placement]:
    """Return the placements of a protocol, spread over the space."""
    return placements()[:: regime.every]


def key_of(row: dict[str, Any]) -> Key:
    """Return what makes a training the same as another."""
    return str(row["placement"]), int(row["seed"]), int(row["images"]), int(row["epochs"])


def read_log(log: Path) -> list[dict[str, Any]]:
    """Return the trainings in a log; a last line that was cut off by a kill is left out."""
    path = log / "trainings.jsonl"
    whole = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in whole[: whole.rfind(b"\n") + 1].splitlines()]


def read_tables(folder: Path) -> list[dict[str, Any]]:
    """Return the trainings in the committed files, with their curves and correctness."""
    rows = {}
    for name in ("trainings", "curves", "correct"):
        path = folder / f"{name}.csv"
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    rows.setdefault(key_of(row), {"curve": []})
                    if name == "curves":
                        rows[key_of(row)]["curve"].append(float(row["val_accuracy"]))
                    else:
                        rows[key_of(row)].update(row)
    return list(rows.values())


def subset(data: Data, images: int) -> Data:
    """Return the data with the first images of a fixed order of the training split, and a `curve` split."""
    split = data.splits["train"]
    if images > len(split.labels):
        raise SystemExit(f"the training split has {len(split.labels)} images, the protocol asks for {images}")
    order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(SUBSET_SEED))
    validation = data.splits["validation"]
    few = torch.linspace(0, len(validation.labels) - 1, min(CURVE, len(validation.labels))).long()
    parts = {"train": split.part(order[:images].sort().values), "curve": validation.part(few)}
    return Data(data.splits | parts, data.classes, data.flip)


def train_one(trainer: Trainer, plain: Architecture, placement: Placement) -> dict[str, Any]:
    """Train one placement from scratch and return its row."""
    began, curve = time.perf_counter(), []
    parent = os.getppid()
    architecture = plain.model_copy(update={"placement": placement})
    model = architecture.build(seed=trainer.protocol.seed)
    for step in trainer.train(model):
        if step % trainer.epoch_steps == 0:
            curve.append(round(trainer.validate(model, "curve").accuracy, 6))
            if os.getppid() != parent:
                raise SystemExit("the process that started this one is gone")
    validation, test = trainer.validate(model), trainer.validate(model, "test")
    return {
        "placement": str(placement),
        "seed": trainer.protocol.seed,
        "epochs": trainer.protocol.epochs,
        "images": len(trainer.train_split.labels),
        "width": WIDTH,
        "val_accuracy": round(validation.accuracy, 6),
        "val_loss": round(validation.loss, 6),
        "test_accuracy": round(test.accuracy, 6),
        "seconds": round(time.perf_counter() - began, 1),
        "precision": trainer.protocol.precision,
        "device": platform.machine() if trainer.device.type == "cpu" else torch.cuda.get_device_name(trainer.device),
        "torch": torch.__version__,
        "curve": curve,
        "correct": base64.b64encode(np.packbits(test.correct.numpy()).tobytes()).decode(),
    }


def work(options: argparse.Namespace, todo: Sequence[Key], taken: Any, until: float) -> None:
    """Train what is left, one after the other; the next is whatever no other process has taken."""
    torch.set_num_threads(1)
    parent, device = os.getppid(), pick_device(options.device)
    data, trainers = load_data(str(options.data), 32), {}
    plain = Architecture(
        backbone="placebench:network",
        num_classes=len(data.classes),
        input_size=(3, 32, 32),
    )
    while time.time() < until and os.getppid() == parent:
        with taken.get_lock():
            at = taken.value
            taken.value += 1
        if at >= len(todo):
            return
        text, seed, images, epochs = todo[at]
        rate = LEARNING_RATE * (BATCH / AT_BATCH_SIZE) ** 0.5
        protocol = Protocol(epochs, BATCH, rate, seed, pick_precision(device))
        if images not in trainers:
            trainers[images] = Trainer(subset(data, images), protocol, device)
        row = train_one(trainers[images].under(protocol), plain, Placement.parse(text))
        with (options.log / "trainings.jsonl").open("ab", buffering=0) as file:
            file.write(json.dumps(row).encode() + b"\n")  # one write: a kill leaves at most one torn last line
            os.fsync(file.fileno())
        left = len(todo) - at - 1
        hours = left * row["seconds"] / options.jobs / 3600
        print(f"{text or 'plain'} seed {seed} {images}x{epochs}: test {100 * row['test_accuracy']:.2f} in "
              f"{row['seconds']:.0f} s; {left} left, about {hours:.1f} h", flush=True)  # fmt: skip


def _same_precision(rows: Sequence[dict[str, Any]], precision: str) -> None:
    other = {str(row["precision"]) for row in rows} - {precision}
    if other:
        raise SystemExit(
            f"the trainings there are {', '.join(sorted(other))}, this machine trains in {precision}, and one table "
            "must not mix them; go on where they were made, or give other folders: --log and --into"
        )


def train(options: argparse.Namespace) -> None:
    options.log.mkdir(parents=True, exist_ok=True)
    path = options.log / "trainings.jsonl"
    if path.exists():
        whole = path.read_bytes()
        os.truncate(path, whole.rfind(b"\n") + 1)  # what comes next must not be glued to a torn line
    done = [*read_log(options.log), *read_tables(options.into)]
    _same_precision(done, pick_precision(pick_device(options.device)))
    done = {key_of(row) for row in done}
    regimes = [PROTOCOLS[name] for name in options.protocol or PROTOCOLS]
    todo = [
        (str(placement), seed, options.images or regime.images, options.epochs or regime.epochs)
        for seed in range(max(regime.seeds for regime in regimes))
        for regime in regimes
        if seed < regime.seeds
        for placement in chosen(regime)[: options.first]
    ]
    todo = [key for key in dict.fromkeys(todo) if key not in done]
    print(f"{len(todo)} trainings left, {len(done)} are there", flush=True)
    context = multiprocessing.get_context("spawn")
    taken, until = context.Value("i", 0), time.time() + 60 * options.minutes
    processes = [context.Process(target=work, args=(options, todo, taken, until)) for _ in range(options.jobs)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a process has failed; see above, then start again: what is done is kept")


def export(options: argparse.Namespace) -> None:
    """Write the committed tables from the log and what they hold already, in a stable order."""
    rows = {key_of(row): row for row in (*read_log(options.log), *read_tables(options.into))}
    names = {(regime.images, regime.epochs): name for name, regime in reversed(PROTOCOLS.items())}
    order = {str(placement): index for index, placement in enumerate(placements())}
    ordered = sorted(rows.values(), key=lambda row: (*key_of(row)[2:], key_of(row)[1], order[row["placement"]]))
    ordered = [row | {"protocol": names.get(key_of(row)[2:], "{}x{}".format(*key_of(row)[2:]))} for row in ordered]
    options.into.mkdir(parents=True, exist_ok=True)
    same = ("placement", "seed", "protocol", "epochs", "images")
    curves = [
        {name: row[name] for name in same} | {"epoch": epoch, "val_accuracy": accuracy}
        for row in ordered
        for epoch, accuracy in enumerate(row["curve"], 1)
    ]
    _write(options.into / "trainings.csv", COLUMNS, ordered)
    _write(options.into / "curves.csv", (*same, "epoch", "val_accuracy"), curves)
    _write(options.into / "correct.csv", (*same, "correct"), ordered)
    print(f"{len(ordered)} trainings in {options.into}")


def _write(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    fresh = path.with_suffix(".new")
    with fresh.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    fresh.replace(path)


def reliability(scores: np.ndarray) -> float:
    """Return how well means over seeds repeat with as many other seeds: ICC(C,k) by a two-way analysis of variance.

    Seeds are taken as crossed with placements, since all placements see the same batches under one seed; it is
    the single-seed consistency stepped up by Spearman-Brown. Below zero where placements differ less than noise does.

    Args:
        scores: Placements by seeds, at least 2 by 2.
    """
    count, seeds = scores.shape
    rows, columns = scores.mean(1, keepdims=True), scores.mean(0, keepdims=True)
    between = seeds * float(((rows - scores.mean()) ** 2).sum()) / (count - 1)
    within = float(((scores - rows - columns + scores.mean()) ** 2).sum()) / ((count - 1) * (seeds - 1))
    return 1 - within / between if between else float("nan")


def pilot(options: argparse.Namespace) -> None:
    """Print the reliability of each protocol's means so far, over the placements that have all of the seeds."""
    by: dict[tuple[int, int], dict[str, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for row in {key_of(row): row for row in (*read_log(options.log), *read_tables(options.into))}.values():
        placement, seed, images, epochs = key_of(row)
        by[images, epochs][placement][seed] = row
    for (images, epochs), table in sorted(by.items()):
        seeds = sorted(set.intersection(*({*row} for row in table.values())))
        seconds = mean(float(row["seconds"]) for rows in table.values() for row in rows.values())
        print(f"{images}x{epochs}: {len(table)} placements, {len(seeds)} seeds of all, {seconds:.0f} s each", end="")
        if len(table) > 1 and len(seeds) > 1:
            scores = np.array([[float(rows[seed]["test_accuracy"]) for seed in seeds] for rows in table.values()])
            random = np.random.default_rng(0)
            drawn = [reliability(scores[random.integers(len(scores), size=len(scores))]) for _ in range(2000)]
            low, high = np.nanquantile(drawn, (0.025, 0.975))
            print(f"; reliability {reliability(scores):.2f} ({low:.2f} to {high:.2f} over placements), "
                  f"sd of means {100 * scores.mean(1).std(ddof=1):.2f} points", end="")  # fmt: skip
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("train", "export", "pilot"))
    parser.add_argument("--data", type=Path, help="image folder of CIFAR-10, with train and test")
    parser.add_argument("--log", type=Path, required=True, help="folder of the trainings done here")
    parser.add_argument("--into", type=Path, default=ROOT, help="folder of the tables")
    parser.add_argument("--protocol", choices=PROTOCOLS, action="append", help="may be given more than once")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e9, help="no training is started after that")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--first", type=int, help="the first placements of a protocol alone, for a trial of the script")
    parser.add_argument("--images", type=int, help="other than the protocol's, for a trial of the script")
    parser.add_argument("--epochs", type=int, help="other than the protocol's, for a trial of the script")
    options = parser.parse_args()
    if options.task == "train" and not options.data:
        parser.error("train needs --data FOLDER; for CIFAR-10 an image folder with train and test")
    {"train": train, "export": export, "pilot": pilot}[options.task](options)


if __name__ == "__main__":
    main()
