"""Running a study: puts the rooms together, in the order in which data flow."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock, Timeout

from placesearch.config import StudyConfig
from placesearch.definition import STUDIES, Definition, mark_code, read_definition_of, settle, study_folder
from placesearch.errors import InputError, StudyError
from placesearch.evaluation.own import Evaluate, check_importable, evaluation_named, name_of
from placesearch.evaluation.workers import Workers
from placesearch.front import front
from placesearch.interrupts import interrupts_held
from placesearch.measured import conditions_of, measure_members, with_latencies
from placesearch.models.architecture import Architecture
from placesearch.plan import prepare
from placesearch.records import Event, Told, TrialRecord
from placesearch.reporting.page import write_page
from placesearch.reporting.parquet import write_parquet
from placesearch.reporting.tables import accuracies, effects_frame, front_frame, trials_frame, verdict_frame
from placesearch.reporting.writing import Subject, caution, found_architecture, pick, set_aside, write_report
from placesearch.search.findings import Findings
from placesearch.search.trials import Trials
from placesearch.searching import begin, open_trials, search, share, stored_definition, study_began, working_on
from placesearch.staffing import Pool, Watch, assignment_of, jobs_for, ray_workers, staffed
from placesearch.storage_url import StorageUrl
from placesearch.training.datasets import load_data
from placesearch.training.loop import pick_device
from placesearch.verdict.trainings import TrainingFile
from placesearch.verdict.verdicts import Confirmed, judge

REPORTS = Path("reports")


@dataclass(frozen=True, slots=True)
class Study:
    """A study on disk and what was found in it so far.

    Args:
        subject: What was run.
        records: Its trials that ended by themselves, in order of position.
        findings: What they say, with intervals; None if they are too few.
        confirmed: What trainings on fresh seeds say; None if there were none.
        ended: Why the search stopped; empty for a study that was only loaded.
        seconds: Wall time of this run's search.
        training_share: Share of this run's search, times its workers, that went into training steps.
    """

    subject: Subject
    records: tuple[TrialRecord, ...]
    findings: Findings | None = None
    confirmed: Confirmed | None = None
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
        """The pick, as in best.yaml, which follows the verdict where there is one; None if no trial succeeded."""
        best, _ = pick(self.subject.objectives, self.records, self.findings, self.confirmed)
        return None if best is None else found_architecture(self.subject, best)

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

    def verdict_frame(self) -> pd.DataFrame:
        """Return the columns of verdict.csv, one row a comparison; no rows before `confirm`."""
        members = {record.placement for record in self.front}
        return verdict_frame(self.confirmed, self.records, self.findings, members)

    def set_aside(self) -> str:
        """Move the report folder away if it holds another study's report; say where to, or nothing.

        Raises:
            OSError: If it cannot be moved.
        """
        return _set_aside(self.name, self.records, self.confirmed)

    def write_report(self, *, parquet: bool = False) -> None:
        """Write the report folder.

        Args:
            parquet: Whether to write each table as Parquet, too.

        Raises:
            InputError: If it cannot be written; the trials are safe. Or if Parquet is asked for and pyarrow missing.
        """
        try:
            self.set_aside()
            write_report(self.folder, self.subject, self.records, self.findings, self.confirmed)
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
    return open_study(name)()


def open_study(name: str) -> Callable[[], Study]:
    """Open a study from `studies/NAME`; return a function that gives it as it stands whenever it is called.

    Raises:
        StudyError: If there is no such study, or it is damaged.
    """
    known = study_names()
    if name not in known:
        raise StudyError(f"no study '{name}' in {STUDIES}/; there are: {', '.join(known) or 'none'}")
    definition = read_definition_of(name)
    trials = open_trials(definition.config, nobody, make=False)
    return lambda: _study(definition, trials)


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
            one trial after the other, unless `config.jobs` or `config.trial_timeout` asks for workers, which import it
            by its name.
        watch: Is told what happens, as it happens.

    Returns:
        The study as it stands at the end.

    Raises:
        InputError: If the configuration cannot be used, or the study of this name is another, damaged or busy.
    """
    watch = watch or nobody
    device = device_named(config.device)
    if config.address is not None and config.engine != "ray":
        raise InputError("--address is that of a Ray cluster; it needs --engine ray")
    if evaluate is not None:
        config = config.model_copy(update={"evaluate": name_of(evaluate)})
    if callable(evaluate):
        here: Evaluate | None = evaluate
        jobs = 1 if config.jobs == "auto" else jobs_for(config, device)
        if jobs > 1 or config.trial_timeout is not None:
            check_importable(evaluate)
    else:
        here = evaluation_named(config.evaluate) if config.evaluate else None
        jobs = jobs_for(config, device)
    if config.engine == "ray":
        if callable(evaluate):
            raise InputError("--engine ray needs an evaluation by its name, package.module:function")
        with ray_workers(config, device, watch) as actors:
            return _run(config, here, device, actors, watch)
    with Workers(jobs, None, watch, config.trial_timeout) as workers:
        ahead = jobs > 1 or config.trial_timeout is not None
        if ahead and "latency_ms" not in config.objectives and config.max_latency is None:
            workers.hire(jobs)  # they import torch while this process plans, which must measure nothing
        return _run(config, here, device, workers, watch)


