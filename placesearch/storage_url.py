"""The address of a shared storage, kept so that its password is seen by nobody."""

import os
import re
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import parse_qsl, urlencode, urlsplit

from placesearch.errors import InputError

VARIABLE = "PLACESEARCH_STORAGE"
"""The environment variable that may hold a whole address, password included."""

DRIVERS = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql", "mariadb": "mariadb+pymysql"}
"""By the name of a database the driver that is used unless the address names another one."""

_SCHEME = re.compile(r"(postgresql|mysql|mariadb|sqlite|grpc)(\+[a-z0-9_]+)?")
_SECRET = re.compile(r"pass(?!file)|pwd|secret|token")


@dataclass(frozen=True, slots=True)
class StorageUrl:
    """The address of a shared storage.

    Args:
        shown: The address without its password, for people, files and logs.

    Example:
        >>> url = StorageUrl.parse("postgresql://ann:secret@db.example/studies")
        >>> url
        StorageUrl(shown='postgresql://ann@db.example/studies')
        >>> url.revealed()
        'postgresql+psycopg://ann:secret@db.example/studies'
        >>> StorageUrl.parse("postgresql://db.example/studies?user=ann&password=secret").shown
        'postgresql://db.example/studies?user=ann'
    """

    shown: str
    _whole: str = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an address such as `postgresql://user@host/database`.

        Raises:
            InputError: If it is none; what was given is not repeated, for it may hold a password.
        """
        try:
            parts = urlsplit(text.strip())
            port = parts.port
        except ValueError:
            raise _no_address() from None
        scheme = _SCHEME.fullmatch(parts.scheme)
        if scheme is None or "@" in parts.path or "\n" in text or parts.fragment:
            raise _no_address()
        if parts.scheme == "grpc" and (not parts.hostname or port is None or parts.path.strip("/") or parts.query):
            raise InputError("a gRPC proxy has a host and a port, such as grpc://db.example:13000")
        host = parts.netloc.rpartition("@")[2]
        user = f"{parts.username or ''}@" if "@" in parts.netloc else ""
        public = [(key, value) for key, value in parse_qsl(parts.query, keep_blank_values=True) if not _is_secret(key)]
        query = f"?{urlencode(public, safe='/:')}" if public else ""
        driver, rest = DRIVERS.get(parts.scheme, parts.scheme), text.strip().partition("://")[2]
        return cls(f"{parts.scheme}://{user}{host}{parts.path}{query}", f"{driver}://{rest}")

    @property
    def kind(self) -> str:
        """What answers there: postgresql, mysql, mariadb, sqlite or grpc."""
        return re.split(r"[+:]", self.shown)[0]

    @property
    def has_password(self) -> bool:
        """Whether the address holds a password."""
        parts = urlsplit(self._whole)
        return parts.password is not None or any(_is_secret(key) for key, _ in parse_qsl(parts.query))

    def revealed(self) -> str:
        """Return the address with its password and its driver, for who connects."""
        return self._whole

    def with_secret(self) -> Self:
        """Return the address with the password that the environment gives it, if it gives one for this very address."""
        given = os.environ.get(VARIABLE)
        if given and not self.has_password:
            whole = self.parse(given)
            if whole.shown == self.shown:
                return whole
        return self


def _is_secret(key: str) -> bool:
    return _SECRET.search(key.lower()) is not None


def _no_address() -> InputError:
    return InputError(
        "--storage takes an address such as postgresql://user@host/database, mysql://..., sqlite:///FILE or "
        "grpc://host:port (what was given is not shown, it may hold a password; in a password write / as %2F, @ as %40)"
    )
