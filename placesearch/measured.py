"""Latencies of whole networks: measured once the search is over, kept with the study in `latency.yaml`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from placesearch.config import read_yaml
from placesearch.costs.latency import FEWEST_ROUNDS, Latency, measure
from placesearch.definition import Definition, study_folder
from placesearch.errors import StudyError
from placesearch.models.insertion import insert
from placesearch.models.sites import every_site
from placesearch.plan import device_name
from placesearch.records import TrialRecord

SECONDS = 10.0
"""How long the measurement of a front may take for each of its two batch sizes, roughly."""

TOO_LONG = 60.0
"""A training batch is left out if measuring it would take longer than that."""

_Say = Callable[[str], None]


def measure_members(definition: Definition, members: Sequence[TrialRecord], device: torch.device, say: _Say) -> None:
    """Measure the members of a front that were not measured yet, each against the plain network, and keep the result.

    Args:
        definition: The study.
        members: Finished trials.
        device: Where to.
        say: Is told before something takes time.
    """
    conditions = {
        "device": device_name(device),
        "precision": definition.protocol.precision,
        "batch_sizes": [1, definition.protocol.batch_size],
    }
    kept = _read(definition.name)
    known = kept["placements"] if kept.get("conditions") == conditions else {}
    fresh = [record.placement for record in members if str(record.placement) not in known]
    if not fresh:
        return
    say(f"measuring the latency of the front, {len(fresh)} network{'s'[: len(fresh) > 1]}, against the plain one ...")
    try:
        plain = definition.plain.build(seed=0)
        sites = every_site(plain, definition.input_size)
        models = [plain, *(insert(plain, placement, sites=sites, seed=0, share=True) for placement in fresh)]
        single = _measured(definition, models, device, 1)
        batches: list[Latency | None] = [None] * len(models)
        if definition.protocol.batch_size * sum(one.median_ms for one in single) * FEWEST_ROUNDS / 1000 < TOO_LONG:
            batches = list(_measured(definition, models, device, definition.protocol.batch_size))
    except Exception as problem:  # noqa: BLE001 - a network of the user's own may raise anything; reports come first
        say(f"no latency: {type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}")
        return
    for placement, one, batch in zip(fresh, single[1:], batches[1:], strict=True):
        known[str(placement)] = {**_fields("latency", one), **(_fields("latency_batch", batch) if batch else {})}
    path = study_folder(definition.name) / "latency.yaml"
    new = path.with_name("latency.yaml.new")
    new.write_text(yaml.safe_dump({"conditions": conditions, "placements": known}, sort_keys=False), encoding="utf-8")
    new.replace(path)


def _measured(definition: Definition, models: list[nn.Module], device: torch.device, size: int) -> list[Latency]:
    precision = definition.protocol.precision
    return measure(models, definition.input_size, device=device, precision=precision, batch_size=size, seconds=SECONDS)


def with_latencies(name: str, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the trials of a study with the latencies that were measured.

    Args:
        name: The study.
        records: Its trials.

    Raises:
        StudyError: If the kept latencies are damaged.
    """
    placements = _read(name)["placements"]
    try:
        return [replace(record, **placements.get(str(record.placement), {})) for record in records]
    except (TypeError, AttributeError):
        raise StudyError(f"{_path(name)} is damaged; remove it, the next run measures again") from None


def conditions_of(name: str) -> str:
    """Say how the kept latencies of a study were measured; empty if there are none."""
    given = _read(name).get("conditions")
    if not given:
        return ""
    where = "one thread of the processor" if given["device"] == "cpu" else given["device"]
    single, batch = given["batch_sizes"]
    return (
        f"{where}, {given['precision']}, inference, batches of {single} and {batch}, interleaved with the plain network"
    )


def _fields(prefix: str, latency: Latency) -> dict[str, float]:
    names = {"ms": latency.median_ms, "ratio": latency.ratio}
    names |= {"ratio_low": latency.ratio_low, "ratio_high": latency.ratio_high}
    return {f"{prefix}_{name}": round(value, 6) for name, value in names.items()}


def _path(name: str) -> Path:
    return study_folder(name) / "latency.yaml"


def _read(name: str) -> dict[str, Any]:
    path = _path(name)
    if not path.exists():
        return {"placements": {}}
    content = read_yaml(path)
    if not isinstance(content.get("placements"), dict):
        raise StudyError(f"{path} is damaged; remove it, the next run measures again")
    return content
