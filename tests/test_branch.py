import pytest
import torch
from networks import Tiny
from test_loop import CPU, protocol
from torch import nn

from placesearch.errors import StudyError
from placesearch.models.insertion import insert
from placesearch.models.weights import Checkpoint, load_weights
from placesearch.placement import Placement
from placesearch.training.branch import load_branch
from placesearch.training.datasets import load_data
from placesearch.training.loop import Trainer


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", 32)


def tiny():
    torch.manual_seed(0)
    return Tiny(10)


def finished(trainer, model, branch=None):
    steps = list(trainer.train(model, branch))
    return steps, trainer.validate(model)


def branched(trainer, text="none"):
    """A candidate with the branch's weights, its blocks as the identity, and the branch."""
    branch = trainer.train_branch(tiny())
    model = insert(Tiny(10), Placement.parse(text), input_size=(3, 32, 32), initial="identity", seed=0)
    load_weights(model, Checkpoint("branch", branch.weights))
    return model, branch


def test_the_plain_network_ends_where_it_would_have_without_the_stop(digits):
    """Weights, momentum, schedule, batches and augmentations all go on, to the last bit."""
    trainer = Trainer(digits, protocol(epochs=3), CPU)
    whole_steps, whole = finished(trainer, tiny())
    rest_steps, rest = finished(trainer, *branched(trainer))
    assert (rest.accuracy, rest.loss) == (whole.accuracy, whole.loss)
    assert torch.equal(rest.correct, whole.correct)
    assert whole_steps == list(range(1, trainer.steps + 1))
    assert rest_steps == whole_steps[trainer.branch_step :]


def test_without_its_momentum_it_would_end_elsewhere(digits):
    trainer = Trainer(digits, protocol(epochs=3), CPU)
    model, branch = branched(trainer)
    _, rest = finished(trainer, model, type(branch)(branch.weights, {}))
    assert rest.loss != finished(trainer, tiny())[1].loss


def test_every_candidate_goes_on_from_the_same_point_with_the_same_batches(digits):
    class Watching(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.seen = inner, []

        def forward(self, x):
            self.seen.append((x.clone(), self.inner(x).detach()))
            return self.inner(x)

    trainer, seen = Trainer(digits, protocol(epochs=2), CPU), []
    for text in ("none", "unit1.bn2=cbam(r=2,k=3)"):
        model, branch = branched(trainer, text)
        watching = Watching(model)
        prefixed = type(branch)(branch.weights, {f"inner.{name}": tensor for name, tensor in branch.momentum.items()})
        list(trainer.train(watching, prefixed))
        seen.append(watching.seen)
    assert len(seen[0]) == trainer.steps - trainer.branch_step
    assert all(torch.equal(one[0], two[0]) for one, two in zip(*seen, strict=True))
    torch.testing.assert_close(seen[0][0][1], seen[1][0][1])  # the first logits: the block is the identity
    assert not torch.allclose(seen[0][-1][1], seen[1][-1][1])


def test_a_branch_reads_back_equal(digits, tmp_path):
    branch = Trainer(digits, protocol(), CPU).train_branch(tiny())
    branch.save(tmp_path / "b.safetensors")
    again = load_branch(tmp_path / "b.safetensors")
    for one, two in ((branch.weights, again.weights), (branch.momentum, again.momentum)):
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert set(branch.momentum) == {name for name, _ in Tiny(10).named_parameters()}


def test_a_damaged_branch_gets_one_line(tmp_path):
    (tmp_path / "b.safetensors").write_bytes(b"no tensors")
    with pytest.raises(StudyError, match=r"b.safetensors is damaged .*remove it"):
        load_branch(tmp_path / "b.safetensors")
