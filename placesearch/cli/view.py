"""What a person sees: of a running study a live view in a terminal and plain lines elsewhere; tables."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pandas as pd
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from placesearch.cli.course import Course
from placesearch.cli.standing import Lead, Standing
from placesearch.cli.terminal import aligned, make_console, name_of, percent, say
from placesearch.cli.tree import tree_lines
from placesearch.records import Event, StudyBegan, Told, TrialEnded, TrialRecord
from placesearch.reporting.writing import duration_text, estimate_text
from placesearch.staffing import Watch
from placesearch.study import Study

BAR = 20
"""Characters of a bar."""


class Lines:
    """A line for each trial, for pipes and logs.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self._told, self._console = Course(), console

    def __call__(self, event: Event) -> None:
        """Show what happened."""
        self._told.hear(event)
        if isinstance(event, StudyBegan):
            say(self._console, *_opening(event))
        elif isinstance(event, Told):
            say(self._console, event.line)
        elif isinstance(event, TrialEnded):
            record, left = event.record, _left_text(self._told)
            test = self._told.study is not None and self._told.study.split == "test"
            what = f"seed {record.seed}" if test else f"trial {record.trial}"
            outcome = _outcome(record, "test" if test else "val.")
            text = f"{_count(self._told)}  {what}: {outcome}  {name_of(record)}"
            say(self._console, text + (f"  ({left})" if left else ""))


