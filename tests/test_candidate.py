import torch
from networks import Tiny

from placesearch.evaluation.candidate import Evaluator
from placesearch.models.architecture import Architecture
from placesearch.placement import Placement
from placesearch.records import StepEnded, Task
from placesearch.training.datasets import load_data
from placesearch.training.loop import Protocol

PROTOCOL = Protocol(epochs=2, batch_size=256, learning_rate=0.05, seed=0, precision="fp32")


def evaluator(backbone="mine:tiny"):
    plain = Architecture(backbone=backbone, num_classes=10, input_size=(3, 32, 32))
    return Evaluator(plain, PROTOCOL, load_data("digits", 32), torch.device("cpu"))


def test_a_candidate_is_counted_trained_and_validated(workplace):
    seen = []
    record = evaluator().evaluate(Task(3, Placement.parse("unit2.bn2=se(r=2)"), "mine"), seen.append)
    assert (record.trial, record.state, record.reference, record.error) == (3, "COMPLETE", "mine", None)
    assert 0 <= record.val_accuracy <= 1
    assert record.params == sum(weight.numel() for weight in Tiny(10).parameters()) + 2 * 8 * 4 + 4 + 8
    assert 0 < record.training_seconds < record.seconds
    assert seen == [StepEnded(3, step, 8, 1 if step <= 4 else 2) for step in range(1, 9)]


def test_what_ran_before_makes_no_difference(workplace):
    evaluate = evaluator().evaluate
    task = Task(0, Placement.parse("unit1.bn2=cbam(r=2,k=3)"), None)
    first = evaluate(task, lambda _: None)
    evaluate(Task(1, Placement(), None), lambda _: None)
    again = evaluate(task, lambda _: None)
    assert (first.val_accuracy, first.val_loss) == (again.val_accuracy, again.val_loss)


def test_whatever_a_network_raises_is_its_own_failure(workplace):
    record = evaluator().evaluate(Task(0, Placement.parse("unit1.bn2=se(r=99)"), None), lambda _: None)
    assert record.state == "FAIL"
    assert record.error.startswith("PlacementError: mine:tiny: site 'unit1.bn2' with 8 channels: reduction 99")
    assert record.val_accuracy is None
