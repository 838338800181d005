"""Running a study: puts the rooms together, in the order in which data flow."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from filelock import FileLock, Timeout

from placesearch.config import StudyConfig
from placesearch.definition import STUDIES, Definition, read_definition_of, settle, study_folder
from placesearch.errors import InputError, StudyError
from placesearch.evaluation.fitting import fit
from placesearch.evaluation.own import Evaluate, evaluation_named, name_of
from placesearch.evaluation.workers import Assignment, Evaluators, ThisProcess, Workers
from placesearch.front import front, knee
from placesearch.measured import conditions_of, measure_members, with_latencies
from placesearch.models.architecture import Architecture
from placesearch.plan import Plan, prepare
from placesearch.records import Event, StudyBegan, Told, TrialBegan, TrialEnded, TrialRecord
from placesearch.reporting.page import write_page
from placesearch.reporting.parquet import write_parquet
from placesearch.reporting.tables import accuracies, effects_frame, front_frame, trials_frame
from placesearch.reporting.writing import Subject, caution, found_architecture, write_report
from placesearch.search.findings import Findings
from placesearch.search.samplers import LAG, check_sampler
from placesearch.search.trials import Trials
from placesearch.training.datasets import SPLITS, Data, load_data, share_data
from placesearch.training.loop import pick_device

REPORTS = Path("reports")

MEMORY_OF_A_WORKER = 2 * 2**30
"""Bytes that a worker process may need; fewer workers are started where there is less."""

PACE_SECONDS = 3.0
"""How long each number of workers trains the plain network, to find out how many fill a GPU."""

Watch = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Study:
    """A study on disk and what was found in it so far.

    Args:
        subject: What was run.
        records: Its trials that ended by themselves, in order of position.
        findings: What they say, with intervals; None if they are too few.
        ended: Why the search stopped; empty for a study that was only loaded.
        seconds: Wall time of this run's search.
        training_share: Share of this run's search, times its workers, that went into training steps.
    """

    subject: Subject
    records: tuple[TrialRecord, ...]
    findings: Findings | None = None
    ended: str = ""
    seconds: float = 0.0
    training_share: float = 0.0

    @property
    def name(self) -> str:
        """The study's name."""
        return self.subject.name

    @property
    def folder(self) -> Path:
        """Where its reports are, from the current directory."""
        return REPORTS / self.name

    @property
    def front(self) -> list[TrialRecord]:
        """Members of the recommended front, ordered by cost."""
        return front(self.records, self.subject.objectives, accuracies(self.findings))

    @property
    def best(self) -> Architecture | None:
        """The pick, as in best.yaml; None if no trial succeeded."""
        members = self.front
        if not members:
            return None
        return found_architecture(self.subject, knee(members, self.subject.objectives, accuracies(self.findings)))

    @property
    def caution(self) -> str:
        """What the accuracies cannot tell."""
        return caution(self.subject, self.records, self.findings)

    def trials_frame(self) -> pd.DataFrame:
        """Return the columns of trials.csv, one row a trial."""
        return trials_frame(self.records)

    def front_frame(self) -> pd.DataFrame:
        """Return the columns of front.csv, one row a member of the front."""
        return front_frame(self.records, self.subject.objectives, self.findings)

    def sites_frame(self) -> pd.DataFrame:
        """Return the columns of sites.csv, one row a setting at a site, then the strongest pairs."""
        return effects_frame(self.findings, self.subject.cost)

    def write_report(self, *, parquet: bool = False) -> None:
        """Write the report folder.

        Args:
            parquet: Whether to write each table as Parquet, too.

        Raises:
            InputError: If it cannot be written; the trials are safe. Or if Parquet is asked for and pyarrow missing.
        """
        try:
            write_report(self.folder, self.subject, self.records, self.findings)
            write_page(self.folder, self.subject, self.records, self.findings, self.best)
            if parquet:
                write_parquet(self.folder)
        except OSError as error:
            raise InputError(
                f"cannot write {self.folder}: {error.strerror}; "
                f"no trial is lost, 'placesearch report {self.name}' writes the reports again"
            ) from None


def load_study(name: str) -> Study:
    """Load a study from `studies/NAME`.

    Raises:
        StudyError: If there is no such study, or it is damaged.
    """
    known = study_names()
    if name not in known:
        raise StudyError(f"no study '{name}' in {STUDIES}/; there are: {', '.join(known) or 'none'}")
    definition = read_definition_of(name)
    return _study(definition, _trials(definition.config))


def study_names() -> list[str]:
    """Return the names of the studies below the current directory."""
    return sorted(path.parent.name for path in STUDIES.glob("*/study.yaml"))


