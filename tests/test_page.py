import json
import random
import re
from dataclasses import replace
from html.parser import HTMLParser

import pandas as pd
import pytest

from placesearch.models.architecture import Architecture
from placesearch.reporting.drawing import DARK, LIGHT
from placesearch.reporting.page import headline, in_script, write_page
from placesearch.reporting.picture_tables import picture_tables
from placesearch.reporting.writing import found_architecture

from test_picture_tables import FINDINGS, RECORDS, SUBJECT, TABLES, record  # isort: skip

TAG = "a<b>&lt;</script>'\"=mine:Gate(r=4)"
"""A placement that would be markup if anything forgot to escape it."""


class Reader(HTMLParser):
    """Collects tags with their attributes, the scripts, and the text outside of scripts and styles."""

    def __init__(self):
        super().__init__()
        self.tags, self.scripts, self.text, self.within = [], [], "", None

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.within = tag
            self.scripts += [""] if tag == "script" else []

    def handle_endtag(self, tag):
        self.within = None if tag == self.within else self.within

    def handle_data(self, data):
        if self.within == "script":
            self.scripts[-1] += data
        elif self.within is None:
            self.text += data


def written(folder, records=RECORDS, findings=FINDINGS, subject=SUBJECT, best=RECORDS[2]):
    write_page(folder, subject, records, findings, found_architecture(subject, best) if best else None)
    reader = Reader()
    reader.feed((folder / "report.html").read_text(encoding="utf-8"))
    return reader


def data_of(reader):
    return json.loads(re.search(r"^const report = (.*);$", reader.scripts[1], re.MULTILINE)[1])


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path):
    reader = written(tmp_path)
    assert [attributes for tag, attributes in reader.tags if tag == "script"] == [{}, {}]
    for tag, attributes in reader.tags:
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            assert attributes.get(name, "#").startswith("#") or attributes[name] == "data:,", (tag, attributes)
    html = (tmp_path / "report.html").read_text(encoding="utf-8").replace(reader.scripts[0], "")
    assert html.startswith("<!doctype html>")
    assert "@import" not in html
    assert "url(" not in html
    assert len(html) < 200_000  # all but the library


def test_configs_are_those_of_the_folder_and_load_reads_them(tmp_path):
    data = data_of(written(tmp_path))
    assert set(data["configs"]) == {"0", "1", "2", "6"}  # members and references
    assert data["placements"]["4"] == "a.0.bn2=se(r=4)"
    for trial, words in data["configs"].items():
        path = tmp_path / "one.yaml"
        path.write_text(words, encoding="utf-8")
        assert Architecture.load(path).placement == RECORDS[int(trial)].placement


def test_every_picture_has_its_table_beside_it(tmp_path):
    written(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"report.html", "front.svg", "map.svg", "candidates.csv", "effects.csv", "hypervolume.csv"}
    candidates = pd.read_csv(tmp_path / "candidates.csv")
    assert candidates.trial.tolist() == [0, 1, 2, 4, 6]
    assert candidates.estimate.tolist() == pytest.approx(TABLES.candidates.estimate.tolist())
    assert len(pd.read_csv(tmp_path / "effects.csv", keep_default_na=False)) == len(FINDINGS.averages)
    assert pd.read_csv(tmp_path / "hypervolume.csv").trial.tolist() == [0, 1, 2, 4, 5, 6]


def test_the_page_says_what_was_found_and_what_was_run(tmp_path):
    text = " ".join(written(tmp_path).text.split())
    assert "The pick is trial 2, 1 block: 85.00 % estimated (83.00 to 87.00)" in text
    for part in ("python 3.11", "6 complete, 1 failed", "1 min 02 s in trials", "the loss became nan", "None yet."):
        assert part in text


def test_the_headline_says_where_no_difference_is_shown():
    assert headline(SUBJECT, TABLES, 1).endswith("it costs +30 % parameters.")  # 0.85..0.89 over 0.78..0.82
    close = replace(
        FINDINGS, accuracy={**FINDINGS.accuracy, RECORDS[1].placement: FINDINGS.accuracy[RECORDS[0].placement]}
    )
    assert headline(SUBJECT, picture_tables(SUBJECT, RECORDS, close), 1).endswith("no difference is shown yet.")
    assert headline(SUBJECT, TABLES, 0) == "The pick is trial 0, the plain network: 80.00 % estimated (78.00 to 82.00)."


def test_the_verdict_is_shown_as_soon_as_there_is_one(tmp_path):
    row = {"placement": "b.0.bn2=se(r=4)", "against": "plain", "seeds": 5, "difference": 0.012, "difference_low": 0.004}
    rows = [row | {"difference_high": 0.02, "p_value": 0.0123, "verdict": "better", "more": 1}]
    rows.append({"placement": TAG, "against": "plain", "seeds": 1, "verdict": "no difference shown"})
    pd.DataFrame(rows).to_csv(tmp_path / "verdict.csv", index=False)
    text = " ".join(written(tmp_path).text.split())
    for part in ("trial 2against plain", "better", "+1.20+0.40 to +2.00", "0.012"):
        assert part in text
    assert TAG in text
    assert "None yet." not in text


@pytest.mark.parametrize("records", [[], RECORDS[3:4], RECORDS[:1], RECORDS[:3]], ids=["no", "failed", "one", "few"])
def test_a_study_with_little_in_it_has_a_page(tmp_path, records):
    succeeded = any(one.state == "COMPLETE" for one in records)
    reader = written(tmp_path, records, None, best=RECORDS[0] if succeeded else None)
    assert ("No trial succeeded." in reader.text) == (not succeeded)
    assert "Trials are too few to tell effects" in reader.text
    assert ("history" in data_of(reader)["figures"]) == succeeded


