"""What all that is printed has in common."""

import io
import sys
from collections.abc import Collection, Mapping, Sequence

from rich.console import Console

from placesearch.records import TrialRecord


def make_console() -> Console:
    """Return what to print on; where its encoding lacks a character, there will be a question mark."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return Console()


def say(console: Console, *lines: str) -> None:
    """Print lines as they are; the terminal breaks those that are too long, so that what is copied stays whole.

    Args:
        console: Where to.
        lines: What.
    """
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def aligned(columns: Mapping[str, Sequence[str]], words: Collection[str] = ()) -> list[str]:
    """Return the lines of a table, the header first.

    Args:
        columns: Names and cells of the columns.
        words: Names of those that hold words, and begin on the left; numbers end on the right.

    Example:
        >>> aligned({"trial": ["3", "12"], "verdict": ["better", "worse"]}, ["verdict"])
        ['trial  verdict', '    3  better ', '   12  worse  ']
    """
    sized = [(name in words, max(map(len, (name, *cells))), (name, *cells)) for name, cells in columns.items()]
    rows = zip(
        *([f"{cell:{'<' if left else '>'}{size}}" for cell in cells] for left, size, cells in sized), strict=True
    )
    return ["  ".join(row) for row in rows]


def name_of(record: TrialRecord) -> str:
    """Return what a trial is called: the names of the reference that it is, else its placement.

    Args:
        record: The trial.
    """
    return record.reference or str(record.placement)


def percent(share: float | None) -> str:
    """Return a share in percent; empty without one.

    Example:
        >>> percent(0.9512), percent(None)
        ('95.12 %', '')
    """
    return "" if share is None else f"{100 * share:.2f} %"
