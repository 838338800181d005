"""The result of a study as it is printed at the end: front, verdict, where the reports are, what to do next."""

from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap

from rich.console import Console

from placesearch.cli.plot import Point, front_plot
from placesearch.cli.terminal import aligned, make_console, name_of, percent, say
from placesearch.config import StudyConfig
from placesearch.definition import read_definition_of
from placesearch.models.code import names_code
from placesearch.placement import Placement
from placesearch.records import TrialRecord
from placesearch.reporting.front_picture import title_of
from placesearch.reporting.tables import accuracies
from placesearch.reporting.verdict_section import difference_text
from placesearch.reporting.writing import duration_text, estimate_text, latency_text, pick
from placesearch.study import Study
from placesearch.verdict.verdicts import Confirmed

LEAST_BESIDE = 30
"""Placements stand beside their rows where they have at least so many characters, else below."""

INDENT = 5
"""So far in they stand below."""

WORDS = ("difference in points", "verdict", "against", "start")
"""Columns of words; the others are numbers."""


def show_result(study: Study) -> None:
    """Print the front, the verdict if there is one, where the reports are, and what to do next.

    Args:
        study: The study.
    """
    console = make_console()
    lines = [*_how_it_went(study)]
    say(console, *lines, *([""] if lines else []))
    members, best = study.front, _pick(study)
    if members:
        _print_front(console, study)
        plot = _plot(study, best, ascii_only=console.options.ascii_only)
        if plot:
            say(console, "", *plot)
        console.print()
        console.print(study.caution, highlight=False, markup=False)
    if study.confirmed:
        console.print()
        _print_verdict(console, study.confirmed, f"verdict on {study.name}, on the test split")
    say(
        console,
        *([""] if members else []),
        f"reports: {study.folder}/  (report.html, summary.md, front.csv, sites.csv, trials.csv)",
    )
    if best is not None:
        say(console, f"best config: {study.folder}/architectures/best.yaml  ({_short(best)})")
    if members:
        steps = next_steps(study.name, read_definition_of(study.name).config, confirmed=study.confirmed is not None)
        wide = max(len(command) for command, _ in steps)
        say(console, "", "to go on:", *(f"  {command:{wide}}  # {what}" for command, what in steps))


def next_steps(name: str, config: StudyConfig, *, confirmed: bool) -> list[tuple[str, str]]:
    """Return commands to go on with after a study or its confirmation, and what each is for.

    Args:
        name: The study.
        config: Its options; code that it names has to be allowed again.
        confirmed: Whether it was confirmed.

    Example:
        >>> next_steps("s", StudyConfig(backbone="resnet18"), confirmed=False)[1]
        ('placesearch confirm s', 'which gains are real')
    """
    own = [code for code in (config.backbone, *config.blocks) if names_code(code)]
    allowed = "".join(f" --allow {code}" for code in own)
    steps = [(f"placesearch dashboard {name}", "look at it in a browser")]
    if not confirmed:
        evaluation = f" --allow {config.evaluate}" if config.evaluate else ""
        steps.append((f"placesearch confirm {name}{allowed}{evaluation}", "which gains are real"))
    steps.append((f"placesearch export {name} --format py{allowed}", "best.yaml as a Python file"))
    if confirmed and not config.evaluate:
        best = f"reports/{name}/architectures/best.yaml"
        steps.append((f"placesearch train {best} --data {config.data} --epochs 100{allowed}", "train it in earnest"))
    return steps


def _how_it_went(study: Study) -> Iterator[str]:
    """Say why the study ended, and which trials did not go well."""
    records = study.records
    if study.ended:
        share = 100 * study.training_share
        rest = f"; {share:.0f} % of the workers' time in training steps" if share else ""
        yield f"{study.ended}; {'searched' if share else 'took'} {duration_text(study.seconds)}{rest}"
    failed = [record for record in records if record.state == "FAIL"]
    if failed:
        yield f"{len(failed)} of {len(records)} trials failed; the first: {failed[0].error}"
    stopped = sum(record.state == "PRUNED" for record in records)
    if stopped:
        yield f"{stopped} of {len(records)} trials stopped early"


