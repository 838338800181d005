"""The resolved definition of a study: every default filled in, kept in `studies/NAME/study.yaml`."""

import importlib.metadata
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import yaml

from placesearch.config import RUN_FIELDS, StudyConfig, parse_yaml, read_yaml
from placesearch.errors import StudyError
from placesearch.evaluation.versions import SCORING, code_fingerprint
from placesearch.models.architecture import Architecture
from placesearch.models.graph import InputSize
from placesearch.placement import BlockSetting
from placesearch.reporting.writing import Subject
from placesearch.storage_url import StorageUrl
from placesearch.training.datasets import SPLITS
from placesearch.training.loop import Protocol

STUDIES = Path("studies")

FINGERPRINT = "fingerprint of images"
"""What the hash of the data is called where two studies are compared."""


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
        device: Kind of device that it is trained on, `cpu` or `cuda`; empty in studies that began before this was kept.
        code: Fingerprint of this package's source; likewise.
        fingerprint: That of the images and labels; likewise, and where the evaluation is the user's own.
        skipped: Images that could not be decoded when the study began and are left out, below the folder of the data.
        scoring: The fingerprints of the code that scores depend on, each with the number of trials that had ended when
            the study went on under it; empty in studies that began before this was kept.
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
    device: str = ""
    code: str = ""
    fingerprint: str = ""
    skipped: tuple[str, ...] = ()
    scoring: tuple[tuple[str, int], ...] = ()

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
            "device": self.device,
            "code": self.code,
            "fingerprint": self.fingerprint,
            **({"latencies": self.latencies} if self.latencies else {}),
            **({"skipped": list(self.skipped)} if self.skipped else {}),
            **({"scoring": [list(one) for one in self.scoring]} if self.scoring else {}),
        }

    def text(self) -> str:
        """Return the text of `study.yaml`."""
        return yaml.safe_dump(self.content(), sort_keys=False, default_flow_style=None)

    def shared_text(self) -> str:
        """Return the same for a shared storage, which has another address on another machine."""
        return self.stored_in(None).text()

    def stored_in(self, storage: StorageUrl | None) -> Self:
        """Return the definition of the same study with its trials in another place."""
        return replace(self, config=self.config.model_copy(update={"storage": storage}))

    def changed_versions(self) -> dict[str, tuple[str, str]]:
        """Return what the study began with and what there is here, of all that numbers and suggestions depend on."""
        here = {name: importlib.metadata.version(name) for name in self.versions if name != "python"}
        was = {name: version for name, version in self.versions.items() if name != "python"}
        if self.code:
            here["code"], was["code"] = code_fingerprint(), self.code
        return {name: (was[name], here[name]) for name in here if was[name] != here[name]}

    def identity(self) -> dict[str, Any]:
        """Everything that may not change between two runs, as flat names and values."""
        config = {key: value for key, value in self.config.plain().items() if key not in RUN_FIELDS}
        sites = {f"site {name}": "x".join(map(str, shape)) for name, shape in self.sites.items()}
        splits: dict[str, Any] = {f"{name} images": count for name, count in self.splits.items()}
        if self.fingerprint:
            splits[FINGERPRINT] = self.fingerprint
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
                *([("code", _changes(self.scoring))] if len(self.scoring) > 1 else []),
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
    return _definition(read_yaml(path), str(path))


def shared_definition(text: str, storage: StorageUrl) -> Definition:
    """Read the definition that a shared storage holds of a study, as `shared_text` writes it.

    Args:
        text: The definition.
        storage: Where it is from; the study's storage is this address.

    Raises:
        StudyError: If it is damaged or of a newer format.
    """
    where = f"the study's definition in {storage.shown}"
    definition = _definition(parse_yaml(text, where), where)
    return definition.stored_in(storage)


