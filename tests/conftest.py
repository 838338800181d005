import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
PROCESSES = min(CORES, 8)
"""So many tests run at a time; each process takes about 1.3 GB."""

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, and for the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // PROCESSES)))

signal.signal(signal.SIGINT, signal.default_int_handler)  # or commands could not be stopped by tests in the background

COMMAND = Path(sys.executable).with_name("placesearch")
NETWORKS = Path(__file__).with_name("networks.py")


def pytest_xdist_auto_num_workers():
    """Say what `-n auto` is: the cores that this process may use, hyperthreads too."""
    return PROCESSES


def reproducible(frame):
    """Leave out the columns of trials.csv that may differ between two runs of one seed."""
    changing = [name for name in frame if name.endswith(("seconds", "_seconds")) or name.startswith("latency")]
    return frame.drop(columns=changing)


@pytest.fixture(autouse=True)
def _brief_measurements(monkeypatch):
    """Measure latencies as briefly as can be; what they come to is no test's business but those of `latency`."""
    monkeypatch.setattr("placesearch.costs.latency.SHORTEST", 1e-6)
    monkeypatch.setattr("placesearch.costs.latency.MOST_ROUNDS", 7)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty current directory with the networks of `networks.py` as the user's own module `mine`."""
    shutil.copy(NETWORKS, tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("mine", None)
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.fixture
def start(workplace):
    """Start the installed command in the workplace."""
    running = []

    def begin(*arguments, **options):
        environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **options.pop("env", {})}
        process = subprocess.Popen(
            [str(COMMAND), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            **options,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def call(start):
    """Run the installed command to its end and return (exit code, stdout, stderr)."""

    def finish(*arguments, **options):
        process = start(*arguments, **options)
        out, err = process.communicate(timeout=240)
        return process.returncode, out, err

    return finish


@pytest.fixture
def call_here(workplace, monkeypatch, capsys):
    """Do the same in this process, which has imported everything already."""
    from placesearch.cli import main

    before = signal.getsignal(signal.SIGTERM)

    def finish(*arguments):
        monkeypatch.setattr(sys, "argv", ["placesearch", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    yield finish
    signal.signal(signal.SIGTERM, before)
    logging.captureWarnings(capture=False)
    logging.getLogger("py.warnings").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def browser():
    """A Chromium that the system has; tests that need one skip without it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[browser]'")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs a Chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield launched
        launched.close()


def _served(kind):
    """A server of one's own, from its start to its end."""
    pytest.importorskip("psycopg", reason="needs psycopg: pip install -e '.[postgresql,mysql]'")
    pytest.importorskip("pymysql", reason="needs pymysql: pip install -e '.[postgresql,mysql]'")
    import servers

    folder = Path(tempfile.mkdtemp(prefix="server-"))  # a short path that another user may enter
    folder.chmod(0o755)
    try:
        server = getattr(servers, kind)(folder)
        yield server
        server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server of one's own; tests that need one skip without its programs."""
    yield from _served("Postgres")


@pytest.fixture(scope="session")
def mariadb():
    """The same of MariaDB."""
    yield from _served("MariaDB")
