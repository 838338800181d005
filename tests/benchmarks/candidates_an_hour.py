"""Candidates an hour: a placesearch study against the recipe of Optuna's multi-objective PyTorch example.

The recipe: one process with all cores, an image folder through a DataLoader, fp32, Adam from scratch, fvcore's count of
each trial, Optuna's default sampler, trials in SQLite. Both train ResNet-18 with its ImageNet stem on the same part of
CIFAR-10 as an image folder, same epochs and batch size, on SE and CBAM at every residual site. They take turns, a few
candidates each; start-up and the first candidates are left out. Writes `reports/benchmarks/candidates_an_hour.md`.
About 8 minutes on two cores.

    python tests/benchmarks/candidates_an_hour.py CIFAR10_FOLDER
"""

import logging
import os
import platform
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import optuna
import torch
import torch.nn.functional as F
import torchvision
from fvcore.nn import FlopCountAnalysis
from torch.utils.data import DataLoader

import placesearch as ps
from placesearch.models.backbones import load_backbone
from placesearch.models.insertion import insert
from placesearch.models.sites import every_site
from placesearch.records import TrialEnded
from placesearch.search.space import make_space
from placesearch.training.loop import pick_precision

IMAGES, EPOCHS, BATCH, SIDE = 4000, 2, 128, 32
ROUNDS, RECIPE_TRIALS, OUR_TRIALS = 3, 3, 8
REPORT = Path(__file__).resolve().parents[2] / "reports" / "benchmarks" / "candidates_an_hour.md"


def part_of(folder: Path, target: Path) -> None:
    """Link a part of CIFAR-10: so many images for training, a quarter of that for validation and for test."""
    for split, source, count in (
        ("train", "train", IMAGES),
        ("val", "test", IMAGES // 4),
        ("test", "test", IMAGES // 4),
    ):
        for name in sorted(path.name for path in (folder / source).iterdir()):
            (target / split / name).mkdir(parents=True)
            files = sorted((folder / source / name).iterdir())
            chosen = files[: count // 10] if split != "test" else files[-(count // 10) :]
            for path in chosen:
                (target / split / name / path.name).symlink_to(path.resolve())


def recipe(folder: Path, workplace: Path, seed: int) -> float:
    """Return candidates an hour of the example's recipe."""
    plain = load_backbone("resnet18", 10)
    sites = every_site(plain, (3, SIDE, SIDE))
    space = make_space([s for s in sites if "residual" in s.kinds], ["se", "cbam"], [4, 8, 16], [3, 7])
    as_tensor = torchvision.transforms.ToTensor()
    train, valid = (torchvision.datasets.ImageFolder(str(folder / name), as_tensor) for name in ("train", "val"))
    ends: list[float] = []

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        chosen = {site: trial.suggest_categorical(site, texts) for site, texts in space.choices.items()}
        model = insert(load_backbone("resnet18", 10), space.placement(chosen), sites=sites)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(EPOCHS):
            model.train()
            for images, labels in DataLoader(train, batch_size=BATCH, shuffle=True):
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
            model.eval()
            right = 0
            with torch.no_grad():
                for images, labels in DataLoader(valid, batch_size=BATCH):
                    right += int((model(images).argmax(1) == labels).sum())
        flops = FlopCountAnalysis(model, torch.zeros(1, 3, SIDE, SIDE)).total()
        return right / len(valid), flops

    study = optuna.create_study(
        storage=f"sqlite:///{workplace / 'recipe.db'}", directions=["maximize", "minimize"], study_name=f"r{seed}"
    )
    study.optimize(objective, n_trials=RECIPE_TRIALS, callbacks=[lambda *_: ends.append(time.perf_counter())])
    return 3600 * (len(ends) - 1) / (ends[-1] - ends[0])


def ours(folder: Path, seed: int) -> float:
    """Return candidates an hour of a study."""
    ends: list[float] = []

    def watch(event: object) -> None:
        if isinstance(event, TrialEnded):
            assert event.record.state == "COMPLETE", event.record.error
            ends.append(time.perf_counter())

    config = ps.StudyConfig(
        backbone="resnet18",
        data=str(folder),
        name=f"ours-{seed}",
        trials=OUR_TRIALS,
        epochs=EPOCHS,
        batch_size=BATCH,
        input_size=SIDE,
        seed=seed,
    )
    ps.run(config, watch=watch)
    first = len(os.sched_getaffinity(0)) - 1  # the workers' first candidates include their start
    return 3600 * (len(ends) - 1 - first) / (ends[-1] - ends[first])


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    source = Path(sys.argv[1]).resolve()
    rows, ratios = [], []
    with tempfile.TemporaryDirectory() as made:
        workplace = Path(made)
        part_of(source, workplace / "images")
        os.chdir(workplace)
        for index in range(ROUNDS):
            theirs, own = recipe(workplace / "images", workplace, index), ours(workplace / "images", index)
            ratios.append(own / theirs)
            rows.append(f"| {index + 1} | {theirs:.0f} | {own:.0f} | {ratios[-1]:.2f} |")
            print(rows[-1], flush=True)
    text = [
        "# Candidates an hour",
        "",
        "A study against the recipe of Optuna's multi-objective PyTorch example. ResNet-18, ImageNet stem, "
        f"{SIDE}x{SIDE}, {IMAGES:,} training and {IMAGES // 4:,} validation images of CIFAR-10 (a JPEG copy) as an "
        f"image folder, {EPOCHS} epochs, batch {BATCH}. {platform.machine()}, {len(os.sched_getaffinity(0))} cores; "
        f"ours in {pick_precision(torch.device('cpu'))}, the recipe in fp32; torch {torch.__version__}, optuna "
        f"{optuna.__version__}. {RECIPE_TRIALS} and {OUR_TRIALS} candidates a round, in turns, start-up left out. "
        "Made by `python tests/benchmarks/candidates_an_hour.py`.",
        "",
        "| round | recipe | ours | ratio |",
        "|---:|---:|---:|---:|",
        *rows,
        "",
        f"Median ratio: {median(ratios):.2f}.",
    ]
    REPORT.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