def _definition(content: dict[str, Any], where: str) -> Definition:
    try:
        if content.pop("placesearch") != 1:
            raise StudyError(f"{where} was written by a newer placesearch")
        content["config"] = StudyConfig(**content["config"])
        content["protocol"] = Protocol(**content["protocol"])
        channels, height, width = content["input_size"]
        content["skipped"] = tuple(map(str, content.get("skipped", ())))
        content["scoring"] = tuple((str(code), int(since)) for code, since in content.get("scoring", ()))
        definition = Definition(**{**content, "input_size": (channels, height, width)})
        definition.identity()
        definition.subject()
    except StudyError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StudyError(f"{where} is damaged: {type(error).__name__} {error}") from None
    return definition


def refuse_difference(stored: Definition, given: Definition, *, without_splits: bool = False) -> None:
    """Refuse a definition that is another study's.

    Args:
        stored: The study that exists.
        given: What a run is to do.
        without_splits: Whether the data are not known yet.

    Raises:
        StudyError: If they differ in anything that is the identity of a study; with the difference.
    """
    different = difference(stored, given, without_splits=without_splits)
    if different:
        raise StudyError(
            f"study '{stored.name}' exists with other settings ({different}); give this one another name with --name"
        )


def difference(stored: Definition, given: Definition, *, without_splits: bool = False) -> str:
    """Return in what two definitions are not those of the same study; nothing if they are.

    Args:
        stored: The study that exists.
        given: Another one.
        without_splits: Whether the data of the other one are not known yet.
    """
    before, now = stored.identity(), given.identity()
    if not (stored.fingerprint and given.fingerprint):
        before.pop(FINGERPRINT, None)
        now.pop(FINGERPRINT, None)
    keys = [key for key in {**before, **now} if not (without_splits and key.endswith(" images"))]
    changed = [key for key in keys if before.get(key) != now.get(key)]
    shown = "; ".join(
        f"{key.replace('_', '-')} {_shown(before.get(key))} -> {_shown(now.get(key))}" for key in changed[:4]
    )
    return shown + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _changes(scoring: tuple[tuple[str, int], ...]) -> str:
    since = ", ".join(f"{trials:,}" for _, trials in scoring[1:])
    return f"what scores depend on changed after {since} trials; scores before and after may not compare"


def mark_code(definition: Definition, trials: int) -> tuple[Definition, list[str]]:
    """Keep in `study.yaml` under which code scores are made, if it is not that of the trials before.

    Args:
        definition: The study.
        trials: How many of its trials have ended.

    Returns:
        The definition, and what is worth knowing about it.
    """
    path, now = study_folder(definition.name) / "study.yaml", code_fingerprint(SCORING)
    stored = read_definition_of(definition.name).scoring
    if stored and stored[-1][0] == now:
        return replace(definition, scoring=stored), []
    earlier = stored if trials and stored else (("unknown", 0),) if trials else ()
    marked = replace(read_definition_of(definition.name), scoring=(*earlier, (now, trials)))
    _write(path, marked.text())
    notes = [f"note: {_changes(marked.scoring)}"] if trials and stored else []
    return replace(definition, scoring=marked.scoring), notes


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def settle(definition: Definition) -> list[str]:
    """Write `study.yaml`, or check the one that is there; return what is worth knowing about it."""
    path = study_folder(definition.name) / "study.yaml"
    if not path.exists():
        if (path.parent / "journal.log").exists() and definition.config.storage is None:
            raise StudyError(f"{path} is missing, but there are trials beside it; restore it, or choose another --name")
        _write(path, definition.text())
        return []
    stored = read_definition_of(definition.name)
    refuse_difference(stored, definition)
    journal, lost = path.with_name("journal.log"), []
    if definition.config.storage is None and (not journal.exists() or not journal.stat().st_size):
        lost = [f"note: {journal} is empty or missing although the study had begun; whatever trials it held are gone"]
    changed = [f"{name} {was} -> {now}" for name, (was, now) in stored.changed_versions().items() if name != "code"]
    return lost + (
        [f"note: versions changed since the study began ({', '.join(changed)}); numbers may differ"] if changed else []
    )
