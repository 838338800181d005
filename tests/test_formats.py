import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_building import saved, tiny

import placesearch as ps
from placesearch.errors import InputError
from placesearch.exporting.formats import FORMATS, export, format_named
from placesearch.models.architecture import Architecture
from placesearch.placement import Placement


def resnet(placement="layer4.1.bn2=se(r=16)"):
    return Architecture(
        backbone="resnet18", num_classes=10, input_size=(3, 64, 64), placement=Placement.parse(placement)
    )


def test_every_format_is_a_text_or_a_program_and_says_what_it_is():
    for line in FORMATS.values():
        assert line.what
        assert (line.text is None) != (line.program is None)
    assert len({line.suffix for line in FORMATS.values()}) == len(FORMATS)
    assert ps.export is export


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(InputError, match=r"unknown format 'onxx'; did you mean 'onnx'\?; known: yaml, py, onnx, pt2"):
        export(resnet(), "onxx", tmp_path / "network")
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_said_before_anything_is_read_or_built(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r"pip install 'placesearch\[onnx\]'"):
        format_named("onnx")
    assert format_named("pt2") is FORMATS["pt2"]


def test_the_architecture_file_reads_back(tmp_path):
    done = export(resnet(), "yaml", tmp_path / "network.yaml")
    assert (done.files, done.replaced, done.difference) == ((tmp_path / "network.yaml",), (), None)
    assert Architecture.load(tmp_path / "network.yaml") == resnet()


def test_weights_of_a_text_go_into_a_file_beside_it_and_build_reads_them(workplace):
    architecture = resnet()
    given = architecture.build(seed=5).state_dict()
    torch.save(given, "trained.pt")
    done = export(architecture, "py", "network.py", weights="trained.pt")
    assert done.files == (Path("network.py"), Path("network.safetensors"))
    names = {"__name__": "network"}
    exec(compile(Path("network.py").read_text(), "network.py", "exec"), names)  # noqa: S102 - it is what is tested
    for weights in ("network.safetensors", "trained.pt"):
        built = names["build"](weights=weights).state_dict()
        assert list(built) == list(given)
        assert all(torch.equal(built[name], tensor) for name, tensor in given.items())
    with pytest.raises(RuntimeError, match="size mismatch for fc"):
        names["build"](num_classes=3, weights="network.safetensors")


def test_weights_that_lie_beside_it_already_stay_as_they_are(workplace):
    before = Path(saved(tiny().build(seed=3).state_dict(), "network.safetensors")).stat()
    done = export(tiny(), "yaml", "network.yaml", weights="network.safetensors")
    assert done.files == (Path("network.yaml"),)
    assert Path("network.safetensors").stat() == before


def test_a_program_holds_the_weights_that_it_is_given(workplace):
    given = tiny().build(seed=3)
    done = export(tiny(), "pt2", "network.pt2", weights=saved(given.state_dict()))
    assert done.files == (Path("network.pt2"),)
    assert done.difference <= 1e-6
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load("network.pt2").module()(x), given.eval()(x))


def test_what_was_there_is_replaced_and_said(workplace):
    Path("network.py").write_text("mine")
    done = export(resnet(), "py", "network.py")
    assert done.replaced == done.files == (Path("network.py"),)
    assert "def build(" in Path("network.py").read_text()
    assert not list(Path().glob(".network*"))


def test_nothing_is_written_if_anything_is_wrong(workplace):
    tensors = tiny().build().state_dict()
    tensors.pop("head.bias")
    Path("network.yaml").write_text("mine")
    with pytest.raises(InputError, match="lacks 'head.bias'"):
        export(tiny(), "yaml", "network.yaml", weights=saved(tensors))
    assert Path("network.yaml").read_text() == "mine"
    assert not Path("network.safetensors").exists()


def test_a_program_that_computes_something_else_is_not_written(workplace, monkeypatch):
    monkeypatch.setattr("placesearch.exporting.checking.LARGEST_DIFFERENCE", -1.0)
    with pytest.raises(InputError, match="nothing was written"):
        export(tiny(), "pt2", "network.pt2")
    assert not Path("network.pt2").exists()


@pytest.mark.parametrize("path", ["nowhere/network.yaml", "mine.py/network.yaml", "."])
def test_a_place_where_nothing_can_be_written_gets_one_line(workplace, path):
    with pytest.raises(InputError, match="cannot write") as caught:
        export(tiny(), "yaml", path)
    assert "\n" not in str(caught.value)
    assert sorted(Path().iterdir()) == [Path("mine.py")]


def test_weights_of_safetensors_are_written_as_such(workplace):
    given = tiny().build(seed=3).state_dict()
    export(tiny(), "yaml", "network.yaml", weights=saved(given))
    assert set(safetensors.torch.load_file("network.safetensors")) == set(given)
