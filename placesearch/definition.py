"""The resolved definition of a study: every default filled in, kept in `studies/NAME/study.yaml`."""

import importlib.metadata
import platform
import re
from bisect import bisect_left
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
import yaml
from torch import nn

from placesearch.config import KINDS, RUN_FIELDS, StudyConfig, read_yaml
from placesearch.errors import BackboneError, StudyError
from placesearch.models.architecture import Architecture
from placesearch.models.backbones import load_backbone
from placesearch.models.graph import InputSize
from placesearch.models.sites import find_sites, last_map
from placesearch.models.weights import load_weights, read_weights
from placesearch.placement import Placement
from placesearch.reporting.writing import Subject
from placesearch.search.space import SearchSpace, make_space, reference_placements
from placesearch.training.datasets import SPLITS, inspect_data
from placesearch.training.loop import Protocol, pick_precision

STUDIES = Path("studies")

SMALLEST_MAP = 4
"""A last feature map with a shorter side below this many pixels leaves spatial attention nothing to look at."""

DIGITS = {"epochs": 1, "batch_size": 8}
DIGITS_TRIALS, DIGITS_TIMEOUT = 10, 300.0
DEFAULTS = {"epochs": 5, "batch_size": 128}
DEFAULT_TRIALS = 50
"""Budgets where none is given. Those of `digits` make a first look of at most five minutes on two slow cores."""

LEARNING_RATE, AT_BATCH_SIZE = 0.02, 8
"""The peak learning rate grows with the root of the batch size (Krizhevsky 2014, arXiv:1404.5997)."""

FINE_TUNING = 0.1
"""Share of that rate where candidates start from weights."""


