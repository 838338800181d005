"""The report folder of a study: tables, a page of text, and a config for each member of the front."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from placesearch.front import front, knee
from placesearch.models.architecture import Architecture, Found
from placesearch.placement import BlockSetting, Placement
from placesearch.records import TrialRecord
from placesearch.reporting.tables import (
    accuracies,
    confirmed_frame,
    effects_frame,
    front_frame,
    trials_frame,
    verdict_frame,
)
from placesearch.reporting.verdict_section import verdict_section
from placesearch.search.findings import Findings, Interval, find
from placesearch.verdict.verdicts import PLAIN, Confirmed


@dataclass(frozen=True, slots=True)
class Subject:
    """What a report is about.

    Args:
        name: The study.
        objectives: Names of its objectives.
        architecture: Its backbone without blocks.
        facts: What was run, as pairs of a word and its value.
        validation_images: Images that a val_accuracy was measured on; None if unknown.
        added: By site, the macs and params that each setting adds there.
        sites: Channels, height and width at the sites of the network, from input to output.
    """

    name: str
    objectives: tuple[str, ...]
    architecture: Architecture
    facts: tuple[tuple[str, str], ...]
    validation_images: int | None
    added: Mapping[str, Mapping[BlockSetting, tuple[int, int]]] = field(default_factory=dict)
    sites: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, tuple[BlockSetting, ...]]:
        """By site, the settings by which its trials are understood."""
        return {site: tuple(of_site) for site, of_site in self.added.items()}

    def find(self, records: Sequence[TrialRecord]) -> Findings | None:
        """Return what trials of the study say; None if they are too few."""
        return find(records, self.settings)

    def cost(self, site: str, setting: BlockSetting) -> tuple[int, int] | None:
        """Return the macs and params that a block adds at a site; None if they were not counted."""
        return self.added.get(site, {}).get(setting)


def set_aside(folder: Path, records: Sequence[TrialRecord], confirmed: Confirmed | None = None) -> Path | None:
    """Move a report folder away if it holds what this study cannot write again.

    That is a trial that the study does not have, or a verdict where it has no trainings for one: the report of another
    study of this name, one that came with a repository, or one whose trials were deleted.

    Args:
        folder: The report folder.
        records: Finished trials of the study.
        confirmed: What its fresh trainings say, if there were any.

    Returns:
        Where it is now; None if it stayed.

    Raises:
        OSError: If it cannot be moved.
    """
    verdict = confirmed is None and any((folder / name).exists() for name in ("confirmed.csv", "verdict.csv"))
    if not verdict and not _foreign(folder / "trials.csv", records):
        return None
    number = 1
    while (other := folder.with_name(f"{folder.name}-earlier-{number}")).exists():
        number += 1
    return folder.rename(other)


def _foreign(table: Path, records: Sequence[TrialRecord]) -> bool:
    """Tell whether a trials.csv has rows that are none of these trials."""
    if not table.exists():
        return False
    own = {str(record.trial): str(record.placement) for record in records}
    try:
        with table.open(encoding="utf-8", newline="") as file:
            rows = [(row["trial"], row["placement"]) for row in csv.DictReader(file)]
    except (KeyError, ValueError, csv.Error):
        return True
    return any(own.get(trial) != placement for trial, placement in rows)


def write_report(
    folder: Path,
    subject: Subject,
    records: Sequence[TrialRecord],
    findings: Findings | None = None,
    confirmed: Confirmed | None = None,
) -> None:
    """Write all tables, `summary.md` and `architectures/*.yaml`; each file appears whole or not at all.

    Args:
        folder: The report folder; made if it does not exist.
        subject: What the report is about.
        records: Finished trials.
        findings: What they say.
        confirmed: What fresh trainings say, if there were any.

    Raises:
        OSError: If the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "trials.csv", trials_frame(records).to_csv(index=False))
    replace_file(folder / "front.csv", front_frame(records, subject.objectives, findings).to_csv(index=False))
    replace_file(folder / "sites.csv", effects_frame(findings, subject.cost).to_csv(index=False))
    replace_file(folder / "summary.md", summary(subject, records, findings, confirmed))
    members = front(records, subject.objectives, accuracies(findings))
    tables = {}
    if confirmed:
        on_front = {member.placement for member in members}
        tables["verdict.csv"] = verdict_frame(confirmed, records, findings, on_front)
        tables["confirmed.csv"] = confirmed_frame(confirmed)
    for name in ("verdict.csv", "confirmed.csv"):
        if name in tables:
            replace_file(folder / name, tables[name].to_csv(index=False))
        else:
            (folder / name).unlink(missing_ok=True)
    configs = {f"trial-{member.trial}.yaml": found_architecture(subject, member).to_yaml() for member in members}
    best, why = pick(subject.objectives, records, findings, confirmed)
    if best is not None:
        configs["best.yaml"] = f"# {why}\n{found_architecture(subject, best).to_yaml()}"
    target = folder / "architectures"
    target.mkdir(exist_ok=True)
    for name, text in configs.items():
        replace_file(target / name, text)
    for old in {*target.glob("trial-*.yaml"), target / "best.yaml"}:
        if old.name not in configs:
            old.unlink(missing_ok=True)


