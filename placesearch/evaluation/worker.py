"""The program that a worker process runs: `python -m placesearch.evaluation.worker DESCRIPTOR`."""

import sys
import warnings
from multiprocessing.connection import Connection

from placesearch.evaluation.workers import serve

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # what libraries deprecate was told, or hidden, by the process that began this one
    serve(Connection(int(sys.argv[1])))
