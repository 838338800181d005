"""What a run is to do: every default filled in, backbone and data looked at, costs counted; nothing is written."""

import os
import platform
import re
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from placesearch.config import KINDS, StudyConfig, full_input_size, short_input_size
from placesearch.costs import CostTable
from placesearch.costs.latency import ENOUGH, LatencyTable, agreement, latency_table
from placesearch.definition import (
    Definition,
    read_definition_of,
    refuse_difference,
    study_folder,
)
from placesearch.errors import BackboneError, InputError, printable
from placesearch.evaluation.versions import PACKAGES, versions
from placesearch.models.architecture import Architecture
from placesearch.models.backbones import input_channels, load_backbone
from placesearch.models.copying import InputSize, initialise
from placesearch.models.outputs import check_outputs
from placesearch.models.sites import Site, every_site, last_map, unplaced_additions
from placesearch.models.weights import load_weights, read_weights
from placesearch.placement import BlockSetting, Placement
from placesearch.prices import Prices, flat_axes, limits_of, within_budget
from placesearch.search.space import SearchSpace, make_space, reference_placements
from placesearch.search.stopping import milestone_epoch
from placesearch.training.datasets import SPLITS, Data, DataInfo, corrupt_images, inspect_data
from placesearch.training.loop import Protocol, pick_precision

SMALLEST_MAP = 4
"""A last feature map with a shorter side below this many pixels leaves spatial attention nothing to look at."""

DIGITS = {"epochs": 1, "batch_size": 8}
DIGITS_TRIALS, DIGITS_TIMEOUT = 10, 300.0
DEFAULTS = {"epochs": 5, "batch_size": 128}
DEFAULT_TRIALS = 50
"""Budgets where none is given. Those of `digits` make a first look of at most five minutes on two slow cores."""

LONGER = 4
"""How many times as long some trials are trained, so that a study can tell who wins from who learns fast."""

OWN_DATA = (1000, 224)
"""Classes and input side for the user's own evaluation, where nothing else is given: as backbones are published."""

LEARNING_RATE, AT_BATCH_SIZE = 0.02, 8
"""The peak learning rate grows with the root of the batch size (Krizhevsky 2014, arXiv:1404.5997)."""

FINE_TUNING = 0.1
"""Share of that rate where candidates start from weights."""


HELD_OUT = 16
"""Placements on which a prediction of latencies is checked."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is to do, before it loads any data.

    Args:
        definition: The definition; the sizes of the splits come once the data are loaded.
        space: What to choose from.
        references: Placements that are evaluated first, by name.
        prices: What placements cost.
        notes: What is worth knowing about costs and budgets, in sentences.
        limits: The most that a candidate may cost, by the name of the cost.
    """

    definition: Definition
    space: SearchSpace
    references: dict[str, Placement]
    prices: Prices
    notes: tuple[str, ...]
    limits: dict[str, float] = field(default_factory=dict)

    def with_data(self, data: Data) -> Self:
        """Return the plan with what is known of the data once they are loaded."""
        splits = {name: len(data.splits[name].labels) for name in SPLITS}
        definition = replace(self.definition, splits=splits, fingerprint=data.fingerprint())
        return replace(self, definition=definition, notes=(*self.notes, *data.notes))

    def lines(self, device: torch.device, jobs: int) -> list[str]:
        """Say what is run, and warn where an axis is flat or the last feature map too small to look at."""
        facts = dict(self.definition.subject().facts)
        where = device_name(device)
        if device.type == "cpu":
            where = f"one thread{f', {jobs} trials at a time' if jobs > 1 else ''}"
        choices = self.space.choices.values()
        lines = [
            facts["backbone"],
            facts["data"],
            f"{facts['training']}, on {where}",
            f"{self.space.size:,} placements: {len(choices)} sites with up to {max(map(len, choices))} choices",
            *self.notes,
        ]
        side = _last_side(self.definition.plain)
        if 0 < side < SMALLEST_MAP:
            lines.append(
                f"note: the last feature map is only {side} wide or high, too few pixels for spatial attention "
                "to mean anything; --stem small or a larger --input-size mends that"
            )
        return lines