def _pick(study: Study) -> TrialRecord | None:
    """Return the trial of best.yaml."""
    return pick(study.subject.objectives, study.records, study.findings, study.confirmed)[0]


def _plot(study: Study, best: TrialRecord | None, *, ascii_only: bool) -> list[str]:
    """Draw the front, the references and the plain network by the first cost."""
    cost = next((name for name in study.subject.objectives if name != "accuracy"), None)
    if cost is None:
        return []
    accuracy = accuracies(study.findings)
    members = study.front
    points: dict[Placement, Point] = {}
    for record in (*(r for r in study.records if r.reference and r.state == "COMPLETE"), *members):
        kind = "front" if record in members else "reference"
        kind = "plain" if record.placement == Placement() else kind
        kind = "pick" if best is not None and record.placement == best.placement else kind
        value = record.val_accuracy or 0.0 if accuracy is None else accuracy[record.placement]
        points[record.placement] = Point(kind, record.value(cost), value, _short(record))
    what = "observed accuracy" if accuracy is None else "estimated accuracy"
    return front_plot([*points.values()], title_of(cost), f"{what}, %", ascii_only=ascii_only)


def _short(record: TrialRecord) -> str:
    """Return a name of a trial that is short: of a reference its first one."""
    return record.reference.split()[0] if record.reference else f"trial {record.trial}"


def _print_front(console: Console, study: Study) -> None:
    """Print the front in the widest form that fits."""
    members, found = study.front, study.findings
    counted = [name for name in ("macs", "macs_full", "params") if name in study.subject.objectives] or ["params"]
    times = [latency_text(record) for record in members]
    columns = {"trial": [str(record.trial) for record in members]}
    if found:
        columns["estimate (90 %)"] = [estimate_text(found.accuracy[record.placement]) for record in members]
    columns["val. accuracy"] = [percent(record.val_accuracy) for record in members]
    brief = columns | {name: [f"{record.value(name):,.0f}" for record in members] for name in counted}
    for name in ("macs", "macs_full", "params"):
        if name in ("macs", "params", *counted):
            columns[name] = [f"{record.value(name):,.0f}" for record in members]
    shorter = dict(brief)
    if any(times):
        columns["latency / plain"] = brief["latency / plain"] = times
        shorter["latency"] = [text.partition(" ")[0] for text in times]
    _print_rows(console, f"front of {study.name}", [columns, brief, shorter], [name_of(record) for record in members])


def _print_verdict(console: Console, confirmed: Confirmed, title: str) -> None:
    verdicts = confirmed.verdicts
    columns = {
        "difference in points": [difference_text(one) for one in verdicts],
        "verdict": [one.verdict for one in verdicts],
        "against": [one.against for one in verdicts],
    }
    if len({one.start for one in verdicts}) > 1:
        columns["start"] = [one.start for one in verdicts]
    _print_rows(console, title, [columns], [one.reference or str(one.placement) for one in verdicts])


def _print_rows(
    console: Console, title: str, forms: Sequence[Mapping[str, Sequence[str]]], placements: Sequence[str]
) -> None:
    """Print rows with a placement each, beside them if there is room, else below the last of those that share it.

    Args:
        console: Where to.
        title: What stands above.
        forms: Names and cells of the columns, the widest form first; the first that fits is taken.
        placements: The placements.
    """
    drawn = [aligned(form, WORDS) for form in forms]
    beside = next((lines for lines in drawn if len(lines[0]) + 2 + LEAST_BESIDE <= console.width), None)
    lines = beside or next((lines for lines in drawn if len(lines[0]) <= console.width), drawn[-1])
    say(console, title)
    indent = len(lines[0]) + 2 if beside else INDENT
    named = ("placement", *placements)
    for line, placement, following in zip(lines, named, (*placements, ""), strict=True):
        first, *others = wrap(placement, max(console.width - indent, LEAST_BESIDE), break_on_hyphens=False)
        if beside:
            say(console, f"{line}  {first}", *(f"{'':{indent}}{other}" for other in others))
        else:
            below = (first, *others) if placement != following else ()
            say(console, line.rstrip(), *(f"{'':{indent}}{part}" for part in below))
