"""The trials of a study: what to evaluate next, and the record of what was evaluated.

A trial's position is its Optuna number. A trial that a killed process left behind is taken up again under its own
number with its own placement, so a position is never lost and never doubled. What a position gets follows from the
study and the trials before it, whoever asks; so any number of processes may ask, each for positions of its own.
"""

import logging
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import fields
from datetime import datetime
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from placesearch.errors import StudyError
from placesearch.interrupts import interrupts_held
from placesearch.placement import Placement
from placesearch.records import DIRECTIONS, Milestone, Task, TrialRecord
from placesearch.search.claims import Claims, Owner
from placesearch.search.samplers import LAG, PLACEMENT, AdditiveSampler, make_sampler
from placesearch.search.space import Added, SearchSpace
from placesearch.search.stopping import Ended, milestone, milestone_epoch
from placesearch.search.storage import at_once, open_storage, patiently
from placesearch.search.suggesting import long_number
from placesearch.storage_url import StorageUrl

_MEASURED = tuple(
    field.name for field in fields(TrialRecord) if field.name not in ("trial", "state", "placement", "reference")
)
DEFINITION, GOAL = "placesearch:definition", "placesearch:goal"
"""Names of the study's attributes that tell other processes what it is, and until when they are to work on it."""

PIECE = 16_000
"""Characters of a piece of a definition; MySQL takes 65,535 bytes."""

PLACED_AFTER, PLACED_WITHIN = 0.03, 2.0
"""Seconds that a process takes for placing its position, about and at most; after that another one does it."""

_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def artifacts_beside(journal: Path) -> Path:
    """Return the folder of the files that are attached to the trials of a journal."""
    return journal.with_name("artifacts")


