"""Real servers that tests speak to, on free ports of this machine, gone at the end."""

import os
import pwd
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.harness import free_port

PLACES: Final = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), Path("/usr/bin")]


@contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL with an empty database; what libpq takes to connect. As root, runs as nobody."""
    programs = next(place for place in PLACES if (place / "initdb").exists())
    port, user = free_port(), None
    with tempfile.TemporaryDirectory(prefix="dayfly-postgres-") as folder:  # nobody may enter it
        data = Path(folder) / "data"
        data.mkdir(mode=0o700)
        if os.geteuid() == 0:
            user = pwd.getpwnam("nobody").pw_uid
            Path(folder).chmod(0o755)
            os.chown(data, user, -1)

        def run(program: str, *arguments: str) -> None:
            command = [str(programs / program), "-D", str(data), *arguments]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, user=user, cwd="/")

        run("initdb", "-U", "dayfly", "--auth=trust", "-N")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
        run("pg_ctl", "-w", "-l", str(data / "log"), "-o", options, "start")
        try:
            yield f"host=127.0.0.1 port={port} user=dayfly dbname=postgres"
        finally:
            run("pg_ctl", "-m", "immediate", "stop")
