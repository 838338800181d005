"""What do kills, hangs and full disks cost a study? Faults for real, at random moments, and what came of each study.

Runs the command line with an evaluation that takes 0.2 s and whose score follows from placement and seed, two or three
trials at a time; does harm at seeded random moments; gives the same command again until it ends. Then every position
has to be there once, every trial that the storage held as finished before the harm has to be there as it was, and
placements and scores have to be those of a study that nothing happened to. Rows are kept in
`reports/benchmarks/faults.csv`, so that faults can be tried one by one, and `reports/benchmarks/faults.md` is written
from all of them. About 40 minutes on two cores.

    python tests/benchmarks/faults.py [FAULT ...] [--storage journal|postgresql] [--seed N] [--times N]

With `--storage postgresql` it starts a server of its own, and commands in other processes join the study as
`placesearch worker` does from other machines.
"""

import argparse
import os
import platform
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import optuna
import pandas as pd
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from servers import Postgres

COMMAND = Path(sys.executable).with_name("placesearch")
NETWORKS = Path(__file__).parents[1] / "networks.py"
REPORT = Path(__file__).parents[2] / "reports" / "benchmarks" / "faults.md"
STORAGES = ("journal", "postgresql")
TRIALS = 24
"""Trials of each study."""

PATIENCE = 120.0
"""Seconds after which something that ought to happen is taken for not happening."""

ENDING = 20.0
"""Seconds that processes may take to end: a worker that just starts imports torch before it looks around."""

TRIAL_TIMEOUT = 1.0
"""Seconds that a trial may take where some hang."""

FAILING = 0.15
"""Candidates with a score below this are those that fail, where some are to fail."""

EVALUATION = Path(__file__).with_name("judged.py")
"""What evaluates, in the command's processes."""

NETWORK, EVALUATE = "mine:tiny", "judged:evaluate"
"""The network and what evaluates it, as the command line names them."""

judge: Callable[[str, int], float] = runpy.run_path(str(EVALUATION))["judge"]

REASONS = {
    "hang": f"took longer than {TRIAL_TIMEOUT:g} s, its time limit (--trial-timeout)",
    "nan": "the evaluation returned loss nan",
}
"""Why trials fail, by what goes wrong."""


@dataclass
class Found:
    """What came of the studies that a fault was tried on.

    Args:
        tried: How often.
        studies: On how many studies.
        lost: Trials that the storage held as finished before and that are gone or others in the end, and positions
            without a trial.
        doubled: Trials more than were asked for, and trials of the same placement under the same seed.
        retried: Evaluations that were begun more than once.
        differing: Trials whose placement, state, reason or score is not that of a study that nothing happened to.
        left: Processes that were still there some seconds after they ought to have ended.
    """

    tried: int = 0
    studies: int = 0
    lost: int = 0
    doubled: int = 0
    retried: int = 0
    differing: int = 0
    left: int = 0


