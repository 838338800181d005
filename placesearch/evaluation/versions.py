"""What results depend on besides a study: the code of this package and the versions of others."""

import hashlib
import importlib.metadata
from functools import cache
from pathlib import Path

import placesearch

PACKAGES = ("placesearch", "torch", "torchvision", "optuna")


@cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on, and a hash of the source of this one as `code`."""
    return {name: importlib.metadata.version(name) for name in PACKAGES} | {"code": code_fingerprint()}


SCORING = ("models/", "training/", "evaluation/candidate.py", "evaluation/fitting.py", "evaluation/own.py")
"""The part of this package that scores depend on: what is built, how it is trained and validated."""


def code_fingerprint(part: tuple[str, ...] = ("",)) -> str:
    """Return a hash of the source of this package, the same wherever it is installed.

    Args:
        part: Only of files whose paths begin with one of these, as `SCORING` has them.
    """
    package = Path(placesearch.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name.startswith(part):
            digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
