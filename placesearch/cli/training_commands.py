"""Commands for a found architecture: train it in earnest, carry it to another backbone."""

import re
import sys
from pathlib import Path
from typing import Any

import click

from placesearch.cli.options import InputSizeOption
from placesearch.cli.training_view import make_view, show_trained, show_transfer
from placesearch.earnest import EPOCHS, train
from placesearch.errors import InputError, TrainingError
from placesearch.models.architecture import Architecture
from placesearch.models.transfer import transfer
from placesearch.reporting.writing import replace_file

_ALLOW = {"multiple": True, "metavar": "MODULE:FUNCTION", "help": "Code that the file may name."}


@click.command("train")
@click.argument("architecture", type=click.Path(path_type=Path), metavar="ARCH.yaml")
@click.option("--data", required=True, metavar="SPEC", help="A data set or a folder of images, as for run.")
@click.option(
    "--epochs", type=int, default=EPOCHS, show_default=True, metavar="N", help="Passes over the training split."
)
@click.option("--batch-size", type=int, metavar="N", help="Images a step.  [default: 128; digits 8]")
@click.option("--learning-rate", type=float, metavar="RATE", help="Peak of the schedule.  [default: by the batch size]")
@click.option("--ema", type=float, metavar="DECAY", help="Average the weights, 0.999 say.  [default: no]")
@click.option("--weights", metavar="DEFAULT|FILE", help="Start from pretrained weights or a checkpoint.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of weights and data order.")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda, cuda:1, ...")
@click.option("--allow", **_ALLOW)  # type: ignore[arg-type]
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Folder for what is written.  [default: reports/NAME-train]",
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def train_command(architecture: Path, data: str, quiet: bool, **options: Any) -> None:
    """Train an architecture in earnest, or go on where that was interrupted.

    Writes best.safetensors and last.safetensors, log.csv, curve.svg, architecture.yaml and, at the end, result.yaml
    with the accuracy of the best weights on the test split. Several GPUs: torchrun --nproc-per-node N
    --no-python placesearch train ARCH.yaml ...
    """
    try:
        with make_view(options["epochs"], quiet=quiet) as view:
            trained = train(architecture, data, watch=view, **options)
    except KeyboardInterrupt:
        print("placesearch: interrupted; the same command goes on after the last finished epoch", file=sys.stderr)
        raise SystemExit(130) from None
    except TrainingError as error:
        print(f"placesearch: {error}; a lower --learning-rate may mend that", file=sys.stderr)
        raise SystemExit(1) from None
    if not quiet:
        show_trained(trained)


@click.command("transfer")
@click.argument("architecture", type=click.Path(path_type=Path), metavar="ARCH.yaml")
@click.option("--backbone", required=True, metavar="NAME", help="The other backbone, as for run.")
@click.option(
    "--input-size",
    type=InputSizeOption(),
    metavar="N|HxW|CxHxW",
    help="Its input.  [default: the same]",
)
@click.option("--allow", **_ALLOW)  # type: ignore[arg-type]
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The new architecture file.  [default: ARCH-NAME.yaml here]",
)
def transfer_command(
    architecture: Path,
    backbone: str,
    input_size: int | tuple[int, ...] | None,
    allow: tuple[str, ...],
    output: Path | None,
) -> None:
    """Carry a placement to another backbone: same kind of site, nearest relative depth.

    Says where each block went and what had to change, and writes the new architecture file. It was not trained: what
    helped in one backbone need not help in another.
    """
    moved = transfer(Architecture.load(architecture, allow), backbone, input_size)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{architecture.stem}-{backbone.removeprefix('timm:')}")
    path, text = output or Path(f"{name}.yaml"), moved.architecture.to_yaml()
    try:
        if output is None and path.exists() and path.read_text(encoding="utf-8") != text:
            raise InputError(f"{path} is there already and says something else; give another --output")
        replace_file(path, text)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    show_transfer(moved, path)
