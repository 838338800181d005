"""The recipes of the README, each run as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import placesearch as ps

ROOT = Path(__file__).parent.parent
BEST = "reports/examples/resnet18-cifar10/architectures/best.yaml"


def recipe(heading):
    """Return the code block under a heading of the README."""
    section = (ROOT / "README.md").read_text().split(f"### {heading}\n")[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


@pytest.fixture
def place(workplace):
    """A folder with an architecture where the recipes look for one; it has blocks, whatever a study recommends."""
    path = workplace / BEST
    path.parent.mkdir(parents=True)
    placement = ps.Placement.parse("layer1.0.bn2=se(r=16) layer4.1.bn2=cbam(r=16,k=7)")
    ps.Architecture(backbone="resnet18", num_classes=10, input_size=(3, 97, 97), placement=placement).save(path)
    return workplace


def test_every_recipe_is_run_here():
    text = (ROOT / "README.md").read_text()
    part = text.split("## Hand-over\n")[1].split("\n## ")[0]
    tested = Path(__file__).read_text()
    for heading in re.findall(r"^### (.+)$", part, re.MULTILINE):
        assert f'recipe("{heading}")' in tested


@pytest.mark.slow
def test_the_detector_has_the_features_of_the_network_at_all_stages(place):
    names = {}
    exec(recipe("As the backbone of a detector"), names)  # noqa: S102 - our own README
    assert [set(found) for found in names["found"]] == [{"boxes", "labels", "scores"}]
    model, body = names["architecture"].build().eval(), names["body"].eval()
    body.load_state_dict(model.state_dict(), strict=False)
    images = torch.rand(1, 3, 97, 97)
    assert any("attention" in name for name, _ in body.named_modules())
    with torch.no_grad():
        maps = body(images)
        assert torch.equal(model.fc(maps["3"].mean((2, 3))), model(images))  # blocks included
    assert [tuple(maps[f"{level}"].shape[1:3]) for level in range(4)] == [(64, 25), (128, 13), (256, 7), (512, 4)]
    detector = names["detector"].train()
    target = {"boxes": torch.tensor([[10.0, 10.0, 60.0, 50.0]]), "labels": torch.tensor([1])}
    sum(detector([torch.rand(3, 128, 160)], [target]).values()).backward()
    gate = next(weight for name, weight in detector.named_parameters() if "attention" in name)
    assert gate.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore")  # Lightning's own, on workers and versions
def test_lightning_trains_the_network(place):
    pytest.importorskip("lightning", reason="needs lightning, which is not installed here")
    names = {}
    torch.manual_seed(0)
    before = ps.Architecture.load(BEST).build(8).state_dict()
    torch.manual_seed(0)
    exec(recipe("In a Lightning module"), names)  # noqa: S102 - our own README
    after = names["module"].model.state_dict()
    assert names["trainer"].global_step == 2
    assert any(not torch.equal(before[name], after[name]) for name in after if "attention" in name)


STAND_IN = """
import argparse
from pathlib import Path

import torch
from timm.data import create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import create_model, safe_model_name
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV2

parser = argparse.ArgumentParser()
parser.add_argument("data_dir")
parser.add_argument("--model")
parser.add_argument("--num-classes", type=int)
args = parser.parse_args()
torch.manual_seed(0)
model = create_model(
    args.model, pretrained=False, in_chans=3, num_classes=args.num_classes, drop_rate=0.0, drop_path_rate=None,
    drop_block_rate=None, global_pool=None, bn_momentum=None, bn_eps=None, scriptable=False, checkpoint_path="",
)
assert safe_model_name(args.model) == "winner"
assert model.num_classes == args.num_classes
config = resolve_data_config(vars(args), model=model)
assert config["input_size"] == (3, 97, 97), config
assert config["mean"] == (0.5,) * 3
optimizer = create_optimizer_v2(model, opt="sgd", lr=0.005, weight_decay=1e-4, momentum=0.9)
average = ModelEmaV2(model)
saver = CheckpointSaver(model=model, optimizer=optimizer, model_ema=average, checkpoint_dir=".", recovery_dir=".")
images, labels = torch.rand(4, *config["input_size"]), torch.tensor([0, 1, 2, 3])
losses = []
for _ in range(4):
    loss = LabelSmoothingCrossEntropy(0.1)(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    average.update(model)
    losses.append(float(loss.detach()))
assert losses[-1] < losses[0], losses
saver.save_checkpoint(0, metric=0.5)
assert any("attention" in name for name in torch.load("last.pth.tar", weights_only=False)["state_dict"])
print("trained")
"""


@pytest.mark.slow
def test_timm_finds_the_network_and_trains_it(place):
    """timm's script is not in its package; the stand-in takes the steps that it takes with a model."""
    pytest.importorskip("timm", reason="needs timm")
    Path("winner.py").write_text(recipe("In timm's train script"))
    Path("train.py").write_text(STAND_IN)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    ended = subprocess.run(
        [sys.executable, "winner.py", "train.py", "images", "--model", "winner", "--num-classes", "4"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "trained\n"
