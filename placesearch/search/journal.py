"""The journal file of a study: locked so that a killed process holds nobody up, mended before it is read."""

import json
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.storages.journal._file import get_lock_file
from optuna.storages.journal._storage import JournalOperation

from placesearch.errors import StudyError

Storage = TypeVar("Storage", bound=JournalStorage)


class _SystemLock(JournalFileOpenLock):
    """A lock that the system frees when its holder dies; Optuna's own is waited for up to 30 seconds then."""

    def __init__(self, path: Path) -> None:
        self._lock = FileLock(path)

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        self._lock.release()


class _GatheringBackend(JournalFileBackend):
    """A journal file that can write many records in one go; Optuna's own syncs the disk after each parameter."""

    _gathered: list[dict[str, Any]] | None = None
    _base = 0

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        if self._gathered is None:
            yield from super().read_logs(log_number_from)
            return
        if self._base < 0:
            self._base = log_number_from
        yield from self._gathered[log_number_from - self._base :]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        if self._gathered is None:
            super().append_logs(logs)
        else:
            self._gathered += json.loads(json.dumps(logs))  # as they will be read

    @property
    def whole(self) -> int:
        """How many bytes of the file were read, all of them whole lines."""
        return max(self._log_number_offset.values())

    def gather(self) -> None:
        """Keep records back from now on."""
        self._gathered, self._base = [], -1

    def flush(self) -> None:
        """Write what was kept back, and remember where in the file it is."""
        gathered, self._gathered = self._gathered or [], None
        if not gathered:
            return
        super().append_logs(gathered)
        self._log_number_offset = {0: 0, self._base: self._log_number_offset[self._base]}  # earlier ones are done with
        for number, log in enumerate(gathered, self._base):
            length = len(json.dumps(log, separators=(",", ":")).encode()) + 1
            self._log_number_offset[number + 1] = self._log_number_offset[number] + length


@contextmanager
def at_once(storage: BaseStorage) -> Iterator[None]:
    """Write all that is stored in the block as one piece, when it ends; other writers to a journal wait so long.

    What a writer that died before left of a last line is cut off.
    """
    backend = getattr(storage, "_backend", None)
    if not isinstance(backend, _GatheringBackend):
        yield
        return
    with get_lock_file(backend._lock):
        _mend(Path(backend._file_path), whole_before=backend.whole)
        storage.get_all_studies()  # reads what others wrote
        backend.gather()
        try:
            yield
        finally:
            backend.flush()


def open_journal(path: Path, kind: type[Storage]) -> Storage:
    """Open a journal as Optuna storage, cutting off a last line that was torn by a kill or a full disk.

    Left alone, the next line would be glued onto it, and the study be lost.

    Args:
        path: The file; made if it does not exist.
        kind: The class of the storage.

    Raises:
        StudyError: If a line before the last one is damaged; the file is left as it is.
    """
    lock = _SystemLock(path.with_name(path.name + ".flock"))
    lock.acquire()
    try:
        if path.exists():
            _mend(path)
    finally:
        lock.release()
    return kind(_GatheringBackend(str(path), lock_obj=lock))


def _mend(path: Path, whole_before: int = 0) -> None:
    """Cut off a last line that is torn.

    Args:
        path: The file.
        whole_before: So many of its bytes are known to be whole lines.

    Raises:
        StudyError: If a line before the last one is damaged, or one is missing that made a trial.
    """
    whole, number, made = whole_before, 0, 0
    with path.open("rb") as file:
        file.seek(whole)
        for line in file:
            record = _record_in(line)
            if record is None:
                break
            whole, number = whole + len(line), number + 1
            made += record["op_code"] == JournalOperation.CREATE_TRIAL
            if not whole_before and isinstance(trial := record.get("trial_id"), int) and trial >= made:
                raise StudyError(
                    f"{path} is damaged before line {number}: what it says there is about a trial that no line has "
                    "made; restore it from a copy"
                )
        else:
            return
        if file.read(1):
            which = f"line {number + 1}" if not whole_before else "a line that was written just now"
            raise StudyError(f"{path} is damaged in {which}, which is not its last; restore it from a copy")
    os.truncate(path, whole)


def _record_in(line: bytes) -> dict[str, Any] | None:
    """Return what a line holds; None if it is torn or no record."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if line.endswith(b"\n") and isinstance(record, dict) and "op_code" in record else None