@dataclass(frozen=True, slots=True)
class Definition:
    """What a study is, with nothing left open.

    Args:
        config: Its options, every default that depends on backbone or data filled in.
        protocol: How candidates are trained.
        num_classes: Classes of the data set.
        input_size: Channels, height and width of the input.
        sites: Channels, height and width at each site.
        splits: Number of images in each split; empty until the data are loaded.
        versions: Versions of what the numbers depend on.
        weights: What weights candidates start from; None if they start from scratch.
    """

    config: StudyConfig
    protocol: Protocol
    num_classes: int
    input_size: InputSize
    sites: dict[str, list[int]]
    splits: dict[str, int]
    versions: dict[str, str]
    weights: str | None = None

    @property
    def name(self) -> str:
        """The study's name."""
        return str(self.config.name)

    @property
    def plain(self) -> Architecture:
        """The backbone without blocks."""
        return Architecture(
            backbone=self.config.backbone,
            stem=self.config.stem,
            num_classes=self.num_classes,
            input_size=self.input_size,
        )

    def with_splits(self, splits: dict[str, int]) -> Self:
        """Return the definition with the number of images in each split, known once the data are loaded."""
        return replace(self, splits=splits)

    def content(self) -> dict[str, Any]:
        """Return what `study.yaml` holds."""
        return {
            "placesearch": 1,
            "config": self.config.plain(),
            "protocol": asdict(self.protocol),
            "num_classes": self.num_classes,
            "input_size": list(self.input_size),
            "splits": self.splits,
            "versions": self.versions,
            "weights": self.weights,
            "sites": self.sites,
        }

    def identity(self) -> dict[str, Any]:
        """Everything that may not change between two runs, as flat names and values."""
        config = {key: value for key, value in self.config.plain().items() if key not in RUN_FIELDS}
        sites = {f"site {name}": "x".join(map(str, shape)) for name, shape in self.sites.items()}
        splits = {f"{name} images": count for name, count in self.splits.items()}
        start = {"start": self.weights} if self.weights else {}
        return {**config, "classes": self.num_classes, **start, **splits, **sites}

    def subject(self) -> Subject:
        """Return what reports say about the study."""
        config = self.config
        start = f"{self.weights}, blocks as the identity" if self.weights else "scratch"
        counts = ", ".join(f"{self.splits[name]:,} {name}" for name in SPLITS)
        return Subject(
            name=self.name,
            objectives=config.objectives,
            architecture=self.plain,
            facts=(
                ("backbone", f"{config.backbone}, {config.stem} stem, input {'x'.join(map(str, self.input_size))}"),
                ("data", f"{config.data}: {counts} images in {self.num_classes} classes"),
                (
                    "training",
                    f"{_counted(self.protocol.epochs, 'epoch')} from {start}, batch {self.protocol.batch_size}, "
                    f"peak learning rate {self.protocol.learning_rate:g}, {self.protocol.precision}",
                ),
                ("search", f"{config.sampler}, seed {config.seed}, {len(self.sites)} sites"),
                ("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
            ),
            validation_images=self.splits["validation"],
        )

    def lines(self, device: torch.device, space: SearchSpace, jobs: int) -> list[str]:
        """Say what is run, and warn where the last feature map is too small to look at."""
        facts = dict(self.subject().facts)
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the {device.type}"
        if device.type == "cpu":
            where = f"one thread{f', {jobs} trials at a time' if jobs > 1 else ''}"
        most = max(len(choices) for choices in space.choices.values())
        lines = [
            facts["backbone"],
            facts["data"],
            f"{facts['training']}, on {where}",
            f"{space.size:,} placements: {len(space.choices)} sites with up to {most} choices",
        ]
        side = _last_side(self.plain, self.input_size[1])
        if 0 < side < SMALLEST_MAP:
            lines.append(
                f"note: the last feature map is only {side} wide or high, too few pixels for spatial attention "
                "to mean anything; --stem small or a larger --input-size mends that"
            )
        return lines


def prepare(config: StudyConfig, device: torch.device) -> tuple[Definition, SearchSpace, dict[str, Placement]]:
    """Fill in every default and look at backbone and data; nothing is written.

    A study of this name that exists keeps its protocol and versions.

    Args:
        config: What to search.
        device: Where candidates will be trained.

    Returns:
        The definition, still without the sizes of the splits; the search space; the references by name.

    Raises:
        InputError: If something cannot be used, or the study of this name has other settings.
    """
    num_classes, native = inspect_data(config.data)
    is_digits = config.data == "digits"
    with torch.random.fork_rng(devices=[]):
        backbone = load_backbone(config.backbone, num_classes, config.stem)
    checkpoint = read_weights(config.weights, config.backbone) if config.weights else None
    if checkpoint is not None:
        load_weights(backbone, checkpoint)
    side = config.input_size or (_side_for_a_map(backbone, native) if is_digits else native)
    budget = DIGITS if is_digits else DEFAULTS
    filled: dict[str, Any] = {
        "name": config.name or _slug(f"{config.backbone}-{Path(config.data).name}"),
        "epochs": config.epochs or budget["epochs"],
        "batch_size": config.batch_size or budget["batch_size"],
        "input_size": side,
    }
    if config.trials is None and config.timeout is None:
        filled |= {"trials": DIGITS_TRIALS, "timeout": DIGITS_TIMEOUT} if is_digits else {"trials": DEFAULT_TRIALS}
    config = config.model_copy(update=filled)
    input_size = (3, side, side)
    every = find_sites(backbone, input_size)
    if "sites" not in config.model_fields_set and not any("residual" in site.kinds for site in every):
        config = config.model_copy(update={"sites": ("block",)})
    sites = [site for site in every if site.kinds & set(config.sites)]
    if not sites:
        there = [kind for kind in KINDS if any(kind in site.kinds for site in every)]
        raise BackboneError(
            f"{config.backbone} has no sites of kind {', '.join(config.sites)}; it has: {', '.join(there) or 'none'}"
        )
    if "reductions" not in config.model_fields_set:
        most = max(site.channels for site in sites)
        fitting = tuple(reduction for reduction in config.reductions if reduction <= most)
        config = config.model_copy(update={"reductions": fitting or (1,)})
    space = make_space(sites, config.blocks, config.reductions, config.kernel_sizes)
    rate = LEARNING_RATE * (filled["batch_size"] / AT_BATCH_SIZE) ** 0.5
    protocol = Protocol(
        epochs=filled["epochs"],
        batch_size=filled["batch_size"],
        learning_rate=rate * (FINE_TUNING if checkpoint else 1.0),
        seed=config.seed,
        precision=pick_precision(device),
    )
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in ("placesearch", "torch", "torchvision", "optuna")}
    shapes = {site.name: [site.channels, site.height, site.width] for site in sites}
    weights = checkpoint.name if checkpoint else None
    definition = Definition(config, protocol, num_classes, input_size, shapes, {}, versions, weights)
    if (study_folder(definition.name) / "study.yaml").exists():
        stored = read_definition_of(definition.name)
        definition = replace(definition, protocol=stored.protocol, versions=stored.versions)
        _refuse_difference(stored, definition, without_splits=True)
    return definition, space, reference_placements(every)


