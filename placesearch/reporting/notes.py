"""What stands beside trials in the dashboard: a note on the study, and one on each trial that is worth it; Markdown."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from placesearch.records import TrialRecord
from placesearch.reporting.drawing import percent
from placesearch.reporting.front_picture import title_of
from placesearch.reporting.page import headline
from placesearch.reporting.picture_tables import PictureTables, costs_of
from placesearch.reporting.verdict_section import difference_text, verdict_text
from placesearch.reporting.writing import Subject, caution, found_architecture
from placesearch.search.findings import Findings
from placesearch.verdict.verdicts import Confirmed, Verdict


def study_note(
    subject: Subject,
    records: Sequence[TrialRecord],
    findings: Findings | None,
    tables: PictureTables,
    best: int | None,
    page: str,
) -> str:
    """Return what to know about the study: what was found, what that cannot tell, and where the report page is.

    Args:
        subject: What was run.
        records: Finished trials.
        findings: What they say.
        tables: What was found.
        best: The trial that is the pick.
        page: Address of the report page.
    """
    members = tables.candidates[tables.candidates.on_front].sort_values([*costs_of(subject.objectives), "trial"])
    lines = [
        headline(subject, tables, best),
        "",
        f"[Report page]({page}); on the recommended front: {', '.join(f'trial {n}' for n in members.trial) or 'none'}.",
        "",
        "The front in Optuna's own plots goes by observed values, mostly lucky draws; the recommended one goes "
        "by estimates from all trials together. Each trial has its config attached.",
        "",
        caution(subject, records, findings),
        "",
        *(f"- {word}: {value}" for word, value in subject.facts),
    ]
    return "\n".join(lines)


def trial_notes(
    subject: Subject,
    records: Sequence[TrialRecord],
    tables: PictureTables,
    confirmed: Confirmed | None = None,
    best: int | None = None,
) -> dict[int, str]:
    """Return notes by trial: for members of the front, references, and trials that failed or were stopped.

    Args:
        subject: What was run.
        records: Finished trials.
        tables: What was found.
        confirmed: What fresh trainings say.
        best: The trial that is the pick.
    """
    plain = tables.candidates[tables.candidates.placement == "none"]
    notes: dict[int, str] = {}
    for _, row in tables.candidates.iterrows():
        is_reference = isinstance(row.reference, str)
        if not (row.on_front or is_reference or row.trial == best):
            continue
        of_it = [record for record in records if str(record.placement) == row.placement and record.state == "COMPLETE"]
        verdicts = [one for one in confirmed.verdicts if str(one.placement) == row.placement] if confirmed else []
        what = [
            *(["the pick"] if row.trial == best else []),
            *(["on the recommended front"] if row.on_front else []),
            *([f"reference: {row.reference}"] if is_reference else []),
        ]
        said = [f"**{', '.join(what)}**", _accuracy(row), _costs(subject, row, plain), *_verdicts(verdicts)]
        for record in of_it:
            config = found_architecture(subject, record).to_yaml().rstrip()
            notes[record.trial] = "\n\n".join([*said, f"```yaml\n{config}\n```"])
    for record in records:
        if record.state == "FAIL":
            notes[record.trial] = f"**failed**: {record.error or 'no reason given'}"
        elif record.state == "PRUNED" and record.trial not in notes:
            notes[record.trial] = "**stopped early**: even a lucky end would have left it below a cheaper one"
    return notes


def _accuracy(row: Any) -> str:
    often = f"{row.replicates} trials" if row.replicates > 1 else "one trial"
    observed = f"{percent(row.val_accuracy)} observed in {often}"
    if pd.isna(row.estimate):
        return f"Accuracy: {observed}"
    low, high = 100 * row.estimate_low, 100 * row.estimate_high
    return f"Accuracy: {percent(row.estimate)} estimated ({low:.2f} to {high:.2f}), {observed}"


def _costs(subject: Subject, row: Any, plain: pd.DataFrame) -> str:
    said = []
    for cost in costs_of(subject.objectives):
        if pd.isna(row[cost]):
            continue
        base = plain[cost].iloc[0] if len(plain) else None
        more = f" ({100 * (row[cost] / base - 1):+.2f} % on plain)" if base and not pd.isna(base) else ""
        said.append(f"{row[cost]:,} {title_of(cost)}{more}")
    return "Costs: " + ", ".join(said) if said else ""


def _verdicts(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the verdicts as a table, if there are any."""
    if not verdicts:
        return []
    lines = ["| on fresh seeds, against | verdict | difference, points | seeds |", "|---|---|---|---|"]
    for one in verdicts:
        against = one.against if one.start == "scratch" else f"{one.against}, from {one.start}"
        lines.append(f"| {against} | {verdict_text(one)} | {difference_text(one)} | {one.seeds} |")
    return ["\n".join(lines)]
