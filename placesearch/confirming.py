"""Confirming a study: its front and the references, trained anew on fresh seeds, measured on the test split."""

import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from placesearch.config import StudyConfig
from placesearch.costs import profile
from placesearch.definition import Definition, read_definition_of, settle, study_folder
from placesearch.errors import InputError, StudyError
from placesearch.evaluation.own import Evaluate, evaluation_named, name_of
from placesearch.evaluation.workers import Assignment, Evaluators, Workers
from placesearch.interrupts import interrupts_held
from placesearch.models.architecture import Architecture
from placesearch.models.code import names_code
from placesearch.models.deeper import deeper
from placesearch.models.weights import read_weights
from placesearch.placement import Placement
from placesearch.plan import AT_BATCH_SIZE, LEARNING_RATE, device_name
from placesearch.records import StudyBegan, Task, TrialBegan, TrialEnded, TrialRecord
from placesearch.reporting.tables import accuracies
from placesearch.staffing import Watch, assignment_of, jobs_for, staffed
from placesearch.study import Study, device_named, load_study, nobody, nothing_lost, owned
from placesearch.training.datasets import SPLITS, Data, load_data
from placesearch.verdict.trainings import Training, TrainingFile
from placesearch.verdict.verdicts import BIGGER, PLAIN, REFERENCES

SEEDS = 5
"""Fresh seeds, where no number is given."""

FARTHEST = 2**31
"""Fresh seeds begin so far from the study's own, which are that one and the few after it; seeds are below 2**32."""

MOST_SEEDS, MOST_EPOCHS = 1000, 100_000


@dataclass(frozen=True, slots=True)
class _Group:
    """Networks that are trained under one assignment.

    Args:
        assignment: What those who train them need to know.
        references: Names of the reference placement that a placement is, None for others, by placement.
        costs: `macs` and `params` of each.
    """

    assignment: Assignment
    references: dict[Placement, str | None]
    costs: dict[Placement, dict[str, int | None]]

    def training(self, record: TrialRecord, images: int | None) -> Training:
        """Return what is kept of a finished trial."""
        return Training(
            placement=record.placement,
            backbone=self.assignment.plain.backbone,
            reference=self.references[record.placement],
            start=self.assignment.protocol.start,
            epochs=int(record.epochs or 0),
            seed=int(record.seed or 0),
            state=record.state,
            accuracy=record.val_accuracy,
            loss=record.val_loss,
            images=images if record.correct else None,
            correct=record.correct,
            seconds=record.seconds,
            error=record.error,
            **self.costs[record.placement],
        )


def confirm(
    study: str,
    *,
    seeds: int = SEEDS,
    epochs: int | None = None,
    top: int | None = None,
    jobs: int | Literal["auto"] = "auto",
    device: str = "auto",
    evaluate: Evaluate | None = None,
    allow: Collection[str] = (),
    watch: Watch | None = None,
) -> Study:
    """Find out which gains of a study are real: train its front and the references again, on seeds it never used.

    Trained are the members of the recommended front, plain, SE everywhere and CBAM everywhere where the study has
    them, and, in a ResNet of torchvision, a deeper plain network with about as many parameters as the largest of
    these: from scratch, and once more from where the study's own trainings start, if that is another. Within a seed all
    see the same data in the same order. They are measured on the test split, which nothing else looks at.

    Each finished training is stored in `studies/NAME/confirm.jsonl`; those that are there are not trained again, so the
    same call goes on after an interrupt, and one with more seeds adds to them. Reports are written at the end, and on
    Ctrl-C, when KeyboardInterrupt is raised again.

    Args:
        study: The study's name.
        seeds: How many fresh seeds, at least two. Decide before you look: adding seeds until something shows makes
            wrong claims more probable than stated.
        epochs: Passes over the training split; as long as the study's longest trainings if not given.
        top: Only so many members of the front, those of the highest estimated accuracy.
        jobs: How many trainings at a time.
        device: Where to train.
        evaluate: The study's own evaluation, if it has one; its name in `allow` does as well.
        allow: Names `package.module:function` of code that the study names; it is imported only if repeated here.
        watch: Is told what happens, as it happens.

    Returns:
        The study, with what was confirmed.

    Raises:
        InputError: If there is no such study, nothing in it to confirm, or it is busy; if it names code that is not
            allowed; if data, weights or code are others than the study's; if a number is out of range.
    """
    for name, value, least, most in (
        ("seeds", seeds, 2, MOST_SEEDS),
        ("epochs", epochs, 1, MOST_EPOCHS),
        ("top", top, 1, None),
    ):
        if value is not None and (value < least or (most is not None and value > most)):
            raise InputError(
                f"{name} {value} is not allowed; allowed are {least}{f' to {most:,}' if most else ' and up'}"
            )
    if not load_study(study).front:
        raise StudyError(f"study '{study}' has no finished trial to confirm; 'placesearch run' makes some")
    definition = read_definition_of(study)
    jobs = 1 if evaluate is not None and jobs == "auto" else jobs  # a function is called in this process
    config = StudyConfig(**definition.config.plain() | {"jobs": jobs, "device": device, "trials": None})
    definition = replace(definition, config=config)
    here = evaluation_of(definition, evaluate, allow)
    where = device_named(device)
    with owned(study):
        return _confirm(definition, seeds, epochs, top, here, where, watch or nobody)


