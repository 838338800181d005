import pytest

from placesearch.errors import StudyError
from placesearch.placement import Placement
from placesearch.verdict.trainings import Training, TrainingFile


def training(**changes):
    values = {"placement": Placement.parse("a=se(r=4)"), "backbone": "mine:tiny", "reference": None, "start": "scratch"}
    return Training(**{**values, "epochs": 3, "seed": 7, "state": "COMPLETE", "accuracy": 0.1 + 0.2, **changes})


def test_trainings_are_read_as_they_were_added(tmp_path):
    kept = TrainingFile(tmp_path / "confirm.jsonl")
    assert kept.read() == []
    both = [training(), training(state="FAIL", accuracy=None, error="nan, so\n")]
    for one in both:
        kept.add(one)
    assert TrainingFile(tmp_path / "confirm.jsonl").read() == both


@pytest.mark.parametrize("torn", [b'{"placement": "no', b'{"placement": "none"}', b"7"])
def test_a_torn_last_line_is_left_out_and_cut_off_before_the_next(tmp_path, torn):
    path = tmp_path / "confirm.jsonl"
    kept = TrainingFile(path)
    kept.add(training())
    with path.open("ab") as file:
        file.write(torn)
    assert kept.read() == [training()]
    kept.mend()
    kept.add(training(seed=8))
    assert kept.read() == [training(), training(seed=8)]


@pytest.mark.parametrize("damage", [b"x\n", b"{}\n", b"[]\n", b'{"placement": "none", "surprise": 1}\n'])
def test_a_damaged_line_is_refused_and_the_file_left_as_it_is(tmp_path, damage):
    path = tmp_path / "confirm.jsonl"
    TrainingFile(path).add(training())
    path.write_bytes(damage + path.read_bytes())
    before = path.read_bytes()
    for use in (TrainingFile(path).read, TrainingFile(path).mend):
        with pytest.raises(StudyError, match="damaged in line 1"):
            use()
    assert path.read_bytes() == before
