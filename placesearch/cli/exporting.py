"""The command `placesearch export`."""

from pathlib import Path

import click

from placesearch.errors import InputError, StudyError
from placesearch.exporting.checking import BATCHES
from placesearch.exporting.formats import FORMATS, export, format_named
from placesearch.models.architecture import Architecture
from placesearch.models.code import names_code
from placesearch.reporting.writing import found_architecture
from placesearch.study import Study, load_study

_FORMATS_HELP = "; ".join(f"{name}: {line.what}" for name, line in FORMATS.items())


@click.command("export")
@click.argument("source", metavar="STUDY|ARCH.yaml")
@click.option("--format", "form", required=True, metavar="|".join(FORMATS), help=f"{_FORMATS_HELP}.")
@click.option("--trial", type=int, metavar="N", help="Trial of the study.  [default: the pick, as in best.yaml]")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Where to.  [default: among the configs of the study's report, or beside ARCH.yaml]",
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Trained weights of this architecture: a program holds them, beside a text they are written as safetensors.",
)
@click.option("--allow", multiple=True, metavar="MODULE:FUNCTION", help="Code that the study or the file may name.")
def export_command(
    source: str, form: str, trial: int | None, output: Path | None, weights: Path | None, allow: tuple[str, ...]
) -> None:
    """Write an architecture for other programs: that of a study, or of an architecture file.

    A program (onnx, pt2) takes any number of images, and is run and compared with the network before it is written.
    """
    suffix = format_named(form).suffix
    if _is_file(source):
        if trial is not None:
            raise InputError(f"--trial {trial} is one of a study, and {source} is an architecture file")
        architecture, beside = Architecture.load(source, allow), Path(source)
        usual = beside.with_name(f"{beside.stem}{suffix}")
    else:
        study = load_study(source)
        architecture = _architecture_of(study, trial)
        for code in (architecture.backbone, *(setting.block for setting in architecture.placement.values())):
            if names_code(code) and code not in allow:
                raise InputError(f"study '{source}' names code, '{code}'; if you trust it, add --allow {code}")
        usual = study.folder / "architectures" / f"{'best' if trial is None else f'trial-{trial}'}{suffix}"
    if output is None and form == "yaml" and usual.exists() and Architecture.load(usual, allow) == architecture:
        click.echo(f"{usual} holds it already")
        return
    if output is None:
        _make_folder(usual.parent)
    done = export(architecture, form, output or usual, weights=weights)
    for path in done.files:
        click.echo(f"wrote {path}{', in place of what was there' if path in done.replaced else ''}")
    if done.difference is not None:
        numbers = " and ".join(map(str, BATCHES))
        click.echo(
            f"checked: on {numbers} images its logits differ from the network's by at most {done.difference:.1e} of "
            "the largest"
        )
        if weights is None:
            click.echo("its weights are fresh; --weights FILE gives it trained ones")


def _is_file(source: str) -> bool:
    """Tell whether an argument means an architecture file: a study's name is no path and ends on no such suffix."""
    return source.endswith((".yaml", ".yml")) or Path(source).name != source or Path(source).is_file()


def _architecture_of(study: Study, trial: int | None) -> Architecture:
    if trial is None:
        if study.best is None:
            raise StudyError(f"study '{study.name}' has no trial that succeeded yet")
        return study.best
    for record in study.records:
        if record.trial == trial:
            return found_architecture(study.subject, record)
    trials = [record.trial for record in study.records]
    there = f"{min(trials)} to {max(trials)}" if trials else "none yet"
    raise StudyError(f"study '{study.name}' has no trial {trial} that ended; there are: {there}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {folder}: {error.strerror}") from None
