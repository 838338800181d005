"""Candidates an hour: a placesearch study against the recipe of Optuna's multi-objective PyTorch example.

The recipe: one process with all cores, an image folder through a DataLoader, fp32, Adam from scratch, fvcore's count of
each trial, Optuna's default sampler, trials in SQLite. Both train ResNet-18 with its ImageNet stem on the same part of
CIFAR-10 as an image folder, same epochs and batch size, on SE and CBAM at every residual site. They take turns, a few
candidates each; start-up and the first candidates are left out. So it is once more with the CIFAR stem, which takes
ten times as long an image, on fewer images. Writes `reports/benchmarks/candidates_an_hour.md`. About 8 minutes for each
stem on two cores.

    python tests/benchmarks/candidates_an_hour.py CIFAR10_FOLDER [original|small]
"""

import logging
import os
import platform
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
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
from placesearch.search.space import make_space, reference_placements
from placesearch.training.loop import pick_precision

BATCH, SIDE = 128, 32


@dataclass(frozen=True)
class Case:
    """What is compared: how many images and epochs, and how many candidates each side trains in how many rounds."""

    stem: str
    images: int
    epochs: int
    rounds: int
    recipe_trials: int
    our_trials: int


CASES = [Case("original", 4000, 2, 3, 7, 9), Case("small", 640, 1, 3, 7, 9)]
REPORT = Path(__file__).resolve().parents[2] / "reports" / "benchmarks" / "candidates_an_hour.md"


def part_of(folder: Path, target: Path, images: int = 4000) -> None:
    """Link a part of CIFAR-10: so many images for training, a quarter of that for validation and for test."""
    for split, source, count in (
        ("train", "train", images),
        ("val", "test", images // 4),
        ("test", "test", images // 4),
    ):
        for name in sorted(path.name for path in (folder / source).iterdir()):
            (target / split / name).mkdir(parents=True)
            files = sorted((folder / source / name).iterdir())
            chosen = files[: count // 10] if split != "test" else files[-(count // 10) :]
            for path in chosen:
                (target / split / name / path.name).symlink_to(path.resolve())


def recipe(case: Case, folder: Path, workplace: Path, seed: int) -> tuple[float, float]:
    """Return candidates an hour of the example's recipe, and the share of its time in forward, backward and step."""
    plain = load_backbone("resnet18", 10, case.stem)
    sites = every_site(plain, (3, SIDE, SIDE))
    space = make_space([s for s in sites if "residual" in s.kinds], ["se", "cbam"], [4, 8, 16], [3, 7])
    references = list(reference_placements(sites).values())
    as_tensor = torchvision.transforms.ToTensor()
    train, valid = (torchvision.datasets.ImageFolder(str(folder / name), as_tensor) for name in ("train", "val"))
    ends: list[float] = []
    spent: list[float] = []

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        chosen = {site: trial.suggest_categorical(site, texts) for site, texts in space.choices.items()}
        same = trial.number < len(references)  # as in a study, so that both train the same networks
        placement = references[trial.number] if same else space.placement(chosen)
        model = insert(load_backbone("resnet18", 10, case.stem), placement, sites=sites)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        spent.append(0.0)
        for _ in range(case.epochs):
            model.train()
            for images, labels in DataLoader(train, batch_size=BATCH, shuffle=True):
                before = time.perf_counter()
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
                spent[-1] += time.perf_counter() - before
            model.eval()
            right = 0
            with torch.no_grad():
                for images, labels in DataLoader(valid, batch_size=BATCH):
                    right += int((model(images).argmax(1) == labels).sum())
        flops = FlopCountAnalysis(model, torch.zeros(1, 3, SIDE, SIDE)).total()
        return right / len(valid), flops

    storage, name = f"sqlite:///{workplace / 'recipe.db'}", f"{case.stem}-{seed}"
    study = optuna.create_study(storage=storage, directions=["maximize", "minimize"], study_name=name)
    study.optimize(objective, n_trials=case.recipe_trials, callbacks=[lambda *_: ends.append(time.perf_counter())])
    return 3600 * (len(ends) - 1) / (ends[-1] - ends[0]), sum(spent[1:]) / (ends[-1] - ends[0])


def ours(case: Case, folder: Path, seed: int) -> tuple[float, float]:
    """Return candidates an hour of a study, and the share of its workers' time in training steps."""
    ends: list[float] = []
    spent: list[float] = []

    def watch(event: object) -> None:
        if isinstance(event, TrialEnded):
            assert event.record.state == "COMPLETE", event.record.error
            ends.append(time.perf_counter())
            spent.append(event.record.training_seconds or 0.0)

    config = ps.StudyConfig(
        backbone="resnet18",
        stem=case.stem,
        data=str(folder),
        name=f"ours-{case.stem}-{seed}",
        trials=case.our_trials,
        epochs=case.epochs,
        long_epochs=0,
        batch_size=BATCH,
        input_size=SIDE,
        seed=seed,
    )
    ps.run(config, watch=watch)
    workers = len(os.sched_getaffinity(0))
    first = workers - 1  # the workers' first candidates include their start
    took = ends[-1] - ends[first]
    return 3600 * (len(ends) - 1 - first) / took, sum(spent[first + 1 :]) / (took * workers)


def compared(case: Case, source: Path) -> list[str]:
    """Let both take turns; return the lines of the report."""
    rows, ratios = [], []
    with tempfile.TemporaryDirectory() as made:
        workplace = Path(made)
        images = workplace / "images"
        part_of(source, images, case.images)
        os.chdir(workplace)
        for index in range(case.rounds):
            (theirs, their_share), (own, our_share) = recipe(case, images, workplace, index), ours(case, images, index)
            ratios.append(own / theirs)
            rows.append(
                f"| {index + 1} | {theirs:.0f} | {own:.0f} | {ratios[-1]:.2f} | {their_share:.2f} | {our_share:.2f} |"
            )
            print(case.stem, rows[-1], flush=True)
        os.chdir("/")
    name = {"original": "ImageNet stem (`--stem original`)", "small": "CIFAR stem (`--stem small`)"}[case.stem]
    epochs = "one epoch" if case.epochs == 1 else f"{case.epochs} epochs"
    return [
        f"## {name}",
        "",
        f"{case.images:,} training and {case.images // 4:,} validation images, {epochs}; {case.recipe_trials} and "
        f"{case.our_trials} candidates a round.",
        "",
        "| round | recipe | ours | ratio | recipe's share | our share |",
        "|---:|---:|---:|---:|---:|---:|",
        *rows,
        "",
        f"Median ratio: {median(ratios):.2f}.",
        "",
    ]


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    source = Path(sys.argv[1]).resolve()
    cases = [case for case in CASES if case.stem in sys.argv[2:] or not sys.argv[2:]]
    text = [
        "# Candidates an hour",
        "",
        "A study against the recipe of Optuna's multi-objective PyTorch example. ResNet-18 at "
        f"{SIDE}x{SIDE}, CIFAR-10 (a JPEG copy) as an image folder, batch {BATCH}. {platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} cores; ours in {pick_precision(torch.device('cpu'))}, the recipe in fp32; "
        f"torch {torch.__version__}, optuna {optuna.__version__}. In turns, start-up left out; both train the "
        "references of a study, in the same order. A share is the part of "
        "the time in forward, backward and step; for ours of all workers' time, augmentation included, which takes 1 "
        "to 2 % of a step ([measured](training_loop.md)). Made by `python tests/benchmarks/candidates_an_hour.py`.",
        "",
    ]
    for case in cases:
        text += compared(case, source)
    REPORT.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
