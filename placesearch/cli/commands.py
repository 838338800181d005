"""What `placesearch` does on the command line. Only in this room are click and rich used.

Exit codes: 0 done; 1 finished but not one trial succeeded; 2 bad input, one line on stderr; 70 an error of our own, one
line on stderr and where its traceback was written; 130 interrupted, by Ctrl-C or SIGTERM, and the same command goes on.
"""

import contextlib
import errno
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import click

from placesearch.cli.exporting import export_command
from placesearch.cli.options import InputSizeOption
from placesearch.cli.result import show_result
from placesearch.cli.sharing import not_public, storage_given, worker_command
from placesearch.cli.training_commands import train_command, transfer_command
from placesearch.cli.view import make_view, show_comparison, show_sites, show_studies
from placesearch.config import StudyConfig, full_input_size, read_definition
from placesearch.confirming import SEEDS, confirm
from placesearch.costs import CostTable, profile
from placesearch.costs.latency import measure
from placesearch.dashboard import dashboard, is_loopback, newest_study
from placesearch.errors import InputError, PlacesearchError, printable, reason_of
from placesearch.models.architecture import Architecture
from placesearch.models.backbones import input_channels, load_backbone
from placesearch.models.blocks import BLOCKS, block_named
from placesearch.models.code import names_code
from placesearch.models.sites import find_sites, unplaced_additions
from placesearch.placement import BlockSetting, Placement
from placesearch.plan import device_name
from placesearch.reporting.tables import comparison_frame, sites_frame
from placesearch.study import adopt, device_named, load_study, run, study_names
from placesearch.training.loop import pick_precision

_OPTIONS: dict[str, tuple[str, str]] = {
    "backbone": ("NAME", "A torchvision network, or your own as package.module:function."),
    "data": ("SPEC", "digits, cifar10, cifar100, fashion_mnist, mnist, or a folder of images.  [default: digits]"),
    "name": ("NAME", "Name of the study.  [default: BACKBONE-DATA]"),
    "trials": ("N", "Trials the study is to have, those of earlier runs included."),
    "timeout": ("TIME", "Longest time of this run, such as 90s, 10m or 2h."),
    "trial_timeout": ("TIME", "Longest time of one trial; one that takes longer fails.  [default: none]"),
    "until": ("settled", "End when the model expects that little is left to win; other limits hold too."),
    "epochs": ("N", "Passes over the training split for each candidate."),
    "long_epochs": ("N", "The same for some of them, which estimates then speak of; 0 for none."),
    "batch_size": ("N", "Images a training step."),
    "input_size": ("N|HxW|CxHxW", "Height and width of the input in pixels, such as 64 or 256x512; channels if not 3."),
    "stem": ("original|small", "small: first strided convolution to stride 1, first max pooling gone."),
    "weights": ("DEFAULT|FILE", "Start from torchvision's pretrained weights or a checkpoint, blocks as the identity."),
    "start": (
        "scratch|branch|pretrained",
        "branch: train the plain network halfway once, all candidates go on from there.  [default: scratch; "
        "pretrained with --weights]",
    ),
    "evaluate": ("MODULE:FUNCTION", "Your own evaluation in place of the built-in training."),
    "blocks": ("LIST", f"Of {', '.join(BLOCKS)}, or package.module:Class.  [default: se,cbam]"),
    "reductions": ("LIST", "Reductions r to choose from.  [default: 4,8,16]"),
    "kernel_sizes": ("LIST", "Kernel sizes k of CBAM to choose from.  [default: 3,7]"),
    "sites": (
        "LIST",
        "Of residual, block, stage, last, head.  [default: residual; block where there is none]",
    ),
    "objectives": ("LIST", "Of accuracy, macs, macs_full, params, latency_ms.  [default: accuracy,params]"),
    "max_macs": ("LIMIT", "The most multiply-adds: +5% for more than the plain backbone, or a number such as 1.9G."),
    "max_macs_full": ("LIMIT", "The same for all operators."),
    "max_params": ("LIMIT", "The most parameters: +5%, or a number such as 12M."),
    "max_latency": ("LIMIT", "The longest latency of one image: +10%, or milliseconds."),
    "sampler": ("NAME", "additive (our own), tpe, nsga2, nsga3, gp (slow) or random.  [default: additive]"),
    "seed": ("N", "Seed of the search, the weights and the data order.  [default: 0]"),
    "jobs": (
        "N|auto",
        "Trials at a time, at most 8; results stay the same.  [default: auto: one a core, on a GPU measured]",
    ),
    "max_jobs": (
        "N",
        "The most trials at a time that the study will ever have, on all machines; a suggestion follows from all "
        "trials but the last N-1 (2N-1 above 8).  [default: 8]",
    ),
    "device": ("NAME", "auto, cpu, cuda, cuda:1, ...  [default: auto]"),
    "engine": ("local|ray", "ray: workers are actors on a Ray cluster.  [default: local]"),
    "address": ("ADDRESS", "Of the Ray cluster, such as auto or ray://host:10001.  [default: one in this machine]"),
    "gpus_per_worker": ("SHARE", "Share of a GPU that a worker on a Ray cluster holds.  [default: 1]"),
    "storage": (
        "URL",
        "Keep the trials in a database, so that other machines can work on them: postgresql://user@host/database, "
        "mysql://..., sqlite:///FILE, grpc://host:port.  [default: $PLACESEARCH_STORAGE, or a file]",
    ),
}


