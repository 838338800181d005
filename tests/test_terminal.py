import io

from placesearch.cli.terminal import aligned, make_console, say


def test_a_character_that_the_encoding_lacks_becomes_a_question_mark(monkeypatch):
    paper = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", paper)
    say(make_console(), "größer")
    paper.flush()
    assert paper.buffer.getvalue() == b"gr??er\n"


def test_what_is_said_is_not_broken_so_that_it_can_be_copied(monkeypatch):
    paper = io.StringIO()
    monkeypatch.setattr("sys.stdout", paper)
    say(make_console(), "[red]" + "x" * 300, "", "end")
    assert paper.getvalue() == "[red]" + "x" * 300 + "\n\nend\n"


def test_numbers_end_and_words_begin_below_each_other():
    lines = aligned({"trial": ["3", "12"], "verdict": ["better", "worse"]}, ["verdict"])
    assert lines == ["trial  verdict", "    3  better ", "   12  worse  "]
    assert aligned({"trial": []}) == ["trial"]
