"""The errors that users meet.

PlacesearchError            everything below; one line that says what was given, what is allowed and what to do
├── InputError              an option, a file or a folder that cannot be used
│   ├── PlacementError      a placement that cannot be read, or that a network cannot take
│   ├── BackboneError       an unknown backbone, or one in which no site was found
│   ├── DataError           a data set that is unknown, missing or unusable
│   └── StudyError          a study that is damaged, busy, or another than the one described
└── TrainingError           a candidate whose training went wrong; its trial fails, the search goes on
"""

from collections.abc import Iterable
from difflib import get_close_matches


class PlacesearchError(Exception):
    """Base of all errors of this package."""


class InputError(PlacesearchError, ValueError):
    """An option, a file or a folder cannot be used."""


class PlacementError(InputError):
    """A placement cannot be read, or a network cannot take it."""


class BackboneError(InputError):
    """A backbone is unknown or offers no sites."""


class DataError(InputError):
    """A data set is unknown, missing or unusable."""


class StudyError(InputError):
    """A study is damaged, busy, or not the one described."""


class TrainingError(PlacesearchError):
    """Training a candidate went wrong."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest allowed word, or nothing.

    Example:
        >>> did_you_mean("resnet19", ["resnet18", "vgg11"])
        "; did you mean 'resnet18'?"
        >>> did_you_mean("zzz", ["resnet18"])
        ''
    """
    close = get_close_matches(given, list(allowed), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def reason_of(error: Exception) -> str:
    r"""Return the first line of what others say went wrong; the name of the error if they say nothing.

    Example:
        >>> reason_of(ValueError("no such file\nstack ...")), reason_of(KeyError())
        ('no such file', 'KeyError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def printable(text: object) -> str:
    r"""Return a text or path so that it can be written anywhere, in one line: what is not UTF-8 is escaped.

    Example:
        >>> print(printable("caf\udce9"), printable("two\nlines"))
        caf\xe9 two\nlines
    """
    whole = str(text).encode("utf-8", "surrogateescape" if _from_bytes(str(text)) else "backslashreplace")
    readable = whole.decode("utf-8", "backslashreplace")
    return "".join(letter if letter >= " " and letter != "\x7f" else repr(letter)[1:-1] for letter in readable)


def _from_bytes(text: str) -> bool:
    """Tell whether all that is not Unicode in a text are bytes, as in names of files."""
    return all("\udc80" <= letter <= "\udcff" for letter in text if "\ud800" <= letter <= "\udfff")
