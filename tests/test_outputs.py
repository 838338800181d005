from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torchvision
from networks import Tiny
from torch import Tensor, nn

from placesearch.errors import BackboneError
from placesearch.models.outputs import check_outputs, logits_of, put_out_logits

SIZE = (3, 32, 32)

Pair = namedtuple("Pair", ["features", "logits"])


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class Wrapping(Tiny):
    """A network whose output is `wrap(logits, features, training)`."""

    def __init__(self, wrap, classes=3):
        super().__init__(classes)
        self.wrap = wrap

    def forward(self, x):
        features = self.unit2(self.unit1(self.stem(x))).mean((2, 3))
        return self.wrap(self.head(features), features, self.training)


TAKEN = {
    "alone": (lambda y, f, training: y, None),
    "as a map of one pixel": (lambda y, f, training: y[:, :, None, None], "dimensions of 1"),
    "under logits": (lambda y, f, training: {"features": f, "logits": y}, "2 tensors the network puts out, 'logits'"),
    "under out": (lambda y, f, training: {"out": y, "aux": 2 * y.detach().clone()}, "'out' is taken"),
    "logits before out": (lambda y, f, training: {"out": f[:, :3] * 1, "logits": y}, "'logits' is taken"),
    "in a named tuple": (lambda y, f, training: Pair(f, y), "'logits' is taken"),
    "in a data class": (lambda y, f, training: Output(None, y), "of what the network puts out, 'logits' is taken"),
    "the only fitting one": (lambda y, f, training: (f, y), "the second is taken"),
    "nested": (lambda y, f, training: [{"more": (f, y)}], "'0.more.1' is taken"),
    "before auxiliary ones": (lambda y, f, training: (y, f[:, :3] * 1) if training else y, "in training, the first is"),
}  # fmt: skip


@pytest.mark.parametrize("form", TAKEN)
def test_logits_are_taken_where_it_is_plain_which_they_are(form):
    wrap, says = TAKEN[form]
    told = check_outputs(Wrapping(wrap), SIZE, 3)
    assert len(told) == (says is not None)
    assert says is None or says in told[0]
    y, features = torch.randn(4, 3), torch.randn(4, 8)
    for training in (False, True):
        assert torch.equal(logits_of(wrap(y, features, training), 4, 3), y)
    assert torch.equal(logits_of(wrap(y[:1], features[:1], False), 1, 3), y[:1])


def test_auxiliary_logits_of_training_are_told():
    class TwoHeads(Tiny):
        def __init__(self):
            super().__init__(3)
            self.auxiliary = nn.Linear(8, 3)

        def forward(self, x):
            features = self.unit1(self.stem(x))
            logits = self.head(self.unit2(features).mean((2, 3)))
            return (logits, self.auxiliary(features.mean((2, 3)))) if self.training else logits

    (told,) = check_outputs(TwoHeads(), SIZE, 3)
    assert told == "of the 2 tensors the network puts out in training, the first is taken as logits"


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_heads_put_out_logits(name):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=7, init_weights=False)
    (told,) = check_outputs(model, (3, 299, 299), 7)
    assert "in training, 'logits' is taken" in told


REFUSED = {
    "Wrapping puts out 7 values for 3 classes": lambda y, f, training: torch.cat([y, y, y[:, :1]], 1),
    "Wrapping puts out 1 value for 3 classes": lambda y, f, training: y[:, :1],
    "Wrapping puts out 2 values in 'logits' for 3 classes": lambda y, f, training: {"logits": y[:, :2]},
    "puts out in training 8 values for 3 classes": lambda y, f, training: f if training else y,
    r"'features' of shape \(images, 8\), 'y' of shape \(images, 2\); expected": (
        lambda y, f, training: {"features": f, "y": y[:, :2]}
    ),
    r"'a' of shape \(images, 3\), 'b' of shape \(images, 3\); expected are logits": (
        lambda y, f, training: {"a": y, "b": y + 1}
    ),
    r"a tensor of shape \(images, 3, 2, 2\); expected": lambda y, f, training: (
        y[:, :, None, None].expand(-1, -1, 2, 2) * 1
    ),
    "no tensor; expected": lambda y, f, training: "logits",
    "cannot be run in training: .*KeyError: target": lambda y, f, training: {}["target"] if training else y,
}


@pytest.mark.parametrize("says", REFUSED)
def test_outputs_without_plain_logits_get_one_line(says):
    with pytest.raises(BackboneError, match=says.replace("KeyError: target", "KeyError: 'target'")) as caught:
        check_outputs(Wrapping(REFUSED[says]), SIZE, 3)
    assert "\n" not in str(caught.value)


def test_features_as_wide_as_there_are_classes_are_not_taken_for_logits():
    with pytest.raises(BackboneError, match="the first and, made of that, the second, both of shape"):
        check_outputs(Wrapping(lambda y, f, training: (f, y), classes=8), SIZE, 8)
    (told,) = check_outputs(Wrapping(lambda y, f, training: (y, y.detach(), y.softmax(1))), SIZE, 3)
    assert "the first is taken as logits" in told


def test_logits_of_another_width_are_refused():
    with pytest.raises(BackboneError, match="the network puts out 7 values for 3 classes"):
        logits_of(torch.zeros(4, 7), 4, 3)
    with pytest.raises(BackboneError, match=r"the first of shape \(images, 8\), the second of shape \(images, 7\)"):
        logits_of((torch.zeros(4, 8), torch.zeros(4, 7)), 4, 3)


def test_a_network_whose_training_takes_too_much_memory_is_left_to_its_trials():
    class Large(Tiny):
        def forward(self, x):
            if self.training:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(x)

    assert check_outputs(Large(3), SIZE, 3) == ()


@pytest.mark.parametrize("form", ["alone", "under out", "as a map of one pixel", "in a data class"])
def test_a_network_can_be_made_to_put_out_its_logits_alone(form):
    model = Wrapping(TAKEN[form][0]).eval()
    x, names = torch.randn(4, *SIZE), list(model.state_dict())
    expected = logits_of(model(x), 4, 3)
    put_out_logits(model, SIZE, 3)
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == names
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    torch.testing.assert_close(program(x[:2]), expected[:2])