def _run(config: StudyConfig, here: Evaluate | None, device: torch.device, workers: Pool, watch: Watch) -> Study:
    """Plan and run a study.

    Args:
        config: What to search.
        here: The user's own evaluation.
        device: Where to train.
        workers: Who evaluates, unless it is one without a time limit; then this process does.
        watch: Is told what happens.
    """
    plan = prepare(config, device)
    if config.storage is not None and (stored := stored_definition(plan.definition.name, config.storage)) is not None:
        plan = prepare(config, device, stored)
    config = plan.definition.config
    data = None
    if here is None:
        data = load_data(config.data, plan.definition.input_size, plan.definition.skipped)
        plan = plan.with_data(data)
    definition = plan.definition
    jobs = workers.size = min(workers.size, config.trials or workers.size)
    with owned(definition.name):
        notes = settle(definition)
        trials = open_trials(config, watch)
        share(trials, definition)
        begin(trials, plan)
        before, began = tuple(trials.records()), time.monotonic()
        finished = {record.trial for record in before}
        definition, changed = mark_code(definition, len(before))
        notes += changed
        aside = _set_aside(definition.name, before, _confirmed(definition.name))
        notes += [aside] if aside else []
        watch(study_began(plan, before, jobs, (*plan.lines(device, jobs), *notes)))
        with nothing_lost(definition.name, "trial", lambda: _study(definition, trials)):
            folder = study_folder(definition.name)
            assignment = assignment_of(definition, device, folder)
            if assignment.branches and not any(folder.glob("branch-*.safetensors")):
                watch(Told("the first trials train the plain network up to the branch point, from where all go on"))
            with (
                working_on(trials, config),
                staffed(assignment, definition, data, here, workers, watch, folder) as evaluators,
            ):
                del data
                ended = search(plan, trials, evaluators, watch, began)
            seconds, jobs = time.monotonic() - began, workers.size
            measure_members(definition, _study(definition, trials).front, device, lambda line: watch(Told(line)))
        study = _study(definition, trials)
        training = sum(record.training_seconds or 0.0 for record in study.records if record.trial not in finished)
        study = replace(study, ended=ended, seconds=seconds, training_share=training / (seconds * jobs))
        study.write_report()
    return study


def adopt(name: str, storage: StorageUrl) -> None:
    """Make a study that other machines work on known here, so that its reports can be written here.

    Raises:
        StudyError: If the storage holds no such study, or there is another study of this name here.
    """
    definition = stored_definition(name, storage)
    if definition is None:
        raise StudyError(f"no study '{name}' in {storage.shown}")
    with owned(name):
        settle(definition)


def _study(definition: Definition, trials: Trials) -> Study:
    records = with_latencies(definition.name, trials.records())
    how = conditions_of(definition.name)
    subject = definition.subject()
    if how:
        subject = replace(subject, facts=(*subject.facts, ("latency", how)))
    return Study(subject, tuple(records), subject.find(records), _confirmed(definition.name))


def _confirmed(name: str) -> Confirmed | None:
    return judge(TrainingFile(study_folder(name) / "confirm.jsonl").read())


def _set_aside(name: str, records: Sequence[TrialRecord], confirmed: Confirmed | None) -> str:
    moved = set_aside(REPORTS / name, records, confirmed)
    return f"note: {REPORTS / name} held the report of other trials; it is kept as {moved}" if moved else ""


def nobody(_: Event) -> None:
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


@contextmanager
def owned(name: str) -> Iterator[None]:
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
def nothing_lost(name: str, what: str, study: Callable[[], Study]) -> Iterator[None]:
    """Write the reports if the block is interrupted; if the disk takes no more, say so in one line.

    Args:
        name: The study's name.
        what: What was stored one by one in the block, `trial` or `training`.
        study: Returns the study as it is then.

    Raises:
        KeyboardInterrupt: On Ctrl-C, once the reports are written.
        StudyError: If something cannot be written.
    """
    try:
        yield
    except KeyboardInterrupt:
        with interrupts_held():
            found = study()
            found.write_report()
        raise KeyboardInterrupt(f"reports are in {found.folder}/") from None
    except BrokenPipeError:
        raise  # nobody reads the output any more
    except OSError as error:
        raise StudyError(
            f"cannot write to {study_folder(name)}: {error.strerror}; every finished {what} is kept, the same "
            "command goes on"
        ) from None
