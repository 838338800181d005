"""Commands for a found architecture: train it in earnest."""

import sys
from pathlib import Path
from typing import Any

import click

from placesearch.cli.training_view import make_view, show_trained
from placesearch.earnest import EPOCHS, train
from placesearch.errors import TrainingError

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