@dataclass
class Bench:
    """Where studies are made.

    Args:
        folder: Folder for them.
        server: The server of the storage; None for a journal.
        trials: Trials of each study.
        random: Draws the moments.
    """

    folder: Path
    server: Postgres | None
    trials: int
    random: random.Random
    made: int = 0

    def __post_init__(self) -> None:
        """Run the study that nothing happens to."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        whole, began = self.study(), time.monotonic()
        whole.end()
        self.seconds, self.expected = time.monotonic() - began, whole.table()
        ends = [trial.datetime_complete.timestamp() for trial in whole.stored()]
        self.search_seconds = max(ends) - min(ends)

    def study(self, *options: str, fault: str = "", jobs: int = 2) -> "Study":
        """Begin a new study, always the same one under another name."""
        self.made += 1
        name = f"faults-{self.made}"
        folder = self.folder / name
        folder.mkdir()
        shutil.copy(NETWORKS, folder / "mine.py")
        shutil.copy(EVALUATION, folder / "judged.py")
        return Study(self, folder, ("--evaluate", EVALUATE, "--jobs", str(jobs), *options), fault)


@dataclass
class Study:
    """A study, the command that runs it, and what was seen of it.

    Args:
        bench: Where it is made.
        folder: Where the command runs.
        options: Further options of the command.
        fault: What its evaluations do.
        before: Finished trials that were seen in the storage, by position.
        lost: Those that were seen to be gone or others later.
        left: Processes that did not end in time.
        known: How many evaluations had been begun when the command was given.
        joined: The commands that joined it.
    """

    bench: Bench
    folder: Path
    options: tuple[str, ...]
    fault: str = ""
    before: dict[int, tuple] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)
    left: int = 0
    known: int = 0
    joined: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, **how: object) -> subprocess.Popen[bytes]:
        """Give the command."""
        options = ["--backbone", NETWORK, "--input-size", "32", "--reductions", "2,4", *self.options]
        if self.bench.server:
            options += ["--storage", self.bench.server.public_url]
        self.known = len(self.begun())
        with (self.folder / "errors").open("w") as errors:  # no pipe, which a process that is left would hold open
            self.process = subprocess.Popen(
                [COMMAND, "run", *options, "--trials", str(self.bench.trials), "--name", self.folder.name, "--quiet"],
                cwd=self.folder,
                env=self.environment(),
                stderr=errors,
                **how,
            )
        return self.process

    def join(self) -> subprocess.Popen[bytes]:
        """Have another command join it."""
        self.joined.append(self.joining(len(self.joined)))
        return self.joined[-1]

    def joining(self, number: int) -> subprocess.Popen[bytes]:
        """Give the command that joins it."""
        assert self.bench.server is not None, "a journal is not shared"
        with (self.folder / f"errors-{number}").open("w") as errors:
            options = ["--storage", self.bench.server.public_url, "--wait", f"{PATIENCE:g}s", "--jobs", "1", "--quiet"]
            allowed = ["--allow", NETWORK, "--allow", EVALUATE]
            return subprocess.Popen(
                [COMMAND, "worker", self.folder.name, *options, *allowed],
                cwd=self.folder,
                env=self.environment(),
                stderr=errors,
            )

    def give_again(self) -> None:
        """Give commands again that came while the server was away, and ended with a line that says so."""
        if self.process.poll() == 2 and "cannot use" in (self.folder / "errors").read_text():
            self.start()
        for number, process in enumerate(self.joined):
            if process.poll() == 2 and "cannot use" in (self.folder / f"errors-{number}").read_text():
                self.joined[number] = self.joining(number)

    def wait_for_joined(self) -> None:
        """Wait until the commands that joined it have ended, as they do with the study."""
        until = time.monotonic() + PATIENCE
        while any(process.poll() is None for process in self.joined) and time.monotonic() < until:
            self.give_again()
            time.sleep(0.1)
        self.give_again()
        for number, process in enumerate(self.joined):
            code = process.wait(PATIENCE)
            assert code in (0, -signal.SIGKILL), (self.folder / f"errors-{number}").read_text()

    def environment(self) -> dict[str, str]:
        """Return what the commands find in their environment."""
        secret = {"PGPASSWORD": self.bench.server.password} if self.bench.server else {}
        return {**os.environ, **secret, "FAULT": self.fault, "FAILING": str(FAILING)}

    def end(self) -> None:
        """Give the command and wait until it has ended the study."""
        self.start()
        self.wait()

    def wait(self, code: int = 0) -> str:
        """Wait until the command has ended with an exit code, 0 for a study that has ended; return its last words."""
        self.process.wait(PATIENCE)
        errors = (self.folder / "errors").read_text()
        assert self.process.returncode == code, errors
        self.see_processes_end()
        return errors

    def stored(self) -> list[optuna.trial.FrozenTrial]:
        """Return the trials that the storage holds now."""
        if self.bench.server:
            server = RDBStorage(self.bench.server.url.replace("postgresql:", "postgresql+psycopg:"))
            try:
                return self.trials_in(server)
            finally:
                server.remove_session()
                server.engine.dispose()
        journal = self.folder / "studies" / self.folder.name / "journal.log"
        return self.trials_in(JournalStorage(JournalFileBackend(str(journal)))) if journal.exists() else []

    def trials_in(self, storage: BaseStorage) -> list[optuna.trial.FrozenTrial]:
        """Return the trials that a storage holds now."""
        try:
            return optuna.load_study(storage=storage, study_name=self.folder.name).get_trials(deepcopy=False)
        except KeyError:  # not begun yet
            return []

    def remember(self) -> None:
        """Look at the finished trials in the storage; those that were there before have to be there as they were."""
        now = {
            trial.number: (trial.state, trial.values, trial.user_attrs)
            for trial in self.stored()
            if trial.state.is_finished()
        }
        self.lost |= {number for number, trial in self.before.items() if now.get(number) != trial}
        self.before = now

    def begun(self) -> list[tuple[int, str]]:
        """Return what was begun to be evaluated, in order: the process, and seed and placement."""
        notes = self.folder / "notes"
        lines = notes.read_text().splitlines() if notes.exists() else []
        return [(int(process), trial) for process, trial in (line.split(" ", 1) for line in lines)]

    def wait_for_a_moment(self) -> None:
        """Wait until a moment that is drawn: every other one from the whole run, the others from its search."""
        random = self.bench.random
        until = random.uniform(0, self.bench.seconds)
        if random.random() < 0.5:
            until = random.uniform(0, self.bench.search_seconds)
            while len(self.begun()) == self.known and self.process.poll() is None:
                time.sleep(0.02)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(until)

    def processes(self, part: str = "") -> list[int]:
        """Return the processes that run in the study's folder, by what their command line holds."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if (
                    entry.name.isdigit()
                    and (entry / "cwd").readlink() == self.folder
                    and part.encode() in (entry / "cmdline").read_bytes()
                    and (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
                ):
                    found.append(int(entry.name))
        return found

    def workers(self) -> list[int]:
        """Return its worker processes."""
        return self.processes("placesearch.evaluation.worker")

    def see_processes_end(self) -> None:
        """Wait until none of its processes is left; kill and count those that stay."""
        self.process.wait()
        deadline = time.monotonic() + ENDING
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.left += len(left)
        for process in left:
            os.kill(process, signal.SIGKILL)

    def table(self) -> pd.DataFrame:
        """Return its trials.csv without what a stopwatch measured."""
        frame = pd.read_csv(self.folder / "reports" / self.folder.name / "trials.csv", keep_default_na=False)
        return frame.drop(columns=[name for name in frame if name.endswith("seconds") or name.startswith("latency")])

    def add_to(self, found: Found, tried: int, expected: pd.DataFrame | None = None) -> None:
        """Add what came of it to what was found.

        Args:
            found: What was found before.
            tried: How often the fault was tried on it.
            expected: Its table, if nothing had happened; None if some trials have to fail, which are then told by what
                the evaluation does.
        """
        self.remember()
        table = self.table()
        positions = set(table.trial)
        begun = Counter(trial for _, trial in self.begun())
        wanted = range(len(self.bench.expected) if expected is None else len(expected))
        assert sorted(self.before) == sorted(positions), "the storage and trials.csv hold other trials"
        found.tried += tried
        found.studies += 1
        found.lost += len(self.lost | (set(wanted) - positions))
        again = table.duplicated("trial") | table.duplicated(["placement", "seed", "epochs"])
        found.doubled += int((again | ~table.trial.isin(wanted)).sum())
        found.retried += sum(begun.values()) - len(begun)
        found.differing += self.failing_otherwise(table) if expected is None else differing(table, expected)
        found.left += self.left

    def failing_otherwise(self, table: pd.DataFrame) -> int:
        """Return how many trials did not end as the evaluation has them end."""
        wrong = 0
        for row in table.itertuples():
            accuracy = judge(row.placement, row.seed)
            fails = accuracy < FAILING
            ended = ("FAIL", REASONS[self.fault], "") if fails else ("COMPLETE", "", accuracy)
            seen = row.val_accuracy if row.val_accuracy == "" else float(row.val_accuracy)
            wrong += (row.state, row.error, seen) != ended
        return wrong


