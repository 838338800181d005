"""A part of `benchmarks/every_network.py`, which looks at all networks of torchvision and families of timm."""

import random

import pytest
import torchvision
from benchmarks.every_network import TIMM, check

QUICK = ["resnet18", "mobilenet_v3_small", "timm:regnetx_004"]
HUGE = {
    "regnet_y_128gf",
    "convnext_large",
    "efficientnet_v2_l",
    "efficientnet_b7",
}  # minutes each; the benchmark has them
CONVOLUTIONAL = [
    name
    for name in [*torchvision.models.list_models(module=torchvision.models), *(f"timm:{name}" for name in TIMM)]
    if not name.startswith(("vit", "swin", "maxvit")) and name not in {*QUICK, "vgg11", *HUGE}
]


def judge(name):
    seen = check(name)
    assert seen.errors["eval"] <= 1e-5
    assert seen.errors["train"] <= 1e-5
    assert seen.reached == seen.blocks > 0
    assert seen.fold_errors["float64"] <= 1e-9
    # more than 1e-4 only where a deep network with random weights blows rounding up, as it then does in fp64
    assert seen.fold_errors["float32"] <= max(1e-4, 1e10 * seen.fold_errors["float64"])


@pytest.mark.parametrize("name", QUICK)
def test_a_block_at_every_site_can_start_as_the_identity_and_learn(name):
    judge(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg11", *random.Random(0).sample(CONVOLUTIONAL, 8)])
def test_the_same_for_a_sample_of_all_networks(name):
    judge(name)
