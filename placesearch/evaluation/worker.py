"""The program that a worker process runs: `python -m placesearch.evaluation.worker DESCRIPTOR`."""

import os
import select
import signal
import sys
import time
import warnings
from contextlib import suppress
from multiprocessing.connection import Connection
from threading import Thread

from placesearch.errors import DataError, PlacesearchError
from placesearch.evaluation.candidate import Evaluator, failed, is_out_of_memory
from placesearch.evaluation.workers import Began, Pace

TOLD_EVERY = 0.2
"""Seconds between two reports of a worker on its steps."""


def end_with(descriptor: int) -> None:
    """Wait until the other end of a pipe is closed; then end this process and all that it started, whatever they do.

    Args:
        descriptor: Our end.
    """
    pipe = select.poll()
    pipe.register(descriptor, 0)  # no message is waited for, only that it is closed
    pipe.poll()
    with suppress(ProcessLookupError):  # this process leads no group
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(0)


def serve(pipe: Connection) -> None:
    """Evaluate the tasks that come through a pipe until it closes; the body of a worker process.

    Args:
        pipe: First brings an `Assignment`, then tasks; takes that a task began, steps, records and, if getting ready
            fails, a text; if an image cannot be read, the error.
    """
    last = 0.0

    def tell(event: object) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= TOLD_EVERY:
            last = now
            pipe.send(event)

    try:
        assignment = pipe.recv()
        try:
            evaluator = assignment.evaluator()
        except (PlacesearchError, OSError) as error:
            pipe.send(str(error))
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            asked = pipe.recv()
            pipe.send(0.0 if isinstance(asked, Pace) else failed(asked, assignment.protocol, error, 0.0))
            return
        while True:
            asked = pipe.recv()
            try:
                if isinstance(asked, Pace) and isinstance(evaluator, Evaluator):
                    pipe.send(evaluator.pace(asked.seconds))
                else:
                    pipe.send(Began())
                    pipe.send(evaluator.evaluate(asked, tell))
            except DataError as error:
                pipe.send(error)
                return
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the process that started this one is gone


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # what libraries deprecate was told, or hidden, by the process that began this one
    pipe = Connection(int(sys.argv[1]))
    Thread(target=end_with, args=(pipe.fileno(),), daemon=True).start()
    serve(pipe)
