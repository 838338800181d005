"""Database servers that tests and benchmarks start themselves. Drivers are imported when a server is."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

USER = "placesearch"


class _Server:
    """A database server with a password on a port of this machine.

    Args:
        folder: An empty folder that other users may enter.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self.database = folder, ""
        self._as = {"user": "nobody", "group": "nogroup"} if os.getuid() == 0 else {}  # they refuse to run as root
        if self._as:
            shutil.chown(folder, **self._as)
        self.password, self.port = secrets.token_hex(12), free_port()
        self._process: subprocess.Popen | None = None

    def _run(self, *command):
        subprocess.run(command, check=True, capture_output=True, cwd=self._folder, **self._as)

    def _begin(self, *command):
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self._folder,
            start_new_session=True,
            **self._as,
        )

    def kill(self):
        """Kill the server and all its processes at once."""
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.wait()

    def processes(self):
        """The server's processes, the first one first."""
        found = [self._process.pid]
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()
                found += [int(path.parent.name)] * (int(fields[1]) == self._process.pid)
        return found

    def create(self):
        """Make another database, empty, which the addresses speak of from now on."""
        self.database = f"studies{secrets.token_hex(4)}"
        self._ask(f"CREATE DATABASE {self.database}")

    @property
    def url(self):
        """Its address, with the password."""
        return f"{self.kind}://{USER}:{self.password}@127.0.0.1:{self.port}/{self.database}"

    @property
    def public_url(self):
        """Its address as it may be seen."""
        return f"{self.kind}://{USER}@127.0.0.1:{self.port}/{self.database}"


def programs():
    """Where PostgreSQL's programs are; Debian has them in a folder of each version, outside of the path."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class Postgres(_Server):
    """PostgreSQL."""

    kind = "postgresql"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._programs = programs()
        if self._programs is None:
            pytest.skip("needs PostgreSQL: apt-get install postgresql")
        (folder / "password").write_text(self.password)
        initdb, data = self._programs / "initdb", folder / "data"
        self._run(initdb, "-D", data, "-U", USER, "-A", "scram-sha-256", "--pwfile", folder / "password")
        self.start()
        self.create()

    def _connect(self):
        import psycopg

        where = {"host": "127.0.0.1", "port": self.port, "user": USER, "password": self.password}
        return psycopg.connect(**where, dbname="postgres", autocommit=True)

    def _ask(self, statement):
        with self._connect() as connection:
            connection.execute(statement)

    def start(self):
        """Start the server, after a crash as well, and wait until it answers."""
        (self._folder / "data" / "postmaster.pid").unlink(missing_ok=True)
        where = ["-h", "127.0.0.1", "-p", str(self.port), "-k", self._folder, "-c", "max_connections=300"]
        self._begin(self._programs / "postgres", "-D", self._folder / "data", *where)
        import psycopg

        while True:
            with suppress(psycopg.OperationalError), self._connect():
                return
            assert self._process.poll() is None, "PostgreSQL has ended"

    def stop(self):
        """Stop the server."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait()

    def seconds_of_processor(self):
        """Processor time that all processes of the server have used so far, those that have ended included."""
        ticks = 0
        for process in self.processes():
            with suppress(OSError):
                fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
                own, of_children = sum(map(int, fields[11:13])), sum(map(int, fields[13:15]))
                ticks += own + (of_children if process == self._process.pid else 0)
        return ticks / os.sysconf("SC_CLK_TCK")

    def dump(self):
        """All that it holds, as text."""
        where = ["-h", "127.0.0.1", "-p", str(self.port), "-U", USER, self.database]
        environment = {**os.environ, "PGPASSWORD": self.password}
        command = [self._programs / "pg_dump", *where]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


class MariaDB(_Server):
    """MariaDB, which speaks as MySQL does."""

    kind = "mysql"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        program = shutil.which("mariadbd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
        if program is None or shutil.which("mariadb-install-db") is None:
            pytest.skip("needs MariaDB: apt-get install mariadb-server")
        data = folder / "data"
        self._run(
            "mariadb-install-db", "--no-defaults", f"--datadir={data}", "--auth-root-authentication-method=normal"
        )
        where = [f"--datadir={data}", f"--socket={folder}/socket", "--bind-address=127.0.0.1", f"--port={self.port}"]
        self._begin(program, "--no-defaults", *where, "--max-connections=300")
        while not (folder / "socket").exists():
            assert self._process.poll() is None, "MariaDB has ended"
        self._ask(f"CREATE USER {USER}@'127.0.0.1' IDENTIFIED BY '{self.password}'")
        self._ask(f"GRANT ALL ON *.* TO {USER}@'127.0.0.1'")
        self.create()

    def _ask(self, statement):
        import pymysql

        with pymysql.connect(unix_socket=f"{self._folder}/socket", user="root") as connection:
            connection.cursor().execute(statement)

    def stop(self):
        """Stop the server."""
        self._process.terminate()
        self._process.wait()
