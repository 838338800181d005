from dataclasses import replace

import pytest
import torch
from networks import Tiny

from placesearch.evaluation.candidate import Evaluator
from placesearch.models.architecture import Architecture
from placesearch.models.weights import Checkpoint
from placesearch.placement import Placement
from placesearch.records import StepEnded, Task
from placesearch.training.datasets import load_data
from placesearch.training.loop import Protocol

PROTOCOL = Protocol(epochs=2, batch_size=256, learning_rate=0.05, seed=0, precision="fp32")


def evaluator(backbone="mine:tiny", protocol=PROTOCOL, checkpoint=None):
    plain = Architecture(backbone=backbone, num_classes=10, input_size=(3, 32, 32))
    return Evaluator(plain, protocol, load_data("digits", 32), torch.device("cpu"), checkpoint)


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
