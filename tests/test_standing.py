import pytest

from placesearch.cli import standing
from placesearch.cli.course import Course
from placesearch.cli.standing import Lead, Standing, lead_of
from placesearch.front import front
from placesearch.placement import BlockSetting, Placement
from placesearch.records import StudyBegan, TrialEnded, TrialRecord
from placesearch.search.findings import find

SE = BlockSetting.parse("se(r=4)")
TEXTS = ["none", "a=se(r=4) b=se(r=4)", "a=se(r=4)", "b=se(r=4)", "none", "a=se(r=4)"]


def trial(number, text, accuracy, state="COMPLETE"):
    placement = Placement.parse(text)
    return TrialRecord(
        trial=number, state=state, placement=placement, val_accuracy=accuracy, params=100 + len(placement), epochs=1
    )


def study(**values):
    usual = {"name": "s", "finished": (), "trials": 10, "seconds_left": None, "jobs": 1, "lines": (), "epochs": 1}
    return StudyBegan(**(usual | {"objectives": ("accuracy", "params"), "settings": {"a": [SE], "b": [SE]}} | values))


def test_the_front_is_the_one_that_the_report_recommends():
    records = [trial(number, text, 0.9 + 0.01 * len(text) / 20 + 0.001 * number) for number, text in enumerate(TEXTS)]
    lead = lead_of(study(), records)
    found = find(records, study().settings)
    accuracy = {placement: interval.estimate for placement, interval in found.accuracy.items()}
    assert lead.estimates == found.accuracy
    assert list(lead.members) == front(records, ("accuracy", "params"), accuracy)
    assert lead.best.placement == Placement.parse("a=se(r=4) b=se(r=4)")
    assert lead.plain.trial == 0
    assert lead.accuracy(lead.plain) == accuracy[Placement()]


def test_with_few_trials_the_front_is_that_of_observed_accuracies_and_says_so():
    records = [trial(0, "none", 0.9), trial(1, "a=se(r=4)", 0.8), trial(2, "b=se(r=4)", None, state="FAIL")]
    lead = lead_of(study(), records)
    assert lead.estimates is None
    assert [record.trial for record in lead.members] == [0]
    assert lead.accuracy(lead.best) == 0.9
    nothing = lead_of(study(), records[2:])
    assert (nothing.members, nothing.best, nothing.plain) == ((), None, None)


@pytest.mark.parametrize("takes", [0.001, 0.5])
def test_finding_out_who_leads_takes_no_more_than_a_hundredth_of_the_time(monkeypatch, takes):
    now, found = [0.0], []

    def slow(_, records):
        now[0] += takes
        found.append(len(records))
        return Lead(len(records), (), None, None)

    monkeypatch.setattr(standing, "lead_of", slow)
    course, leads = Course(lambda: now[0]), Standing(lambda: now[0])
    course.hear(study())
    for number in range(1000):
        course.hear(TrialEnded(trial(number, TEXTS[number % 3], 0.9 + 1e-5 * number)))
        now[0] += 0.25
        assert leads.lead(course).trials == found[-1]
    assert len(found) * takes <= 0.01 * now[0] + takes
    assert len(found) == (1000 if takes == 0.001 else pytest.approx(250 / 50, abs=1))
    ended = len(found)
    now[0] += 100.0
    assert leads.lead(course).trials == 1000
    now[0] += 100.0
    leads.lead(course)
    assert len(found) == (ended if takes == 0.001 else ended + 1)  # nothing new, nothing to find out


def test_a_confirmation_has_no_front():
    course = Course()
    course.hear(study(objectives=(), split="test"))
    course.hear(TrialEnded(trial(0, "none", 0.9)))
    assert Standing().lead(course) is None
