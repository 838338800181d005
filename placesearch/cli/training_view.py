"""What a person sees of a training in earnest, a line an epoch and in a terminal how far it is; and of a transfer."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from placesearch.cli.terminal import make_console, say
from placesearch.earnest import Trained, Watch
from placesearch.models.transfer import Transfer
from placesearch.records import Epoch, StepEnded, Told
from placesearch.reporting.writing import duration_text


@contextmanager
def make_view(epochs: int, *, quiet: bool) -> Iterator[Watch]:
    """Give what `train` tells its events.

    Args:
        epochs: How many epochs there are to be.
        quiet: Whether to show nothing.
    """
    console = make_console()

    def line(event: Told | StepEnded | Epoch) -> None:
        if isinstance(event, Told):
            say(console, event.line)
        elif isinstance(event, Epoch):
            say(console, _epoch_line(event, epochs))

    if quiet:
        yield lambda _: None
    elif not console.is_terminal or os.environ.get("RANK", "0") != "0":
        yield line
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
            task = progress.add_task("getting ready", total=None)

            def screen(event: Told | StepEnded | Epoch) -> None:
                if isinstance(event, StepEnded):
                    what = f"epoch {event.epoch}/{epochs}"
                    progress.update(task, completed=event.step, total=event.steps, description=what)
                else:
                    line(event)

            yield screen


def show_trained(trained: Trained) -> None:
    """Print what came of a training, and where it is.

    Args:
        trained: The training.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    best, folder = trained.best, trained.folder
    seconds = sum(one.seconds for one in trained.log)
    say(
        make_console(),
        f"{'done' if trained.fresh else 'done already'}: test accuracy {100 * trained.test_accuracy:.2f} % on "
        f"{trained.test_images:,} images, with the weights of epoch {best.epoch} (val. accuracy "
        f"{100 * best.val_accuracy:.2f} %); {len(trained.log)} epochs took {duration_text(seconds)}",
        f"weights: {folder}/best.safetensors, last.safetensors; the course: log.csv, curve.svg, result.yaml",
        f'in Python: ps.Architecture.load("{folder}/architecture.yaml").build(weights="{folder}/best.safetensors")',
    )


def show_transfer(moved: Transfer, path: Path) -> None:
    """Print where each block went, and where the new architecture file is.

    Args:
        moved: What was done.
        path: The file.
    """
    console, new = make_console(), moved.architecture
    table = Table(box=None, pad_edge=False)
    for name in ("site", "kind", "depth", "new site", "depth", "block", "note"):
        table.add_column(name, justify="right" if name == "depth" else "left", overflow="fold")
    for move in moved.moves:
        depth = "" if move.new_depth is None else f"{move.new_depth:.2f}"
        cells = (move.site, move.kind, f"{move.depth:.2f}", move.new_site or "-", depth)
        table.add_row(*map(Text, cells), Text(str(move.new_setting or move.setting)), Text(move.note))
    console.print(table)
    kept = len(new.placement)
    size = "x".join(map(str, new.input_size))
    say(
        console,
        f"{kept} of {len(moved.moves)} blocks carried to {new.backbone} at {size}; depth counts sites of the kind",
        *moved.notes,
        f"architecture: {path}  (not trained; 'placesearch train {path} --data SPEC' does that)",
    )


def _epoch_line(epoch: Epoch, epochs: int) -> str:
    seen = f"val. accuracy {100 * epoch.val_accuracy:.2f} %, val. loss {epoch.val_loss:.4f}"
    return (
        f"epoch {epoch.epoch}/{epochs}: {seen}, "
        f"training loss {epoch.train_loss:.4f}, learning rate {epoch.learning_rate:.3g}, {epoch.seconds:,.1f} s"
    )
