"""The dashboard: a study in a browser, while it runs and after.

Optuna's dashboard shows what is stored. What only this project knows, estimates, the recommended front, the map
and the verdict, is shown as if it were stored there too, as notes, plots and an artifact, but is worked out anew from
the trials as they come in; nothing of it is written, so that it never is out of date. A note that somebody edits is
stored, and stays as it is.
"""

import io
import ipaddress
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from socketserver import ThreadingMixIn
from threading import Event, Thread
from typing import Any, BinaryIO
from uuid import NAMESPACE_URL, uuid5
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import BaseStorage
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial
from optuna_dashboard import wsgi

from placesearch.definition import read_definition_of, study_folder
from placesearch.errors import InputError, StudyError
from placesearch.reporting.figures import Figure, front_figures, history_figure
from placesearch.reporting.front_picture import title_of
from placesearch.reporting.map_figure import map_figure
from placesearch.reporting.map_picture import placement_map
from placesearch.reporting.notes import study_note, trial_notes
from placesearch.reporting.page import in_script, page
from placesearch.reporting.picture_tables import costs_of, picture_tables
from placesearch.search.storage import Database, Journal, Proxy, open_storage, patiently
from placesearch.search.trials import artifacts_beside
from placesearch.study import Study, open_study, study_names

PAUSE, SHARE = 2.0, 0.05
"""Seconds between looks at the trials; longer, if that would otherwise take more than this share of a core."""

CARD = 440
"""Height of a plot, in pixels: what Optuna's dashboard has room for."""

REPORT = str(uuid5(NAMESPACE_URL, "placesearch:report.html"))
"""Under which number the report page is attached to the study."""


@dataclass(slots=True)
class Shown:
    """What is shown beside what is stored.

    Args:
        attributes: As Optuna's dashboard would have stored it in the study.
        facts: What was run.
        page: The report page.
    """

    attributes: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    page: str = ""


class _Showing(BaseStorage):
    """A storage that seems to hold what is shown beside it."""

    shown: Shown

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        stored = super().get_study_system_attrs(study_id)  # type: ignore[safe-super]  # a storage comes after this class
        edited = {key.rpartition("note_ver")[0] for key in stored if key.endswith("note_ver")}
        of_notes = {
            key: value
            for key, value in self.shown.attributes.items()
            if "note_" not in key or key.rpartition("note_")[0] not in edited
        }
        return of_notes | stored

    def get_all_studies(self) -> list[FrozenStudy]:
        studies = super().get_all_studies()  # type: ignore[safe-super]
        for study in studies:
            study.system_attrs = self.get_study_system_attrs(study._study_id)
            study.user_attrs = {**self.shown.facts, **study.user_attrs}
        return studies


class _ShownJournal(_Showing, Journal):
    pass


class _ShownDatabase(_Showing, Database):
    pass


class _ShownProxy(_Showing, Proxy):
    pass


class _Files(FileSystemArtifactStore):
    """The files attached to trials, and the report page."""

    def __init__(self, folder: str, shown: Shown) -> None:
        super().__init__(folder)
        self._shown = shown

    def open_reader(self, artifact_id: str) -> BinaryIO:
        return io.BytesIO(self._shown.page.encode()) if artifact_id == REPORT else super().open_reader(artifact_id)


def shown_of(study: Study, study_id: int, trial_ids: Mapping[int, int]) -> Shown:
    """Return what to show of a study beside its trials.

    Args:
        study: The study.
        study_id: Its number in the storage.
        trial_ids: Optuna's identifiers of the trials, by position.
    """
    subject, records, findings = study.subject, study.records, study.findings
    tables = picture_tables(subject, records, findings)
    best = study.best.found.trial if study.best and study.best.found else None
    drawn = placement_map(subject, tables, best)
    plots: dict[str, Figure] = {}
    for cost, figure in zip(costs_of(subject.objectives), front_figures(subject, tables, best), strict=False):
        plots[f"front-by-{cost}"] = _titled(figure, f"Recommended front: accuracy against {title_of(cost)}")
    if (drawn_small := map_figure(subject, tables, best)) is not None:
        plots["placement-map"] = _titled(drawn_small, "Placement map: what blocks add where")
    if (history := history_figure(tables)) is not None:
        plots["front-over-trials"] = _titled(history, "How the front improved")
    address = f"/artifacts/{study_id}/{REPORT}"
    attributes = {f"dashboard:plot_data:{name}:0": in_script(figure) for name, figure in plots.items()}
    attributes |= _note("", study_note(subject, records, findings, tables, best, address))
    for number, text in trial_notes(subject, records, tables, study.confirmed, best).items():
        attributes |= _note(f"{trial_ids[number]}:", text)
    attached = {"artifact_id": REPORT, "filename": "report.html", "mimetype": "text/html", "encoding": None}
    attributes[f"artifacts:{REPORT}"] = json.dumps(attached)
    written = page(subject, records, findings, tables, drawn, best, study.verdict_frame() if study.confirmed else None)
    return Shown(attributes, dict(subject.facts), written)


