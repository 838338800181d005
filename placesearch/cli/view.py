"""What a person sees: a live view in a terminal, plain lines elsewhere, and the result at the end."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pandas as pd
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from placesearch.cli.course import Course
from placesearch.front import front
from placesearch.records import Event, StudyBegan, Told, TrialEnded, TrialRecord
from placesearch.reporting.verdict_section import difference_text
from placesearch.reporting.writing import duration_text, estimate_text, latency_text
from placesearch.search.findings import Findings
from placesearch.staffing import Watch
from placesearch.study import Study
from placesearch.verdict.verdicts import Confirmed


class _Lines:
    """A line for each trial, for pipes and logs."""

    def __init__(self, console: Console) -> None:
        self._told, self._console = Course(), console

    def __call__(self, event: Event) -> None:
        self._told.hear(event)
        if isinstance(event, StudyBegan):
            for line in _opening(event):
                self._console.print(line, soft_wrap=True, highlight=False, markup=False)
        elif isinstance(event, Told):
            self._console.print(event.line, soft_wrap=True, highlight=False, markup=False)
        elif isinstance(event, TrialEnded):
            record, left = event.record, _left_text(self._told)
            count = f"{len(self._told.records)}/{_total(self._told.study)}"
            test = self._told.study is not None and self._told.study.split == "test"
            what = f"seed {record.seed}" if test else f"trial {record.trial}"
            text = f"{count}  {what}: {_outcome(record, 'test' if test else 'val.')}  {_name(record)}"
            self._console.print(text + (f"  ({left})" if left else ""), soft_wrap=True, highlight=False, markup=False)


class _Screen:
    """A view that is drawn anew twice a second."""

    def __init__(self, console: Console) -> None:
        self._told, self._console = Course(), console

    def __call__(self, event: Event) -> None:
        self._told.hear(event)
        if isinstance(event, StudyBegan):
            for line in _opening(event):
                self._console.print(line, highlight=False, markup=False)
        elif isinstance(event, Told):
            self._console.print(event.line, highlight=False, markup=False)

    def __rich__(self) -> RenderableType:
        told = self._told
        if told.study is None:
            return Text("preparing ...")
        left = _left_text(told)
        note = f"{len(told.records)}/{_total(told.study)} trials" + (f", {left}" if left else "")
        rows = Table.grid(padding=(0, 1))
        rows.add_column(no_wrap=True, min_width=9)
        rows.add_column(no_wrap=True, min_width=24)
        rows.add_column(no_wrap=True, overflow="ellipsis")
        rows.add_row("study", _bar(told.share_done() or 0.0, 1.0), note)
        for running in told.running:
            began, step = running.began, running.step
            what = f"epoch {step.epoch}/{began.epochs}  " if step else "getting ready  "
            bar = _bar(step.step, step.steps) if step else _bar(0, 1)
            rows.add_row(f"trial {began.task.trial}", bar, what + (began.task.reference or str(began.task.placement)))
        members = front(told.records, told.study.objectives) if told.study.objectives else []
        return Group(rows, _front_table(members[-8:], "front so far")) if members else rows


def _total(study: StudyBegan | None) -> str:
    return "?" if study is None or study.trials is None else str(study.trials)


def _left_text(told: Course) -> str:
    """Say how much time is left; empty if that is nothing, or not known."""
    left = told.seconds_left()
    if not left or told.study is None:
        return ""
    bound = "at most" if told.study.settles or not told.measured else "about"
    return f"{bound} {duration_text(left)} left"


def _bar(done: float, total: float | None) -> ProgressBar:
    return ProgressBar(total=total, completed=done, width=24, pulse=total is None)


@contextmanager
def make_view(*, quiet: bool) -> Iterator[Watch]:
    """Give what `run` tells its events: a live view in a terminal, lines elsewhere, nothing if quiet.

    Args:
        quiet: Whether to show nothing.
    """
    console = Console()
    if quiet:
        yield lambda _: None
    elif console.is_terminal:
        screen = _Screen(console)
        with Live(screen, console=console, refresh_per_second=2, transient=True):
            yield screen
    else:
        yield _Lines(console)


def show_result(study: Study) -> None:
    """Print the front and where the reports are.

    Args:
        study: The study.
    """
    console = Console()
    records = study.records
    if study.ended:
        share = (
            f"; {100 * study.training_share:.0f} % of the workers' time in training steps"
            if study.training_share
            else ""
        )
        console.print(
            f"{study.ended}; {'searched' if study.training_share else 'took'} {duration_text(study.seconds)}{share}",
            highlight=False,
            soft_wrap=True,
        )
    failed = [record for record in records if record.state == "FAIL"]
    if failed:
        console.print(
            f"{len(failed)} of {len(records)} trials failed; the first: {failed[0].error}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    stopped = sum(record.state == "PRUNED" for record in records)
    if stopped:
        console.print(f"{stopped} of {len(records)} trials stopped early", highlight=False)
    members = study.front
    if members:
        console.print(_front_table(members, f"front of {study.name}", study.findings))
        console.print(study.caution, highlight=False)
    if study.confirmed:
        console.print(_verdict_table(study.confirmed, f"verdict on {study.name}, on the test split"))
    console.print(
        f"reports: {study.folder}/  (report.html, summary.md, front.csv, sites.csv, trials.csv)",
        highlight=False,
        soft_wrap=True,
    )
    if members:
        console.print(f"best config: {study.folder}/architectures/best.yaml", highlight=False, soft_wrap=True)


def show_sites(frame: pd.DataFrame, title: str) -> None:
    """Print a table of sites.

    Args:
        frame: What `sites_frame` returns.
        title: What stands above it.
    """
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    blocks = [name.removesuffix("_macs") for name in frame.columns if name.endswith("_macs")]
    table.add_column("site", overflow="fold", min_width=12)
    table.add_column("kinds")
    for name in ("channels", "map", *(f"{block}\nmacs, params" for block in blocks)):
        table.add_column(name, justify="right", no_wrap=True)
    for row in frame.to_dict("records"):
        costs = (f"{row[f'{block}_macs']:,}, {row[f'{block}_params']:,}" for block in blocks)
        table.add_row(row["site"], row["kinds"], str(row["channels"]), f"{row['height']}x{row['width']}", *costs)
    console = Console()
    console.print(table)
    built_in = " ".join(frame["attention"]).split()
    if built_in:
        console.print(
            f"\nattention that it has already, in {len(built_in)} modules: {', '.join(built_in)}", highlight=False
        )


def show_comparison(frame: pd.DataFrame, title: str, how: str, uncounted: Sequence[str]) -> None:
    """Print what an architecture costs beside the plain backbone.

    Args:
        frame: What `comparison_frame` returns.
        title: What stands above it.
        how: How the latency was measured.
        uncounted: Operators that macs_full lacks.
    """
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for name in ("plain", "with blocks", "ratio"):
        table.add_column(name, justify="right")
    for row in frame.to_dict("records"):
        is_time = row["cost"] == "latency_ms"
        values = [f"{row[name]:.3f}" if is_time else f"{round(row[name]):,}" for name in ("plain", "candidate")]
        ratio = f"{row['ratio']:.4f}"
        if is_time:
            ratio = f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"
        table.add_row(row["cost"], *values, ratio)
    console = Console()
    console.print(table)
    console.print(f"latency: {how}, inference mode, median; interval of 95 %", highlight=False)
    if uncounted:
        console.print(f"macs_full is too low: no rule counts {', '.join(uncounted)}", highlight=False)


def show_studies(studies: Sequence[Study]) -> None:
    """Print a table of studies.

    Args:
        studies: The studies.
    """
    console = Console()
    if not studies:
        console.print("no studies here yet; 'placesearch run --backbone resnet18' makes one", highlight=False)
        return
    table = Table("study", "trials", "failed", "best accuracy", box=None)
    for study in studies:
        failed = sum(record.state == "FAIL" for record in study.records)
        accuracies = [record.val_accuracy for record in study.records if record.val_accuracy is not None]
        table.add_row(study.name, str(len(study.records)), str(failed), _percent(max(accuracies, default=None)))
    console.print(table)


def _opening(event: StudyBegan) -> Iterator[str]:
    if event.split == "test":
        verb = f"confirming {event.name}, {len(event.finished)} of {event.trials} trainings are there already"
    elif event.finished:
        verb = f"going on with {event.name} after {len(event.finished)} trials"
    else:
        verb = f"study {event.name}"
    yield verb
    yield from (f"  {line}" for line in event.lines)


def _front_table(members: Sequence[TrialRecord], title: str, findings: Findings | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    measured = any(record.latency_ratio is not None for record in members)
    estimated = ["estimate (90 %)"] if findings else []
    for name in ("trial", *estimated, "val. accuracy", "macs", "params", *(["latency / plain"] if measured else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("placement", overflow="fold", min_width=12)
    for record in members:
        cells = [str(record.trial), *([estimate_text(findings.accuracy[record.placement])] if findings else [])]
        cells += [_percent(record.val_accuracy), f"{record.macs:,}", f"{record.params:,}"]
        table.add_row(*cells, *([latency_text(record)] if measured else []), Text(_name(record)))
    return table


def _verdict_table(confirmed: Confirmed, title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    starts = len({one.start for one in confirmed.verdicts}) > 1
    for name in ("difference in points", "verdict", "against", *(["start"] if starts else [])):
        table.add_column(name, no_wrap=True)
    table.add_column("placement", overflow="fold", min_width=12)
    for one in confirmed.verdicts:
        cells = [difference_text(one), one.verdict, one.against, *([one.start] if starts else [])]
        table.add_row(*cells, Text(one.reference or str(one.placement)))
    return table


def _name(record: TrialRecord) -> str:
    return f"{record.reference}" if record.reference else str(record.placement)


def _outcome(record: TrialRecord, split: str) -> str:
    if record.state == "PRUNED":
        seen = _percent(record.curve[-1]) if record.curve else "?"
        return f"stopped early, at {seen} after {record.stopped_after} of {record.epochs} epochs"
    if record.state != "COMPLETE":
        return f"failed: {record.error}"
    return f"{split} accuracy {_percent(record.val_accuracy)}, {record.macs:,} macs, {record.params:,} params"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"
