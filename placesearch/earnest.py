"""Training an architecture in earnest: many epochs, resumable, with the best weights and their test accuracy."""

import csv
import importlib.metadata
import io
import json
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import nn

from placesearch.config import read_yaml, short_input_size
from placesearch.errors import InputError
from placesearch.evaluation.candidate import steady
from placesearch.models.architecture import Architecture
from placesearch.models.copying import InputSize, copy_of
from placesearch.models.insertion import fold
from placesearch.models.outputs import check_outputs
from placesearch.models.weights import Checkpoint, has_blocks, load_weights, read_weights
from placesearch.plan import AT_BATCH_SIZE, DEFAULTS, DIGITS, FINE_TUNING, LEARNING_RATE, device_name, notes_on_data
from placesearch.records import Epoch, StepEnded, Told
from placesearch.reporting.curve_picture import best_of, curve_svg
from placesearch.reporting.writing import replace_file
from placesearch.study import device_named
from placesearch.training.branch import Branch
from placesearch.training.checkpoint import Snapshot, follow, load_snapshot, write_tensors
from placesearch.training.datasets import SPLITS, Data, inspect_data, load_data
from placesearch.training.loop import Protocol, Trainer, branch_of, dice_of, pick_precision, weights_of
from placesearch.training.team import Team, gathered, own_device

RECIPE = ("momentum", "weight_decay", "label_smoothing", "warmup", "shift")
"""What a training that goes on takes from its beginning, whatever the defaults are by now."""

EPOCHS = 30
"""Passes over the training split, where no number is given."""

Watch = Callable[[Told | StepEnded | Epoch], None]


@dataclass(frozen=True, slots=True)
class Trained:
    """An architecture that was trained in earnest, and what came of it.

    Args:
        folder: Where its files are.
        architecture: What was trained, with the number of classes of the data.
        log: Its epochs.
        test_accuracy: Share of test images that the best weights classify correctly, 0..1.
        test_loss: Their mean cross-entropy on the test split.
        test_images: Images in the test split.
        fresh: Whether anything was trained now; False if all was done before.
    """

    folder: Path
    architecture: Architecture
    log: tuple[Epoch, ...]
    test_accuracy: float
    test_loss: float
    test_images: int
    fresh: bool

    @property
    def best(self) -> Epoch:
        """The epoch of the best weights, chosen on the validation split."""
        return best_of(self.log)

    def build(self) -> nn.Module:
        """Build the model with its best weights."""
        return self.architecture.build(weights=self.folder / "best.safetensors")


