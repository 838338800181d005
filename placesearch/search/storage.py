"""Where the trials of a study are stored: in a journal file, or in a database that several machines share."""

import random
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import local
from typing import Any, TypeVar

import sqlalchemy.exc
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage, _CachedStorage
from sqlalchemy.orm import Session

from placesearch.errors import InputError, StudyError, reason_of
from placesearch.interrupts import interrupts_held
from placesearch.search.journal import at_once as journal_at_once
from placesearch.search.journal import open_journal
from placesearch.storage_url import StorageUrl

PATIENCE = 600.0
"""Seconds for which a database that does not answer is asked again, before the process gives up."""

PAUSES = (0.5, 10.0)
"""Seconds between two attempts: the first, and the longest; each is twice the last, and up to half longer by chance."""

ATTEMPTS = 10
"""How often making the tables is tried, where others make them at the same moment."""

READY_SECONDS = 20.0
"""How long a proxy may take to answer for the first time."""

EXTRAS = {"postgresql": "postgresql", "mysql": "mysql", "mariadb": "mysql", "grpc": "grpc"}
"""By kind of database the extra of this package that brings what is needed to speak to it."""

_PASSING = (
    sqlalchemy.exc.OperationalError,
    sqlalchemy.exc.InterfaceError,
    sqlalchemy.exc.PendingRollbackError,  # the connection was lost before
    sqlalchemy.exc.IntegrityError,  # another process has written the same at the same moment
)

Answer = TypeVar("Answer")


class _Held:
    """A session that commits when it is told that all is written."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def commit(self) -> None:
        """Send what was written, and go on."""
        self._session.flush()

    def close(self) -> None:
        """Go on."""


class _GatheringDatabase(RDBStorage):
    """A database in which a trial is written in one transaction; Optuna's own takes one for each parameter."""

    def __init__(self, url: str, engine_kwargs: dict[str, Any]) -> None:
        super().__init__(url, engine_kwargs)
        self._of_thread = local()
        weakref.finalize(self, self.engine.dispose)  # closes the connections
        self._sessions = self.scoped_session
        self.scoped_session = self._session  # type: ignore[assignment]  # Optuna does nothing with it but call it

    def _session(self) -> Any:
        return getattr(self._of_thread, "held", None) or self._sessions()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Write all or nothing of what this thread writes in the block."""
        session = self._sessions()
        self._of_thread.held = _Held(session)
        try:
            yield
            session.commit()
        except sqlalchemy.exc.SQLAlchemyError as error:
            raise StorageInternalError(reason_of(error)) from error
        finally:
            self._of_thread.held = None
            session.rollback()
            session.close()


class Database(_CachedStorage):
    """A database as Optuna's storage, with what was finished kept in memory."""

    def __init__(self, backend: _GatheringDatabase) -> None:
        super().__init__(backend)
        self.gathered = backend.gathered


class Journal(JournalStorage):
    """A journal file as Optuna's storage."""


class Proxy(GrpcStorageProxy):
    """A gRPC proxy as Optuna's storage."""


Kinds = tuple[type[Journal], type[Database], type[Proxy]]
KINDS: Kinds = (Journal, Database, Proxy)


def open_storage(where: Path | StorageUrl, kinds: Kinds = KINDS) -> BaseStorage:
    """Open a storage; one that does not exist yet is made.

    Args:
        where: A journal file, or the address of a database.
        kinds: The classes to use for a journal, a database and a proxy.

    Raises:
        InputError: If what is needed to speak to the database is missing, or it does not answer.
        StudyError: If a journal is damaged.
    """
    if isinstance(where, Path):
        return open_journal(where, kinds[0])
    where = where.with_secret()
    try:
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            if where.kind == "grpc":
                host, _, port = where.revealed().removeprefix("grpc://").rpartition(":")
                proxy = kinds[2](host=host.strip("[]"), port=int(port))
                proxy.wait_server_ready(timeout=READY_SECONDS)
                return proxy
            return kinds[1](_connected(where))
    except ImportError:
        raise InputError(
            f"{where.shown} needs a package that is not installed: pip install 'placesearch[{EXTRAS[where.kind]}]'"
            if where.kind in EXTRAS
            else f"{where.shown} needs a driver that is not installed"
        ) from None
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, RuntimeError, ConnectionError) as error:
        raise InputError(f"cannot use {where.shown}: {_reason(error)}") from None


def _connected(where: StorageUrl) -> _GatheringDatabase:
    """Connect to a database and make Optuna's tables there, unless somebody else is making them at this moment."""
    options = {} if where.kind == "sqlite" else {"pool_pre_ping": True}
    for attempt in range(ATTEMPTS):
        try:
            return _GatheringDatabase(where.revealed(), options)
        except sqlalchemy.exc.DBAPIError as error:
            if attempt == ATTEMPTS - 1 or "already exists" not in str(error.orig):
                raise
            time.sleep(random.uniform(0.0, PAUSES[0]))
    raise AssertionError


@contextmanager
def at_once(storage: BaseStorage) -> Iterator[None]:
    """Write all that is stored in the block as one piece, when it ends, where the storage can do that.

    A proxy cannot; there a trial counts only with the last thing that is written of it, its state.
    """
    if isinstance(storage, Database):
        with storage.gathered():
            yield
    else:
        with journal_at_once(storage):
            yield


def patiently(attempt: Callable[[], Answer], tell: Callable[[str], None]) -> Answer:
    """Return what an attempt returns, made again and again while a database does not answer.

    Ctrl-C waits while an attempt is being made, not between two.

    Args:
        attempt: What to do; it must do no harm if it is done twice.
        tell: Is told, once, that the database does not answer, and when it does again.

    Raises:
        StudyError: If it does not answer for `PATIENCE` seconds.
    """
    until, (pause, longest) = time.monotonic() + PATIENCE, PAUSES
    told = False
    while True:
        try:
            with interrupts_held():
                answer = attempt()
        except Exception as error:
            if not is_lost_connection(error):
                raise
            if time.monotonic() > until:
                raise StudyError(
                    f"the storage did not answer for {PATIENCE:.0f} s ({_reason(error)}); the same command goes on"
                ) from None
            if not told:
                tell(f"the storage does not answer ({_reason(error)}); asking again until it does")
            told = True
            time.sleep(pause * random.uniform(1.0, 1.5))  # or all workers would ask at once
            pause = min(2 * pause, longest)
            continue
        if told:
            tell("the storage answers again")
        return answer


def is_lost_connection(error: BaseException) -> bool:
    """Tell whether an error may go away by itself: a server that is restarted, a lock that is held too long."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, _PASSING):
            return True
        if isinstance(cause, sqlalchemy.exc.DBAPIError) and cause.connection_invalidated:
            return True
        code = getattr(cause, "code", None)
        if callable(code) and getattr(code(), "name", "") in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "UNKNOWN"):
            return True  # an error of gRPC, which is not imported unless it is used
        cause = cause.__cause__
    return False


def _reason(error: BaseException) -> str:
    """Return in a line what the driver says, which of all is nearest to the cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    original = getattr(error, "orig", None) or error
    details = getattr(original, "details", None)
    text = details() if callable(details) else str(original)
    return " ".join(text.split())[:300] or type(original).__name__