def _note(of: str, text: str) -> dict[str, Any]:
    return {f"dashboard:{of}note_ver": 1, f"dashboard:{of}note_str:0": text}


def _titled(figure: Figure, title: str) -> Figure:
    """Give a figure what it needs in a card of half the width of the window."""
    layout = {
        **figure["layout"],
        "title": {"text": title, "font": {"size": 15}},
        "height": CARD,
        "autosize": True,
        "margin": {"l": 60, "r": 20, "t": 90, "b": 60},
        "legend": {"orientation": "h", "y": -0.25},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
    }
    return {"data": figure["data"], "layout": layout}


class Live:
    """Keeps up to date what is shown of a study."""

    def __init__(self, name: str) -> None:
        self._study, self._known = open_study(name), (-1, 0.0)
        self._kept = study_folder(name) / "confirm.jsonl"
        self.shown = Shown()
        where = read_definition_of(name).config.storage or study_folder(name) / "journal.log"
        self.storage = open_storage(where, (_ShownJournal, _ShownDatabase, _ShownProxy))
        self.storage.shown = self.shown  # type: ignore[attr-defined]  # it is of one of these classes
        self.study_id = self.storage.get_study_id_from_name(name)

    def refresh(self) -> float:
        """Look at the trials, and show what they say if there are new ones; return the seconds that it took."""
        began = time.monotonic()
        trials = self._trials()
        confirmed = self._kept.stat().st_mtime if self._kept.exists() else 0.0
        known = (sum(trial.state.is_finished() for trial in trials), confirmed)
        if known != self._known:
            study = self._study()
            trials = self._trials()  # all that the study has by now
            found = shown_of(study, self.study_id, {trial.number: trial._trial_id for trial in trials})
            self.shown.attributes, self.shown.facts, self.shown.page = found.attributes, found.facts, found.page
            self._known = known
        return time.monotonic() - began

    def _trials(self) -> list[FrozenTrial]:
        return patiently(lambda: self.storage.get_all_trials(self.study_id, deepcopy=False), lambda _: None)

    def keep_up(self, ended: Event) -> None:
        """Look again and again until the dashboard ends."""
        taken = 0.0
        while not ended.wait(max(PAUSE, taken / SHARE)):
            taken = self.refresh()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing about each request."""


def newest_study() -> str:
    """Return the name of the study that was changed last.

    Raises:
        StudyError: If there is none.
    """
    kept = [(name, study_folder(name) / file) for name in study_names() for file in ("study.yaml", "journal.log")]
    names = sorted((path.stat().st_mtime, name) for name, path in kept if path.exists())
    if not names:
        raise StudyError("no study below the current directory; 'placesearch run' makes one")
    return names[-1][1]


def dashboard(name: str, host: str, port: int, tell: Callable[[str], None]) -> None:
    """Serve a study to a browser until interrupted.

    Args:
        name: The study.
        host: Address to listen on.
        port: Port to listen on; 0 for any that is free.
        tell: Is told the address of the study's page.

    Raises:
        InputError: If the address cannot be used.
        StudyError: If there is no such study.
    """
    live = Live(name)
    live.refresh()
    folder = artifacts_beside(study_folder(name) / "journal.log")
    folder.mkdir(exist_ok=True)
    app = wsgi(live.storage, artifact_store=_Files(str(folder), live.shown))
    try:
        server = make_server(host, port, app, server_class=_Server, handler_class=_Quiet)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot listen on {host}:{port}: {why}; --port 0 takes a free one") from None
    shown_host = f"[{host}]" if ":" in host else host
    tell(f"study '{name}' is at http://{shown_host}:{server.server_port}/dashboard/studies/{live.study_id}")
    ended = Event()
    Thread(target=live.keep_up, args=(ended,), daemon=True).start()
    with server:
        try:
            server.serve_forever()
        finally:
            ended.set()


def is_loopback(host: str) -> bool:
    """Tell whether nobody but this machine reaches an address.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
