import math

import pytest
import torch
from torch import Tensor, nn

from placesearch.exporting.block_source import CLASSES, WITHOUT_CHANNELS, block_source, needs_math
from placesearch.models.blocks import BLOCKS, make_block
from placesearch.placement import BlockSetting


def test_every_block_has_its_class():
    assert CLASSES.keys() == BLOCKS.keys()


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_class_has_the_parameters_of_the_block_and_computes_the_same(name, factors):
    names = {"torch": torch, "nn": nn, "Tensor": Tensor}
    if needs_math([name], factors=factors):
        names["math"] = math
    exec(block_source([name], factors=factors), names)  # noqa: S102 - our own
    numbers = {"reduction": 4, "kernel_size": 3}
    given = {setting: numbers[setting] for setting in BLOCKS[name].settings}
    own = make_block(BlockSetting(name, **given), 8).eval()
    channels = () if name in WITHOUT_CHANNELS else (8,)
    other = names[CLASSES[name][0]](*channels, **given, **({"factor": 1.5} if factors else {})).eval()
    other.load_state_dict(own.state_dict())
    if factors:
        own.factor = 1.5
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(own(x), other(x), rtol=1e-5, atol=1e-6)
    assert factors == ("factor" in block_source([name], factors=factors))
