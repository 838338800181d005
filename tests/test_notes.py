from dataclasses import replace

from placesearch.models.architecture import Architecture
from placesearch.placement import Placement
from placesearch.reporting.notes import study_note, trial_notes
from placesearch.reporting.picture_tables import picture_tables
from placesearch.verdict.verdicts import Confirmed, Verdict

from test_picture_tables import FINDINGS, RECORDS, SUBJECT, TABLES, record  # isort: skip

VERDICT = Verdict(
    placement=Placement.parse("b.0.bn2=se(r=4)"), against="plain", against_placement=Placement(), start="scratch",
    seeds=5, failed=0, difference=0.02, low=0.01, high=0.03, p_value=0.001, verdict="better",
)  # fmt: skip


def test_members_of_the_front_references_and_failures_have_a_note():
    notes = trial_notes(SUBJECT, RECORDS, TABLES, best=2)
    assert set(notes) == {0, 1, 2, 3, 5, 6}  # trial 4 is none of these; 5 repeats 2
    assert notes[2].startswith("**the pick, on the recommended front**\n")
    assert "85.00 % estimated (83.00 to 87.00), 90.00 % observed in 2 trials" in notes[2]
    assert "120 parameters (+20.00 % on plain)" in notes[2]
    assert notes[0].startswith("**on the recommended front, reference: plain**\n")
    assert notes[6].startswith("**reference: cbam-after-every-block**\n")
    assert notes[3] == "**failed**: the loss became nan"


def test_the_config_in_a_note_is_one_that_load_reads(tmp_path):
    for trial, note in trial_notes(SUBJECT, RECORDS, TABLES).items():
        if trial == 3:
            continue
        (tmp_path / "a.yaml").write_text(note.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
        found = Architecture.load(tmp_path / "a.yaml")
        assert (found.placement, found.found.trial) == (RECORDS[trial].placement, trial)


def test_a_note_has_the_verdict_when_there_is_one():
    notes = trial_notes(SUBJECT, RECORDS, TABLES, Confirmed(1, {}, (VERDICT,), 1, None))
    assert "| plain | **better** | +2.00 (+1.00 to +3.00) | 5 |" in notes[2]
    assert "verdict" not in notes[1]


def test_a_trial_that_was_stopped_says_so():
    records = [*RECORDS, replace(record(7, "a.0.bn2=se(r=4)", None, 110), state="PRUNED", forecast=0.7)]
    assert trial_notes(SUBJECT, records, picture_tables(SUBJECT, records, FINDINGS))[7].startswith("**stopped early**")


def test_the_note_of_the_study_says_what_was_found_and_where_the_page_is():
    note = study_note(SUBJECT, RECORDS, FINDINGS, TABLES, 2, "/page")
    assert note.startswith("The pick is trial 2, 1 block: 85.00 % estimated")
    assert "[Report page](/page); on the recommended front: trial 0, trial 2, trial 1." in note
    assert "- versions: python 3.11" in note


def test_a_study_without_a_trial_has_a_note_too():
    assert "No trial succeeded." in study_note(SUBJECT, [], None, picture_tables(SUBJECT, [], None), None, "/page")