def test_nothing_from_outside_becomes_markup(tmp_path):
    records = [
        record(0, TAG, 0.5, 10, reference="<i>plain"),
        record(1, "none", None, 9, state="FAIL", error="</script><b>broken"),
    ]
    subject = replace(SUBJECT, facts=(("data", "<u>mine</u>"),))
    reader = written(tmp_path, records, None, subject, records[0])
    assert not {"b", "i", "u"} & {tag for tag, _ in reader.tags}
    assert len(reader.scripts) == 2
    for part in (TAG, "<i>plain", "</script><b>broken", "<u>mine</u>"):
        assert part in reader.text
    assert data_of(reader)["placements"] == {"0": TAG}


def test_what_is_no_number_is_null_in_a_script():
    values = {"a": [float("nan"), float("inf"), 1.5], "b": {"c": (None, "</SCRIPT><!--")}}
    assert json.loads(in_script(values)) == {"a": [None, None, 1.5], "b": {"c": [None, "</SCRIPT><!--"]}}
    assert "<" not in in_script(values)


def many(trials, sites):
    """A study of random placements, SE or CBAM at every other site or so."""
    rng = random.Random(0)
    settings = [f"se(r={r})" for r in (4, 8, 16)] + [f"cbam(r={r},k={k})" for r in (4, 8, 16) for k in (3, 7)]
    records = []
    for trial in range(trials):
        chosen = [
            f"layer{site // 12}.{site % 12}.bn2={rng.choice(settings)}" for site in range(sites) if rng.random() < 0.5
        ]
        words = " ".join(chosen) or "none"
        changes = {"macs_full": rng.randrange(10**9), "reference": "plain" if trial == 0 else None}
        records.append(record(trial, words if trial else "none", rng.random(), rng.randrange(10**7), **changes))
    return records


def test_a_thousand_trials_of_fifty_sites_fit_on_a_page(tmp_path):
    records = many(1000, 50)
    subject = replace(SUBJECT, objectives=("accuracy", "params", "macs_full"))
    reader = written(tmp_path, records, None, subject, records[0])
    assert (tmp_path / "report.html").stat().st_size < 8e6
    assert len(data_of(reader)["placements"]) == 1000


@pytest.fixture
def visit(browser):
    """Open a report and return its page, with all that the console and the network had to say."""

    def opened(path, width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        sheet, said = context.new_page(), []
        sheet.on("console", lambda message: said.append(message.text))
        sheet.on("pageerror", lambda error: said.append(str(error)))
        sheet.on("request", lambda request: said.append(request.url) if request.url[:4] == "http" else None)
        sheet.goto(path.as_uri())
        sheet.wait_for_selector("html[data-drawn=yes]")
        return sheet, said

    return opened


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_front_and_map_on_every_screen(tmp_path, visit, width, scheme):
    written(tmp_path)
    sheet, said = visit(tmp_path / "report.html", width, scheme)
    for place in ("[data-figure=front-0] .scatterlayer .points path", ".map svg.labels", ".map circle.gain"):
        assert sheet.locator(place).first.is_visible()
    assert sheet.evaluate("document.documentElement.scrollWidth") == width  # nothing hangs over the edge
    ink = (LIGHT if scheme == "light" else DARK)["ink"]
    assert sheet.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()") == ink
    assert said == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "click", ["[data-figure=front-0] .points", "button[data-copy='2']", "g[data-copy='2'] >> nth=0"]
)
def test_a_click_copies_a_config_that_load_reads(tmp_path, visit, click):
    written(tmp_path)
    sheet, said = visit(tmp_path / "report.html")
    sheet.locator(".map").scroll_into_view_if_needed()
    if "figure" in click:  # where Plotly drew the second member of the front
        sheet.locator("[data-figure=front-0]").scroll_into_view_if_needed()
        where = sheet.evaluate(
            """() => {
                const place = document.querySelector("[data-figure=front-0]"), box = place.getBoundingClientRect();
                const front = place.data.find((trace) => trace.name === "front");
                const {xaxis: x, yaxis: y} = place._fullLayout;
                return [box.left + x._offset + x.d2p(front.x[1]), box.top + y._offset + y.d2p(front.y[1])];
            }"""
        )
        sheet.mouse.move(*where)
        sheet.wait_for_selector(".hoverlayer .hovertext")
        assert "b.0.bn2 = se(r=4)" in sheet.locator(".hoverlayer .hovertext").text_content()
        sheet.mouse.click(*where)
    else:
        sheet.locator(click).click()
    sheet.wait_for_selector("#said.on")
    assert sheet.locator("#said").inner_text() == "Config of trial 2 copied"
    path = tmp_path / "copied.yaml"
    path.write_text(sheet.evaluate("navigator.clipboard.readText()"), encoding="utf-8")
    assert Architecture.load(path).placement == RECORDS[2].placement
    assert said == []


@pytest.mark.slow
def test_names_that_look_like_markup_stay_text_in_a_browser(tmp_path, visit):
    records = [record(0, TAG, 0.5, 10, reference="<img/src=x>"), record(1, "none", 0.4, 9)]
    written(tmp_path, records, None, best=records[0])
    sheet, said = visit(tmp_path / "report.html")
    assert sheet.locator("img").count() == 0
    assert TAG in sheet.locator("#front").inner_text()
    assert said == []


@pytest.mark.slow
def test_a_thousand_trials_are_shown_within_ten_seconds(tmp_path, visit):
    records = many(1000, 50)
    written(tmp_path, records, None, replace(SUBJECT, objectives=("accuracy", "params", "macs_full")), records[0])
    sheet, said = visit(tmp_path / "report.html")
    assert sheet.evaluate("performance.now()") < 10_000
    assert said == []
