"""The program that a worker process runs: `python -m placesearch.evaluation.worker DESCRIPTOR`."""

import sys
import warnings
from multiprocessing.connection import Connection
from threading import Thread

from placesearch.evaluation.workers import end_with, serve

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # what libraries deprecate was told, or hidden, by the process that began this one
    pipe = Connection(int(sys.argv[1]))
    Thread(target=end_with, args=(pipe.fileno(),), daemon=True).start()
    serve(pipe)