def _confirm(
    definition: Definition,
    seeds: int,
    epochs: int | None,
    top: int | None,
    here: Evaluate | None,
    device: torch.device,
    watch: Watch,
) -> Study:
    """Train what is missing and write the reports; the study is held by this process."""
    name, config, began = definition.name, definition.config, time.monotonic()
    notes = settle(definition)
    data = _data_of(definition) if here is None else None
    images = len(data.splits["test"].labels) if data else None
    epochs = epochs or config.long_epochs or definition.protocol.epochs
    kept = TrainingFile(study_folder(name) / "confirm.jsonl")
    kept.mend()
    before = kept.read()
    groups = _groups(definition, load_study(name), before, top, device)
    done = {(one.start, one.backbone, one.placement, one.epochs, one.seed) for one in before}
    fresh = fresh_seeds(config.seed, seeds)
    number = len(before)
    tasks: list[list[Task]] = [[] for _ in groups]
    for group, missing in zip(groups, tasks, strict=True):
        start, backbone = group.assignment.protocol.start, group.assignment.plain.backbone
        for seed in fresh:
            for placement, reference in group.references.items():
                if (start, backbone, placement, epochs, seed) not in done:
                    missing.append(Task(number, placement, reference, epochs, seed, "test"))
                    number += 1
    jobs = jobs_for(config.model_copy(update={"trials": number or 1}), device)
    watch(
        StudyBegan(
            name=name,
            finished=tuple(_as_record(index, one) for index, one in enumerate(before)),
            trials=number,
            seconds_left=None,
            jobs=jobs,
            objectives=(),
            lines=(*_lines(groups, fresh, epochs, images, device, jobs), *notes),
            epochs=epochs,
            split="test",
        )
    )
    with nothing_lost(name, "training", lambda: load_study(name)), Workers(jobs, None, watch) as workers:
        for group, missing in zip(groups, tasks, strict=True):
            if missing:
                folder = study_folder(name)
                with staffed(group.assignment, definition, data, here, workers, watch, folder) as evaluators:
                    for record in _train(evaluators, missing, group, watch):
                        with interrupts_held():
                            kept.add(group.training(record, images))
                        watch(TrialEnded(record))
            if group.assignment.branches:
                _forget_branches(name, fresh)
    found = load_study(name)
    found.write_report()
    trained = sum(len(missing) for missing in tasks)
    ended = f"{trained} trainings on {seeds} fresh seeds" if trained else "all trainings were there already"
    return replace(found, ended=ended, seconds=time.monotonic() - began)


def fresh_seeds(seed: int, count: int) -> list[int]:
    """Return seeds that no search under this seed uses, always the same ones; more are those, and further ones.

    Args:
        seed: The study's seed, which its replicates count up from.
        count: How many.

    Example:
        >>> fresh_seeds(0, 2)
        [2147483648, 2147483649]
    """
    return [(seed + FARTHEST + number) % 2**32 for number in range(count)]


def evaluation_of(definition: Definition, evaluate: Evaluate | None, allow: Collection[str]) -> Evaluate | None:
    """Return the study's own evaluation, if it has one; refuse code that is not allowed."""
    config = definition.config
    if evaluate is not None and name_of(evaluate) != config.evaluate:
        own = f"'{config.evaluate}'" if config.evaluate else "the built-in training"
        raise StudyError(f"study '{definition.name}' was evaluated by {own}, not by '{name_of(evaluate)}'")
    named = [config.backbone, *config.blocks, *([config.evaluate] if config.evaluate and evaluate is None else [])]
    for code in named:
        if names_code(code) and code not in allow:
            raise InputError(f"study '{definition.name}' names code, '{code}'; if you trust it, add --allow {code}")
    return evaluate or (evaluation_named(config.evaluate) if config.evaluate else None)


def _data_of(definition: Definition) -> Data:
    """Load the study's data.

    Raises:
        StudyError: If they are others than in the search.
    """
    data = load_data(definition.config.data, definition.input_size, definition.skipped)
    counts = {name: len(data.splits[name].labels) for name in SPLITS}
    if definition.splits and counts != definition.splits:
        was, now = (", ".join(f"{given[name]} {name}" for name in SPLITS) for given in (definition.splits, counts))
        raise StudyError(f"{definition.config.data} changed since the study: {was} images then, {now} now")
    return data