def pick(
    objectives: tuple[str, ...],
    records: Sequence[TrialRecord],
    findings: Findings | None = None,
    confirmed: Confirmed | None = None,
) -> tuple[TrialRecord | None, str]:
    """Return the trial of the architecture to use, and the reason.

    Before a confirmation it is the knee of the front. After one it is the knee of the placements that were shown to be
    better than plain, whether or not they are on the front still, and plain if there are none.

    Args:
        objectives: Names of the objectives.
        records: Finished trials.
        findings: What they say.
        confirmed: What fresh trainings say, if there were any.
    """
    accuracy = accuracies(findings)
    members = front(records, objectives, accuracy)
    if not members:
        return None, "no trial succeeded"
    against = [one for one in confirmed.verdicts if one.against == PLAIN] if confirmed else []
    if confirmed is None or all(one.p_value is None for one in against):
        return knee(members, objectives, accuracy), "the knee of the front; not confirmed on fresh seeds yet"
    longest: dict[Placement, TrialRecord] = {}
    for record in sorted(records, key=lambda record: (record.state == "COMPLETE", record.epochs or 0, -record.trial)):
        longest[record.placement] = record
    known = [longest[placement] for placement in confirmed.better_than_plain if placement in longest]
    better = [record for record in known if record.state == "COMPLETE"]
    if better:
        return knee(better, objectives, accuracy), "the knee of the placements that fresh seeds showed to beat plain"
    return longest[Placement()], "plain: on fresh seeds, nothing was shown to beat it"


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


