"""The trials of a study: what to evaluate next, and the record of what was evaluated.

A trial's position is its Optuna number. A trial that a killed process left behind is taken up again under its own
number with its own placement, so a position is never lost and never doubled.
"""

import logging
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from placesearch.errors import StudyError
from placesearch.placement import Placement
from placesearch.records import DIRECTIONS, Milestone, Task, TrialRecord
from placesearch.search.journal import at_once, open_journal
from placesearch.search.samplers import LAG, PLACEMENT, AdditiveSampler, make_sampler
from placesearch.search.space import Added, SearchSpace
from placesearch.search.stopping import Ended, milestone, milestone_epoch
from placesearch.search.suggesting import long_number

_MEASURED = tuple(
    field.name for field in fields(TrialRecord) if field.name not in ("trial", "state", "placement", "reference")
)
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def artifacts_beside(journal: Path) -> Path:
    """Return the folder of the files that are attached to the trials of a journal."""
    return journal.with_name("artifacts")


class Trials:
    """The stored trials of a study.

    Args:
        path: The journal file; made if it does not exist.
        name: The study's name.
        objectives: Names of the objectives, in the order of the values of a trial.

    Raises:
        StudyError: If the journal is damaged or holds another study.
    """

    def __init__(self, path: Path, name: str, objectives: tuple[str, ...]) -> None:
        logging.getLogger("optuna").setLevel(logging.WARNING)
        self._objectives, self._artifacts = objectives, artifacts_beside(path)
        storage = open_journal(path, JournalStorage)
        try:
            if any(study.study_name == name for study in storage.get_all_studies()):
                self._study = optuna.load_study(storage=storage, study_name=name)
            else:
                with at_once(storage):
                    directions = [StudyDirection[DIRECTIONS[objective].upper()] for objective in objectives]
                    self._study = optuna.create_study(storage=storage, study_name=name, directions=directions)
                    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
                        self._study.set_metric_names(list(objectives))
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise StudyError(f"{path} is damaged: Optuna cannot read it ({type(error).__name__}: {error})") from None

    def records(self) -> list[TrialRecord]:
        """Return the trials that ended by themselves, in order of position."""
        return [_record(trial) for trial in self._all() if trial.state in _FINISHED]

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

        Raises:
            InputError: If there is no such sampler.
        """
        self._space, self._references, self._long_epochs, self._seed = space, references, long_epochs, seed
        self._running: set[int] = set()
        self._limits = dict(limits or {})
        self._added, self._stopped_epochs = added, stopped_epochs
        self._costs: dict[str, tuple[float, ...]] = {}
        self._study.sampler = make_sampler(sampler, seed, space, added, tuple(references.values()), long_epochs)

    def must_wait(self) -> bool:
        """Tell whether a trial has to end first, on which the next suggestion may depend."""
        return bool(self._running) and min(self._running) < len(self._all()) - LAG

    def ask(self) -> Task | None:
        """Return the next trial to run, None if every placement of the space was tried; it is stored as a whole.

        First come trials that were begun and lost, then the references, then suggestions of the sampler. One process
        at a time may ask. Ask only while not `must_wait()`. A placement that had trials of this length before is
        repeated, under the study's seed plus the number of these.
        """
        with at_once(self._study._storage):
            return self._ask()

    def _ask(self) -> Task | None:
        trials = self._all()
        lost = next((t for t in trials if t.state == TrialState.RUNNING and t.number not in self._running), None)
        if lost is not None:
            trial = optuna.trial.Trial(self._study, lost._trial_id)
        else:
            if not any(trial.state == TrialState.WAITING for trial in trials):
                again = self._long_number(len(trials))
                if len(trials) < len(self._references):
                    self._enqueue(*list(self._references.items())[len(trials)])
                elif again is not None and again < len(self._references):
                    self._enqueue(*list(self._references.items())[again])
                elif self._is_exhausted(trials):
                    return None
            trial = self._study.ask()
        attributes = trial.user_attrs
        if "reference" not in attributes or self._space.chosen(Placement.parse(attributes[PLACEMENT])) is not None:
            chosen = {site: trial.suggest_categorical(site, texts) for site, texts in self._space.choices.items()}
            if PLACEMENT not in attributes:
                trial.set_user_attr(PLACEMENT, str(self._space.placement(chosen)))
        attributes = trial.user_attrs
        self._running.add(trial.number)
        placement, reference = Placement.parse(attributes[PLACEMENT]), attributes.get("reference")
        epochs = self._epochs_at(trial.number)
        repeated = sum(
            earlier.user_attrs.get(PLACEMENT) == attributes[PLACEMENT] and self._epochs_at(earlier.number) == epochs
            for earlier in trials[: trial.number]
        )
        seed = self._seed + repeated if repeated else None
        looked_at = self._milestone(trial.number, attributes, stops=reference is None and not repeated)
        return Task(trial.number, placement, reference, epochs, seed, milestone=looked_at)

    def _milestone(self, position: int, attributes: Mapping[str, Any], *, stops: bool) -> Milestone | None:
        """Return where a trial is looked at on its way; whether it is stopped there depends on no later trial's result.

        As a suggestion may, it depends on the trials before the last LAG ones. References and repeats are not stopped.
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
            for trial in self._all()[: max(0, position - LAG)]
            if trial.state == TrialState.COMPLETE
            and (given := trial.user_attrs)["epochs"] == epochs
            and given.get("curve")
        ]
        return milestone(epoch, self._costs_of(attributes[PLACEMENT]), ended)

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
        return isinstance(sampler, AdditiveSampler) and sampler.settled(self._study, len(self._all()))

    def next_epochs(self) -> int | None:
        """Return how long the next trial is to be trained, if other than usual."""
        return self._epochs_at(len(self._all()))

    def _epochs_at(self, position: int) -> int | None:
        return self._long_epochs if self._long_number(position) is not None else None

    def _long_number(self, position: int) -> int | None:
        return long_number(position - len(self._references)) if self._long_epochs else None

    def complete(self, record: TrialRecord, config: str = "") -> None:
        """Store a finished trial under its position, whole or not at all.

        Args:
            record: What came of it.
            config: Text of its architecture file, to be attached to it.
        """
        with at_once(self._study._storage):
            self._complete(record, config)
        self._running.discard(record.trial)

    def _complete(self, record: TrialRecord, config: str) -> None:
        trial = optuna.trial.Trial(self._study, self._all()[record.trial]._trial_id)
        if config:
            with suppress(OSError):  # a config can be had again, a trial cannot
                self._attach(trial, f"trial-{record.trial}.yaml", config)
        for name, limit in self._limits.items():
            trial.set_constraint(name, record.value(name) - limit)
        for name in _MEASURED:
            value = getattr(record, name)
            if value is not None:
                trial.set_user_attr(name, value)
        if record.state == "COMPLETE":
            self._study.tell(trial, [record.value(name) for name in self._objectives])
        else:
            self._study.tell(trial, state=TrialState[record.state])

    def _attach(self, trial: optuna.trial.Trial, name: str, text: str) -> None:
        """Attach a file to a trial that has not ended yet; Optuna takes none for one that has."""
        self._artifacts.mkdir(exist_ok=True)
        with TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_text(text, encoding="utf-8")
            upload_artifact(
                artifact_store=FileSystemArtifactStore(self._artifacts),
                file_path=str(path),
                study_or_trial=trial,
                mimetype="text/plain",
            )

    def _all(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _enqueue(self, name: str, placement: Placement) -> None:
        """Queue a reference; one that the space does not hold has no parameters, its text says what it is."""
        attributes: dict[str, Any] = {"reference": name, PLACEMENT: str(placement)}
        self._study.enqueue_trial(self._space.chosen(placement) or {}, user_attrs=attributes)

    def _is_exhausted(self, trials: list[FrozenTrial]) -> bool:
        if len(trials) < self._space.size and not self._space.room:
            return False
        tried = {trial.user_attrs[PLACEMENT] for trial in trials if PLACEMENT in trial.user_attrs}
        every = islice(self._space.within_budget(), len(tried) + 1)
        return all(str(self._space.placement(chosen)) in tried for chosen in every)


def _record(trial: FrozenTrial) -> TrialRecord:
    measured = {name: trial.user_attrs.get(name) for name in _MEASURED}
    measured["curve"] = tuple(measured["curve"]) if measured["curve"] else None
    return TrialRecord(
        trial=trial.number,
        state=trial.state.name,
        placement=Placement.parse(trial.user_attrs[PLACEMENT]),
        reference=trial.user_attrs.get("reference"),
        **measured,
    )