def _groups(
    definition: Definition, study: Study, before: Sequence[Training], top: int | None, device: torch.device
) -> list[_Group]:
    """Return what is to be trained: from scratch, the bigger plain network, and from the study's own start."""
    config, protocol = definition.config, definition.protocol
    estimate = accuracies(study.findings) or {}
    members = sorted(study.front, key=lambda record: -estimate.get(record.placement, record.val_accuracy or 0.0))
    references: dict[Placement, str | None] = {Placement(): PLAIN}
    for record in study.records:
        if record.reference and set(record.reference.split()) & set(REFERENCES):
            references[record.placement] = record.reference
    references |= {record.placement: record.reference for record in members[:top]}
    known = {record.placement: {"macs": record.macs, "params": record.params} for record in study.records}
    macs, _, params, *_ = definition.costs["none"]
    costs = {placement: known.get(placement, {"macs": macs, "params": params}) for placement in references}
    scratch = replace(
        protocol, start="scratch", learning_rate=LEARNING_RATE * (protocol.batch_size / AT_BATCH_SIZE) ** 0.5
    )
    own = assignment_of(definition, device, study_folder(definition.name))
    from_scratch = replace(own, protocol=scratch, weights=None, branches=None)
    groups = [_Group(from_scratch, references, costs)]
    largest = max(
        one
        for one in (*(cost["params"] for cost in costs.values()), *(t.params for t in before if t.reference != BIGGER))
        if one is not None
    )
    bigger = deeper(definition.plain, largest)
    if bigger is not None:
        groups.append(
            _Group(replace(from_scratch, plain=bigger), {Placement(): BIGGER}, {Placement(): _counted(bigger)})
        )
    if protocol.start != "scratch":
        weights = read_weights(config.weights, config.backbone) if config.weights else None
        if weights is not None and weights.name != definition.weights:
            raise StudyError(f"weights changed since the study: {definition.weights} then, {weights.name} now")
        groups.append(_Group(own, references, costs))
    return groups


def _counted(architecture: Architecture) -> dict[str, int | None]:
    cost = profile(architecture.build(seed=0), architecture.input_size)
    return {"macs": cost.macs, "params": cost.params}


def _train(evaluators: Evaluators, tasks: Sequence[Task], group: _Group, watch: Watch) -> Iterator[TrialRecord]:
    """Run tasks, as many at a time as there are evaluators, and yield what came of each as soon as it has ended."""
    waiting, running = deque(tasks), dict[int, Task]()
    while waiting or running:
        while waiting and len(running) < evaluators.size:
            task = waiting.popleft()
            running[task.trial] = task
            evaluators.submit(task)
            watch(TrialBegan(task, task.epochs or 0))
        for record in evaluators.results():
            task, cost = running.pop(record.trial), group.costs[record.placement]
            yield replace(record, epochs=task.epochs, seed=task.seed, macs=cost["macs"], params=cost["params"])


def _forget_branches(name: str, seeds: Sequence[int]) -> None:
    """Remove the branches of fresh seeds, which nobody needs again; one that is missed is trained anew."""
    for seed in seeds:
        for path in study_folder(name).glob(f"branch-*-{seed}.safetensors*"):
            path.unlink(missing_ok=True)


def _as_record(number: int, training: Training) -> TrialRecord:
    """Return a stored training as the record of a trial, for those who watch."""
    return TrialRecord(
        trial=number,
        state=training.state,
        placement=training.placement,
        val_accuracy=training.accuracy,
        macs=training.macs,
        params=training.params,
        epochs=training.epochs,
        seconds=training.seconds,
        seed=training.seed,
        reference=training.reference,
        error=training.error,
    )


def _lines(
    groups: Sequence[_Group], seeds: Sequence[int], epochs: int, images: int | None, device: torch.device, jobs: int
) -> list[str]:
    """Say what is trained."""
    placements = len(groups[0].references)
    where = f"one thread{f', {jobs} at a time' if jobs > 1 else ''}" if device.type == "cpu" else device_name(device)
    lines = [
        f"{placements} placements, references included, on {len(seeds)} fresh seeds from {seeds[0]}, "
        f"{epochs} epoch{'s'[: epochs > 1]} each, on {where}",
        f"measured on the {f'{images:,} images of the ' if images else ''}test split, which the search has not seen",
    ]
    lines += [f"trained from {group.assignment.protocol.start} as well" for group in groups[1:] if len(group.costs) > 1]
    for group in groups[1:]:
        if group.references.get(Placement()) == BIGGER:
            params = group.costs[Placement()]["params"]
            lines.append(
                f"and a bigger plain network from scratch: {group.assignment.plain.backbone}, {params:,} params"
            )
            return lines
    return [*lines, "no bigger plain network: this backbone's family has no recipe here to grow by"]
