"""Real servers that tests speak to, on free ports of this machine, gone at the end."""

import os
import pwd
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from tests.harness import free_port

PLACES: Final = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), Path("/usr/bin")]


class Postgres:
    """A PostgreSQL with an empty database; *dsn* is what libpq takes to connect.

    As root it runs as nobody. Use it as a context manager.
    """

    def __init__(self) -> None:
        self._programs = next(place for place in PLACES if (place / "initdb").exists())
        self._folder = tempfile.TemporaryDirectory(prefix="dayfly-postgres-")  # nobody may enter it
        self._data, self._user = Path(self._folder.name) / "data", None
        self._data.mkdir(mode=0o700)
        if os.geteuid() == 0:
            self._user = pwd.getpwnam("nobody").pw_uid
            Path(self._folder.name).chmod(0o755)
            os.chown(self._data, self._user, -1)
        self.port = free_port()
        self.dsn = f"host=127.0.0.1 port={self.port} user=dayfly dbname=postgres"

    def start(self) -> None:
        """Be there."""
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
        self._run("pg_ctl", "-w", "-l", str(self._data / "log"), "-o", options, "start")

    def stop(self) -> None:
        """Be gone, at once and without a word."""
        self._run("pg_ctl", "-m", "immediate", "stop")

    @property
    def process(self) -> int:
        """The first of its processes; the others are children of that."""
        return int((self._data / "postmaster.pid").read_text().split()[0])

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), "-D", str(self._data), *arguments]
        quiet = subprocess.DEVNULL
        subprocess.run(command, check=True, stdout=quiet, user=self._user, cwd="/")

    def __enter__(self) -> "Postgres":
        self._run("initdb", "-U", "dayfly", "--auth=trust", "-N")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._folder.cleanup()
