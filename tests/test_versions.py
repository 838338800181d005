import shutil
from pathlib import Path

import placesearch
from placesearch.evaluation.versions import PACKAGES, SCORING, code_fingerprint, versions


def test_every_package_that_results_depend_on_has_a_version_and_the_code_a_hash():
    found = versions()
    assert list(found) == [*PACKAGES, "code"]
    assert found["code"] == code_fingerprint()
    assert len(found["code"]) == 16


def test_the_hash_is_the_same_elsewhere_and_changes_with_any_letter_or_name(tmp_path, monkeypatch):
    here = code_fingerprint()
    copy = Path(shutil.copytree(Path(placesearch.__file__).parent, tmp_path / "placesearch"))
    (copy / "__pycache__").mkdir(exist_ok=True)
    monkeypatch.setattr(placesearch, "__file__", str(copy / "__init__.py"))
    assert code_fingerprint() == here
    source = copy / "errors.py"
    source.write_text(source.read_text() + " ")
    assert code_fingerprint() != here
    source.write_text(source.read_text()[:-1])
    assert code_fingerprint() == here
    source.rename(copy / "mistakes.py")
    assert code_fingerprint() != here


def test_the_hash_of_what_scores_depend_on_changes_with_it_alone(tmp_path, monkeypatch):
    copy = Path(shutil.copytree(Path(placesearch.__file__).parent, tmp_path / "placesearch"))
    monkeypatch.setattr(placesearch, "__file__", str(copy / "__init__.py"))
    here = code_fingerprint(SCORING)
    assert here != code_fingerprint()
    for name in ("cli/commands.py", "reporting/page.py"):
        (copy / name).write_text("")
    assert code_fingerprint(SCORING) == here
    for name in ("training/loop.py", "models/blocks.py", "evaluation/candidate.py"):
        before = code_fingerprint(SCORING)
        (copy / name).write_text("")
        assert code_fingerprint(SCORING) != before, name
