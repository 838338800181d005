import io

import pytest
import torch
from networks import Tiny, tiny

from placesearch.errors import InputError
from placesearch.exporting.torch_program import torch_program
from placesearch.models.insertion import insert
from placesearch.placement import Placement

SIZE = (3, 32, 32)


def network():
    torch.manual_seed(0)
    placement = Placement.parse("unit1.bn2=cbam_bn(r=4,k=3) unit2=se(r=2)")
    return insert(tiny(num_classes=10), placement, input_size=SIZE).eval()


def test_the_program_computes_the_same_for_any_number_of_images():
    model = network()
    content, differs = torch_program(model, SIZE)
    assert differs <= 1e-6
    program = torch.export.load(io.BytesIO(content)).module()
    for number in (1, 2, 5):
        x = torch.randn(number, *SIZE)
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x))


def test_the_program_tells_no_paths_of_the_machine_that_made_it():
    content, _ = torch_program(network(), SIZE)
    assert Tiny.forward.__code__.co_filename.encode() not in content


class Undecided(Tiny):
    """A network whose way depends on what it sees."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def test_a_network_that_cannot_be_followed_is_refused_in_one_line():
    with pytest.raises(InputError, match="torch.export cannot follow Undecided: ") as caught:
        torch_program(Undecided(10).eval(), SIZE)
    assert "\n" not in str(caught.value)
