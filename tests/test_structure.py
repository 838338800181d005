"""The map of the house: which room may know which, and who may use which third-party package."""

import ast
import sys
from pathlib import Path

import pytest

import placesearch

PACKAGE = Path(placesearch.__file__).parent

ROOMS = [
    "errors",
    "interrupts",
    "placement",
    "records",
    "front",
    "storage_url",
    "config",
    "models",
    "costs",
    "training",
    "evaluation",
    "search",
    "verdict",
    "reporting",
    "exporting",
    "definition",
    "prices",
    "plan",
    "measured",
    "staffing",
    "searching",
    "study",
    "confirming",
    "joining",
    "dashboard",
    "earnest",
    "cli",
]
"""Lowest first; a room knows only those before it."""

THIRD_PARTY = {
    "torch": {
        "models",
        "costs",
        "training",
        "evaluation",
        "exporting",
        "plan",
        "measured",
        "staffing",
        "study",
        "confirming",
        "joining",
        "earnest",
        "cli",
    },
    "torchvision": {"models", "training", "exporting"},
    "optuna": {"search", "dashboard"},
    "optuna_dashboard": {"dashboard"},
    "fvcore": {"costs"},
    "pandas": {"reporting", "study", "cli"},
    "rich": {"cli"},
    "click": {"cli"},
    "pydantic": {"config", "models"},
    "yaml": {"config", "models", "definition", "measured", "earnest"},
    "sklearn": {"training"},
    "PIL": {"training"},
    "numpy": {"front", "costs", "training", "evaluation", "search", "verdict", "reporting", "plan"},
    "plotly": {"reporting"},
    "jinja2": {"reporting", "exporting"},
    "markupsafe": {"reporting"},
    "filelock": {"evaluation", "search", "study", "earnest", "joining"},
    "safetensors": {"models", "training", "exporting", "earnest"},
    "scipy": {"costs", "search", "verdict"},
    "threadpoolctl": {"search"},
    "sqlalchemy": {"search"},
}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path):
    """Full names of everything that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield f"{node.module}"


def test_every_room_is_on_the_map():
    assert {room_of(path) for path in FILES} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_knows_only_those_before_it(path):
    room = room_of(path)
    for name in imported(path):
        if name.startswith("placesearch."):
            other = name.split(".")[1]
            assert other == room or ROOMS.index(other) < ROOMS.index(room), f"{room} knows {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_third_party_packages_stay_in_their_rooms(path):
    for name in imported(path):
        top = name.split(".")[0]
        if top != "placesearch" and top not in sys.stdlib_module_names:
            assert room_of(path) in THIRD_PARTY[top], f"{room_of(path)} uses {top}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_stand_on_top_of_their_file(path):
    tree = ast.parse(path.read_text())
    inner = {
        ast.unparse(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef)
        for node in ast.walk(outer)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert inner <= {"from sklearn.datasets import load_digits"}  # 1.5 s that only one data set needs


def test_public_names_are_complete_and_sorted():
    assert placesearch.__all__ == sorted(placesearch.__all__)
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    names = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(names) == placesearch.__all__
    for name in placesearch.__all__:
        assert getattr(placesearch, name).__doc__


def test_each_module_has_its_test_file():
    tested = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    modules = {path.stem for path in FILES if path.stem != "__init__"}
    elsewhere = {"errors", "records", "samplers", "definition", "plan", "prices", "commands", "worker", "code"}
    elsewhere |= {"staffing"}  # test_workers, test_study
    elsewhere |= {"searching"}  # test_study, test_joining
    elsewhere |= {"sharing"}  # test_joining
    elsewhere |= {"training_view", "options"}  # test_training_commands, test_cli
    assert modules - tested <= elsewhere
    assert not elsewhere - modules


def test_the_map_in_the_contributing_notes_names_every_room():
    text = (PACKAGE.parent / ".github" / "CONTRIBUTING.md").read_text()
    assert all(f"`{room}`" in text or f"`{room}/`" in text for room in ROOMS)


def test_the_study_file_that_comes_along_says_what_the_defaults_are():
    import torch

    from placesearch.config import StudyConfig, read_definition
    from placesearch.plan import prepare

    cpu = torch.device("cpu")
    written = StudyConfig(**read_definition(PACKAGE.parent / "studies" / "resnet18-digits.yaml"))
    assert prepare(StudyConfig(backbone="resnet18"), cpu).definition.config == prepare(written, cpu).definition.config
