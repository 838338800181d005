"""What happened, as plain values: costs, scores, finished trials, and the events of a running study."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from placesearch.placement import BlockSetting, Placement

DIRECTIONS: Mapping[str, str] = {
    "accuracy": "maximize",
    "macs": "minimize",
    "macs_full": "minimize",
    "params": "minimize",
    "latency_ms": "minimize",
}
"""Every objective and its direction. Accuracy goes up, everything else down."""


_MEASURED_AS = {"accuracy": "val_accuracy", "latency_ms": "latency_predicted_ms"}


@dataclass(frozen=True, slots=True)
class Cost:
    """What a network costs.

    Args:
        macs: Multiply-adds of convolutions and linear layers for one image.
        macs_full: These, and what all other operators cost by the rule of `placesearch.costs.counting`.
        params: Number of parameters.
        uncounted: Operators that the rule does not know.
    """

    macs: int
    macs_full: int
    params: int
    uncounted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Milestone:
    """Where a training is looked at on its way, and stopped if it is hopeless.

    Args:
        epoch: After which epoch.
        floor: Validation accuracy below which it is stopped; 0.0 for never.
        intercept: What is to be expected in the end of an accuracy of zero there.
        slope: How much more of each that it is higher.
    """

    epoch: int
    floor: float = 0.0
    intercept: float = 0.0
    slope: float = 1.0


@dataclass(frozen=True, slots=True)
class Task:
    """A trial to run.

    Args:
        trial: Its position in the study.
        placement: What to evaluate.
        reference: Names of the reference placement that it is, if it is one.
        epochs: Passes over the training split, if other than the study's usual ones.
        seed: Seed of initialisation, data order and augmentation, if other than the study's.
        split: What to measure the accuracy on: `validation`, or `test` when a study is confirmed.
        milestone: Where it is looked at on its way, in a study that stops hopeless trials.
    """

    trial: int
    placement: Placement
    reference: str | None
    epochs: int | None = None
    seed: int | None = None
    split: str = "validation"
    milestone: Milestone | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """A trial that ended by itself.

    None stands for "not measured", never for zero.

    Args:
        trial: Position in the study, from 0.
        state: COMPLETE, FAIL, or PRUNED if it was stopped early.
        placement: The candidate.
        val_accuracy: Share of validation images classified correctly, 0..1.
        val_loss: Mean cross-entropy on the validation split.
        macs: Multiply-adds of convolutions and linear layers for one image.
        params: Number of parameters.
        latency_ms: Median latency of one image in milliseconds, measured on the whole network.
        epochs: Passes over the training split; of a trial that was stopped, those that it was to make.
        seconds: Wall time of the whole trial.
        seed: Seed of initialisation, data order and augmentation.
        reference: Names of the reference placement that this is, if it is one.
        error: Why the trial failed, if it did.
        training_seconds: Wall time spent in training steps.
        macs_full: What all operators cost for one image, by the rule of `placesearch.costs.counting`.
        latency_predicted_ms: The same as the sum of the plain network and each block; what a search goes by.
        latency_ratio: That latency by the plain network's, measured interleaved with it.
        latency_ratio_low: Lower end of its 95 % interval.
        latency_ratio_high: Upper end.
        latency_batch_ms: Median latency of a training batch in milliseconds, in inference.
        latency_batch_ratio: That by the plain network's.
        latency_batch_ratio_low: Lower end of its 95 % interval.
        latency_batch_ratio_high: Upper end.
        train_memory_mb: Peak memory on the GPU in training, in MiB.
        inference_memory_mb: Peak memory on the GPU in validation, in MiB.
        correct: For each validation image whether it was classified correctly, base64 of bits, the first one highest.
        curve: Validation accuracies on the way: that at the milestone, in a study that stops hopeless trials; or what
            the user's own evaluation returned.
        factors: What gates of blocks that started as the identity and cannot be folded are multiplied by, by site.
        stopped_after: Epochs after which it was stopped early.
        forecast: What its accuracy in the end was expected to be when it was stopped.
    """

    trial: int
    state: str
    placement: Placement
    val_accuracy: float | None = None
    val_loss: float | None = None
    macs: int | None = None
    params: int | None = None
    latency_ms: float | None = None
    epochs: int | None = None
    seconds: float | None = None
    seed: int | None = None
    reference: str | None = None
    error: str | None = None
    training_seconds: float | None = None
    macs_full: int | None = None
    latency_predicted_ms: float | None = None
    latency_ratio: float | None = None
    latency_ratio_low: float | None = None
    latency_ratio_high: float | None = None
    latency_batch_ms: float | None = None
    latency_batch_ratio: float | None = None
    latency_batch_ratio_low: float | None = None
    latency_batch_ratio_high: float | None = None
    train_memory_mb: float | None = None
    inference_memory_mb: float | None = None
    correct: str | None = None
    factors: Mapping[str, float] | None = None
    curve: tuple[float, ...] | None = None
    stopped_after: int | None = None
    forecast: float | None = None

    def objectives(self, names: tuple[str, ...]) -> tuple[float, ...]:
        """Return the values of these objectives, each turned so that smaller is better.

        Raises:
            ValueError: If one of them was not measured.
        """
        return tuple(-self.value(name) if DIRECTIONS[name] == "maximize" else self.value(name) for name in names)

    def value(self, objective: str) -> float:
        """Return the value of an objective.

        Raises:
            ValueError: If it was not measured.
        """
        value = getattr(self, _MEASURED_AS.get(objective, objective))
        if value is None:
            raise ValueError(f"trial {self.trial} has no {objective}")
        return float(value)


class OutOfMemory(TrialRecord):
    """A trial that failed because the memory of the GPU did not suffice for it and those that ran beside it."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class StudyBegan:
    """The search, or the confirmation of its result, is about to begin or to go on.

    Args:
        name: The study.
        finished: The trials that it has already.
        trials: How many trials it is to have; None for no such limit.
        seconds_left: How long it may run; None for no such limit.
        jobs: How many trials run at a time.
        objectives: Names of the objectives.
        lines: What is being run, in sentences for a person.
        epochs: Passes over the training split of a usual trial.
        split: What accuracies are measured on: `validation` in a search, `test` in a confirmation.
        long_epochs: The same of the long trials, if there are any.
        references: How many references come first, which say where the long trials are.
        settles: Whether it may end before its limits, because the front has settled.
        settings: By site, the settings to choose from, by which trials are understood.
        lag: On how many of the last trials a suggestion does not depend.
    """

    name: str
    finished: tuple[TrialRecord, ...]
    trials: int | None
    seconds_left: float | None
    jobs: int
    objectives: tuple[str, ...]
    lines: tuple[str, ...]
    epochs: int
    split: str = "validation"
    long_epochs: int | None = None
    references: int = 0
    settles: bool = False
    settings: Mapping[str, Sequence[BlockSetting]] = field(default_factory=dict)
    lag: int = 7