def differing(table: pd.DataFrame, expected: pd.DataFrame) -> int:
    """Return how many trials are in only one of two tables, or not equal."""
    rows, others = ({row[0]: row for row in frame.astype(str).itertuples(index=False)} for frame in (table, expected))
    return sum(rows.get(number) != others.get(number) for number in {*rows, *others})


def at_random_moments(bench: Bench, times: int, harm: Callable[[Study], None]) -> Found:
    """Do harm to the whole command at moments of a run that are drawn, and give it again, until it has ended."""
    found = Found()
    while found.tried < times:
        study, tried = bench.study(), 0
        while found.tried + tried < times:
            process = study.start()
            study.wait_for_a_moment()
            study.remember()
            if process.poll() is not None:
                study.wait()
                break
            harm(study)
            tried += 1
            study.see_processes_end()
            study.remember()
        study.end()
        study.add_to(found, tried, bench.expected)
    return found


def kill_the_parent(bench: Bench, times: int) -> Found:
    """`kill -9` of the process that runs the study."""
    return at_random_moments(bench, times, lambda study: study.process.kill())


def kill_all(bench: Bench, times: int) -> Found:
    """`kill -9` of that process and its workers, in an order that is drawn."""

    def harm(study: Study) -> None:
        processes = study.processes()
        bench.random.shuffle(processes)
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    return at_random_moments(bench, times, harm)


