"""How many workers a storage serves: the share of their time that they spend in trials, and what a trial costs.

Simulated trials of 3 and of 10 seconds, 10 % more or less by chance, asked for, awaited and stored by the very loop of
`placesearch run` and `placesearch worker`: in a journal by one process for all workers, as `--jobs` has it; in SQLite,
in PostgreSQL, and in PostgreSQL behind Optuna's gRPC proxy by one process for each worker, as on several machines. The
study has ResNet-18's 8 sites and 200 trials to begin with, so that suggestions come from a model of some size. All
processes, the server's too, share this machine. Rows are kept in `reports/benchmarks/workers.csv`, one for each
storage, number of workers and length of trials; those asked for are measured again. Writes
`reports/benchmarks/workers.md`.

    python tests/benchmarks/workers.py [--storages journal,sqlite,postgresql,grpc] [--workers 1,2,4,8,32]
                                       [--seconds 3,10] [--rounds 6]
"""

import argparse
import multiprocessing
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from queue import Empty

import optuna
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from servers import Postgres, free_port

from placesearch.config import StudyConfig
from placesearch.plan import prepare
from placesearch.records import TrialRecord
from placesearch.search.samplers import derived_seed
from placesearch.search.trials import Trials
from placesearch.searching import begin, search
from placesearch.storage_url import StorageUrl

REPORTS = Path(__file__).parents[2] / "reports" / "benchmarks"
ROWS, REPORT = REPORTS / "workers.csv", REPORTS / "workers.md"
STORAGES, BEFORE, MOST = ("journal", "sqlite", "postgresql", "grpc"), 200, 32
PLAN = """
## A plan for 1,000 workers and 100,000 trials

On paper, from the figures above; nothing of it was measured.
"""


class Sleeping:
    """Evaluates by waiting.

    Args:
        size: How many trials at a time.
        seconds: How long a trial takes, 10 % more or less.
        until: When to end, by `time.monotonic`.

    Attributes:
        busy: Seconds until then that trials took, of all at a time together.
        ended: Trials that have ended.
    """

    def __init__(self, size: int, seconds: float, until: float) -> None:
        self.size, self._seconds, self._until = size, seconds, until
        self._ends: dict[float, TrialRecord] = {}
        self.busy, self.ended = 0.0, 0

    def submit(self, task) -> None:
        length = self._seconds * random.Random(task.trial).uniform(0.9, 1.1) if self._seconds else 0.0
        luck = derived_seed(hash(str(task.placement)) % 2**32) / 2**32
        record = TrialRecord(
            trial=task.trial, state="COMPLETE", placement=task.placement, reference=task.reference, epochs=1,
            val_accuracy=0.5 + 0.01 * len(task.placement) + 0.03 * luck, val_loss=1.0, seconds=length, seed=0,
        )  # fmt: skip
        now = time.monotonic()
        self._ends[now + length + 1e-9 * task.trial] = record
        self.busy += max(0.0, min(length, self._until - now))

    def results(self, timeout=None):
        left = min(self._ends) - time.monotonic()
        time.sleep(max(0.0, left if timeout is None else min(left, timeout)))
        ended = [end for end in self._ends if end <= time.monotonic()]
        found = [self._ends.pop(end) for end in ended]
        self.ended += len(found)
        return found

    def called_off(self) -> str:
        return "time" if time.monotonic() >= self._until else ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def opened(plan, where) -> Trials:
    trials = Trials(where, "study", plan.definition.config.objectives)
    begin(trials, plan)
    return trials


def work(plan, where, size: int, seconds: float, rounds: float, barrier, results) -> None:
    """One process: work for some rounds of trials and say how its time was spent."""
    trials, began = opened(plan, where), time.monotonic()
    first = Sleeping(1, 0.0, began)  # one trial, or a few: the first suggestion makes the model
    search(plan, trials, first, lambda _: None, began, lambda: "enough" if first.ended else "")
    took = time.monotonic() - began
    barrier.wait()
    used, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    evaluators = Sleeping(size, seconds, began + seconds * rounds)
    search(plan, trials, evaluators, lambda _: None, began, evaluators.called_off)
    trials.leave()
    after = resource.getrusage(resource.RUSAGE_SELF)
    processor = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    results.put((evaluators.busy / (seconds * rounds * size), evaluators.ended, processor, took))