@dataclass(frozen=True, slots=True)
class TrialBegan:
    """A trial begins.

    Args:
        task: The trial.
        epochs: Passes over the training split.
    """

    task: Task
    epochs: int


@dataclass(frozen=True, slots=True)
class Epoch:
    """An epoch of a training in earnest, which ended.

    Args:
        epoch: Its number, from 1.
        train_loss: Mean of the training loss over its steps.
        val_accuracy: Share of validation images classified correctly, 0..1.
        val_loss: Mean cross-entropy on the validation split.
        learning_rate: That of the next step.
        seconds: Wall time of its steps and the validation.
    """

    epoch: int
    train_loss: float
    val_accuracy: float
    val_loss: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True, slots=True)
class StepEnded:
    """A training step of the running trial ended."""

    trial: int
    step: int
    steps: int
    epoch: int


@dataclass(frozen=True, slots=True)
class TrialEnded:
    """A trial ended by itself and is stored."""

    record: TrialRecord


@dataclass(frozen=True, slots=True)
class Told:
    """Something else goes on that takes time.

    Args:
        line: What, in a sentence for a person.
    """

    line: str


Event = StudyBegan | TrialBegan | StepEnded | TrialEnded | Told


def seconds_an_epoch(records: Sequence[TrialRecord], epochs: int = 1) -> float:
    """Return how long an epoch takes, validation and all, as the median over trials that ran to their end.

    By it a search does not begin a trial that would not end in time.

    Args:
        records: Trials; of none it is 0.
        epochs: How many those had that do not say.
    """
    each = [
        record.seconds / (record.epochs or epochs)
        for record in records
        if record.seconds is not None and record.state != "PRUNED"
    ]
    return median(each) if each else 0.0