def _study_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add one option for each field of `StudyConfig`; the config itself checks the values."""
    for name, (metavar, text) in reversed(_OPTIONS.items()):
        command = click.option(f"--{name.replace('_', '-')}", name, metavar=metavar, help=text)(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="placesearch")
def cli() -> None:
    """Find out where attention blocks help in a convolutional network, and what they cost."""


@cli.command("run")
@click.argument("study", required=False, type=click.Path(path_type=Path), metavar="[STUDY.yaml]")
@_study_options
@click.option(
    "--stop-early/--no-stop-early",
    "stop_early",
    default=None,
    help="Stop trainings that will not reach the front.  [default: no]",
)
@click.option(
    "--skip-corrupt/--no-skip-corrupt",
    "skip_corrupt",
    default=None,
    help="Leave out images of a folder that cannot be decoded.  [default: no]",
)
@click.option("--allow", multiple=True, metavar="MODULE:FUNCTION", help="Code that the study file may name.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def run_command(study: Path | None, allow: tuple[str, ...], quiet: bool, **options: Any) -> None:
    """Search for placements, or go on with a study where it stopped.

    Options on the command line win over the study file, which wins over defaults. With none of
    --trials, --timeout and --until a study gets 50 trials; with digits, 10 trials and 5 minutes.
    """
    values: dict[str, Any] = {}
    if study is not None:
        values = read_definition(study)
        written = {name: value for name, value in values.items() if options.get(name) is None}
        blocks = written.get("blocks", [])
        blocks = blocks.split(",") if isinstance(blocks, str) else blocks if isinstance(blocks, list) else []
        for code in (written.get("backbone"), written.get("evaluate"), *blocks):
            if isinstance(code, str) and names_code(code) and code not in allow:
                raise InputError(f"{study} names code, '{code}'; if you trust it, add --allow {code}")
    values |= {name: value for name, value in options.items() if value is not None}
    if (storage := storage_given(options["storage"], values.get("storage"))) is not None:
        values["storage"] = storage
    if "backbone" not in values:
        raise InputError("no backbone given; try --backbone resnet18")
    try:
        with make_view(quiet=quiet) as view:
            found = run(StudyConfig(**values), watch=view)
    except KeyboardInterrupt as interrupt:  # click would drop what it says
        _end_interrupted(str(interrupt))
    if not quiet:
        show_result(found)
    if not found.front:
        raise SystemExit(1)


@cli.command("sites")
@click.option("--backbone", required=True, metavar="NAME", help=_OPTIONS["backbone"][1])
@click.option(
    "--input-size",
    default=224,
    show_default=True,
    type=InputSizeOption(),
    metavar=_OPTIONS["input_size"][0],
    help=_OPTIONS["input_size"][1],
)
@click.option(
    "--stem", default="original", show_default=True, type=click.Choice(["original", "small"]), help="The stem."
)
@click.option("--blocks", metavar="LIST", help="Blocks to count.  [default: se,cbam; all of them in csv]")
@click.option("--format", "form", default="table", type=click.Choice(["table", "csv"]), help="How to print the sites.")
def sites_command(backbone: str, input_size: int | tuple[int, ...], stem: str, blocks: str | None, form: str) -> None:
    """Draw a backbone as a tree with its sites, what a block costs there, and what attention it has already.

    Blocks are counted with r=16 (a site with fewer channels has that many as r) and k=7. Any r from 1 to a site's
    channels and any odd k is legal there.
    """
    size = full_input_size(input_size, _channels_of(backbone))
    names = blocks.split(",") if blocks else [*BLOCKS] if form == "csv" else ["se", "cbam"]
    sites, table = find_sites(backbone, size, stem), CostTable(backbone, size, stem)
    costs = {name: [table.added(site.name, _usual_setting(name, site.channels)) for site in sites] for name in names}
    frame = sites_frame(sites, costs)
    if form == "csv":
        click.echo(frame.to_csv(index=False), nl=False)
    else:
        for line in unplaced_additions(backbone, size, stem):
            click.echo(f"note: {line}")
        show_sites(frame, f"{len(sites)} sites of {backbone} at {'x'.join(map(str, size[1:]))}")


def _channels_of(backbone: str) -> int:
    """Return how many channels a backbone takes; torchvision's and timm's take 3."""
    return input_channels(load_backbone(backbone, num_classes=10)) if names_code(backbone) else 3


def _usual_setting(name: str, channels: int) -> BlockSetting:
    usual = {"reduction": min(16, channels), "kernel_size": 7}
    return BlockSetting(name, **{setting: usual[setting] for setting in block_named(name).settings})


@cli.command("profile")
@click.argument("architecture", type=click.Path(path_type=Path), metavar="ARCH.yaml")
@click.option("--batch-size", default=1, show_default=True, type=click.IntRange(1, 65536), help="Images at a time.")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="Where to measure the latency.")
@click.option("--allow", multiple=True, metavar="MODULE:FUNCTION", help="Code that the file may name.")
@click.option("--format", "form", default="table", type=click.Choice(["table", "csv"]), help="How to print it.")
def profile_command(architecture: Path, batch_size: int, device: str, allow: tuple[str, ...], form: str) -> None:
    """Show what an architecture costs, beside the plain backbone.

    The latency is measured in inference mode, interleaved with the plain backbone's, on one processor thread or as a
    CUDA graph; its interval is one of 95 % for the ratio.
    """
    found = Architecture.load(architecture, allow)
    where = device_named(device)
    models = [found.model_copy(update={"placement": Placement(), "factors": {}}).build(), found.build()]
    costs = [profile(model, found.input_size) for model in models]
    precision = pick_precision(where)
    try:
        latencies = measure(models, found.input_size, device=where, precision=precision, batch_size=batch_size)
    except RuntimeError as error:  # an operator without bf16, too little memory
        raise InputError(f"{architecture}: no latency in {precision}, batch {batch_size}: {error}") from None
    frame = comparison_frame(costs, latencies)
    if form == "csv":
        click.echo(frame.to_csv(index=False), nl=False)
    else:
        how = f"batch {batch_size}, {precision}, {'one thread' if where.type == 'cpu' else device_name(where)}"
        show_comparison(frame, f"{found.backbone}: {found.placement}", how, costs[-1].uncounted)


@cli.command("confirm")
@click.argument("study")
@click.option("--seeds", default=SEEDS, show_default=True, metavar="N", help="Fresh seeds; more later add to them.")
@click.option("--epochs", type=int, metavar="N", help="Passes over the training split.  [default: the study's longest]")
@click.option("--top", type=int, metavar="K", help="Only the K members of the front that are estimated to be best.")
@click.option("--jobs", default="auto", metavar=_OPTIONS["jobs"][0], help="Trainings at a time, at most 8.")
@click.option("--device", default="auto", metavar="NAME", help=_OPTIONS["device"][1])
@click.option("--allow", multiple=True, metavar="MODULE:FUNCTION", help="Code that the study may name.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def confirm_command(
    study: str,
    seeds: int,
    epochs: int | None,
    top: int | None,
    jobs: str,
    device: str,
    allow: tuple[str, ...],
    quiet: bool,
) -> None:
    """Find out which gains of STUDY are real, or go on finding out.

    Trains the front, the references and a bigger plain network again, on seeds that the search never used, and measures
    them on the test split. Says for each placement whether it is better or worse than each reference.
    """
    how = {"jobs": jobs, "device": device, "allow": allow}
    try:
        with make_view(quiet=quiet) as view:
            found = confirm(study, seeds=seeds, epochs=epochs, top=top, watch=view, **how)  # type: ignore[arg-type]
    except KeyboardInterrupt as interrupt:  # click would drop what it says
        _end_interrupted(str(interrupt))
    if not quiet:
        show_result(found)


@cli.command("report")
@click.argument("study")
@click.option("--parquet", is_flag=True, help="Write each table as Parquet, too; needs pyarrow.")
@click.option("--storage", metavar="URL", help="Where the study's trials are, if it was begun on another machine.")
def report_command(study: str, parquet: bool, storage: str | None) -> None:
    """Write the reports of STUDY again."""
    if storage is not None:
        adopt(study, not_public(storage))
    found = load_study(study)
    if note := found.set_aside():
        click.echo(note)
    found.write_report(parquet=parquet)
    show_result(found)


@cli.command("dashboard")
@click.argument("study", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, metavar="HOST", help="Address to listen on.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 for a free one.")
def dashboard_command(study: str | None, host: str, port: int) -> None:
    """Show STUDY in a browser, also while it runs; the one that was changed last if none is named.

    Ends with Ctrl-C.
    """
    if not is_loopback(host):
        warning = f"anyone who reaches {host} can change this study and delete it; there is no password"
        click.echo(f"warning: {warning}", err=True)
    with contextlib.suppress(KeyboardInterrupt):
        dashboard(study or newest_study(), host, port, click.echo)


@cli.command("studies")
def studies_command() -> None:
    """List the studies below the current directory, with their trials and best accuracies."""
    studies = []
    for name in study_names():
        try:
            studies.append(load_study(name))
        except InputError as error:  # its database may be away; the others are shown
            click.echo(f"placesearch: {name}: {error}", err=True)
    show_studies(studies)


cli.add_command(worker_command)
cli.add_command(train_command)
cli.add_command(transfer_command)
cli.add_command(export_command)


def main() -> None:
    """Run the command line and exit; SIGTERM ends it as Ctrl-C does."""
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.captureWarnings(capture=True)  # what libraries deprecate is our business, not the user's
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    try:
        code = cli.main(prog_name="placesearch", standalone_mode=False)
    except click.ClickException as error:
        _fail(error.format_message())
    except PlacesearchError as error:
        _fail(str(error))
    except (KeyboardInterrupt, click.Abort):
        _end_interrupted("")
    except BrokenPipeError:
        _end_unheard()
    except OSError as error:
        if error.errno not in _OF_THE_SYSTEM:
            _end_unexpected(error)
        _fail(f"{printable(error.filename or 'the system')}: {error.strerror}")
    except Exception as error:  # noqa: BLE001 - nobody is to see a traceback
        _end_unexpected(error)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _end_unheard()
    sys.exit(code if isinstance(code, int) else 0)


_OF_THE_SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENFILE)
"""Errors that say by themselves what is wrong here: a full disk, a folder that may not be written."""


def _end_unheard() -> NoReturn:
    """End quietly: who read our output has gone, `| head` say."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
    sys.exit(0)


def _end_unexpected(error: Exception) -> NoReturn:
    """Say in one line what went wrong inside, and where its traceback was written."""
    lines = "".join(traceback.format_exception(error)).encode(errors="backslashreplace").decode()
    text = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {printable(' '.join(sys.argv))}\n{lines}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix="placesearch-", suffix=".log", delete=False
        ) as file:
            file.write(text)
        where = f"its traceback is in {file.name}"
    except OSError as unwritten:
        where = f"its traceback could not be written: {unwritten.strerror}"
    print(f"placesearch: {type(error).__name__}: {printable(reason_of(error))}; {where}", file=sys.stderr)
    sys.exit(70)


def _end_interrupted(where: str) -> NoReturn:
    where = f"{where}, and " if where else ""
    print(f"placesearch: interrupted; {where}the same command goes on where it stopped", file=sys.stderr)
    sys.exit(130)


def _fail(message: str) -> NoReturn:
    print(f"placesearch: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(2)