def prepare(config: StudyConfig, device: torch.device, stored: Definition | None = None) -> Plan:
    """Fill in every default and look at backbone and data; nothing is written.

    A study that exists keeps its protocol, its versions and what was counted.

    Args:
        config: What to search.
        device: Where candidates will be trained.
        stored: The study that exists, if it is known from elsewhere; else one of this name is looked for.

    Raises:
        InputError: If something cannot be used, or the study of this name has other settings.
    """
    own_data = config.evaluate is not None and "data" not in config.model_fields_set
    data_notes: list[str] = []
    if stored is not None:
        num_classes, native = stored.num_classes, stored.input_size[1]
    elif own_data:
        num_classes, native = OWN_DATA
    else:
        info = inspect_data(config.data, skip_corrupt=config.skip_corrupt)
        num_classes, native, data_notes = len(info.classes), info.side, notes_on_data(info)
    is_digits = config.data == "digits" and not own_data
    with torch.random.fork_rng(devices=[]):
        backbone = load_backbone(config.backbone, num_classes, config.stem)
    start = config.start or ("pretrained" if config.weights else "scratch")
    if start == "pretrained" and not config.weights:
        raise InputError("--start pretrained needs weights to start from: --weights DEFAULT or --weights FILE")
    if start == "scratch" and config.weights:
        raise InputError(
            "--start scratch takes no weights; leave --weights out, or choose --start pretrained or branch"
        )
    if config.stop_early and config.evaluate:
        raise InputError("--stop-early stops the built-in training; your own evaluation has to decide by itself")
    if config.skip_corrupt and config.evaluate:
        raise InputError("--skip-corrupt is for the built-in training; your own evaluation reads its images by itself")
    if start == "branch" and config.evaluate:
        raise InputError("--start branch stops the built-in training; your own evaluation cannot start from there")
    checkpoint = read_weights(config.weights, config.backbone) if config.weights else None
    channels = input_channels(backbone)
    side = config.input_size or (_side_for_a_map(backbone, native, channels) if is_digits else native)
    input_size = full_input_size(side, channels)
    budget = DIGITS if is_digits else DEFAULTS
    filled: dict[str, Any] = {
        "name": config.name or _slug(f"{config.backbone}-{'own' if own_data else Path(config.data).name}"),
        "epochs": config.epochs or budget["epochs"],
        "long_epochs": config.long_epochs,
        "batch_size": config.batch_size or budget["batch_size"],
        "input_size": short_input_size(input_size),
        "start": start,
    }
    if config.long_epochs is None:
        longer = config.sampler == "additive" and not is_digits and not config.evaluate
        filled["long_epochs"] = LONGER * filled["epochs"] if longer else 0
    elif config.long_epochs and config.sampler != "additive":
        raise InputError(
            f"--long-epochs needs the sampler 'additive'; {config.sampler} takes all trials for equally long"
        )
    elif 0 < config.long_epochs <= filled["epochs"]:
        raise InputError(
            f"--long-epochs {config.long_epochs} is no longer than the {filled['epochs']} epochs of others"
        )
    if config.until and config.sampler != "additive":
        raise InputError(f"--until settled needs the sampler 'additive'; {config.sampler} has no model of the front")
    if config.trials is None and config.timeout is None and config.until is None:
        filled |= {"trials": DIGITS_TRIALS, "timeout": DIGITS_TIMEOUT} if is_digits else {"trials": DEFAULT_TRIALS}
    config = config.model_copy(update=filled)
    with torch.random.fork_rng(devices=[]):
        initialise(backbone, input_size)
    loaded = load_weights(backbone, checkpoint) if checkpoint is not None else ()
    outputs = () if config.evaluate else check_outputs(backbone, input_size, num_classes)
    every = every_site(backbone, input_size)
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
        start=start,
    )
    installed = versions()
    here = {"python": platform.python_version()} | {name: installed[name] for name in PACKAGES}
    shapes = {site.name: [site.channels, site.height, site.width] for site in sites}
    weights = checkpoint.name if checkpoint else None
    network = {site.name: [site.channels, site.height, site.width] for site in every if site.kinds}
    definition = Definition(
        config,
        protocol,
        num_classes,
        input_size,
        shapes,
        {},
        here,
        weights,
        network=network,
        hardware=_hardware(device),
        device=device.type,
        code=installed["code"],
    )
    counted: dict[str, list[Any]] = {}
    params = sum(weight.numel() for weight in backbone.parameters())
    if stored is None and (study_folder(definition.name) / "study.yaml").exists():
        stored = read_definition_of(definition.name)
    if stored is not None:
        definition = replace(
            definition,
            protocol=stored.protocol,
            versions=stored.versions,
            hardware=stored.hardware,
            device=stored.device,
            code=stored.code,
            skipped=stored.skipped,
            scoring=stored.scoring,
        )
        counted = stored.costs if stored.costs and stored.costs["none"][2] == params else {}
    references = reference_placements(every)
    table = CostTable(backbone, input_size, sites=every, counted=counted)
    settings = _settings(space, references)
    for site, of_site in settings.items():
        for setting in of_site:
            table.added(site, setting)
    definition = replace(definition, costs=table.content())
    if stored is not None:
        refuse_difference(stored, definition, without_splits=True)
    elif config.skip_corrupt:
        definition = replace(definition, skipped=corrupt_images(config.data))
    latencies = None
    if "latency_ms" in config.objectives or config.max_latency is not None:
        latencies, kept = _latencies(backbone, input_size, every, space, settings, device, protocol, stored)
        definition = replace(definition, latencies=kept)
    prices = Prices(table, latencies)
    limits = limits_of(config, prices)
    space, references, notes = within_budget(config, limits, space, references, prices)
    if latencies is not None:
        notes.append("latency: {told}".format(**definition.latencies))
    notes += flat_axes(config, space, prices)
    unplaced = unplaced_additions(backbone, input_size) if "residual" in config.sites else ()
    notes = [*data_notes, *(f"note: {line}" for line in (*loaded, *outputs, *unplaced)), *notes]
    if definition.skipped:
        first, more = ", ".join(definition.skipped[:3]), len(definition.skipped) - 3
        notes.append(
            f"note: corrupt and left out: {first}{f' and {more:,} more' if more > 0 else ''}; "
            f"{study_folder(definition.name)}/study.yaml keeps the names"
        )
    if config.stop_early and milestone_epoch(max(protocol.epochs, filled["long_epochs"])) is None:
        notes.append("note: --stop-early changes nothing here; trainings of one epoch end before they could be stopped")
    return Plan(definition, space, references, prices, tuple(notes), limits)


