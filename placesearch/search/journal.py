"""The journal file of a study: locked so that a killed process holds nobody up, mended before it is read."""

import json
import os
from pathlib import Path

from filelock import FileLock
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from placesearch.errors import StudyError


class _SystemLock(JournalFileOpenLock):
    """A lock that the system frees when its holder dies; Optuna's own is waited for up to 30 seconds then."""

    def __init__(self, path: Path) -> None:
        self._lock = FileLock(path)

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        self._lock.release()


def open_journal(path: Path) -> JournalStorage:
    """Open a journal as Optuna storage, cutting off a last line that was torn by a kill or a full disk.

    Left alone, the next line would be glued onto it, and the study be lost.

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
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _mend(path: Path) -> None:
    whole = number = 0
    with path.open("rb") as file:
        for line in file:
            if not _is_record(line):
                break
            whole, number = whole + len(line), number + 1
        else:
            return
        if file.read(1):
            raise StudyError(f"{path} is damaged in line {number + 1}, which is not its last; restore it from a copy")
    os.truncate(path, whole)


def _is_record(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n") and isinstance(record, dict) and "op_code" in record
