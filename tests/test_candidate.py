from dataclasses import replace

import pytest
import torch
from networks import Tiny

from placesearch.evaluation.candidate import Evaluator
from placesearch.models.architecture import Architecture
from placesearch.models.weights import Checkpoint
from placesearch.placement import Placement
from placesearch.records import Milestone, StepEnded, Task
from placesearch.training.datasets import load_data
from placesearch.training.loop import Protocol, Trainer

PROTOCOL = Protocol(epochs=2, batch_size=256, learning_rate=0.05, seed=0, precision="fp32")


def evaluator(backbone="mine:tiny", protocol=PROTOCOL, checkpoint=None, branches=None):
    plain = Architecture(backbone=backbone, num_classes=10, input_size=(3, 32, 32))
    return Evaluator(plain, protocol, load_data("digits", 32), torch.device("cpu"), checkpoint, branches)


def test_a_candidate_is_trained_and_validated(workplace):
    seen = []
    record = evaluator().evaluate(Task(3, Placement.parse("unit2.bn2=se(r=2)"), "mine"), seen.append)
    assert (record.trial, record.state, record.reference, record.error) == (3, "COMPLETE", "mine", None)
    assert 0 <= record.val_accuracy <= 1
    assert 0 < record.training_seconds < record.seconds
    assert seen == [StepEnded(3, step, 8, 1 if step <= 4 else 2) for step in range(1, 9)]


def test_what_ran_before_makes_no_difference(workplace):
    evaluate = evaluator().evaluate
    task = Task(0, Placement.parse("unit1.bn2=cbam(r=2,k=3)"), None)
    first = evaluate(task, lambda _: None)
    evaluate(Task(1, Placement(), None), lambda _: None)
    again = evaluate(task, lambda _: None)
    assert (first.val_accuracy, first.val_loss) == (again.val_accuracy, again.val_loss)


def test_from_weights_every_placement_starts_as_the_plain_network(workplace):
    still = replace(PROTOCOL, epochs=1, learning_rate=1e-12)
    trained = Tiny(10)
    with torch.no_grad():
        trained.head.bias[3] = 5.0
    evaluate = evaluator(protocol=still, checkpoint=Checkpoint("c", trained.state_dict())).evaluate
    texts = ["none", "unit1.bn2=se(r=2)", "unit1.bn2=cbam(r=2,k=3) unit2=cbam_residual(r=2,k=3)"]
    records = [evaluate(Task(0, Placement.parse(text), None), lambda _: None) for text in texts]
    assert {record.val_accuracy for record in records} == {records[0].val_accuracy}
    assert [record.val_loss for record in records] == pytest.approx([records[0].val_loss] * 3, rel=1e-5)
    assert [record.factors for record in records] == [None, None, {"unit2": 0.8}]
    scratch = evaluator(protocol=still).evaluate(Task(0, Placement(), None), lambda _: None)
    assert scratch.val_loss != pytest.approx(records[0].val_loss, rel=1e-2)


def test_whatever_a_network_raises_is_its_own_failure(workplace):
    record = evaluator().evaluate(Task(0, Placement.parse("unit1.bn2=se(r=99)"), None), lambda _: None)
    assert record.state == "FAIL"
    assert record.error.startswith("PlacementError: mine:tiny: site 'unit1.bn2' with 8 channels: reduction 99")
    assert record.val_accuracy is None


def test_a_task_may_ask_for_a_longer_training(workplace):
    evaluate = evaluator().evaluate
    brief, long = (evaluate(Task(0, Placement(), None, epochs), lambda _: None) for epochs in (None, 4))
    assert (brief.epochs, long.epochs) == (2, 4)
    alone = evaluator(protocol=replace(PROTOCOL, epochs=4)).evaluate(Task(0, Placement(), None), lambda _: None)
    assert long.val_loss == alone.val_loss != brief.val_loss


def test_a_task_may_ask_for_another_seed_and_for_the_test_images(workplace):
    placement = Placement.parse("unit1.bn2=se(r=2)")
    evaluate = evaluator().evaluate
    usual, other, on_test = (
        evaluate(Task(0, placement, None, seed=seed, split=split), lambda _: None)
        for seed, split in ((None, "validation"), (7, "validation"), (7, "test"))
    )
    assert (usual.seed, other.seed, on_test.seed) == (0, 7, 7)
    assert usual.val_loss != other.val_loss != on_test.val_loss
    alone = evaluator(protocol=replace(PROTOCOL, seed=7)).evaluate(Task(0, placement, None), lambda _: None)
    assert (alone.val_loss, alone.correct) == (other.val_loss, other.correct)