def run(config: StudyConfig, *, evaluate: Evaluate | str | None = None, watch: Watch | None = None) -> Study:
    """Run a study, or go on with it where it stopped, and write its reports.

    Trials are stored one by one under `studies/NAME`; reports go to `reports/NAME`, both below the current directory.
    On Ctrl-C the reports are written and KeyboardInterrupt is raised again.

    Args:
        config: What to search.
        evaluate: Your own evaluation in place of the built-in training: a function of a `Candidate`, or its name,
            `package.module:function`, which `config.evaluate` may give as well. A function is called in this process,
            one trial after the other, unless `config.jobs` asks for workers, which import it by its name.
        watch: Is told what happens, as it happens.

    Returns:
        The study as it stands at the end.

    Raises:
        InputError: If the configuration cannot be used, or the study of this name is another, damaged or busy.
    """
    watch = watch or _nobody
    device = device_named(config.device)
    check_sampler(config.sampler)
    if evaluate is not None:
        config = config.model_copy(update={"evaluate": name_of(evaluate)})
    if callable(evaluate):
        here: Evaluate | None = evaluate
        jobs = 1 if config.jobs == "auto" else _jobs(config, device)
    else:
        here = evaluation_named(config.evaluate) if config.evaluate else None
        jobs = _jobs(config, device)
    with Workers(jobs, None, watch) as workers:
        if jobs > 1 and "latency_ms" not in config.objectives and config.max_latency is None:
            workers.hire(min(jobs, LAG + 1))  # they import torch while this process plans, which must measure nothing
        return _run(config, here, device, workers, watch)


def _run(config: StudyConfig, here: Evaluate | None, device: torch.device, workers: Workers, watch: Watch) -> Study:
    """Plan and run a study.

    Args:
        config: What to search.
        here: The user's own evaluation.
        device: Where to train.
        workers: Who evaluates, unless it is one; then this process does.
        watch: Is told what happens.
    """
    plan = prepare(config, device)
    config = plan.definition.config
    data = None
    if here is None:
        data = load_data(config.data, plan.definition.input_size[1])
        plan = plan.with_splits({name: len(data.splits[name].labels) for name in SPLITS})
    definition = plan.definition
    jobs = workers.size = min(workers.size, config.trials or workers.size)
    with _owned(definition.name):
        notes = settle(definition)
        trials = _trials(config)
        costs = [name for name in config.objectives if name != "accuracy"]
        trials.begin(
            plan.space,
            plan.references,
            config.sampler,
            config.seed,
            lambda site, setting: [plan.prices.added(name, site, setting) for name in costs],
            config.long_epochs or None,
            plan.limits,
        )
        before, began = tuple(trials.records()), time.monotonic()
        finished = {record.trial for record in before}
        watch(
            StudyBegan(
                name=definition.name,
                finished=before,
                trials=config.trials,
                seconds_left=config.timeout,
                jobs=jobs,
                objectives=config.objectives,
                lines=(*plan.lines(device, jobs), *notes),
            )
        )
        try:
            with _evaluators(plan, data, here, device, workers, watch) as evaluators:
                del data
                ended = _search(plan, trials, evaluators, watch, began)
            seconds, jobs = time.monotonic() - began, workers.size
            measure_members(definition, _study(definition, trials).front, device, lambda line: watch(Told(line)))
        except KeyboardInterrupt:
            with _interrupts_held():
                study = _study(definition, trials)
                study.write_report()
            raise KeyboardInterrupt(f"reports are in {study.folder}/") from None
        except BrokenPipeError:
            raise  # nobody reads the output any more
        except OSError as error:
            raise StudyError(
                f"cannot write to {study_folder(definition.name)}: {error.strerror}; every finished trial is kept, "
                "the same command goes on"
            ) from None
        study = _study(definition, trials)
        training = sum(record.training_seconds or 0.0 for record in study.records if record.trial not in finished)
        study = replace(study, ended=ended, seconds=seconds, training_share=training / (seconds * jobs))
        study.write_report()
    return study


@contextmanager
def _evaluators(
    plan: Plan, data: Data | None, evaluate: Evaluate | None, device: torch.device, workers: Workers, watch: Watch
) -> Iterator[Evaluators]:
    """Give what evaluates; if the study starts at the branch point, the first to need it trains the plain network."""
    definition = plan.definition
    folder = study_folder(definition.name)
    branches = str(folder) if definition.protocol.start == "branch" else None
    assignment = Assignment(
        plain=definition.plain,
        protocol=definition.protocol,
        data=definition.config.data,
        device=str(device),
        weights=definition.config.weights,
        branches=branches,
        evaluate=definition.config.evaluate,
    )
    if branches and not any(folder.glob("branch-*.safetensors")):
        watch(Told("the first trials train the plain network up to the branch point, from where all go on"))
    fits = _is_fitted(definition.config, device)
    if workers.size == 1 and not fits:
        yield ThisProcess(assignment.evaluator(data, evaluate), watch)
        return
    shared = folder / "data.safetensors"
    try:
        if data is not None and share_data(data, shared):
            assignment = replace(assignment, shared=str(shared))
        del data
        if fits:
            _fit(workers, assignment, definition.config, watch)
        else:
            workers.assign(assignment)
        with workers:
            yield workers
    finally:
        shared.unlink(missing_ok=True)


