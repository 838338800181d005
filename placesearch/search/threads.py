"""The number of threads of linear algebra, a setting of the whole process."""

from threading import Lock
from types import TracebackType
from typing import Any

import scipy.linalg  # noqa: F401 - a library that is not loaded yet would not be found
from threadpoolctl import ThreadpoolController

_CONTROLLER = ThreadpoolController()


class OneThread:
    """A limit of one thread that several threads may hold at a time.

    The first to enter sets it and the last to leave lifts it, in whatever order they do; were each to restore what it
    found, the one that entered second would restore the limit of the first for good.

    Args:
        kind: Of which libraries: `blas` or `openmp`.

    Example:
        >>> with OneThread("blas"):
        ...     pass
    """

    def __init__(self, kind: str) -> None:
        self._kind, self._lock, self._holders = kind, Lock(), 0
        self._limit: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._holders == 0:
                self._limit = _CONTROLLER.limit(limits=1, user_api=self._kind)
            self._holders += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                self._limit.restore_original_limits()


ONE_BLAS_THREAD = OneThread("blas")
"""Held while the model of effects computes: all cores are training, and two threads would wait for each other."""

ONE_OPENMP_THREAD = OneThread("openmp")
"""Held as well while Optuna's GP sampler computes, which does so with torch."""