def caution(subject: Subject, records: Sequence[TrialRecord], findings: Findings | None = None) -> str:
    """Say what the accuracies of a study cannot tell; empty if nothing was measured.

    Args:
        subject: What the report is about.
        records: Finished trials.
        findings: What the trials say.
    """
    accuracies = [
        record.val_accuracy for record in records if record.state == "COMPLETE" and record.val_accuracy is not None
    ]
    if not accuracies:
        return ""
    middle = sorted(accuracies)[len(accuracies) // 2]
    lines = ["Observed accuracies are those of one training each"]
    if subject.validation_images:
        error = 100 * sampling_error(middle, subject.validation_images)
        lines[0] += (
            f", on {subject.validation_images:,} images: at {100 * middle:.1f} % the images alone give a standard "
            f"deviation of {error:.1f} points, and the training adds to it"
        )
    lines[0] += "; the highest of many is too high."
    if findings:
        lines.append(
            f"Estimates see through that as far as effects add up over sites; their noise is estimated at "
            f"{100 * findings.noise:.2f} points a score, and {100 * findings.lack_of_fit:.0f} % of what tells "
            "placements apart as no sum over sites. Intervals hold the true accuracy under the study's first seed "
            "with a probability of 90 % if that model holds; another seed may shift all of them alike. Where they "
            "overlap, no difference is shown."
        )
    stopped = sum(record.state == "PRUNED" for record in records)
    if stopped and findings:
        lines.append(f"Of the {stopped} stopped early, estimates take what was expected of them for what they scored.")
    epochs = {record.epochs for record in records if record.state == "COMPLETE"}
    if len(epochs) < 2:
        lines.append(
            "All trainings were equally brief: what is said holds for such trainings. A brief training favours what "
            "learns fast over what wins in the end."
        )
    elif findings:
        long = sum(record.state == "COMPLETE" and record.epochs == findings.epochs for record in records)
        lines.append(
            f"Estimates speak of trainings of {findings.epochs} epochs, of which there were {long}; the others say "
            "what brief trainings have in common with those."
        )
    return " ".join(lines)


def summary(
    subject: Subject,
    records: Sequence[TrialRecord],
    findings: Findings | None = None,
    confirmed: Confirmed | None = None,
) -> str:
    """Return the page `summary.md`.

    Args:
        subject: What the report is about.
        records: Finished trials.
        findings: What the trials say.
        confirmed: What fresh trainings say, if there were any.
    """
    accuracy = accuracies(findings)
    members = front(records, subject.objectives, accuracy)
    complete = [record for record in records if record.state == "COMPLETE"]
    lines = [f"# {subject.name}", "", "`report.html` beside this page shows the same in pictures.", ""]
    lines += ["## What was run", "", "| | |", "|---|---|"]
    lines += [f"| {word} | {value} |" for word, value in subject.facts]
    failed, stopped = ([record for record in records if record.state == state] for state in ("FAIL", "PRUNED"))
    early = f", {len(stopped)} stopped early" if stopped else ""
    lines += [f"| trials | {len(complete)} complete{early}, {len(failed)} failed |", "", "## Front", ""]
    if not members:
        lines += ["No trial succeeded; the column `error` of trials.csv says why.", ""]
    else:
        best, why = pick(subject.objectives, records, findings, confirmed)
        lines += _table(members, best, findings)
        lines += [
            "",
            "Members are the trained placements that no other one beats in every objective "
            f"({', '.join(subject.objectives)}; accuracy up, everything else down)"
            + (", by estimated accuracy." if findings else ", by observed accuracy: trials are too few for estimates."),
            f"`best.yaml`, marked with *, is {why}. The knee: objectives scaled to 0..1, costs averaged, the member "
            "nearest to (highest accuracy, lowest cost).",
            "",
            *(verdict_section(confirmed, records, findings, {m.placement for m in members}) if confirmed else []),
            caution(subject, records, findings),
            "",
            "## References",
            "",
            *_table([record for record in complete if record.reference], None, findings),
            "",
            *(_effects(findings) if findings else []),
        ]
    if failed:
        lines += ["## Failures", ""]
        lines += [f"- trial {r.trial}, `{r.placement}`: {r.error}" for r in failed]
        lines += [""]
    return "\n".join(lines)


def _effects(findings: Findings) -> list[str]:
    """Tell the strongest effects at sites and the strongest pair; all of them are in sites.csv."""
    alone = [effect for effect in findings.effects if effect.with_site is None]
    best = {effect.site: effect for effect in sorted(alone, key=lambda effect: effect.added.estimate)}
    lines = [
        "## Sites",
        "",
        "The best setting at each site and what it adds to the accuracy in points, with a 90 % interval (`sites.csv` "
        "has all):",
        "",
        "| site | setting | trials | added |",
        "|---|---|---:|---:|",
    ]
    lines += [
        f"| {effect.site} | {effect.setting} | {effect.tried} | {_points(effect.added)} |"
        for effect in sorted(best.values(), key=lambda effect: -effect.added.estimate)
    ]
    clear = [effect for effect in findings.effects if effect.with_site and effect.added.low * effect.added.high > 0]
    lines += ["", "No pair of blocks is shown to add more or less than both alone." if not clear else "Pairs:", ""]
    for effect in clear[:3]:
        both = f"{effect.setting.block} at {effect.site} with {effect.with_block} at {effect.with_site}"
        lines.append(f"- {both}: {_points(effect.added)} beyond their sum")
    return [*lines, ""] if clear else lines


def _points(interval: Interval) -> str:
    return f"{100 * interval.estimate:+.2f} ({100 * interval.low:+.2f} to {100 * interval.high:+.2f})"


def _table(records: Sequence[TrialRecord], best: TrialRecord | None, findings: Findings | None) -> list[str]:
    lines = [
        "| trial | estimate (90 %) | observed | epochs | macs | macs_full | params | latency / plain | placement |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for record in records:
        mark = " *" if record == best else ""
        name = f"{record.reference}: " if record.reference else ""
        found = findings.accuracy.get(record.placement) if findings else None
        observed = f"{100 * (record.val_accuracy or 0):.2f} %"
        costs = " | ".join(map(_count, (record.macs, record.macs_full, record.params)))
        lines.append(
            f"| {record.trial}{mark} | {estimate_text(found)} | {observed} | {record.epochs or ''} | {costs} "
            f"| {latency_text(record)} | {name}`{record.placement}` |"
        )
    return lines


def estimate_text(found: Interval | None) -> str:
    """Return an estimated accuracy in percent with its interval; empty without one.

    Example:
        >>> estimate_text(Interval(0.9512, 0.94, 0.96))
        '95.12 % (94.00 to 96.00)'
    """
    return f"{100 * found.estimate:.2f} % ({100 * found.low:.2f} to {100 * found.high:.2f})" if found else ""


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


def duration_text(seconds: float) -> str:
    """Return a duration with its two largest units.

    Example:
        >>> duration_text(59.6), duration_text(3600 + 61)
        ('1 min 00 s', '1 h 01 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all.

    Args:
        path: The file; what is there is replaced.
        content: What it is to hold, text as UTF-8.

    Raises:
        OSError: If it cannot be written.
    """
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.write_bytes(content if isinstance(content, bytes) else content.encode())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)  # it is in place by now, or of no use