def train(
    architecture: str | Path | Architecture,
    data: str,
    *,
    epochs: int = EPOCHS,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    ema: float | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    allow: Collection[str] = (),
    output: str | Path | None = None,
    watch: Watch | None = None,
) -> Trained:
    """Train an architecture in earnest, or go on where that was interrupted.

    The loop is that of a search: one-cycle Nesterov SGD with label smoothing, bf16 where the device has it. After each
    epoch the network is validated and everything is stored; whatever ends the process, the same call loses no more
    than the epoch in progress and, on a processor, gives the numbers of a training that was never stopped. The test
    split is looked at once, at the end, with the weights that were best on the validation split.

    Started by torchrun, all processes train one model, each on its share of every batch.

    Args:
        architecture: An architecture or its file. Its classifier is made for the classes of the data.
        data: A data set, as `--data` takes it.
        epochs: Passes over the training split.
        batch_size: Images a step, of all processes together; 8 for digits and 128 for other data if not given.
        learning_rate: Peak of the schedule; if not given, as in a search: 0.02 times the root of an eighth of the batch
            size, and a tenth of that from weights.
        ema: Share of the averaged weights that is kept each step, 0.999 say. The averaged weights are then those that
            are validated and written. None keeps no average.
        weights: What to start from, as `Architecture.build` takes it. Blocks that the weights lack start as the
            identity.
        seed: Seed of initialisation, data order and augmentation.
        device: Where to train.
        allow: Names `package.module:function` of code that the file may name.
        output: Folder for what is written; `reports/NAME-train` if not given.
        watch: Is told what happens, as it happens.

    Returns:
        What came of it.

    Raises:
        InputError: If something given cannot be used, or the folder holds a training with other settings.
        TrainingError: If a loss is no longer finite.

    Example:
        >>> train("reports/examples/resnet18-digits/architectures/best.yaml", "digits", epochs=0)
        Traceback (most recent call last):
        placesearch.errors.InputError: epochs 0 is not allowed; allowed are 1 to 100,000
    """
    for name, number, least, most in (
        ("epochs", epochs, 1, 100_000),
        ("batch size", batch_size, 2, 1_000_000),
        ("learning rate", learning_rate, 1e-9, 1000),
        ("ema", ema, 0, 0.9999999),
        ("seed", seed, 0, 2**32 - 1),
    ):
        if number is not None and not least <= number <= most:
            raise InputError(f"{name} {number} is not allowed; allowed are {least:,} to {most:,}")
    found = architecture if isinstance(architecture, Architecture) else Architecture.load(architecture, allow)
    folder = Path(output) if output else _default_folder(architecture)
    info = inspect_data(data)
    classes = len(info.classes)
    checkpoint = read_weights(weights, found.backbone) if weights is not None else None
    batch_size = batch_size or (DIGITS if data == "digits" else DEFAULTS)["batch_size"]
    usual = LEARNING_RATE * (batch_size / AT_BATCH_SIZE) ** 0.5 * (FINE_TUNING if checkpoint else 1.0)
    settings = {
        "backbone": found.backbone,
        "stem": found.stem,
        "placement": str(found.placement),
        "factors": found.factors,
        "classes": classes,
        "input_size": _plain_size(found.input_size),
        "data": data,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate or usual,
        "ema": ema,
        "weights": checkpoint.name if checkpoint else None,
        "seed": seed,
    }
    with gathered() as team:
        where = device_named(own_device(device))
        told = watch if watch is not None and team.rank == 0 else _nobody
        with _held(folder, team):
            if (folder / "result.yaml").exists():
                return _result(folder, settings, found)
            if classes != found.num_classes:
                told(
                    Told(f"the file says {found.num_classes:,} classes, {data} has {classes:,}: so has the classifier")
                )
            for note in notes_on_data(info):
                told(Told(note))
            plain = found.model_copy(update={"num_classes": classes})
            return _Training(folder, plain, settings, checkpoint, where, team, told).run()


