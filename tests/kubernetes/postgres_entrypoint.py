"""Starts PostgreSQL in a container, with the settings of Docker's official image.

$PGDATA is the folder, made when it is empty; $POSTGRES_USER, $POSTGRES_DB and
$POSTGRES_PASSWORD_FILE name the account and the database. What follows goes to the server.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Becomes the server."""
    programs = next(Path("/usr/lib/postgresql").glob("*/bin"))
    data = Path(os.environ["PGDATA"])
    user = os.environ.get("POSTGRES_USER", "postgres")
    database = os.environ.get("POSTGRES_DB", user)
    if not data.exists():
        building = data.with_name(f"{data.name}.new")  # what a kill leaves is not taken for whole
        shutil.rmtree(building, ignore_errors=True)
        _make(programs, building, user, database)
        building.rename(data)
    given = sys.argv[1:] or ["-c", "listen_addresses=*"]
    os.execv(programs / "postgres", [str(programs / "postgres"), "-D", str(data), *given])


def _make(programs: Path, data: Path, user: str, database: str) -> None:
    command = [programs / "initdb", f"--pgdata={data}", f"--username={user}"]
    command += [f"--pwfile={os.environ['POSTGRES_PASSWORD_FILE']}", "--auth-local=trust"]
    command += ["--auth-host=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-instructions"]
    subprocess.run(command, check=True)
    with (data / "pg_hba.conf").open("a") as file:
        file.write("host all all all scram-sha-256\n")
    if database != "postgres":
        single = [programs / "postgres", "--single", "-D", data, "postgres"]
        subprocess.run(single, input=f'CREATE DATABASE "{database}"\n', text=True, check=True)


if __name__ == "__main__":
    main()
