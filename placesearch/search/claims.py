"""Who works on which trial of a shared study, and which trials nobody works on any more.

Whoever begins a trial writes down who it is, and adds to a count beside it every few seconds. No clocks are compared:
a trial is lost when its count has not changed for a while by the clock of the one that looks, or at once if its owner
was a process of this machine that is gone. Who finds a lost trial writes its own name beside it, unless there is one,
and takes it over if the name is still there some seconds later; of several that find it at a time, it is the last
(Fischer's algorithm for mutual exclusion, published by Lamport 1987, doi:10.1145/7351.7352). A name that stands there
for long is written over, as its process does not come. Should that fail because a process slept in between, a trial is
evaluated twice and stored once: nothing can be written to a trial that has ended.
"""

import os
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any, Self
from uuid import uuid4

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

OWNER, BEAT, TAKER = "placesearch:owner", "placesearch:beat", "placesearch:taker"
"""Names of the attributes in which a trial's owner, its count and who takes it over are kept."""

BEAT_SECONDS = 10.0
"""Between two beats of an owner."""

GRACE_SECONDS = 60.0
"""How long an owner may be silent."""

SETTLE_SECONDS = 3.0
"""After which the last one who wants a lost trial has it; writing takes far less."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that works on trials.

    Args:
        machine: What identifies the system that gives process ids their meaning: a boot, and in it a container.
        pid: Its process id.
        born: When it was started, in ticks since that boot; process ids are used again.
        name: What tells it from all others.
    """

    machine: str
    pid: int
    born: str
    name: str

    @classmethod
    def this_process(cls) -> Self:
        """Return this process as an owner, another one at each call."""
        return cls(_machine(), os.getpid(), _born(os.getpid()), f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex}")

    def is_gone(self) -> bool:
        """Tell whether it is known to have ended; of a process on another machine nothing is known."""
        return self.machine == _machine() and _born(self.pid) != self.born

    def plain(self) -> list[Any]:
        """Return it as it is stored."""
        return [self.machine, self.pid, self.born, self.name]


def _machine() -> str:
    with suppress(OSError):  # only Linux has these files; elsewhere owners are told by their beats alone
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return f"unknown {uuid4().hex}"


def _born(pid: int) -> str:
    """Return when a process was started, empty if there is none; a dead one whose parent has not asked yet is none."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""


class Claims:
    """The trials of a shared study that this process works on, and those that were lost.

    Args:
        storage: Where the study is.
        owner: Who this is.
        now: A clock that only goes forward.
    """

    def __init__(self, storage: BaseStorage, owner: Owner, now: Callable[[], float] = time.monotonic) -> None:
        self._storage, self._owner, self._now = storage, owner, now
        self._own: dict[int, int] = {}
        self._seen: dict[int, tuple[Any, float]] = {}
        self._wanted: dict[int, tuple[str, float]] = {}
        self._ended = Event()

    def signature(self) -> dict[str, Any]:
        """Return what stands beside a trial on which this process works."""
        return {BEAT: 0, OWNER: self._owner.plain()}

    def own(self, trial_id: int) -> None:
        """Work on a trial beside which that stands already."""
        self._own[trial_id] = 0

    def begin(self, trial_id: int) -> None:
        """Write down that this process works on a trial."""
        for name, value in self.signature().items():
            self._storage.set_trial_system_attr(trial_id, name, value)
        self.own(trial_id)

    def end(self, trial: FrozenTrial) -> None:
        """Stop working on a trial."""
        self._own.pop(trial._trial_id, None)

    def is_own(self, trial: FrozenTrial) -> bool:
        """Tell whether this process works on a trial."""
        return trial._trial_id in self._own

    def beat(self) -> None:
        """Show that this process is alive. What cannot be written now is written at the next beat."""
        for trial_id, count in list(self._own.items()):
            with suppress(Exception):  # the storage is away for a while, or the trial has just ended
                self._storage.set_trial_system_attr(trial_id, BEAT, count + 1)
                if trial_id in self._own:
                    self._own[trial_id] = count + 1

    def keep_beating(self) -> None:
        """Beat in the background until `stop`."""
        Thread(target=self._beat_on, daemon=True).start()

    def _beat_on(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self.beat()

    def stop(self) -> None:
        """End the beats."""
        self._ended.set()

    def lost(self, trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
        """Return a lost trial that is this process's own from now on; None if there is none, or none yet.

        Args:
            trials: The trials of the study as they are stored now.
        """
        for trial in trials:
            is_open = trial.state == TrialState.RUNNING and not self.is_own(trial)
            if is_open and self._is_signed(trial):
                self.own(trial._trial_id)  # the storage kept that it was begun, and was away before it could say so
                return trial
            if not is_open or not self._is_lost(trial):
                self._wanted.pop(trial._trial_id, None)
                continue
            with suppress(UpdateFinishedTrialError):  # its result has come since, and its process has ended
                if self._taken(trial):
                    return trial
        return None

    def _taken(self, trial: FrozenTrial) -> bool:
        """Take a lost trial if this process has wanted it for a while; else say so, unless another one wants it."""
        taker = trial.system_attrs.get(TAKER)
        noted, since = self._wanted.get(trial._trial_id, (None, 0.0))
        waited = self._now() - since
        if taker == self._owner.name == noted and waited > SETTLE_SECONDS:
            del self._wanted[trial._trial_id]
            self._seen.pop(trial._trial_id, None)
            self.begin(trial._trial_id)
            return True
        if taker is None or (taker == noted != self._owner.name and waited > 2 * SETTLE_SECONDS):
            taker = self._owner.name  # whoever wanted it does not come for it
            self._storage.set_trial_system_attr(trial._trial_id, TAKER, taker)
        if taker != noted:
            self._wanted[trial._trial_id] = (taker, self._now())
        return False

    def _is_signed(self, trial: FrozenTrial) -> bool:
        """Tell whether this process stands beside a trial as its owner."""
        stored = trial.system_attrs.get(OWNER)
        return stored is not None and Owner(*stored) == self._owner

    def _is_lost(self, trial: FrozenTrial) -> bool:
        stored = trial.system_attrs.get(OWNER)
        if stored is not None and Owner(*stored).is_gone():
            return True
        sign = (stored, trial.system_attrs.get(BEAT))
        seen, since = self._seen.get(trial._trial_id, (None, 0.0))
        if seen != sign:
            self._seen[trial._trial_id] = (sign, self._now())
            return False
        return self._now() - since > GRACE_SECONDS
