import pytest
import torch
from torch import nn

from placesearch.errors import BackboneError
from placesearch.models.graph import NCHW, record


class Doing(nn.Module):
    """A network whose forward is a given function."""

    def __init__(self, function):
        super().__init__()
        self.function, self.conv = function, nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x):
        return self.function(self.conv(x))


def operations(function):
    return [node.operation for node in record(Doing(function), (3, 4, 4)).nodes]


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: x + x.relu(), ["relu", "add"]),
        (lambda x: torch.add(x, torch.relu(x)), ["relu", "add"]),
        (lambda x: 2 * x, ["mul"]),
        (lambda x: x.mul_(2).add_(1), ["mul", "add"]),
        (lambda x: nn.functional.hardswish(x, True), ["hardswish"]),
        (lambda x: nn.functional.dropout(x, 0.5, False), []),
        (lambda x: x.flatten(1), ["flatten"]),
    ],
)
def test_an_operation_has_one_name_however_it_is_written(function, names):
    assert operations(function) == ["input", "conv2d", *names]


def test_an_operation_in_place_makes_a_new_node():
    def function(x):
        y = x
        x += 1
        return y  # the same tensor as x

    graph = record(Doing(function), (3, 4, 4))
    assert graph.result is graph.nodes[-1]
    assert [node.operation for node in graph.nodes] == ["input", "conv2d", "add"]
    assert dict(graph.outputs)["conv"] is graph.nodes[1]


@pytest.mark.parametrize(
    ("function", "order"),
    [
        (lambda x: x.permute(0, 2, 3, 1), (0, 2, 3, 1)),
        (lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), NCHW),
        (lambda x: nn.functional.gelu(torch.permute(x, (0, 2, 3, 1))).transpose(1, 3).transpose(2, 3), NCHW),
        (lambda x: nn.functional.linear(x.movedim(1, -1), torch.ones(5, 8)), (0, 2, 3, 1)),
        (lambda x: x.view(1, 2, 4, 4, 4).transpose(1, 2).reshape(1, 8, 4, 4), None),
        (lambda x: x.flatten(2), None),
    ],
)
def test_the_meaning_of_dimensions_is_followed(function, order):
    assert record(Doing(function), (3, 4, 4)).nodes[-1].order == order


def test_what_parameters_alone_make_is_no_node():
    assert operations(lambda x: x * torch.ones(8, device=x.device).reshape(1, 8, 1, 1).exp()) == [
        "input",
        "conv2d",
        "mul",
    ]


def test_a_network_that_looks_at_numbers_is_run_with_memory():
    assert operations(lambda x: x.relu() if float(x.sum()) > 1e9 else x.tanh())[-1] == "tanh"


def test_the_network_itself_is_left_alone():
    model = Doing(lambda x: x.relu())
    record(model, (3, 4, 4))
    assert model.training
    assert next(model.parameters()).device.type == "cpu"
    assert not model._forward_hooks


def test_an_input_that_does_not_fit_gets_one_line():
    with pytest.raises(BackboneError, match="Doing does not take an input of 5x4x4") as caught:
        record(Doing(lambda x: x), (5, 4, 4))
    assert "\n" not in str(caught.value)
