from types import SimpleNamespace

import pytest

from placesearch.cli import result
from placesearch.cli.result import next_steps, show_result
from placesearch.config import StudyConfig
from placesearch.models.architecture import Architecture
from placesearch.placement import BlockSetting, Placement
from placesearch.records import TrialRecord
from placesearch.reporting.writing import Subject
from placesearch.search.findings import find
from placesearch.study import Study
from placesearch.verdict.verdicts import Confirmed, Verdict

SITES = [f"layer{stage}.{block}.bn2" for stage in range(1, 5) for block in range(2)]
SE = BlockSetting.parse("se(r=16)")
PLACEMENTS = [Placement(dict.fromkeys(SITES[:count], SE)) for count in range(len(SITES) + 1)]
ARCHITECTURE = Architecture(backbone="resnet18", num_classes=10, input_size=(3, 32, 32))


def trial(number, **values):
    fields = {"placement": PLACEMENTS[number], "val_accuracy": 0.9 + 0.005 * number, "state": "COMPLETE", "epochs": 1}
    fields |= {"macs": 37_523_456, "macs_full": 38_000_000 + number, "params": 11_689_512 + 1000 * number}
    fields |= {"latency_ratio": 1.0, "latency_ratio_low": 0.99, "latency_ratio_high": 1.01}
    return TrialRecord(trial=number, reference=None if number else "plain", **(fields | values))


def study(records, objectives=("accuracy", "params"), confirmed=None):
    subject = Subject("s", objectives, ARCHITECTURE, (), 359)
    return Study(subject, tuple(records), find(records, {}), confirmed, "the study has its 9 trials", 75.0, 0.9)


@pytest.fixture
def shown(monkeypatch, capsys):
    """Print a result in a pipe of so many columns and return its lines."""
    definition = SimpleNamespace(config=StudyConfig(backbone="resnet18", data="cifar10"))
    monkeypatch.setattr(result, "read_definition_of", lambda name: definition)

    def show(found, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        show_result(found)
        return capsys.readouterr().out.splitlines()

    return show


def test_at_80_columns_placements_stand_below_their_numbers_and_nothing_is_cut(shown):
    lines = shown(study([trial(number) for number in range(9)]))
    start = lines.index("front of s")
    header = "trial estimate (90 %) val. accuracy params latency / plain"  # macs are no objective of this study
    assert " ".join(lines[start + 1].split()) == header
    assert lines[start + 2] == "     placement"
    assert lines[start + 3].startswith("    0  9")
    assert lines[start + 4] == "     plain"
    text = "\n".join(lines)
    assert "…" not in text
    for placement in PLACEMENTS[1:]:
        assert str(placement) in " ".join(text.split())
    front = lines[start : lines.index("", start)]
    assert max(map(len, front)) <= 80


def test_with_more_room_placements_stand_beside_and_all_costs_are_there(shown):
    lines = shown(study([trial(number) for number in range(4)], ("accuracy", "macs_full")), 160)
    header = lines[lines.index("front of s") + 1]
    assert header.split()[-7:] == ["macs", "macs_full", "params", "latency", "/", "plain", "placement"]
    assert lines[lines.index("front of s") + 2].endswith("1.00 (0.99 to 1.01)  plain")


def test_the_front_is_drawn_and_the_commands_to_go_on_with_are_told(shown):
    lines = shown(study([trial(number) for number in range(9)]))
    assert lines[0] == "the study has its 9 trials; searched 1 min 15 s; 90 % of the workers' time in training steps"
    at = lines.index("estimated accuracy, %")
    assert "parameters" in lines[at + 9]
    assert "● front   ■ plain   ◆ best.yaml, trial " in lines[at + 10]
    assert lines[-4:] == [
        "to go on:",
        "  placesearch dashboard s           # look at it in a browser",
        "  placesearch confirm s             # which gains are real",
        "  placesearch export s --format py  # best.yaml as a Python file",
    ]
    lonely = "\n".join(shown(study([trial(0)])))
    assert "accuracy, %" not in lonely  # a picture of one point
    assert "  placesearch confirm s " in lonely


def test_if_nothing_succeeded_there_is_nothing_to_go_on_with(shown):
    lines = shown(study([trial(0, state="FAIL", val_accuracy=None, error="out of memory")]))
    assert "1 of 1 trials failed; the first: out of memory" in lines
    assert lines[-1].startswith("reports: reports/s/")


def test_a_placement_is_named_once_below_its_verdicts_and_confirming_is_not_offered_again(shown):
    against = {"start": "scratch", "against_placement": Placement(), "seeds": 5, "p_value": 0.01}
    values = {"difference": 0.012, "low": 0.004, "high": 0.02, "verdict": "no difference shown"}
    verdicts = [
        Verdict(placement=PLACEMENTS[count], against=name, **against, **values)
        for count in (2, 8)
        for name in ("plain", "bigger-plain")
    ]
    confirmed = Confirmed(1, {}, tuple(verdicts), 4, None)
    lines = shown(study([trial(number) for number in range(9)], confirmed=confirmed))
    at = lines.index("verdict on s, on the test split")
    assert lines[at + 3 : at + 6] == [
        "+1.20 (+0.40 to +2.00)  no difference shown  plain",
        "+1.20 (+0.40 to +2.00)  no difference shown  bigger-plain",
        f"     {PLACEMENTS[2]}",
    ]
    assert not any("confirm" in line for line in lines[lines.index("to go on:") :])
    assert lines[-1].split("  # ") == [
        "  placesearch train reports/s/architectures/best.yaml --data cifar10 --epochs 100",
        "train it in earnest",
    ]


def test_code_of_the_users_own_is_allowed_again_in_the_commands():
    config = StudyConfig(backbone="mine:tiny", evaluate="mine:evaluate", blocks="se,mine:Gate")
    steps = dict(next_steps("s", config, confirmed=False))
    assert "placesearch confirm s --allow mine:tiny --allow mine:Gate --allow mine:evaluate" in steps
    assert "placesearch export s --format py --allow mine:tiny --allow mine:Gate" in steps
    assert [command.split()[1] for command, _ in next_steps("s", config, confirmed=True)] == ["dashboard", "export"]