def terminate(bench: Bench, times: int) -> Found:
    """SIGTERM to the process that runs the study; from when it handles signals, it has to end as on Ctrl-C."""

    def harm(study: Study) -> None:
        status = Path(f"/proc/{study.process.pid}/status").read_text()
        handled = int(status.partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1
        searching = len(study.begun()) > study.known
        study.process.terminate()
        code = study.process.wait(PATIENCE)
        assert code == (130 if handled else -signal.SIGTERM), (code, (study.folder / "errors").read_text())
        if searching and handled:
            assert set(study.before) <= set(study.table().trial), "reports lack trials that were finished"

    return at_random_moments(bench, times, harm)


def kill_a_worker(bench: Bench, times: int) -> Found:
    """`kill -9` of a worker that is drawn, three at a time, but of none that may have a trial whose worker died before.

    Such a trial would fail, as it is meant to. It may be the first one of a worker that was hired after a kill, and is
    one that was begun before.
    """
    found = Found()
    while found.tried < times:
        study, tried, first = bench.study(jobs=3), 0, set[int]()
        process = study.start()
        while found.tried + tried < times and process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(bench.random.uniform(0, 2))
            study.remember()
            begun, running = study.begun(), study.workers()
            first = first if tried else set(running)
            counts, tasks = Counter(trial for _, trial in begun), dict(begun)
            done = Counter(worker for worker, _ in begun)
            fresh = [worker for worker in running if worker not in tasks or counts[tasks[worker]] == 1]
            victims = [worker for worker in fresh if worker in first or done[worker] > 1]
            if victims:
                with suppress(ProcessLookupError):
                    os.kill(bench.random.choice(victims), signal.SIGKILL)
                    tried += 1
        study.wait()
        study.add_to(found, tried, bench.expected)
    return found


def run_out_of_memory(bench: Bench, times: int) -> Found:
    """The evaluation raises torch.OutOfMemoryError whenever another one runs beside it, three at a time at first."""
    found = Found()
    while found.studies < times:
        study = bench.study(fault="memory", jobs=3)
        study.end()
        before = found.retried
        study.add_to(found, 0, bench.expected)
        found.tried += found.retried - before
    return found


def some_fail(bench: Bench, times: int, study: Callable[[], Study]) -> Found:
    """Run studies in which the evaluation of some candidates fails in a way of its own."""
    found = Found()
    while found.tried < times:
        made = study()
        made.end()
        made.add_to(found, sum(judge(row.placement, row.seed) < FAILING for row in made.table().itertuples()))
    return found


def hang(bench: Bench, times: int) -> Found:
    """Some evaluations never end; trials have a time limit, and one worker is enough to have one."""
    limit = ("--trial-timeout", f"{TRIAL_TIMEOUT:g}s")
    return some_fail(bench, times, lambda: bench.study(*limit, fault="hang", jobs=1 + bench.made % 2))


def nan(bench: Bench, times: int) -> Found:
    """Some evaluations return a loss that is not a number."""
    return some_fail(bench, times, lambda: bench.study(fault="nan"))


def corrupt_image(bench: Bench, times: int) -> Found:
    """A file of an image folder is damaged: refused by name, then left out if asked for, as if it were not there."""
    found = Found()
    for number in range(times):
        study = bench.study()
        study.options = ("--data", "tree", "--epochs", "1", "--long-epochs", "0", "--jobs", "2")
        for split in ("train", "val", "test"):
            for shade, name in ((40, "cat"), (200, "dog")):
                folder = study.folder / "tree" / split / name
                folder.mkdir(parents=True)
                for index in range(40):
                    Image.new("RGB", (32, 32), (shade + index, 3 * index, shade)).save(folder / f"{index}.png")
        files = sorted(study.folder.rglob("*.png"))
        bad = bench.random.choice(files)
        whole = bad.read_bytes()
        bad.write_bytes((b"", b"no picture", whole[: len(whole) // 2])[number % 3])
        study.start()
        errors, name = study.wait(code=2), bad.relative_to(study.folder).as_posix()
        assert f"cannot read image {name}" in errors, errors
        assert errors.count("\n") == 1, errors
        assert not study.stored()
        study.options += ("--skip-corrupt",)
        study.end()
        without = bench.study()
        without.options = study.options
        shutil.copytree(study.folder / "tree", without.folder / "tree")
        (without.folder / name).unlink()
        without.end()
        study.add_to(found, 1, without.table())
    return found


def full_disk(bench: Bench, times: int) -> Found:
    """No file may grow beyond a size that is drawn, so that a write to the journal is torn; then there is room."""
    found, study = Found(), bench.study()
    journal = study.folder / "studies" / study.folder.name / "journal.log"
    tried = 0
    while found.tried < times:
        size = journal.stat().st_size if journal.exists() else 0
        room = size + bench.random.randrange(500, 6000)

        def limit(room: int = room) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

        study.start(preexec_fn=limit)
        errors = study.wait(code=2)
        assert errors.count("\n") == 1, errors
        assert "File too large" in errors, errors
        tried += 1
        study.remember()
        if len(study.before) > bench.trials - 3 or found.tried + tried == times:
            study.end()
            study.add_to(found, tried, bench.expected)
            study, tried = bench.study(), 0
            journal = study.folder / "studies" / study.folder.name / "journal.log"
    return found


def torn_line(bench: Bench, times: int) -> Found:
    """After a kill of all, the journal's last line is cut somewhere; what counts are the trials before it."""
    assert bench.server is None, "only a journal has lines"
    found = Found()
    while found.tried < times:
        study, tried = bench.study(), 0
        journal = study.folder / "studies" / study.folder.name / "journal.log"
        while found.tried + tried < times:
            process = study.start()
            study.wait_for_a_moment()
            study.remember()
            if process.poll() is not None:
                break
            process.kill()
            study.see_processes_end()
            if journal.exists() and (content := journal.read_bytes()):
                last = content.rstrip(b"\n").rfind(b"\n") + 1
                journal.write_bytes(content[: bench.random.randrange(last, len(content))])
                ended = {trial.number for trial in study.stored() if trial.state.is_finished()}
                torn = set(study.before) - ended  # the one whose end the last line was
                assert len(torn) <= 1, torn
                study.before = {number: trial for number, trial in study.before.items() if number not in torn}
                tried += 1
        study.end()
        study.add_to(found, tried, bench.expected)
    return found


def kill_a_command(bench: Bench, times: int) -> Found:
    """`kill -9` of one of three commands that share a study, one of them that which began it; another takes its place.

    What a command evaluated is taken over by another one at once, as all are of one machine.
    """
    found = Found()
    while found.tried < times:
        study, tried = bench.study(jobs=1), 0
        study.start()
        commands = [study.process, study.join(), study.join()]
        while found.tried + tried < times:
            study.known = len(study.begun())
            study.wait_for_a_moment()
            study.remember()
            if study.process.poll() is not None:
                break
            victim = bench.random.randrange(len(commands))
            if commands[victim].poll() is None:
                commands[victim].kill()
                commands[victim].wait()
                tried += 1
                commands[victim] = study.join() if victim else study.start()
        study.wait_for_joined()
        study.wait()
        study.end()
        study.add_to(found, tried, bench.expected)
    return found


def kill_the_server(bench: Bench, times: int) -> Found:
    """`kill -9` of the database server and all its processes; it starts again after up to 3 s."""
    assert bench.server is not None, "a journal has no server"
    found = Found()
    while found.tried < times:
        study, tried = bench.study(), 0
        study.start()
        study.join()
        while found.tried + tried < times:
            study.wait_for_a_moment()
            study.give_again()
            study.remember()
            if study.process.poll() is not None:
                break
            bench.server.kill()
            time.sleep(bench.random.uniform(0, 3))
            bench.server.start()
            tried += 1
            study.remember()
        study.wait_for_joined()
        study.wait()
        study.add_to(found, tried, bench.expected)
    return found


@dataclass(frozen=True)
class Fault:
    """A fault.

    Args:
        told: What it is called in the table.
        try_it: Tries it.
        times: How often, by default.
        storages: Where it can be tried.
    """

    told: str
    try_it: Callable[[Bench, int], Found]
    times: int
    storages: tuple[str, ...] = STORAGES


FAULTS = {
    "worker": Fault("`kill -9` of a worker", kill_a_worker, 50),
    "parent": Fault("`kill -9` of the main process", kill_the_parent, 50),
    "all": Fault("`kill -9` of the main process and all workers", kill_all, 50),
    "sigterm": Fault("SIGTERM to the main process", terminate, 10),
    "memory": Fault("out of GPU memory (simulated), 3 at a time", run_out_of_memory, 3),
    "hang": Fault("an evaluation that hangs, `--trial-timeout`", hang, 6),
    "nan": Fault("a loss that is not a number", nan, 6),
    "image": Fault("a corrupt image: refused, then `--skip-corrupt`", corrupt_image, 3),
    "disk": Fault("a full disk", full_disk, 10, ("journal",)),
    "line": Fault("a torn last line of the journal", torn_line, 10, ("journal",)),
    "command": Fault("`kill -9` of one of three commands of a study", kill_a_command, 50, ("postgresql",)),
    "server": Fault("`kill -9` of the database server", kill_the_server, 50, ("postgresql",)),
}
"""Every fault by its name on the command line."""


def write_report(rows: pd.DataFrame) -> None:
    """Write the page of what was found so far."""
    head = [
        "# Faults",
        "",
        "Made by `python tests/benchmarks/faults.py`; the same as [a table](faults.csv). The command line runs a study "
        f"of {TRIALS} trials with an evaluation of 0.2 s, two at a time, three where workers are killed or memory "
        "runs out; something happens, and the same command is given again until it ends. Kills come at seeded random "
        "moments, half of them drawn from the whole run, from the start of the command to its end, half from its "
        "search. Images are those of a folder for the built-in training.",
        "",
        "`lost`: trials that the storage held as finished and that are gone or others in the end, and positions "
        "without a trial. `doubled`: trials more than were asked for, or the same placement under the same seed twice. "
        "`retried`: evaluations begun again. `differing`: trials that are not those of a study that nothing happened "
        "to, in placement, state, reason, score or cost; where evaluations hang or return no number, trials that did "
        "not fail with that reason, or failed without it. `left`: processes still there "
        f"{ENDING:g} s after they ought to have ended.",
        "",
    ]
    for where in sorted(set(rows["where"])):
        names = ", ".join(rows.loc[rows["where"] == where, "fault"])
        head.append(f"On {where}: {names}.")
        head.append("")
    columns = ["storage", "tried", "studies", "lost", "doubled", "retried", "differing", "left"]
    head += [f"| fault | {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 1)]
    for row in rows.to_dict("records"):
        head.append(f"| {FAULTS[row['fault']].told} | {' | '.join(str(row[name]) for name in columns)} |")
    REPORT.write_text("\n".join(head) + "\n", encoding="utf-8")


def main() -> None:
    """Try the faults that are named, all if none is, and write the report with what is known of the others."""
    parser = argparse.ArgumentParser()
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--storage", choices=STORAGES, default=STORAGES[0], help="where the trials are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times", type=int, help="how often to try each")
    given = parser.parse_args()
    where = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"{', '.join(f'{name} {version(name)}' for name in ('torch', 'optuna', 'filelock'))}, seed {given.seed}"
    )
    names = given.faults or [name for name, fault in FAULTS.items() if given.storage in fault.storages]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made).resolve()
        folder.chmod(0o755)
        (folder / "server").mkdir()
        server = Postgres(folder / "server") if given.storage == "postgresql" else None
        bench = Bench(folder, server, TRIALS, random.Random())
        for name in names:
            began = time.monotonic()
            bench.random.seed(f"{name} {given.seed}")
            found = FAULTS[name].try_it(bench, given.times or FAULTS[name].times)
            row = {"fault": name, "storage": given.storage, **vars(found), "where": where}
            print(f"{time.monotonic() - began:.0f} s: {row}", flush=True)
            keep(row)
        if server is not None:
            server.stop()


def keep(row: dict[str, object]) -> None:
    """Put a row into the table, in the place of the one for the same fault and storage, and write the page again."""
    table = REPORT.with_suffix(".csv")
    known = pd.read_csv(table, keep_default_na=False) if table.exists() else pd.DataFrame(columns=list(row))
    same = (known.fault == row["fault"]) & (known.storage == row["storage"])
    rows = pd.concat([known[~same].astype(object), pd.DataFrame([row])])
    order = {fault: index for index, fault in enumerate(FAULTS)}
    rows = rows.sort_values("fault", key=lambda names: names.map(order), kind="stable")
    rows.to_csv(table, index=False)
    write_report(rows)


if __name__ == "__main__":
    main()