def _settings(space: SearchSpace, references: dict[str, Placement]) -> dict[str, list[BlockSetting]]:
    """List every block setting that a study may meet, by site."""
    settings: dict[str, dict[BlockSetting, None]] = {}
    for site, texts in space.choices.items():
        settings[site] = {BlockSetting.parse(text): None for text in texts[1:]}
    for placement in references.values():
        for site, setting in placement.items():
            settings.setdefault(site, {})[setting] = None
    return {site: list(of_site) for site, of_site in settings.items()}


def _latencies(
    backbone: nn.Module,
    input_size: InputSize,
    sites: Sequence[Site],
    space: SearchSpace,
    settings: dict[str, list[BlockSetting]],
    device: torch.device,
    protocol: Protocol,
    stored: Definition | None,
) -> tuple[LatencyTable, dict[str, Any]]:
    """Measure a table of latencies and check it, or take the one that is kept with the study."""
    if stored is not None and stored.latencies:
        return LatencyTable(stored.latencies["plain_ms"], stored.latencies["added_ms"], sites), stored.latencies
    precision = protocol.precision
    table = latency_table(backbone, input_size, sites, settings, device=device, precision=precision)
    random = np.random.default_rng(0)
    held_out: list[Placement] = []
    while len(held_out) < HELD_OUT:
        share = random.random()
        chosen = {
            site: str(random.choice(texts[1:])) for site, texts in space.choices.items() if random.random() < share
        }
        held_out.append(space.placement(chosen))
    seen = agreement(table, backbone, input_size, sites, held_out, device=device, precision=precision)
    how = f"one image, {precision}, " + ("one thread" if device.type == "cpu" else device_name(device))
    told = (
        f"predicted by block ({how}); on {seen.placements} placements that the prediction was not made from, rank "
        f"correlation {seen.tau:.2f} (of two measurements {seen.repeat:.2f}), mean error {100 * seen.error:.1f} %"
    )
    if not seen.ranks:
        raise InputError(
            f"latency cannot rank placements here, so it can be no objective and have no limit: {told}; needed are "
            f"a rank correlation of {ENOUGH} and p < 0.05. A quieter machine may do, or macs_full and params"
        )
    kept = {"plain_ms": table.plain_ms, "added_ms": table.added_ms, "told": told}
    return table, kept


def device_name(device: torch.device) -> str:
    """Return what a device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _hardware(device: torch.device) -> str:
    """Return what a device is called, a processor by its model and cores."""
    if device.type != "cpu":
        return device_name(device)
    model = platform.processor() or platform.machine()
    with suppress(OSError):  # only Linux has this file
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores"


def notes_on_data(info: DataInfo) -> list[str]:
    """Say which classes a folder of images was taken to have, and what was left out."""
    if not info.counts:
        return []
    few, more = [printable(name)[:40] for name in info.classes[:8]], len(info.classes) - 8
    return [f"classes: {', '.join(few)}{f' and {more:,} more' if more > 0 else ''}", *info.notes]


def _side_for_a_map(backbone: nn.Module, smallest: int, channels: int) -> int:
    """Return the smallest input side from which the last feature map has SMALLEST_MAP pixels a side."""

    def last_side(side: int) -> int:
        try:
            return min(last_map(backbone, (channels, side, side)) or (SMALLEST_MAP,))
        except BackboneError:
            return 0  # too small for this network

    sides = range(smallest, 16 * smallest + 1)
    index = bisect_left(sides, SMALLEST_MAP, key=last_side)
    return sides[index] if index < len(sides) else smallest


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:100] or "study"


def _last_side(architecture: Architecture) -> int:
    return min(last_map(architecture.backbone, architecture.input_size, architecture.stem) or (0,))
