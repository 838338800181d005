"""The resolved definition of a study: every default filled in, kept in `studies/NAME/study.yaml`."""

import importlib.metadata
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from placesearch.config import RUN_FIELDS, StudyConfig, read_yaml
from placesearch.errors import StudyError
from placesearch.models.architecture import Architecture
from placesearch.models.graph import InputSize
from placesearch.placement import BlockSetting
from placesearch.reporting.writing import Subject
from placesearch.training.datasets import SPLITS
from placesearch.training.loop import Protocol

STUDIES = Path("studies")


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
        costs: What was counted, as `CostTable.content` has it.
        latencies: Predicted latencies, if the study goes by them: `plain_ms`, `added_ms` by block and shape, and how
            they were measured.
        network: Channels, height and width at every site of the network, searched or not, from input to output; empty
            in studies that began before this was kept.
        hardware: What the study began on.
        skipped: Images that could not be decoded when the study began and are left out, below the folder of the data.
    """

    config: StudyConfig
    protocol: Protocol
    num_classes: int
    input_size: InputSize
    sites: dict[str, list[int]]
    splits: dict[str, int]
    versions: dict[str, str]
    weights: str | None = None
    costs: dict[str, list[Any]] = field(default_factory=dict)
    latencies: dict[str, Any] = field(default_factory=dict)
    network: dict[str, list[int]] = field(default_factory=dict)
    hardware: str = ""
    skipped: tuple[str, ...] = ()

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
            "costs": self.costs,
            "network": self.network,
            "hardware": self.hardware,
            **({"latencies": self.latencies} if self.latencies else {}),
            **({"skipped": list(self.skipped)} if self.skipped else {}),
        }

    def identity(self) -> dict[str, Any]:
        """Everything that may not change between two runs, as flat names and values."""
        config = {key: value for key, value in self.config.plain().items() if key not in RUN_FIELDS}
        sites = {f"site {name}": "x".join(map(str, shape)) for name, shape in self.sites.items()}
        splits = {f"{name} images": count for name, count in self.splits.items()}
        start = {"checkpoint": self.weights} if self.weights else {}
        plain = {"plain params": self.costs["none"][2]} if self.costs else {}
        return {**config, "classes": self.num_classes, **start, **plain, **splits, **sites}

    def subject(self) -> Subject:
        """Return what reports say about the study."""
        config = self.config
        source = self.weights or "scratch"
        start = {
            "scratch": "from scratch",
            "pretrained": f"from {source}, blocks as the identity",
            "branch": f"of the plain network from {source}, taken over with blocks as the identity before the learning "
            "rate is annealed",
        }[self.protocol.start]
        counts = ", ".join(f"{self.splits[name]:,} {name}" for name in SPLITS if self.splits)
        data = f"{config.data}: {counts} images in {self.num_classes} classes"
        if self.skipped:
            data += f", without {_counted(len(self.skipped), 'corrupt file')}"
        training = (
            f"{self._epochs()} {start}, batch {self.protocol.batch_size}, "
            f"peak learning rate {self.protocol.learning_rate:g}, {self.protocol.precision}"
        )
        if config.evaluate:
            data = f"those of {config.evaluate}"
            training = f"{config.evaluate} with {self._epochs()}, {start}"
        return Subject(
            name=self.name,
            objectives=config.objectives,
            architecture=self.plain,
            facts=(
                ("backbone", f"{config.backbone}, {config.stem} stem, input {'x'.join(map(str, self.input_size))}"),
                ("data", data),
                ("training", training),
                ("search", f"{config.sampler}, seed {config.seed}, {len(self.sites)} sites"),
                ("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
                *([("hardware", self.hardware)] if self.hardware else []),
            ),
            validation_images=self.splits.get("validation"),
            added=self._added(),
            sites={name: (shape[0], shape[1], shape[2]) for name, shape in (self.network or self.sites).items()},
        )

    def _epochs(self) -> str:
        usual, long = _counted(self.protocol.epochs, "epoch"), self.config.long_epochs
        return f"{usual}, some trials {long}," if long else usual

    def _added(self) -> dict[str, dict[BlockSetting, tuple[int, int]]]:
        """Return by site the macs and params that each counted setting adds there."""
        of_shape: dict[str, dict[BlockSetting, tuple[int, int]]] = {}
        for name, (macs, _, params, *_) in self.costs.items():
            setting, _, shape = name.partition(" ")
            if shape:
                of_shape.setdefault(shape, {})[BlockSetting.parse(setting)] = (macs, params)
        return {site: of_shape.get("x".join(map(str, shape)), {}) for site, shape in self.sites.items()}


def _counted(number: int, word: str) -> str:
    return f"{number:,} {word}" + ("" if number == 1 else "s")


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
        content["skipped"] = tuple(map(str, content.get("skipped", ())))
        definition = Definition(**{**content, "input_size": (channels, height, width)})
        definition.identity()
        definition.subject()
    except StudyError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StudyError(f"{path} is damaged: {type(error).__name__} {error}") from None
    return definition


def refuse_difference(stored: Definition, given: Definition, *, without_splits: bool = False) -> None:
    """Refuse a definition that is another study's.

    Args:
        stored: The study that exists.
        given: What a run is to do.
        without_splits: Whether the sizes of the splits are not known yet.

    Raises:
        StudyError: If they differ in anything that is the identity of a study; with the difference.
    """
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
    refuse_difference(stored, definition)
    changed = [
        f"{name} {version} -> {now}"
        for name, version in stored.versions.items()
        if name != "python" and (now := importlib.metadata.version(name)) != version
    ]
    return (
        [f"note: versions changed since the study began ({', '.join(changed)}); numbers may differ"] if changed else []
    )
