"""The search itself: trials are asked for, evaluated and stored until a limit is met, here and in other processes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from placesearch.config import StudyConfig
from placesearch.definition import Definition, refuse_difference, shared_definition, study_folder
from placesearch.errors import StudyError
from placesearch.evaluation.workers import Evaluators
from placesearch.plan import Plan
from placesearch.records import StudyBegan, Told, TrialBegan, TrialEnded, TrialRecord, seconds_an_epoch
from placesearch.reporting.writing import found_architecture
from placesearch.search.trials import Trials, read_shared
from placesearch.staffing import Watch
from placesearch.storage_url import StorageUrl

LOOK_SECONDS, BUSY_LOOK_SECONDS = 1.0, 10.0
"""How often a process looks at what others do in a shared study: one that waits for them, and one that has its own."""


def open_trials(config: StudyConfig, watch: Watch, *, make: bool = True) -> Trials:
    """Open the trials of a study, in its journal or in its shared storage."""
    where = config.storage or study_folder(str(config.name)) / "journal.log"
    return Trials(where, str(config.name), config.objectives, lambda line: watch(Told(line)), make=make)


def stored_definition(name: str, storage: StorageUrl) -> Definition | None:
    """Read what a shared storage holds of a study; None if there is no such study."""
    text = read_shared(storage, name)
    return None if text is None else shared_definition(text, storage)


def share(trials: Trials, definition: Definition) -> None:
    """Keep a study's definition beside its trials if they are shared; refuse trials of another study.

    Raises:
        StudyError: If the trials belong to a study with other settings.
    """
    storage = definition.config.storage
    if storage is None:
        return
    text = trials.definition()
    if text is None:
        trials.define(definition.shared_text())
    else:
        refuse_difference(shared_definition(text, storage), definition)


def begin(trials: Trials, plan: Plan) -> None:
    """Prepare the trials of a study for being asked what to do."""
    definition = plan.definition
    config = definition.config
    costs = [name for name in config.objectives if name != "accuracy"]
    trials.begin(
        plan.space,
        plan.references,
        config.sampler,
        config.seed,
        lambda site, setting: [plan.prices.added(name, site, setting) for name in costs],
        config.long_epochs or None,
        plan.limits,
        definition.protocol.epochs if config.stop_early else None,
        config.lag,
    )


def study_began(plan: Plan, before: tuple[TrialRecord, ...], jobs: int, lines: tuple[str, ...]) -> StudyBegan:
    """Return what those who watch are told at the beginning of a search."""
    definition = plan.definition
    config = definition.config
    return StudyBegan(
        name=definition.name,
        finished=before,
        trials=config.trials,
        seconds_left=config.timeout,
        jobs=jobs,
        objectives=config.objectives,
        lines=lines,
        epochs=definition.protocol.epochs,
        long_epochs=config.long_epochs or None,
        references=len(plan.references),
        settles=config.until is not None,
        settings=definition.subject().settings,
        lag=config.lag,
    )


@contextmanager
def working_on(trials: Trials, config: StudyConfig) -> Iterator[None]:
    """Let other processes work on a shared study until the end of the block; then leave to them what was not ended."""
    goal = {"trials": config.trials, "until": config.until, "open": True}
    if trials.is_shared:
        trials.aim(goal)
    try:
        yield
    finally:
        trials.leave()
        if trials.is_shared:
            with suppress(StudyError):  # the storage is away; others will end as it does not answer
                trials.aim(goal | {"open": False})


def search(
    plan: Plan,
    trials: Trials,
    evaluators: Evaluators,
    watch: Watch,
    began: float,
    called_off: Callable[[], str] = lambda: "",
) -> str:
    """Run trials until a limit is met; return which one.

    Args:
        plan: What to do.
        trials: The trials of the study; others may work on them, too, if they are shared.
        evaluators: Who evaluates.
        watch: Is told what happens, also elsewhere.
        began: When this process began, by `time.monotonic`.
        called_off: Returns why no other trial is to be begun; nothing if there is no reason.
    """
    config, epochs = plan.definition.config, plan.definition.protocol.epochs
    subject = plan.definition.subject()
    records = trials.records()
    known = {record.trial for record in records}
    running: set[int] = set()
    while True:
        ended = called_off()
        while len(running) < evaluators.size and not ended:
            ended = _limit(config, records, began, lambda: trials.next_epochs() or epochs)
            if not ended and config.until and trials.is_settled():
                ended = "the front has settled"
            task = None if ended else trials.ask(config.trials)
            if task is None:
                break
            running.add(task.trial)
            evaluators.submit(task)
            watch(TrialBegan(task, task.epochs or epochs))
        if running:
            look = LOOK_SECONDS if len(running) < evaluators.size else BUSY_LOOK_SECONDS
            results = evaluators.results(look if trials.is_shared else None)
        else:
            if ended or trials.is_over(config.trials):
                return ended or _nothing_left(config, trials)
            results = []
            time.sleep(LOOK_SECONDS)  # until a trial ends elsewhere, or whoever has it is found to be gone
        fresh = [replace(evaluated, **plan.prices.of(evaluated.placement)) for evaluated in results]
        for record in fresh:
            trials.complete(record, found_architecture(subject, record).to_yaml())
            running.discard(record.trial)
        if trials.is_shared:
            fresh = [record for record in trials.records() if record.trial not in known]
        for record in fresh:
            known.add(record.trial)
            records.append(record)
            watch(TrialEnded(record))


def _nothing_left(config: StudyConfig, trials: Trials) -> str:
    if config.trials is not None and trials.count() >= config.trials:
        return f"the study has its {config.trials} trials"
    return "every placement of the search space was tried"


def _limit(config: StudyConfig, records: list[TrialRecord], began: float, epochs_of_next: Callable[[], int]) -> str:
    """Return which limit forbids another trial, if one does; one that would not end in time is not begun."""
    if config.trials is not None and len(records) >= config.trials:
        return f"the study has its {config.trials} trials"
    if config.timeout is not None:
        epochs = epochs_of_next()
        usual = epochs * seconds_an_epoch(records, epochs)
        elapsed = time.monotonic() - began
        if elapsed >= config.timeout or elapsed + usual > config.timeout:
            return f"stopped before {config.timeout:g} s were over; the same command goes on"
    return ""