class Trials:
    """The stored trials of a study.

    Args:
        where: The journal file, of which this process is the only writer, or the address of a storage that is shared.
            Made if it does not exist.
        name: The study's name.
        objectives: Names of the objectives, in the order of the values of a trial.
        tell: Is told when a shared storage does not answer.
        make: Whether to make the study if a shared storage does not hold it.

    Raises:
        InputError: If a shared storage cannot be reached.
        StudyError: If the journal is damaged or holds another study, or a shared storage does not hold it.
    """

    def __init__(
        self,
        where: Path | StorageUrl,
        name: str,
        objectives: tuple[str, ...],
        tell: Callable[[str], None] = lambda _: None,
        *,
        make: bool = True,
    ) -> None:
        logging.getLogger("optuna").setLevel(logging.WARNING)
        logging.getLogger("optuna.storages").setLevel(logging.ERROR)  # a lost connection is told by `patiently`
        self._objectives, self._tell = objectives, tell
        self._artifacts = artifacts_beside(where) if isinstance(where, Path) else None
        self._storage = open_storage(where)
        self._claims = None if isinstance(where, Path) else Claims(self._storage, Owner.this_process())
        self._records: dict[int, TrialRecord] = {}

        def attempt() -> optuna.Study:
            if not _holds(self._storage, name):
                if not make and not isinstance(where, Path):
                    raise StudyError(f"no study '{name}' in {where.shown}")
                _create(self._storage, name, objectives)
            return optuna.load_study(storage=self._storage, study_name=name)

        try:
            self._study = patiently(attempt, tell)
        except StudyError:
            raise
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise StudyError(
                f"{where} is damaged: Optuna cannot read it ({type(error).__name__}: {error})"
                if isinstance(where, Path)
                else f"{where.shown} holds something that Optuna cannot read ({type(error).__name__})"
            ) from None

    @property
    def is_shared(self) -> bool:
        """Whether other processes may work on the study."""
        return self._claims is not None

    def definition(self) -> str | None:
        """Return the definition that is kept beside the trials; None if there is none."""
        return _definition(patiently(lambda: self._storage.get_study_system_attrs(self._study._study_id), self._tell))

    def define(self, text: str) -> None:
        """Keep the definition of the study beside its trials, for processes on other machines."""
        parts = [text[begin : begin + PIECE] for begin in range(0, len(text), PIECE)]
        attributes = {f"{DEFINITION}:{number}": part for number, part in enumerate(parts)} | {DEFINITION: len(parts)}

        def attempt() -> None:
            with at_once(self._storage):
                for name, value in attributes.items():
                    self._storage.set_study_system_attr(self._study._study_id, name, value)

        patiently(attempt, self._tell)

    def goal(self) -> Mapping[str, Any]:
        """Return until when other processes are to work on the study, as `aim` has set it."""
        stored = patiently(lambda: self._storage.get_study_user_attrs(self._study._study_id), self._tell)
        return dict(stored.get(GOAL, {}))

    def aim(self, goal: Mapping[str, Any]) -> None:
        """Tell other processes until when they are to work on the study.

        It stands apart from the definition, because it is read again and again.
        """
        patiently(lambda: self._storage.set_study_user_attr(self._study._study_id, GOAL, dict(goal)), self._tell)

    def records(self) -> list[TrialRecord]:
        """Return the trials that ended by themselves, in order of position."""
        ended = [trial for trial in patiently(self._all, self._tell) if trial.state in _FINISHED]
        for trial in ended:
            if trial.number not in self._records:
                self._records[trial.number] = _record(trial)
        return [self._records[trial.number] for trial in ended]

    def begin(
        self,
        space: SearchSpace,
        references: Mapping[str, Placement],
        sampler: str,
        seed: int,
        added: Added,
        long_epochs: int | None = None,
        limits: Mapping[str, float] | None = None,
        stopped_epochs: int | None = None,
        lag: int = LAG,
    ) -> None:
        """Prepare for `ask`.

        Args:
            space: What to choose from.
            references: Placements to evaluate before any suggestion, by name.
            sampler: Name of the sampler that suggests.
            seed: Its seed.
            added: What a block adds at a site to each cost that is an objective.
            long_epochs: How long some trials are trained; None if all are equally long. The first long ones are the
                references once more.
            limits: The most that a candidate may cost, by the name of the cost; told to Optuna as constraints.
            stopped_epochs: How long the other trials are trained, if hopeless ones are stopped early; None if none are.
            lag: On how many of the last trials a suggestion does not depend.

        Raises:
            InputError: If there is no such sampler.
        """
        self._space, self._references, self._long_epochs, self._seed = space, references, long_epochs, seed
        self._claimed, self._running = set[int](), set[int]()
        self._limits, self._lag = dict(limits or {}), lag
        self._added, self._stopped_epochs = added, stopped_epochs
        self._costs: dict[str, tuple[float, ...]] = {}
        self._distributions = {site: CategoricalDistribution(texts) for site, texts in space.choices.items()}
        self._study.sampler = make_sampler(sampler, seed, space, added, tuple(references.values()), long_epochs, lag)
        if self._claims is not None:
            self._claims.keep_beating()

    def ask(self, most: int | None = None) -> Task | None:
        """Return the next trial to run; None if another one has to end first, or if nothing is left to begin.

        First come trials that were begun and lost, then the references, then suggestions of the sampler. A placement
        that had trials of this length before is repeated, under the study's seed plus the number of these. Of a study
        in a journal one process at a time may ask, of a shared one any number.

        Args:
            most: Positions from this one on are not begun.

        Raises:
            StudyError: If a shared storage does not answer for long.
        """
        if self._claims is not None:
            return patiently(lambda: self._ask(most), self._tell)
        with interrupts_held(), at_once(self._storage):
            return self._ask(most)

    def _ask(self, most: int | None) -> Task | None:
        trials = self._all()
        self._take_lost(trials[:most])
        if not self._claimed:
            self._take_next(trials, most)
        if not self._claimed:
            return None
        number, trials = min(self._claimed), self._all()
        if self._must_wait(number, trials):  # others were faster, and this is a later position than it seemed
            return None
        trials = self._all_placed(number, trials)
        trial = trials[number]
        if PLACEMENT not in trial.user_attrs and self._planned(number) is None and self._is_exhausted(trials[:number]):
            self._give_back(trial)
            return None
        try:
            with nullcontext() if self._claims is None else at_once(self._storage):
                placement, reference = self._place(trial)
        except UpdateFinishedTrialError:  # this process was taken for dead, and its trial has ended elsewhere
            self._claimed.discard(number)
            if self._claims is not None:
                self._claims.end(trial)
            return None
        self._claimed.discard(number)  # not before: an error may pass, and then the position is asked for again
        self._running.add(number)
        epochs, text = self._epochs_at(number), str(placement)
        repeated = sum(
            earlier.user_attrs[PLACEMENT] == text and self._epochs_at(earlier.number) == epochs
            for earlier in trials[:number]
        )
        seed = self._seed + repeated if repeated else None
        looked_at = self._milestone(number, text, trials, stops=reference is None and not repeated)
        return Task(number, placement, reference, epochs, seed, milestone=looked_at)

    def _all_placed(self, number: int, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Return the trials when all before a position are placed, on which depends what it gets.

        Each is left to the process that has begun it, or all that ask at a moment would place the same ones; but not
        for long.
        """
        first, since = None, 0.0
        while unplaced := [trial for trial in trials[:number] if PLACEMENT not in trial.user_attrs]:
            if unplaced[0].number != first:
                first, since = unplaced[0].number, time.monotonic()
            is_begun = self._claims is not None and unplaced[0].state == TrialState.RUNNING
            if is_begun and time.monotonic() < since + PLACED_WITHIN:
                time.sleep(PLACED_AFTER * len(unplaced))
            else:
                with suppress(UpdateFinishedTrialError):  # who has begun it was slow, or killed, or very fast just now
                    self._place(unplaced[0])
            trials = self._all()
        return trials

    def _take_lost(self, trials: list[FrozenTrial]) -> None:
        """Take over a trial that was begun by a process which is gone, if there is one."""
        if self._claims is not None:
            lost = self._claims.lost(trials)
        else:
            own = self._claimed | self._running
            lost = next((t for t in trials if t.state == TrialState.RUNNING and t.number not in own), None)
        if lost is not None:
            self._claimed.add(lost.number)

    def _take_next(self, trials: list[FrozenTrial], most: int | None) -> None:
        """Begin the next position, unless it has to wait or nothing is left."""
        while True:
            waiting = next((trial for trial in trials if trial.state == TrialState.WAITING), None)
            number = len(trials) if waiting is None else waiting.number
            if (most is not None and number >= most) or self._must_wait(number, trials):
                return
            if self._planned(number) is None and self._is_exhausted(trials[:number]):
                return
            if waiting is None:
                self._claim_new(most)
                return
            if self._storage.set_trial_state_values(waiting._trial_id, state=TrialState.RUNNING):
                self._claimed.add(number)
                if self._claims is not None:
                    with at_once(self._storage):
                        self._claims.begin(waiting._trial_id)
                return
            trials = self._all()  # somebody else was faster

    def _claim_new(self, most: int | None) -> None:
        """Add a position that is this process's own; of several that do so at a time, each gets another one."""
        signed = {} if self._claims is None else self._claims.signature()
        new = create_trial(state=TrialState.RUNNING, system_attrs=signed)
        new.datetime_start = datetime.now()  # as Optuna has it
        trial_id = self._storage.create_new_trial(self._study._study_id, new)
        trial = self._storage.get_trial(trial_id)
        self._claimed.add(trial.number)
        if self._claims is not None:
            self._claims.own(trial_id)
        if most is not None and trial.number >= most:  # others were faster; it waits for a run that asks for more
            self._give_back(trial)

    def _give_back(self, trial: FrozenTrial) -> None:
        """Leave a position to whoever wants it."""
        with suppress(UpdateFinishedTrialError):
            self._storage.set_trial_state_values(trial._trial_id, state=TrialState.WAITING)
        self._claimed.discard(trial.number)
        self._running.discard(trial.number)
        if self._claims is not None:
            self._claims.end(trial)

    def _must_wait(self, number: int, trials: list[FrozenTrial]) -> bool:
        """Tell whether a trial has to end first, on which what a position gets may depend."""
        return not all(trial.state.is_finished() for trial in trials[: max(0, number - self._lag)])

    def _planned(self, number: int) -> tuple[str, Placement] | None:
        """Return the reference that a position is to evaluate, and its name; None if the sampler suggests."""
        again = self._long_number(number)
        index = number if number < len(self._references) else again
        return list(self._references.items())[index] if index is not None and index < len(self._references) else None

    def _place(self, trial: FrozenTrial) -> tuple[Placement, str | None]:
        """Return what a position evaluates, and as which reference, and write it down if that was not done yet.

        Those before it have to be placed already. It is the same whoever does it, so it does no harm if two do.
        """
        if PLACEMENT in trial.user_attrs:
            return Placement.parse(trial.user_attrs[PLACEMENT]), trial.user_attrs.get("reference")
        reference = None
        if (planned := self._planned(trial.number)) is not None:
            reference, placement = planned
            self._storage.set_trial_user_attr(trial._trial_id, "reference", reference)
        else:
            chosen = self._study.sampler.sample_relative(self._study, trial, dict(self._distributions))
            placement = self._space.placement(chosen)
        self._storage.set_trial_user_attr(trial._trial_id, PLACEMENT, str(placement))
        return placement, reference

    def _write_parameters(self, trial: FrozenTrial, placement: Placement) -> None:
        """Write a placement as Optuna's parameters; one that the space does not hold has none.

        They are written with the result, because running trials are read again and again by all who share a study.
        """
        for site, text in (self._space.chosen(placement) or {}).items():
            if site not in trial.params:
                choices = self._distributions[site]
                self._storage.set_trial_param(trial._trial_id, site, choices.to_internal_repr(text), choices)

    def count(self) -> int:
        """Return how many trials have begun, by whatever process."""
        return sum(trial.state != TrialState.WAITING for trial in patiently(self._all, self._tell))

    def is_over(self, most: int | None = None) -> bool:
        """Tell whether all trials have ended and no other one may begin.

        Args:
            most: Positions from this one on are not begun.
        """
        trials = patiently(self._all, self._tell)[:most]
        begun = [trial for trial in trials if trial.state != TrialState.WAITING]
        if not all(trial.state.is_finished() for trial in begun):
            return False
        return (most is not None and len(begun) >= most) or self._is_exhausted(begun)

    def leave(self) -> None:
        """Leave to other processes what this one has begun and not ended; of a journal, to its next run."""
        if self._claims is None:
            return
        self._claims.stop()
        with suppress(Exception):  # the storage is away: others will notice that this process is gone
            trials = self._all()
            for number in self._claimed | self._running:
                self._give_back(trials[number])

    def _milestone(self, position: int, placement: str, trials: list[FrozenTrial], *, stops: bool) -> Milestone | None:
        """Return where a trial is looked at on its way; whether it is stopped there depends on no later trial's result.

        As a suggestion may, it depends on the trials before the last `lag`. References and repeats are not stopped.
        """
        if self._stopped_epochs is None:
            return None
        epochs = self._epochs_at(position) or self._stopped_epochs
        epoch = milestone_epoch(epochs)
        if epoch is None:
            return None
        if not stops:
            return Milestone(epoch)
        ended = [
            Ended(self._costs_of(given[PLACEMENT]), given["curve"][0], given["val_accuracy"])
            for trial in trials[: max(0, position - self._lag)]
            if trial.state == TrialState.COMPLETE
            and (given := trial.user_attrs)["epochs"] == epochs
            and given.get("curve")
        ]
        return milestone(epoch, self._costs_of(placement), ended)

    def _costs_of(self, text: str) -> tuple[float, ...]:
        """Return what the blocks of a placement add to each cost that is an objective."""
        if text not in self._costs:
            added = [self._added(site, setting) for site, setting in Placement.parse(text).items()]
            none = (0.0,) * (len(self._objectives) - 1)
            self._costs[text] = tuple(map(float, map(sum, zip(*added, strict=True)))) if added else none
        return self._costs[text]

    def is_settled(self) -> bool:
        """Tell whether the front has settled, by the model of our own sampler; with another one it never has."""
        sampler = self._study.sampler
        if not isinstance(sampler, AdditiveSampler):
            return False

        def attempt() -> bool:
            trials = self._all()
            position = self._next_number(trials)
            return not self._must_wait(position, trials) and sampler.settled(self._study, position)

        return patiently(attempt, self._tell)

    def next_epochs(self) -> int | None:
        """Return how long the next trial is to be trained, if other than usual."""
        return self._epochs_at(self._next_number(patiently(self._all, self._tell)))

    def _next_number(self, trials: list[FrozenTrial]) -> int:
        """Return the position of the next trial."""
        return next(
            (t.number for t in trials if t.state == TrialState.WAITING or t.number in self._claimed), len(trials)
        )

    def _epochs_at(self, position: int) -> int | None:
        return self._long_epochs if self._long_number(position) is not None else None

    def _long_number(self, position: int) -> int | None:
        return long_number(position - len(self._references)) if self._long_epochs else None

    def complete(self, record: TrialRecord, config: str = "") -> None:
        """Store a finished trial under its position, whole or not at all.

        Of a shared study, it may have been taken from this process, which was taken for dead, and have ended elsewhere;
        then the result is dropped, which is the same.

        Args:
            record: What came of it.
            config: Text of its architecture file, to be attached to it.

        Raises:
            StudyError: If a shared storage does not answer for long.
        """

        def attempt() -> FrozenTrial:
            try:
                with at_once(self._storage):
                    return self._complete(record, config)
            except UpdateFinishedTrialError:  # just now, elsewhere
                return self._all()[record.trial]

        stored = patiently(attempt, self._tell)
        self._running.discard(record.trial)
        if self._claims is not None:  # not before: while the storage is away it is alive
            self._claims.end(stored)

    def _complete(self, record: TrialRecord, config: str) -> FrozenTrial:
        stored = self._all()[record.trial]
        if stored.state.is_finished():
            return stored
        trial = optuna.trial.Trial(self._study, stored._trial_id)
        if config and self._artifacts is not None:
            with suppress(OSError):  # a config can be had again, a trial cannot
                self._attach(self._artifacts, trial, f"trial-{record.trial}.yaml", config)
        self._write_parameters(stored, record.placement)
        for name, limit in self._limits.items():
            if name not in stored.constraints:
                trial.set_constraint(name, record.value(name) - limit)
        for name in _MEASURED:
            value = getattr(record, name)
            if value is not None:
                trial.set_user_attr(name, value)
        if record.state == "COMPLETE":
            self._study.tell(trial, [record.value(name) for name in self._objectives])
        else:
            self._study.tell(trial, state=TrialState[record.state])
        return stored

    def _attach(self, folder: Path, trial: optuna.trial.Trial, name: str, text: str) -> None:
        """Attach a file to a trial that has not ended yet; Optuna takes none for one that has."""
        folder.mkdir(exist_ok=True)
        with TemporaryDirectory() as passing:
            path = Path(passing) / name
            path.write_text(text, encoding="utf-8")
            upload_artifact(
                artifact_store=FileSystemArtifactStore(folder),
                file_path=str(path),
                study_or_trial=trial,
                mimetype="text/plain",
            )

    def _all(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _is_exhausted(self, trials: list[FrozenTrial]) -> bool:
        if len(trials) < self._space.size and not self._space.room:
            return False
        tried = {trial.user_attrs[PLACEMENT] for trial in trials if PLACEMENT in trial.user_attrs}
        every = islice(self._space.within_budget(), len(tried) + 1)
        return all(str(self._space.placement(chosen)) in tried for chosen in every)


def read_shared(where: StorageUrl, name: str) -> str | None:
    """Return the definition that a shared storage holds of a study; None if there is no such study.

    Raises:
        InputError: If the storage cannot be reached.
    """
    storage = open_storage(where)
    if not _holds(storage, name):
        return None
    return _definition(storage.get_study_system_attrs(storage.get_study_id_from_name(name)))


def _definition(stored: Mapping[str, Any]) -> str | None:
    return "".join(stored[f"{DEFINITION}:{part}"] for part in range(stored.get(DEFINITION, 0))) or None


def _holds(storage: BaseStorage, name: str) -> bool:
    try:
        storage.get_study_id_from_name(name)
    except KeyError:
        return False
    return True


def _create(storage: BaseStorage, name: str, objectives: tuple[str, ...]) -> None:
    directions = [StudyDirection[DIRECTIONS[objective].upper()] for objective in objectives]
    with suppress(DuplicatedStudyError), at_once(storage):  # somebody else was faster
        study = optuna.create_study(storage=storage, study_name=name, directions=directions)
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            study.set_metric_names(list(objectives))


def _record(trial: FrozenTrial) -> TrialRecord:
    """Return a finished trial.

    Raises:
        StudyError: If what is stored of it is not whole.
    """
    needed = (PLACEMENT, *(("val_accuracy", "params", "seed") if trial.state == TrialState.COMPLETE else ()))
    lacking = [name for name in needed if trial.user_attrs.get(name) is None]
    if lacking:
        raise StudyError(
            f"the study is damaged: trial {trial.number} is stored without its {lacking[0].replace('_', ' ')}; restore "
            "the journal or the database from a copy, or begin anew under another --name"
        )
    measured = {name: trial.user_attrs.get(name) for name in _MEASURED}
    measured["curve"] = tuple(measured["curve"]) if measured["curve"] else None
    return TrialRecord(
        trial=trial.number,
        state=trial.state.name,
        placement=Placement.parse(trial.user_attrs[PLACEMENT]),
        reference=trial.user_attrs.get("reference"),
        **measured,
    )