def seconds_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def served(storage: str):
    """Give where trials are kept, and what tells the processor time of those who keep them."""
    folder = Path(tempfile.mkdtemp(prefix="workers-"))
    folder.chmod(0o755)
    try:
        if storage == "journal":
            yield folder / "journal.log", lambda: 0.0
        elif storage == "sqlite":
            yield StorageUrl.parse(f"sqlite:///{folder}/study.db"), lambda: 0.0
        else:
            server = Postgres(folder)
            url = StorageUrl.parse(server.url)
            if storage == "postgresql":
                yield url, server.seconds_of_processor
            else:
                port, code = free_port(), (
                    "import sys, warnings; warnings.simplefilter('ignore'); "
                    "from concurrent.futures import ThreadPoolExecutor; "
                    "from optuna.storages import get_storage, run_grpc_proxy_server; "
                    "run_grpc_proxy_server(get_storage(sys.argv[1]), host='127.0.0.1', port=int(sys.argv[2]), "
                    "thread_pool=ThreadPoolExecutor(32))"
                )  # fmt: skip
                proxy = subprocess.Popen([sys.executable, "-c", code, url.revealed(), str(port)])
                time.sleep(5.0)
                proxied = StorageUrl.parse(f"grpc://127.0.0.1:{port}")
                yield proxied, lambda: server.seconds_of_processor() + seconds_of(proxy.pid)
                proxy.kill()
                proxy.wait()
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measured(plan, where, processor, workers: int, seconds: float, rounds: float):
    """Let so many workers work; return the mean share of their time in trials, trials, and processor time of each."""
    context = multiprocessing.get_context("fork")  # all that is imported is shared
    processes, size = (1, workers) if isinstance(where, Path) else (workers, 1)
    barrier, results = context.Barrier(processes + 1, timeout=300.0), context.Queue()
    begun = [
        context.Process(target=work, args=(plan, where, size, seconds, rounds, barrier, results))
        for _ in range(processes)
    ]
    for process in begun:
        process.start()
    barrier.wait()
    before = processor()
    found = []
    while len(found) < processes:
        with suppress(Empty):
            found.append(results.get(timeout=1.0))
        assert not any(process.exitcode for process in begun), "a process has failed"
    for process in begun:
        process.join()
    shares, ended, used, took = (sum(column) for column in zip(*found, strict=True))
    return shares / processes, int(ended), 1000 * used / ended, 1000 * (processor() - before) / ended, took / processes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--storages", default=",".join(STORAGES))
    parser.add_argument("--workers", default="1,2,4,8,32")
    parser.add_argument("--seconds", default="3,10")
    parser.add_argument("--rounds", type=float, default=6)
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = StudyConfig(backbone="resnet18", name="study", evaluate="simulated:trial", max_jobs=MOST, trials=10**6)
    plan = prepare(config, torch.device("cpu"))
    table = pd.read_csv(ROWS) if ROWS.exists() else pd.DataFrame()
    for storage in given.storages.split(","):
        with served(storage) as (where, processor):
            few = replace(plan.definition, config=plan.definition.config.model_copy(update={"trials": BEFORE}))
            filled = opened(plan, where)
            search(replace(plan, definition=few), filled, Sleeping(1, 0.0, 0.0), lambda _: None, time.monotonic())
            filled.leave()
            for seconds in map(float, given.seconds.split(",")):
                for workers in map(int, given.workers.split(",")):
                    share, trials, own, server, first = measured(plan, where, processor, workers, seconds, given.rounds)
                    row = {
                        "storage": storage, "workers": workers, "seconds": seconds, "share": round(share, 4),
                        "trials": trials, "worker_ms": round(own, 1), "server_ms": round(server, 1),
                        "first_s": round(first, 2),
                    }  # fmt: skip
                    print(row, flush=True)
                    if len(table):
                        same = (table.storage == storage) & (table.workers == workers) & (table.seconds == seconds)
                        table = table[~same]
                    table = pd.concat([table, pd.DataFrame([row])])
                    order = pd.Categorical(table.storage, STORAGES)
                    table = table.assign(order=order).sort_values(["order", "seconds", "workers"]).drop(columns="order")
                    table.to_csv(ROWS, index=False)
    write(table)


def write(table: pd.DataFrame) -> None:
    lines = [
        "# How many workers a storage serves",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores which all processes share, Python {platform.python_version()}, "
        f"optuna {optuna.__version__}. Made by `python tests/benchmarks/workers.py`, whose text says how; one run of "
        "each row. Share: of the workers' time the part in trials, mean over workers. Processor: milliseconds a trial, "
        "of the process that asks and stores, its looks at what others do included, and of the server with its proxy. "
        "First: seconds that a process takes for its first suggestion, for which it reads all trials and makes the "
        "model, while the others do the same; before the clock starts.",
        "",
        "| storage | seconds a trial | workers | trials | share | processor, asking | processor, server | first |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.storage} | {row.seconds:g} | {row.workers} | {row.trials} | {row.share:.3f} | {row.worker_ms:.0f} | "
        f"{row.server_ms:.0f} | {row.first_s:.1f} |"
        for row in table.itertuples()
    ]
    kept = REPORT.read_text(encoding="utf-8") if REPORT.exists() else ""
    _, heading, discussion = kept.partition("\n## ")
    lines += ["", (heading + discussion).strip("\n") or PLAN.strip("\n")]
    REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
