"""The command `placesearch export`, and a part of `benchmarks/exports.py`, which looks at more blocks and backbones."""

import random
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.exports import BACKBONES, placements, prove
from click.testing import CliRunner
from test_building import saved, tiny
from test_onnx_program import WITHOUT

from placesearch.cli.commands import cli
from placesearch.models.architecture import Architecture
from placesearch.models.blocks import BLOCKS

ALLOW = ["--allow", "mine:tiny"]


def call(*arguments):
    done = CliRunner().invoke(cli, ["export", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def refuse(monkeypatch, capsys, *arguments):
    """Run the command as from a shell; return its one line."""
    from placesearch.cli import main

    monkeypatch.setattr("sys.argv", ["placesearch", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1)
    return err


def some(backbones, seed):
    """Take a backbone and a block by a seed; the placement has the block at one site of each kind."""
    chance = random.Random(seed)
    return chance.choice(backbones), chance.choice(list(BLOCKS))


def judge(backbone, block, formats, *, apart=True):
    chosen = placements(backbone, block)
    for seen in prove(backbone, chosen if apart else {"all": chosen["all"]}, formats):
        assert max(seen.differences.values()) <= 1e-4
        assert seen.change > 1e-3  # else the comparison would not notice a block that was left out
        assert seen.back


@pytest.mark.slow
def test_a_sample_of_modules_computes_the_same_where_placesearch_is_barred():
    judge(*some(["resnet18", "mobilenet_v3_small"], seed=1), ["py"])


@pytest.mark.slow
def test_a_sample_of_programs_of_torch_computes_the_same_where_placesearch_is_barred():
    judge(*some(["resnet18"], seed=2), ["pt2"], apart=False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 6))
def test_the_same_for_all_formats_and_a_larger_sample(seed):
    pytest.importorskip("onnxruntime", reason=WITHOUT)
    pytest.importorskip("onnxscript", reason=WITHOUT)
    judge(*some(BACKBONES, seed), ["py", "onnx", "pt2"])


@pytest.mark.slow
def test_an_architecture_file_is_exported_beside_itself(workplace):
    tiny().save("a.yaml")
    assert call("a.yaml", "--format", "pt2", *ALLOW).splitlines()[0] == "wrote a.pt2"
    assert torch.export.load("a.pt2").module()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    out = call("a.yaml", "--format", "pt2", *ALLOW, "--weights", saved(tiny().build(seed=1).state_dict()))
    assert "wrote a.pt2, in place of what was there\nchecked: on 1 and 3 images its logits differ" in out
    assert "fresh" not in out
    assert call("a.yaml", "--format", "yaml", *ALLOW) == "a.yaml holds it already\n"
    assert call("a.yaml", "--format", "yaml", *ALLOW, "--output", "b.yaml") == "wrote b.yaml\n"
    assert Architecture.load("b.yaml", ["mine:tiny"]) == tiny()


@pytest.mark.slow
def test_a_study_exports_its_pick_or_a_trial(workplace):
    flags = [
        "--input-size",
        "32",
        "--reductions",
        "2,4",
        "--epochs",
        "1",
        "--trials",
        "3",
        "--jobs",
        "1",
        "--name",
        "s",
    ]
    assert CliRunner().invoke(cli, ["run", "--backbone", "mine:tiny", "--quiet", *flags]).exit_code == 0
    folder = Path("reports/s/architectures")
    assert call("s", "--format", "yaml", *ALLOW) == f"{folder}/best.yaml holds it already\n"
    assert call("s", "--format", "pt2", *ALLOW).startswith(f"wrote {folder}/best.pt2\nchecked: ")
    (folder / "trial-1.yaml").unlink(missing_ok=True)
    assert call("s", "--format", "yaml", "--trial", 1, *ALLOW) == f"wrote {folder}/trial-1.yaml\n"
    assert Architecture.load(folder / "trial-1.yaml", ["mine:tiny"]).found.trial == 1
    refused = CliRunner().invoke(cli, ["export", "s", "--format", "yaml", "--trial", "9", *ALLOW])
    assert str(refused.exception) == "study 's' has no trial 9 that ended; there are: 0 to 2"
    refused = CliRunner().invoke(cli, ["export", "s", "--format", "pt2"])
    assert str(refused.exception) == "study 's' names code, 'mine:tiny'; if you trust it, add --allow mine:tiny"


HEAD = "placesearch: 1\nbackbone: resnet18\nnum_classes: 10\ninput_size: [3, 32, 32]\n"


@pytest.mark.parametrize(
    ("text", "arguments", "says"),
    [
        (HEAD, ["--format", "pdf"], "unknown format 'pdf'; known: yaml, py, onnx, pt2"),
        (HEAD, [], "Missing option '--format'"),
        (HEAD, ["--format", "py", "--trial", "3"], "--trial 3 is one of a study, and a.yaml is an architecture file"),
        (HEAD, ["--format", "pt2", "--weights", "nothing.pt"], "cannot read weights nothing.pt"),
        (HEAD, ["--format", "pt2", "--weights", "trap.py"], "trap.py is damaged, or holds more than tensors"),
        (HEAD, ["--format", "py", "--output", "nowhere/a.py"], "cannot write nowhere/a.py"),
        (
            HEAD.replace(": 1\n", ": 2\n", 1),
            ["--format", "py"],
            "has format version 2; this placesearch reads version 1",
        ),
        (HEAD.replace("resnet18", "trap:network"), ["--format", "py"], "names code, 'trap:network'"),
        (HEAD.replace("resnet18", "trap:network"), ["--format", "py", "--allow", "trap:network"], "code of your own"),
        (HEAD.replace("resnet18", "!!python/object/apply:os.system [touch hit]"), ["--format", "py"], "is damaged"),
        (HEAD.replace("resnet18", "../../trap"), ["--format", "py"], "unknown backbone '../../trap'"),
        (HEAD.replace("10", "9" * 40), ["--format", "py"], "num-classes"),
        (HEAD.replace("10", "1000000") + "stem: &a [*a]\n", ["--format", "py"], "a.yaml"),
        (HEAD.replace("resnet18", "vgg16").replace("10", "1000000"), ["--format", "pt2"], "parameters; at most"),
        (HEAD.replace("32, 32", "8192, 8192"), ["--format", "pt2"], "too large"),
        (HEAD + "placement: [{site: layer1.0, block: 'trap:Gate'}]\n", ["--format", "pt2"], "names code, 'trap:Gate'"),
    ],
)
def test_bad_input_gets_one_line_and_nothing_is_imported_or_written(
    workplace, monkeypatch, capsys, text, arguments, says
):
    Path("trap.py").write_text("open('hit', 'w')")
    Path("a.yaml").write_text(text)
    assert says in refuse(monkeypatch, capsys, "a.yaml", *arguments)
    assert "trap" not in sys.modules
    assert sorted(path.name for path in Path().iterdir()) == ["a.yaml", "mine.py", "trap.py"]


def test_a_missing_extra_gets_one_line_that_says_how_to_get_it(workplace, monkeypatch, capsys):
    Path("a.yaml").write_text(HEAD)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "pip install 'placesearch[onnx]'" in refuse(monkeypatch, capsys, "a.yaml", "--format", "onnx")


def test_a_study_that_is_not_there_gets_one_line(workplace, monkeypatch, capsys):
    assert "no study 'nothing'" in refuse(monkeypatch, capsys, "nothing", "--format", "py")