def _is_fitted(config: StudyConfig, device: torch.device) -> bool:
    """Tell whether the number of workers is found by measuring."""
    return config.jobs == "auto" and device.type == "cuda" and config.evaluate is None


def _fit(workers: Workers, assignment: Assignment, config: StudyConfig, watch: Watch) -> None:
    """Give workers their assignment, and find out how many of them fill the GPU. Not run on a GPU yet."""
    device = torch.device(assignment.device)
    watch(Told("measuring how many candidates to train at a time ..."))
    most = min(LAG + 1, config.trials or LAG + 1)

    def pace(count: int) -> float:
        if count == 1:
            workers.assign(assignment)
        return workers.pace(count, PACE_SECONDS)

    size, paces = fit(pace, lambda: _free_memory(device), most)
    workers.keep(size)
    measured = ", ".join(f"{count}: {rate:.1f}" for count, rate in enumerate(paces, 1))
    watch(Told(f"{size} at a time; steps of the plain network a second, by the number of workers: {measured}"))


def _free_memory(device: torch.device) -> float:
    """Return the bytes of memory that are free on a GPU."""
    return float(torch.cuda.mem_get_info(device)[0])


def _study(definition: Definition, trials: Trials) -> Study:
    records = with_latencies(definition.name, trials.records())
    how = conditions_of(definition.name)
    subject = definition.subject()
    if how:
        subject = replace(subject, facts=(*subject.facts, ("latency", how)))
    return Study(subject, tuple(records), subject.find(records))


def _search(plan: Plan, trials: Trials, evaluators: Evaluators, watch: Watch, began: float) -> str:
    """Run trials until a limit is met; return which one."""
    config, epochs = plan.definition.config, plan.definition.protocol.epochs
    records = trials.records()
    running: set[int] = set()
    while True:
        ended = ""
        while len(running) < evaluators.size and not (ended or trials.must_wait()):
            ended = _limit(config, records, len(running), began, trials.next_epochs() or epochs)
            if not ended and config.until and trials.is_settled():
                ended = "the front has settled"
            if ended:
                break
            with _interrupts_held():
                task = trials.ask()
            if task is None:
                ended = "every placement of the search space was tried"
                break
            running.add(task.trial)
            evaluators.submit(task)
            watch(TrialBegan(task, task.epochs or epochs))
        if not running:
            return ended
        for evaluated in evaluators.results():
            record = replace(evaluated, **plan.prices.of(evaluated.placement))
            with _interrupts_held():
                trials.complete(record)
            running.discard(record.trial)
            records.append(record)
            watch(TrialEnded(record))


def _limit(config: StudyConfig, records: list[TrialRecord], running: int, began: float, epochs: int) -> str:
    """Return which limit forbids another trial, if one does; one that would not end in time is not begun."""
    if config.trials is not None and len(records) + running >= config.trials:
        return f"the study has its {config.trials} trials"
    if config.timeout is not None:
        an_epoch = [record.seconds / (record.epochs or epochs) for record in records if record.seconds is not None]
        usual = epochs * median(an_epoch) if an_epoch else 0.0
        elapsed = time.monotonic() - began
        if elapsed >= config.timeout or elapsed + usual > config.timeout:
            return f"stopped before {config.timeout:g} s were over; the same command goes on"
    return ""


def _jobs(config: StudyConfig, device: torch.device) -> int:
    """Return how many trials run at a time: on processors one a core, as far as memory and the sampler allow.

    On a GPU with `auto` it is one until `_fit` has measured.
    """
    if config.jobs == "auto":
        if device.type != "cpu":
            return 1
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        jobs = min(cores, LAG + 1, memory // MEMORY_OF_A_WORKER)
    else:
        jobs = config.jobs
    return max(1, min(jobs, config.trials or jobs))


def _nobody(_: Event) -> None:
    """Watch nothing."""


def device_named(name: str) -> torch.device:
    """Return a device by its name, or what `auto` stands for.

    Raises:
        InputError: If there is no such device here.
    """
    try:
        return pick_device(name)
    except ValueError as error:
        raise InputError(str(error)) from None


def _trials(config: StudyConfig) -> Trials:
    return Trials(study_folder(str(config.name)) / "journal.log", str(config.name), config.objectives)


@contextmanager
def _owned(name: str) -> Iterator[None]:
    """Make the study's folder and hold it; a second run of the same study is refused."""
    folder = study_folder(name)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        REPORTS.joinpath(name).mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "run.lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise StudyError(
            f"study '{name}' is being run by another process; wait for it or choose another --name"
        ) from None
    except OSError as error:
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise InputError(f"cannot write to {error.filename or folder}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block, so that no record is written by half."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        raise KeyboardInterrupt
