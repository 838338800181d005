"""Networks put together at random: what has to hold at every site, whatever the network."""

import copy
import os
import pickle
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from random_networks import SIDE, networks
from torch import nn
from torch.nn.utils import parametrize

import placesearch as ps
from placesearch.models.insertion import blocks_of

SIZE = (3, SIDE, SIDE)
SETTINGS = ("se(r=2)", "cbam(r=2,k=3)", "eca(k=3)", "channel(r=2)", "spatial(k=3)", "cbam_residual(r=2,k=3)")
IN_CI = 8
COUNT = int(os.environ.get("PLACESEARCH_FUZZ", IN_CI))
"""How many networks; more by hand."""


def outputs(model, images, *, train):
    torch.manual_seed(1)  # for dropout
    with torch.no_grad():
        return copy.deepcopy(model).train(train)(images)


def placed(sites, draw):
    return ps.Placement.parse(" ".join(f"{site.name}={draw(st.sampled_from(SETTINGS))}" for site in sites))


def runs_of_blocks(model, images):
    """Say how often the block at each site runs in a forward."""
    model, runs = copy.deepcopy(model), Counter()
    for site, block in blocks_of(model).items():
        block.register_forward_hook(lambda *_, site=site: runs.update([site]))
    with torch.no_grad():
        model(images)
    return runs


def close(one, other):
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4 * max(1.0, float(one.abs().max())))


@pytest.mark.slow
@pytest.mark.skipif("PLACESEARCH_FUZZ" not in os.environ, reason="by hand until it is quick: PLACESEARCH_FUZZ=100")
@pytest.mark.timeout(1200)
@settings(
    max_examples=COUNT,
    phases=[Phase.generate],  # to make a failing network small takes minutes
    deadline=None,
    derandomize=COUNT == IN_CI,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(networks(), st.data())
def test_blocks_at_every_site_of_a_random_network(model, data):
    images = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0))
    plain = {train: outputs(model, images, train=train) for train in (False, True)}
    before = copy.deepcopy(model.state_dict())
    sites = ps.find_sites(model, SIZE)
    assert sites
    table = ps.CostTable(model, SIZE)
    everywhere = placed(sites, data.draw)
    alone = placed([data.draw(st.sampled_from(sites))], data.draw)
    for placement in (everywhere, alone):
        same = ps.insert(model, placement, input_size=SIZE, initial="identity", seed=0)
        for train in (False, True):
            assert torch.equal(outputs(same, images, train=train), plain[train]), (placement, train)
        with torch.no_grad():
            for name, weight in same.named_parameters():
                if ".attention." in name:
                    weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
        assert close(outputs(same, images, train=False), outputs(ps.fold(same), images, train=False)), placement
        stock = ps.insert(model, placement, input_size=SIZE, seed=0).eval()
        expected = outputs(stock, images, train=False)
        assert runs_of_blocks(stock, images) == dict.fromkeys(placement, 1), placement
        counted, told = ps.profile(stock, SIZE), table.cost(placement)
        assert (counted.macs, counted.macs_full, counted.params) == (told.macs, told.macs_full, told.params), placement
        loaded = stock.load_state_dict(model.state_dict(), strict=False)
        assert not loaded.unexpected_keys
        assert all(".attention." in key for key in loaded.missing_keys)
        changed = [nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(stock)), copy.deepcopy(stock)]
        if not any(parametrize.is_parametrized(module) for module in stock.modules()):  # torch pickles none of these
            changed.append(pickle.loads(pickle.dumps(stock)))  # noqa: S301 - our own
        for network in changed:
            assert close(outputs(network, images, train=False), expected), placement
        again = ps.insert(model, placement, input_size=SIZE, seed=1)
        again.load_state_dict(stock.state_dict())
        assert torch.equal(outputs(again, images, train=False), expected), placement
        stock.train()(images).square().sum().backward()
        without = [name for name, weight in stock.named_parameters() if ".attention." in name and weight.grad is None]
        assert not without, placement
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
