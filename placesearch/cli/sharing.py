"""Studies that several machines share, on the command line."""

import os
from typing import Any

import click

from placesearch.cli.view import make_view
from placesearch.config import seconds_of
from placesearch.errors import InputError
from placesearch.joining import work
from placesearch.storage_url import VARIABLE, StorageUrl


def not_public(text: str) -> StorageUrl:
    """Read an address from the command line, where everybody on the machine can see it.

    Raises:
        InputError: If it is none, or holds a password.
    """
    url = StorageUrl.parse(text)
    if url.has_password:
        raise InputError(
            "a password on the command line is seen by everybody on this machine; leave it out and put it into "
            f"PGPASSWORD, ~/.pgpass or a service file, or the whole address into the variable {VARIABLE}"
        )
    return url.with_secret()


def storage_given(option: str | None, in_file: Any = None) -> StorageUrl | None:
    """Return the address that the command line gives, else the study file, else the environment; None if none does."""
    if option is not None:
        return not_public(option)
    if in_file is not None:
        return StorageUrl.parse(str(in_file)).with_secret()
    given = os.environ.get(VARIABLE)
    return StorageUrl.parse(given) if given else None


@click.command("worker")
@click.argument("study")
@click.option("--storage", metavar="URL", help=f"Where the study's trials are.  [default: ${VARIABLE}]")
@click.option("--jobs", default="auto", metavar="N|auto", help="Trials at a time on this machine.")
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, ...")
@click.option("--data", metavar="SPEC", help="The study's data on this machine, if they are elsewhere here.")
@click.option("--timeout", metavar="TIME", help="Begin no trial after this time, such as 90s, 10m or 2h.")
@click.option("--wait", default="0s", metavar="TIME", help="Wait so long for the study to begin.")
@click.option("--allow", multiple=True, metavar="MODULE:FUNCTION", help="Code that the study may name.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def worker_command(
    study: str,
    storage: str | None,
    jobs: str,
    device: str,
    data: str | None,
    timeout: str | None,
    wait: str,
    allow: tuple[str, ...],
    quiet: bool,
) -> None:
    """Work on STUDY, which was begun with 'placesearch run --storage URL' on this or another machine.

    Any number of workers may join at any time, and end at any time; what one leaves, others take up.
    """
    url = storage_given(storage)
    if url is None:
        raise InputError(f"no storage given; --storage URL or the variable {VARIABLE} says where the study is")
    with make_view(quiet=quiet) as view:
        worked = work(
            study,
            url,
            jobs=jobs,  # type: ignore[arg-type]  # the study's config checks it
            device=device,
            data=data,
            timeout=None if timeout is None else seconds_of(timeout),
            wait=seconds_of(wait),
            allow=allow,
            watch=view,
        )
    if not quiet:
        click.echo(f"{worked.trials} trials begun here; {worked.ended}")