class Screen:
    """A view that is drawn again and again, by a thread of its own.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self._told, self._standing, self._console = Course(), Standing(), console

    def __call__(self, event: Event) -> None:
        """Show what happened."""
        self._told.hear(event)
        if isinstance(event, StudyBegan):
            say(self._console, *_opening(event))
        elif isinstance(event, Told):
            say(self._console, event.line)

    def __rich__(self) -> RenderableType:
        if self._told.study is None:
            return Text("preparing ...")
        workers = _progress(self._told, self._console)
        lead = self._standing.lead(self._told)
        if lead is None or not lead.members:
            return workers
        room = self._console.size.height - workers.row_count - 5  # 5: empty lines, the best, the title, the header
        return Group(workers, "", *_leading(lead, self._told.study, room, self._console))


def _progress(told: Course, console: Console) -> Table:
    """Draw how far the study is, and each trial that runs."""
    share, left = told.share_done(), _left_text(told)
    note = f"{_count(told)} trial{'s'[: _count(told) != '1']}" + (f", {left}" if left else "")
    rows = [("study", share, note)]
    for one in told.running:
        epochs, step = one.began.epochs, one.step
        usual, seconds = told.usual_seconds(epochs), told.seconds_of(one)
        if step is not None:
            share, what = one.share, f"epoch {step.epoch}/{epochs}"
        elif usual:
            share, what = min(1.0, seconds / usual), f"{duration_text(seconds)}, usually {duration_text(usual)}"
        else:
            share, what = None, duration_text(seconds)
        name = one.began.task.reference or str(one.began.task.placement)
        rows.append((f"trial {one.began.task.trial}", share, f"{what}  {name}"))
    wide = max(len(name) for name, _, _ in rows)
    table = Table.grid(padding=(0, 1))
    for width in (wide, BAR, 5):
        table.add_column(width=width, no_wrap=True)
    table.add_column(no_wrap=True)
    for name, share, text in rows:
        bar = ProgressBar(total=1.0, completed=share or 0.0, width=BAR)
        known = "" if share is None else f"{100 * share:3.0f} %"
        table.add_row(name, bar, known, _cut(text, console, wide + BAR + 5 + 3))
    return table


def _leading(lead: Lead, study: StudyBegan, room: int, console: Console) -> Iterator[Text]:
    """Draw the best against plain, and the front, with so many members as there is room for."""
    if lead.best is not None and lead.plain is not None:
        yield _cut(_against_plain(lead, lead.best, lead.plain), console)
    what = "recommended front, by estimates" if lead.estimates else "front of observed accuracies"
    yield _cut(f"{what} after {lead.trials} trial{'s'[: lead.trials != 1]}", console)
    cost = next((name for name in study.objectives if name != "accuracy"), "params")
    shown = sorted(lead.members, key=lead.accuracy)[-max(room, 1) :]  # the lowest accuracies give way
    members = [record for record in lead.members if record in shown]
    columns = {
        "trial": [str(record.trial) for record in members],
        "accuracy (90 %)" if lead.estimates else "accuracy": [_accuracy_text(lead, record) for record in members],
        cost: [f"{record.value(cost):,.{3 if cost == 'latency_ms' else 0}f}" for record in members],
    }
    for line, name in zip(aligned(columns), ("placement", *map(name_of, members)), strict=True):
        yield _cut(f"{line}  {name}", console)


def _cut(text: str, console: Console, left: int = 0) -> Text:
    """Return a text that ends where the line does.

    Args:
        text: The text.
        console: Where it is printed.
        left: How many characters stand on its left.
    """
    cut = Text(text)
    cut.truncate(max(1, console.width - left), overflow="crop" if console.options.ascii_only else "ellipsis")
    return cut


def _against_plain(lead: Lead, best: TrialRecord, plain: TrialRecord) -> str:
    """Say how far the best is ahead of the plain network."""
    if best.placement == plain.placement:
        return f"nothing is above plain, {_accuracy_text(lead, plain)}"
    ahead = 100 * (lead.accuracy(best) - lead.accuracy(plain))
    return f"best {_accuracy_text(lead, best)}, plain {_accuracy_text(lead, plain)}: {ahead:+.2f} points"


def _accuracy_text(lead: Lead, record: TrialRecord) -> str:
    return estimate_text(lead.estimates[record.placement]) if lead.estimates else percent(record.val_accuracy)


def _count(told: Course) -> str:
    """Say how many trials have ended, and of how many if there is such a limit."""
    limit = "" if told.study is None or told.study.trials is None else f"/{told.study.trials}"
    return f"{len(told.records)}{limit}"


def _left_text(told: Course) -> str:
    """Say how much time is left; empty if that is nothing, or not known."""
    left = told.seconds_left()
    if told.study is None or left is None or left < 1:
        return ""
    bound = "at most" if told.study.settles or not told.measured else "about"
    return f"{bound} {duration_text(left)} left"


def _takes_a_live_view(console: Console) -> bool:
    """Tell whether what was printed can be drawn over: in a terminal that can do it, and not in CI, whose logs grow."""
    is_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    return sys.stdout.isatty() and console.is_interactive and bool(os.environ.get("TERM")) and not is_ci


@contextmanager
def make_view(*, quiet: bool) -> Iterator[Watch]:
    """Give what `run` tells its events: a live view in a terminal, lines elsewhere, nothing if quiet.

    Args:
        quiet: Whether to show nothing.
    """
    console = make_console()
    if quiet:
        yield lambda _: None
    elif _takes_a_live_view(console):
        screen = Screen(console)
        with Live(screen, console=console, refresh_per_second=2, transient=True):
            yield screen
    else:
        yield Lines(console)


def show_sites(frame: pd.DataFrame, title: str) -> None:
    """Print the sites of a network as a tree of its modules.

    Args:
        frame: What `sites_frame` returns.
        title: What stands above it.
    """
    console, names = make_console(), list(frame["site"])
    example = next((name for name in names if "." in name), names[0])
    say(console, title, f"a line with a map is a site; its name is the way to it, such as {example}", "")
    say(console, *tree_lines(frame, console.width, ascii_only=console.options.ascii_only))
    built_in = " ".join(frame["attention"]).split()
    if built_in:
        say(console, "", f"attention that it has already, in {len(built_in)} modules: {', '.join(built_in)}")


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
    console = make_console()
    console.print(table)
    console.print(f"latency: {how}, inference mode, median; interval of 95 %", highlight=False)
    if uncounted:
        console.print(f"macs_full is too low: no rule counts {', '.join(uncounted)}", highlight=False)


def show_studies(studies: Sequence[Study]) -> None:
    """Print a table of studies.

    Args:
        studies: The studies.
    """
    console = make_console()
    if not studies:
        console.print("no studies here yet; 'placesearch run --backbone resnet18' makes one", highlight=False)
        return
    table = Table("study", "trials", "failed", "best accuracy", box=None)
    for study in studies:
        failed = sum(record.state == "FAIL" for record in study.records)
        accuracies = [record.val_accuracy for record in study.records if record.val_accuracy is not None]
        table.add_row(study.name, str(len(study.records)), str(failed), percent(max(accuracies, default=None)))
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


def _outcome(record: TrialRecord, split: str) -> str:
    if record.state == "PRUNED":
        seen = percent(record.curve[-1]) if record.curve else "?"
        return f"stopped early, at {seen} after {record.stopped_after} of {record.epochs} epochs"
    if record.state != "COMPLETE":
        return f"failed: {record.error}"
    return f"{split} accuracy {percent(record.val_accuracy)}, {record.macs:,} macs, {record.params:,} params"
