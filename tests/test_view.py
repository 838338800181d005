import io
import re

import pytest
from rich.console import Console

from placesearch.cli.view import Lines, Screen, make_view
from placesearch.placement import BlockSetting, Placement
from placesearch.records import StepEnded, StudyBegan, Task, Told, TrialBegan, TrialEnded, TrialRecord

SITES = [f"layer{stage}.{block}.bn2" for stage in range(1, 5) for block in range(2)]
SE = BlockSetting.parse("se(r=16)")
PLACEMENTS = [Placement(dict.fromkeys(SITES[:count], SE)) for count in range(len(SITES) + 1)]


def terminal(width=80, height=24, encoding="utf-8"):
    """A terminal without colours, and what it is made of."""
    paper = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=paper, width=width, height=height, force_terminal=True, color_system=None)
    return console, paper


def written(paper):
    paper.flush()
    return paper.buffer.getvalue().decode(paper.encoding)


def began(**values):
    usual = {"name": "s", "finished": (), "trials": 20, "seconds_left": None, "jobs": 2, "lines": ("resnet18",)}
    usual |= {"epochs": 3, "objectives": ("accuracy", "params"), "settings": dict.fromkeys(SITES, (SE,))}
    return StudyBegan(**(usual | values))


def ended(number, accuracy, **values):
    fields = {"state": "COMPLETE", "placement": PLACEMENTS[number % len(PLACEMENTS)], "val_accuracy": accuracy}
    fields |= {"macs": 37_523_456, "params": 11_689_512 + 1000 * number, "epochs": 3, "seconds": 30.0}
    return TrialEnded(TrialRecord(trial=number, reference=None if number else "plain", **(fields | values)))


def told(view, trials=9, **study):
    """Tell a view of a study in which two trials run."""
    view(began(**study))
    for number in range(trials):
        view(TrialBegan(Task(number, PLACEMENTS[number], None), 3))
        view(ended(number, 0.9 + 0.005 * number))
    for number in (trials, trials + 1):
        view(TrialBegan(Task(number, PLACEMENTS[5], None), 3))
    view(StepEnded(trials, 150, 300, 2))


def test_the_screen_fits_80_columns_and_shows_progress_workers_front_and_best_against_plain():
    console, paper = terminal()
    screen = Screen(console)
    told(screen)
    console.print(screen)
    lines = written(paper).splitlines()
    assert lines[:2] == ["study s", "  resnet18"]
    assert max(map(len, lines)) <= 80
    study, first, second = lines[2:5]
    assert study.startswith("study    ━")
    assert " 48 % 9/20 trials, about " in study  # 9 and a half of 20
    assert study.rstrip().endswith(" left")
    assert first.startswith("trial 9  ━")
    assert " 50 % epoch 2/3  layer1.0.bn2=se(r=16) " in first
    assert first.endswith("…")
    assert "0 s, usually 30 s  layer1.0.bn2=se(r=16)" in second
    assert lines[6].startswith("best 9")
    assert lines[6].rstrip().endswith(" points")
    assert "recommended front, by estimates after 9 trials" in lines[7]
    assert lines[8].split() == ["trial", "accuracy", "(90", "%)", "params", "placement"]
    assert lines[9].split()[0] == "0"
    assert lines[9].rstrip().endswith("11,689,512  plain")
    assert len(lines) - 2 <= 24
    assert "\x1b[3" not in written(paper)


def test_a_low_terminal_gets_the_best_of_the_front_and_a_long_one_all():
    for height, members in ((12, 4), (40, 9)):
        console, paper = terminal(height=height)
        screen = Screen(console)
        told(screen)
        console.print(screen)
        lines = written(paper).splitlines()[2:]
        assert len(lines) <= height
        assert [line.split()[0] for line in lines[7:]] == [str(number) for number in range(9 - members, 9)]


def test_before_there_are_estimates_the_front_is_called_observed():
    console, paper = terminal()
    screen = Screen(console)
    told(screen, trials=2)
    console.print(screen)
    assert "front of observed accuracies after 2 trials" in written(paper)
    assert "best 90.50 %, plain 90.00 %: +0.50 points" in written(paper)


def test_an_evaluation_without_steps_and_a_study_without_number_are_shown_by_time():
    console, paper = terminal()
    screen = Screen(console)
    screen(began(trials=None, seconds_left=3600.5))
    screen(TrialBegan(Task(0, PLACEMENTS[1], None), 3))
    console.print(screen)
    lines = written(paper).splitlines()
    assert "0 % 0 trials, at most 1 h 00 min left" in lines[2]
    assert lines[3].rstrip().endswith("  0 s  layer1.0.bn2=se(r=16)")
    screen = Screen(console)
    screen(began(trials=None, seconds_left=3600.5))
    screen(TrialBegan(Task(0, PLACEMENTS[0], None), 3))
    screen(ended(0, 0.9))
    console.print(screen)
    assert "0 % 1 trial, about 1 h 00 min left" in written(paper)
    assert "front of observed accuracies after 1 trial\n" in re.sub(" +\n", "\n", written(paper))


def test_a_screen_of_ascii_has_nothing_else():
    console, paper = terminal(encoding="ascii")
    screen = Screen(console)
    console.print(screen)
    told(screen)
    console.print(screen)
    text = written(paper)
    assert "preparing ..." in text
    assert "study    ----" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_confirmation_has_its_trainings_and_no_front():
    console, paper = terminal()
    screen = Screen(console)
    told(screen, objectives=(), split="test", settings={})
    console.print(screen)
    text = written(paper)
    assert "confirming s, 0 of 20 trainings are there already" in text
    assert "9/20 trials" in text
    assert "front" not in text


def test_what_else_takes_time_is_said_and_so_is_what_is_only_a_limit():
    console, paper = terminal()
    lines = Lines(console)
    lines(began(trials=None, seconds_left=7200.5, finished=(ended(0, 0.9).record,)))
    lines(Told("measuring ..."))
    lines(TrialBegan(Task(1, PLACEMENTS[1], None), 3))
    lines(ended(1, 0.91))
    lines(ended(2, None, state="FAIL", error="out of memory"))
    lines(began(settles=True))
    lines(ended(3, 0.92))
    text = written(paper)
    assert "going on with s after 1 trials" in text
    assert "\nmeasuring ...\n" in text
    assert "2  trial 1: val. accuracy 91.00 %, 37,523,456 macs, 11,690,512 params  layer1.0.bn2=se(r=16)" in text
    assert "(about 2 h 00 min left)" in text
    assert "trial 2: failed: out of memory" in text
    assert text.rstrip().endswith("left)")
    assert "(at most " in text.splitlines()[-1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("environment", "live"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True),
        ({"TERM": "xterm", "CI": "false"}, True),
        ({"TERM": "xterm", "CI": "true"}, False),
        ({"TERM": "dumb"}, False),
        ({}, False),
    ],
)
def test_a_live_view_is_only_for_terminals_that_can_be_drawn_over(monkeypatch, environment, live):
    for name in ("TERM", "CI", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    paper = Terminal()
    monkeypatch.setattr("sys.stdout", paper)
    with make_view(quiet=False) as view:
        assert isinstance(view, Screen if live else Lines)
        view(began())
    assert ("\x1b" in paper.getvalue()) == live
    assert "\x1b[3" not in paper.getvalue() or "NO_COLOR" not in environment


def test_a_pipe_gets_lines_even_if_colours_are_forced(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with make_view(quiet=False) as view:
        assert isinstance(view, Lines)
        told(view)
    assert "\x1b" not in capsys.readouterr().out