def _counted(number: int, word: str) -> str:
    return f"{number:,} {word}" + ("" if number == 1 else "s")


def _side_for_a_map(backbone: nn.Module, smallest: int) -> int:
    """Return the smallest input side from which the last feature map has SMALLEST_MAP pixels a side."""

    def last_side(side: int) -> int:
        try:
            return min(last_map(backbone, (3, side, side)) or (SMALLEST_MAP,))
        except BackboneError:
            return 0  # too small for this network

    sides = range(smallest, 16 * smallest + 1)
    index = bisect_left(sides, SMALLEST_MAP, key=last_side)
    return sides[index] if index < len(sides) else smallest


def _last_side(architecture: Architecture, side: int) -> int:
    return min(last_map(architecture.backbone, (3, side, side), architecture.stem) or (0,))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:100] or "study"


def study_folder(name: str) -> Path:
    """Return where a study is kept, from the current directory."""
    return STUDIES / name


def read_definition_of(name: str) -> Definition:
    """Read `study.yaml` of a study.

    Raises:
        StudyError: If it is missing, damaged or of a newer format.
    """
    path = study_folder(name) / "study.yaml"
    content = read_yaml(path)
    try:
        if content.pop("placesearch") != 1:
            raise StudyError(f"{path} was written by a newer placesearch")
        content["config"] = StudyConfig(**content["config"])
        content["protocol"] = Protocol(**content["protocol"])
        channels, height, width = content["input_size"]
        definition = Definition(**{**content, "input_size": (channels, height, width)})
        definition.identity()
        definition.subject()
    except StudyError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StudyError(f"{path} is damaged: {type(error).__name__} {error}") from None
    return definition


def _refuse_difference(stored: Definition, given: Definition, *, without_splits: bool = False) -> None:
    before, now = stored.identity(), given.identity()
    keys = [key for key in {**before, **now} if not (without_splits and key.endswith(" images"))]
    changed = [key for key in keys if before.get(key) != now.get(key)]
    if changed:
        shown = "; ".join(
            f"{key.replace('_', '-')} {_shown(before.get(key))} -> {_shown(now.get(key))}" for key in changed[:4]
        )
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise StudyError(
            f"study '{stored.name}' exists with other settings ({shown}{more}); give this one another name with --name"
        )


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def settle(definition: Definition) -> list[str]:
    """Write `study.yaml`, or check the one that is there; return what is worth knowing about it."""
    path = study_folder(definition.name) / "study.yaml"
    if not path.exists():
        if (path.parent / "journal.log").exists():
            raise StudyError(f"{path} is missing, but there are trials beside it; restore it, or choose another --name")
        fresh = path.with_name("study.yaml.new")
        fresh.write_text(
            yaml.safe_dump(definition.content(), sort_keys=False, default_flow_style=None), encoding="utf-8"
        )
        fresh.replace(path)
        return []
    stored = read_definition_of(definition.name)
    _refuse_difference(stored, definition)
    changed = [
        f"{name} {version} -> {now}"
        for name, version in stored.versions.items()
        if name != "python" and (now := importlib.metadata.version(name)) != version
    ]
    return (
        [f"note: versions changed since the study began ({', '.join(changed)}); numbers may differ"] if changed else []
    )