class _Training:
    """One training from its first or its last stored epoch to its end."""

    def __init__(
        self,
        folder: Path,
        architecture: Architecture,
        settings: Mapping[str, Any],
        checkpoint: Checkpoint | None,
        device: torch.device,
        team: Team,
        watch: Watch,
    ) -> None:
        self._folder, self._architecture, self._settings = folder, architecture, settings
        self._checkpoint, self._device, self._team, self._watch = checkpoint, device, team, watch
        stored = folder / "checkpoint.safetensors"
        self._snapshot = load_snapshot(stored) if stored.exists() else None
        self._conditions: dict[str, Any] = {
            "precision": pick_precision(device),
            "threads": torch.get_num_threads(),
            **{name: field.default for name, field in Protocol.__dataclass_fields__.items() if name in RECIPE},
        }
        self._log: list[Epoch] = []
        if self._snapshot is not None:
            told = _read(self._snapshot.told, stored)
            _refuse_difference(told["settings"], settings, folder)
            self._conditions |= {name: told["conditions"].get(name, now) for name, now in self._conditions.items()}
            self._log = [Epoch(**one) for one in told["log"]]

    def run(self) -> Trained:
        """Train what is left to train."""
        settings = self._settings
        data = _load_in_turn(str(settings["data"]), self._architecture.input_size, self._team)
        images = {name: len(data.splits[name].labels) for name in SPLITS}
        if self._snapshot is not None:
            _refuse_difference(self._snapshot.told["images"], images, self._folder)
        protocol = Protocol(
            epochs=settings["epochs"],
            batch_size=settings["batch_size"],
            learning_rate=settings["learning_rate"],
            seed=settings["seed"],
            start="pretrained" if self._checkpoint else "scratch",
            **self._conditions,
        )
        trainer = Trainer(data, protocol, self._device, self._team)
        if trainer.batch_size % self._team.size:
            raise InputError(
                f"a batch of {trainer.batch_size} cannot be shared among {self._team.size} processes; give a "
                "--batch-size that they divide"
            )
        for text in (*self._opening(images, protocol), *self._looked_at(), *data.notes):
            self._watch(Told(text))
        with steady(self._device, protocol.threads):
            self._train(trainer, images)
            if self._team.rank == 0:
                self._finish(trainer, images)
            self._team.wait()
        return replace(_result(self._folder, settings, self._architecture), fresh=True)

    def _opening(self, images: Mapping[str, int], protocol: Protocol) -> Iterator[str]:
        told = self._settings
        where = (
            f"{protocol.threads} thread{'s'[: protocol.threads > 1]}"
            if self._device.type == "cpu"
            else device_name(self._device)
        )
        if self._team.size > 1:
            where = f"{self._team.size} processes, {where} each"
        start = f"from {told['weights']}" if told["weights"] else "from scratch"
        counts = ", ".join(f"{count:,} {name}" for name, count in images.items())
        size = "x".join(map(str, self._architecture.input_size))
        yield f"training {told['backbone']}: {told['placement']}"
        yield f"  {told['data']}: {counts} images in {told['classes']:,} classes, input {size}"
        yield (
            f"  {told['epochs']} epochs {start}, batch {told['batch_size']}, peak learning rate "
            f"{told['learning_rate']:g}, {protocol.precision}, on {where}"
        )
        if self._log:
            yield f"  going on after epoch {len(self._log)}"

    def _looked_at(self) -> Iterator[str]:
        """Say what is taken of what the network puts out, and what of the weights was left out."""
        architecture = self._architecture
        model = architecture.build(seed=self._settings["seed"])
        told = check_outputs(model, architecture.input_size, architecture.num_classes)
        yield from (
            f"  {text}" for text in (*told, *(load_weights(model, self._checkpoint) if self._checkpoint else ()))
        )

    def _train(self, trainer: Trainer, images: Mapping[str, int]) -> None:
        """Take all steps that are left; at the end of each epoch validate and store everything."""
        decay, epochs = self._settings["ema"], self._settings["epochs"]
        model, snapshot = self._fresh_model(), self._snapshot
        branch = Branch(snapshot.weights, snapshot.momentum) if snapshot else None
        if snapshot is not None:
            _load(model, snapshot.weights, self._folder)
            _check_momentum(model, snapshot, self._folder)
        optimizer = trainer.optimizer(model, branch=branch)
        average = copy_of(model) if decay is not None else None
        if snapshot is not None and average is not None:
            _load(average, snapshot.average, self._folder)
        judged = model if average is None else average
        if self._log and self._team.rank == 0:
            self._write(judged)
        began = time.perf_counter()

        def ended(epoch: int, loss: float) -> None:
            nonlocal began
            if self._team.rank:
                return
            seen, rate = trainer.validate(judged), float(optimizer.param_groups[0]["lr"])
            self._log.append(Epoch(epoch, loss, seen.accuracy, seen.loss, rate, time.perf_counter() - began))
            began = time.perf_counter()
            now = branch_of(model, optimizer)
            Snapshot(
                told={
                    "settings": dict(self._settings),
                    "images": dict(images),
                    "conditions": self._conditions,
                    "log": [asdict(one) for one in self._log],
                },
                weights=now.weights,
                momentum=now.momentum,
                average=weights_of(average) if average is not None else {},
                dice={"state": dice_of(self._device)},
            ).save(self._folder / "checkpoint.safetensors")
            self._write(judged)
            self._watch(self._log[-1])

        dice = snapshot.dice.get("state") if snapshot and self._team.rank == 0 else None
        if dice is not None and dice.shape != dice_of(self._device).shape:
            dice = None  # that of another kind of device
        begin = len(self._log) * trainer.epoch_steps
        if begin == trainer.steps:
            return
        for step in trainer.steps_between(model, optimizer, begin, trainer.steps, dice, ended):
            if average is not None:
                follow(average, model, decay, step)
            self._watch(StepEnded(0, step, trainer.steps, 1 + (step - 1) * epochs // trainer.steps))

    def _fresh_model(self) -> nn.Module:
        start = self._checkpoint
        model = self._architecture.build(seed=self._settings["seed"])
        if start is None:
            return model
        initial = "standard" if has_blocks(model, start) else "identity"
        return self._architecture.build(weights=start, initial=initial, seed=self._settings["seed"])

    def _write(self, judged: nn.Module) -> None:
        """Write everything that follows from the checkpoint; done again, it comes out the same."""
        last, best, folder = self._log[-1], best_of(self._log), self._folder
        stock = fold(judged)
        tensors = weights_of(stock)
        told = {"epoch": str(last.epoch), "val_accuracy": str(last.val_accuracy)}
        write_tensors(folder / "last.safetensors", tensors, told)
        if best == last:
            write_tensors(folder / "best.safetensors", tensors, told)
        replace_file(folder / "architecture.yaml", self._architecture.with_factors_of(stock).to_yaml())
        replace_file(folder / "log.csv", _table(self._log))
        title = f"{self._settings['backbone']} on {self._settings['data']}"
        replace_file(folder / "curve.svg", curve_svg(self._log, self._settings["epochs"], title))

    def _finish(self, trainer: Trainer, images: Mapping[str, int]) -> None:
        """Measure the best weights on the test split and write that down; then the checkpoint has served."""
        path, best = self._folder / "best.safetensors", best_of(self._log)
        if _epoch_of(path) != best.epoch:
            raise InputError(
                f"{path} is not that of epoch {best.epoch}, the best; remove {self._folder}/ to begin anew"
            )
        kept = Architecture.load(self._folder / "architecture.yaml", _code_in(self._architecture))
        model = kept.build(weights=path)
        seen = trainer.validate(model.to(self._device).to(memory_format=torch.channels_last), "test")
        content = {
            "settings": dict(self._settings),
            "images": dict(images),
            "conditions": {**self._conditions, "processes": self._team.size, "device": device_name(self._device)},
            "versions": {name: importlib.metadata.version(name) for name in ("placesearch", "torch", "torchvision")},
            "mean": trainer.mean.tolist(),
            "std": (1 / trainer.scale).tolist(),
            "best_epoch": best.epoch,
            "val_accuracy": best.val_accuracy,
            "val_loss": best.val_loss,
            "test_accuracy": seen.accuracy,
            "test_loss": seen.loss,
            "seconds": sum(one.seconds for one in self._log),
            "log": [asdict(one) for one in self._log],
        }
        replace_file(
            self._folder / "result.yaml", yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120)
        )
        (self._folder / "checkpoint.safetensors").unlink(missing_ok=True)


def _result(folder: Path, settings: Mapping[str, Any], architecture: Architecture) -> Trained:
    """Return what a training came to that has ended.

    Raises:
        InputError: If it is one with other settings, or its files are damaged.
    """
    path = folder / "result.yaml"
    content = _read(read_yaml(path), path)
    _refuse_difference(content["settings"], settings, folder)
    try:
        return Trained(
            folder=folder,
            architecture=Architecture.load(folder / "architecture.yaml", _code_in(architecture)),
            log=tuple(Epoch(**one) for one in content["log"]),
            test_accuracy=content["test_accuracy"],
            test_loss=content["test_loss"],
            test_images=content["images"]["test"],
            fresh=False,
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); remove {folder}/ to begin anew") from None


def _read(told: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Check the form of what a file tells about a training."""
    parts = {"settings": dict, "images": dict, "conditions": dict, "log": list}
    names = {one.name for one in fields(Epoch)}
    for name, kind in parts.items():
        if not isinstance(told, Mapping) or not isinstance(told.get(name), kind):
            raise InputError(f"{path} is damaged: it lacks '{name}'; remove it to begin anew, or give another --output")
    if not told["log"] or not all(isinstance(one, dict) and set(one) == names for one in told["log"]):
        raise InputError(f"{path} is damaged: its log is none; remove it to begin anew, or give another --output")
    conditions = told["conditions"]
    if conditions.get("precision") not in ("fp32", "bf16") or conditions.get("threads") not in range(1, 4097):
        raise InputError(
            f"{path} is damaged: its precision or number of threads is none; remove it to begin anew, or give another "
            "--output"
        )
    return told


def _refuse_difference(then: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with another training than the one that is stored."""
    then, now = json.loads(json.dumps(then)), json.loads(json.dumps(now))
    for name in now:
        if then.get(name) != now[name]:
            raise InputError(
                f"{folder}/ holds a training with other settings, {name.replace('_', '-')}: {then.get(name)} then, "
                f"{now[name]} now; give another --output, or remove the folder"
            )


def _load(model: nn.Module, tensors: Mapping[str, Any], folder: Path) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError:
        raise InputError(
            f"{folder}/checkpoint.safetensors is that of another network; give another --output, or remove the folder"
        ) from None


def _check_momentum(model: nn.Module, snapshot: Snapshot, folder: Path) -> None:
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    if any(shapes.get(name) != tensor.shape for name, tensor in snapshot.momentum.items()):
        raise InputError(
            f"{folder}/checkpoint.safetensors is that of another network; give another --output, or remove the folder"
        )


def _code_in(architecture: Architecture) -> set[str]:
    """Return what a copy of an architecture may name, because the architecture does."""
    return {architecture.backbone, *(setting.block for setting in architecture.placement.values())}


def _epoch_of(path: Path) -> int | None:
    """Return the epoch that weights say they are of; None if they cannot be read."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return int((file.metadata() or {})["epoch"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _table(log: Sequence[Epoch]) -> str:
    """Return the log as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [one.name for one in fields(Epoch)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(one) for one in log)
    return text.getvalue()


def _plain_size(size: InputSize) -> int | list[int]:
    """Return an input size as settings hold it: one number for a square of three channels."""
    short = short_input_size(size)
    return short if isinstance(short, int) else list(short)


def _load_in_turn(spec: str, size: InputSize, team: Team) -> Data:
    """Load the data; of several processes the first does so first, because it may have to download them."""
    if team.rank:
        team.wait()
    data = load_data(spec, size)
    if not team.rank:
        team.wait()
    return data


def _default_folder(architecture: str | Path | Architecture) -> Path:
    """Return `reports/STUDY-FILE-train`, as far as there is a study and a file."""
    if isinstance(architecture, Architecture):
        parts = [architecture.found.study if architecture.found else architecture.backbone]
    else:
        path = Path(architecture)
        parts = [path.parent.parent.name if path.parent.name == "architectures" else "", path.stem]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(part for part in parts if part)).strip("-._")[:100]
    return Path("reports") / f"{name or 'architecture'}-train"


@contextmanager
def _held(folder: Path, team: Team) -> Iterator[None]:
    """Make the folder and hold it; a second training there is refused. What cannot be written is told in one line."""
    try:
        if team.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "run.lock", timeout=0):
                yield
        else:
            yield
    except Timeout:
        raise InputError(f"{folder}/ is in use by another training; wait for it or give another --output") from None
    except BrokenPipeError:
        raise  # nobody reads the output any more
    except OSError as error:
        raise InputError(
            f"cannot write to {error.filename or folder}: {error.strerror}; every finished epoch is kept, the same "
            "command goes on"
        ) from None


def _nobody(_: Any) -> None:
    """Watch nothing."""