def test_a_branch_is_trained_once_for_each_length_and_seed_and_kept(workplace, tmp_path):
    def plain(evaluate, **options):
        record = evaluate(Task(0, Placement(), None, **options), lambda _: None)
        assert record.state == "COMPLETE", record.error
        return record.val_loss

    first = evaluator(branches=tmp_path).evaluate
    losses = [plain(first), plain(first, epochs=4), plain(first, seed=1)]
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in files] == [f"branch-{kind}.safetensors" for kind in ("2-0", "2-1", "4-0")]
    made = [path.stat().st_mtime_ns for path in files]
    second = evaluator(branches=tmp_path).evaluate
    assert [plain(second), plain(second, epochs=4), plain(second, seed=1)] == losses
    assert [path.stat().st_mtime_ns for path in files] == made
    assert losses == [plain(evaluator().evaluate, **options) for options in ({}, {"epochs": 4}, {"seed": 1})]
    files[0].write_bytes(b"damaged")
    assert plain(evaluator(branches=tmp_path).evaluate) == losses[0]
    assert files[0].stat().st_size > 100


@pytest.mark.parametrize(("backbone", "curve"), [("mine:tiny", 1), ("mine:late", 0)])
def test_a_look_on_the_way_changes_nothing_of_what_follows(workplace, backbone, curve):
    evaluate = evaluator(backbone, replace(PROTOCOL, epochs=3)).evaluate
    task = Task(0, Placement.parse("unit1.bn2=cbam(r=2,k=3)"), None)
    plain, looked_at = (
        evaluate(replace(task, milestone=milestone), lambda _: None) for milestone in (None, Milestone(1))
    )
    assert (plain.state, looked_at.state) == ("COMPLETE", "COMPLETE")
    assert (looked_at.val_loss, looked_at.correct) == (plain.val_loss, plain.correct)
    assert plain.curve is None
    assert len(looked_at.curve or ()) == curve  # where the loss is not finite yet, there is nothing to see


@pytest.mark.parametrize("start", ["scratch", "branch"])
def test_a_hopeless_training_is_stopped_after_its_epoch(workplace, tmp_path, start):
    protocol = replace(PROTOCOL, epochs=4, start=start)
    where = tmp_path if start == "branch" else None
    evaluate = evaluator(protocol=protocol, branches=where).evaluate
    seen = []
    placement = Placement.parse("unit2.bn2=se(r=2)")
    record = evaluate(Task(3, placement, None, milestone=Milestone(3, 1.01, 0.1, 0.5)), seen.append)
    first = 1 if start == "scratch" else 1 + round(0.3 * 16)
    assert [event.step for event in seen] == list(range(first, 13))
    assert (record.state, record.error, record.epochs, record.stopped_after) == ("PRUNED", None, 4, 3)
    assert (record.val_accuracy, record.val_loss, record.correct) == (None, None, None)
    assert record.forecast == pytest.approx(0.1 + 0.5 * record.curve[0])
    assert 0 < record.training_seconds < record.seconds
    whole = evaluate(Task(3, placement, None, milestone=Milestone(3, record.curve[0])), lambda _: None)
    assert (whole.state, whole.curve, whole.stopped_after, whole.forecast) == ("COMPLETE", record.curve, None, None)


def test_what_is_seen_on_the_way_is_the_accuracy_after_that_epoch(workplace):
    protocol = replace(PROTOCOL, epochs=2)
    record = evaluator(protocol=protocol).evaluate(Task(0, Placement(), None, milestone=Milestone(1)), lambda _: None)
    trainer = Trainer(load_data("digits", 32), protocol, torch.device("cpu"))
    model = Architecture(backbone="mine:tiny", num_classes=10, input_size=(3, 32, 32)).build(seed=0)
    steps = trainer.train(model)
    for _ in range(4):
        next(steps)
    assert record.curve == (trainer.validate(model).accuracy,)
