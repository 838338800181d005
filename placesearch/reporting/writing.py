"""The report folder of a study: tables, a page of text, and a config for each member of the front."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from placesearch.front import front, knee
from placesearch.models.architecture import Architecture, Found
from placesearch.records import TrialRecord
from placesearch.reporting.tables import front_frame, trials_frame


@dataclass(frozen=True, slots=True)
class Subject:
    """What a report is about.

    Args:
        name: The study.
        objectives: Names of its objectives.
        architecture: Its backbone without blocks.
        facts: What was run, as pairs of a word and its value.
        validation_images: Images that a val_accuracy was measured on; None if unknown.
    """

    name: str
    objectives: tuple[str, ...]
    architecture: Architecture
    facts: tuple[tuple[str, str], ...]
    validation_images: int | None


def write_report(folder: Path, subject: Subject, records: Sequence[TrialRecord]) -> None:
    """Write `trials.csv`, `front.csv`, `summary.md` and `architectures/*.yaml`; each file appears whole or not at all.

    Args:
        folder: The report folder; made if it does not exist.
        subject: What the report is about.
        records: Finished trials.

    Raises:
        OSError: If the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "trials.csv", trials_frame(records).to_csv(index=False))
    _replace(folder / "front.csv", front_frame(records, subject.objectives).to_csv(index=False))
    _replace(folder / "summary.md", summary(subject, records))
    members = front(records, subject.objectives)
    configs = {f"trial-{member.trial}.yaml": found_architecture(subject, member) for member in members}
    if members:
        configs["best.yaml"] = found_architecture(subject, knee(members, subject.objectives))
    target = folder / "architectures"
    target.mkdir(exist_ok=True)
    for name, architecture in configs.items():
        _replace(target / name, architecture.to_yaml())
    for old in {*target.glob("trial-*.yaml"), target / "best.yaml"}:
        if old.name not in configs:
            old.unlink(missing_ok=True)


def found_architecture(subject: Subject, record: TrialRecord) -> Architecture:
    """Return the architecture of a trial with what was measured on it."""
    found = Found(
        study=subject.name,
        trial=record.trial,
        val_accuracy=record.val_accuracy,
        macs=record.macs,
        params=record.params,
    )
    factors = dict(record.factors or {})
    return subject.architecture.model_copy(update={"placement": record.placement, "factors": factors, "found": found})


def sampling_error(accuracy: float, images: int) -> float:
    """Return the binomial standard deviation of an accuracy measured on so many images, sqrt(p (1 - p) / n).

    Example:
        >>> round(sampling_error(0.9, 5000), 4)
        0.0042
    """
    return math.sqrt(accuracy * (1 - accuracy) / images)


def caution(subject: Subject, records: Sequence[TrialRecord]) -> str:
    """Say what the accuracies of a study cannot tell; empty if nothing was measured."""
    accuracies = [
        record.val_accuracy for record in records if record.state == "COMPLETE" and record.val_accuracy is not None
    ]
    if not accuracies:
        return ""
    if not subject.validation_images:
        return (
            "Accuracies are observed once each. How much they vary by themselves was not measured; small differences "
            "may mean nothing, and the highest of many observed values is too high."
        )
    middle = sorted(accuracies)[len(accuracies) // 2]
    error = 100 * sampling_error(middle, subject.validation_images)
    return (
        f"Accuracies are observed once each, after a brief training, on {subject.validation_images:,} images: at "
        f"{100 * middle:.1f} % the images alone give a standard deviation of {error:.1f} points, and the training adds "
        "to it. Smaller differences mean nothing, and the highest of many observed values is too high. A brief "
        "training also favours what learns fast over what wins in the end."
    )


def summary(subject: Subject, records: Sequence[TrialRecord]) -> str:
    """Return the page `summary.md`.

    Args:
        subject: What the report is about.
        records: Finished trials.
    """
    members = front(records, subject.objectives)
    complete = [record for record in records if record.state == "COMPLETE"]
    lines = [f"# {subject.name}", "", "## What was run", "", "| | |", "|---|---|"]
    lines += [f"| {word} | {value} |" for word, value in subject.facts]
    failed = len(records) - len(complete)
    lines += [f"| trials | {len(complete)} complete, {failed} failed |", "", "## Front", ""]
    if not members:
        lines += ["No trial succeeded; the column `error` of trials.csv says why.", ""]
    else:
        best = knee(members, subject.objectives)
        lines += _table(members, best)
        lines += [
            "",
            "Members are the trials that no other one beats in every objective "
            f"({', '.join(subject.objectives)}; accuracy up, everything else down).",
            "`best.yaml` is the knee, marked with *: objectives scaled over the front to 0..1, costs averaged, "
            "the member nearest to (highest accuracy, lowest cost).",
            "",
            caution(subject, records),
            "",
            "## References",
            "",
            *_table([record for record in complete if record.reference], None),
            "",
        ]
    if failed:
        lines += ["## Failures", ""]
        lines += [f"- trial {r.trial}, `{r.placement}`: {r.error}" for r in records if r.state != "COMPLETE"]
        lines += [""]
    return "\n".join(lines)


def _table(records: Sequence[TrialRecord], best: TrialRecord | None) -> list[str]:
    lines = [
        "| trial | val. accuracy | macs | macs_full | params | latency / plain | placement |",
        "|---:|---:|---:|---:|---:|---:|---|",
    ]
    for record in records:
        mark = " *" if record == best else ""
        name = f"{record.reference}: " if record.reference else ""
        lines.append(
            f"| {record.trial}{mark} | {100 * (record.val_accuracy or 0):.2f} % | {_count(record.macs)} "
            f"| {_count(record.macs_full)} | {_count(record.params)} | {latency_text(record)} "
            f"| {name}`{record.placement}` |"
        )
    return lines


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def latency_text(record: TrialRecord) -> str:
    """Return the latency by the plain network's with its 95 % interval; empty if it was not measured.

    Example:
        >>> from placesearch.placement import Placement
        >>> fields = {"latency_ratio": 1.081, "latency_ratio_low": 1.0702, "latency_ratio_high": 1.0924}
        >>> latency_text(TrialRecord(trial=0, state="COMPLETE", placement=Placement(), **fields))
        '1.08 (1.07 to 1.09)'
    """
    if record.latency_ratio is None:
        return ""
    return f"{record.latency_ratio:.2f} ({record.latency_ratio_low:.2f} to {record.latency_ratio_high:.2f})"


def _replace(path: Path, text: str) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)
