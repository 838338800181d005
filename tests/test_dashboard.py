import json
import re
import socket
import urllib.error
import urllib.request

import optuna
import pytest
from optuna.artifacts import get_all_artifact_meta

import placesearch as ps
from placesearch.dashboard import REPORT, Live, dashboard, newest_study
from placesearch.definition import study_folder
from placesearch.errors import InputError, StudyError
from placesearch.search.journal import open_journal


def evaluate(candidate):
    """An accuracy from the placement alone; one candidate fails."""
    if str(candidate.placement).count("cbam") == 1:
        raise ValueError("lost its images")
    return {"accuracy": 0.5 + len(str(candidate.placement)) / 1000 + candidate.seed / 100, "loss": 1.0}


def search(name="s", trials=12):
    config = ps.StudyConfig(backbone="mine:tiny", name=name, trials=trials, input_size=32, reductions=(2, 4), jobs=1)
    return ps.run(config, evaluate=evaluate)


def stored(name="s"):
    return open_journal(study_folder(name) / "journal.log", optuna.storages.JournalStorage)


def test_what_is_shown_is_not_stored(workplace):
    study = search()
    journal = workplace / "studies" / "s" / "journal.log"
    before = journal.read_bytes()
    live = Live("s")
    live.refresh()
    shown = live.storage.get_study_system_attrs(live.study_id)
    assert journal.read_bytes() == before
    assert "dashboard:note_ver" not in stored().get_study_system_attrs(live.study_id)
    assert study.subject.name == "s"
    plots = {key.split(":")[2] for key in shown if key.startswith("dashboard:plot_data:")}
    assert plots == {"front-by-params", "placement-map", "front-over-trials"}
    assert all(json.loads(value)["layout"]["title"]["text"] for key, value in shown.items() if "plot_data" in key)
    [found] = live.storage.get_all_studies()
    assert found.system_attrs == shown
    assert found.user_attrs["backbone"].startswith("mine:tiny")
    for member in study.front:
        assert "on the recommended front" in shown[f"dashboard:{member.trial}:note_str:0"]


def test_every_trial_has_its_config_attached_and_the_metrics_have_their_names(workplace):
    search()
    storage = stored()
    study = optuna.load_study(study_name="s", storage=storage)
    assert study.metric_names == ["accuracy", "params"]
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert {trial.state.name for trial in study.trials} == {"COMPLETE", "FAIL"}
    for trial in study.trials:
        [meta] = get_all_artifact_meta(trial, storage=storage)
        path = workplace / "studies" / "s" / "artifacts" / meta.artifact_id
        path.rename(path.with_suffix(".yaml"))
        architecture = ps.Architecture.load(path.with_suffix(".yaml"), allow=["mine:tiny"])
        assert str(architecture.placement) == trial.user_attrs["placement"]
        assert architecture.found.trial == trial.number


def test_new_trials_are_shown_when_they_come(workplace):
    search()
    live = Live("s")
    live.refresh()
    page, attributes = live.shown.page, live.shown.attributes
    live.refresh()
    assert live.shown.attributes is attributes  # nothing new, nothing done
    search(trials=16)
    live.refresh()
    assert live.shown.page != page


def test_a_note_that_somebody_wrote_stays(workplace):
    search()
    live = Live("s")
    live.refresh()
    live.storage.set_study_system_attr(live.study_id, "dashboard:0:note_ver", 2)
    live.storage.set_study_system_attr(live.study_id, "dashboard:0:note_str:0", "mine")
    shown = live.storage.get_study_system_attrs(live.study_id)
    assert (shown["dashboard:0:note_ver"], shown["dashboard:0:note_str:0"]) == (2, "mine")
    assert shown["dashboard:note_ver"] == 1  # the others are as they were


def test_a_port_that_is_taken_is_told_in_a_line(workplace):
    search(trials=1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{port}: .*--port 0 takes a free one"):
            dashboard("s", "127.0.0.1", port, print)


def test_an_unknown_study_is_told_with_those_that_there_are(workplace):
    search(trials=1)
    with pytest.raises(StudyError, match="no study 'other'.*there are: s"):
        dashboard("other", "127.0.0.1", 0, print)


def test_the_newest_study_is_the_one_that_was_changed_last(workplace):
    with pytest.raises(StudyError, match="no study below the current directory"):
        newest_study()
    search("b", 1)
    search("a", 1)
    assert newest_study() == "a"
    search("b", 2)
    assert newest_study() == "b"


def serve(start, *options):
    process = start("dashboard", "s", "--port", "0", *options)
    line = process.stdout.readline()
    return process, re.search(r"http://\S+", line)[0]


def get(address):
    """Ask the dashboard for something; return the type and the content."""
    with urllib.request.urlopen(address) as answer:  # noqa: S310 - our own server
        return answer.headers["Content-Type"], answer.read()


@pytest.mark.slow
def test_the_command_serves_the_study_the_configs_and_the_page(workplace, start):
    search()
    process, address = serve(start)
    assert address.startswith("http://127.0.0.1:")
    base = address.partition("/dashboard")[0]
    detail = json.loads(get(f"{base}/api/studies/0?after=0")[1])
    assert detail["objective_names"] == ["accuracy", "params"]
    assert len(detail["trials"]) == 12
    assert {plot["id"] for plot in detail["plotly_graph_objects"]} >= {"front-by-params", "placement-map"}
    kind, content = get(f"{base}/artifacts/0/{REPORT}")
    assert kind == "text/html"
    assert content.startswith(b"<!doctype html>")
    artifact = detail["trials"][0]["artifacts"][0]["artifact_id"]
    assert get(f"{base}/artifacts/0/0/{artifact}")[1].startswith(b"placesearch: 1")
    with pytest.raises(urllib.error.HTTPError):
        get(f"{base}/artifacts/0/0/{'0' * 8}")
    process.send_signal(2)
    assert process.wait(30) == 0
    assert process.stderr.read() == ""


@pytest.mark.slow
def test_a_host_that_others_reach_is_warned_of(workplace, start):
    search(trials=2)
    process, _ = serve(start, "--host", "0.0.0.0")  # noqa: S104 - what is tested
    process.send_signal(2)
    process.wait(30)
    assert process.stderr.read().startswith("warning: anyone who reaches 0.0.0.0 can change this study")


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 480])
def test_a_browser_shows_the_front_with_our_names(workplace, start, browser, width):
    search()
    _, address = serve(start)
    sheet, said = browser.new_page(viewport={"width": width, "height": 900}), []
    sheet.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    sheet.on("pageerror", lambda error: said.append(str(error)))
    sheet.goto(address)
    for text in ("Recommended front: accuracy against parameters", "Placement map: what blocks add where"):
        sheet.get_by_text(text).first.wait_for(timeout=60_000)
    shown = sheet.locator("body").inner_text()
    assert "accuracy" in shown
    assert "params" in shown
    assert "Objective 0" not in shown
    sheet.goto(address + "/trials?numbers=0")
    sheet.get_by_text("reference: plain").first.wait_for(timeout=60_000)
    assert said == []
