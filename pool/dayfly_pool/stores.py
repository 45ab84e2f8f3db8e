"""Where a server keeps what must survive it: its own files, or a PostgreSQL that servers share."""

from dayfly_pool.config import Config
from dayfly_pool.errors import BadInput
from dayfly_pool.store import events, journals
from dayfly_pool.store.sqlite_events import SqliteEvents
from dayfly_pool.store.sqlite_journals import SqliteJournals


def events_of(config: Config) -> events.Store:
    """Of accepted events. Raises `BadInput` without PostgreSQL's extra."""
    if not config.events_dsn:
        folder = config.data / "events"
        folder.mkdir(mode=0o700, exist_ok=True)
        return SqliteEvents(folder / "events.sqlite", folder / "bodies")
    try:
        from dayfly_pool.store.postgres_events import PostgresEvents
    except ImportError as error:
        raise _missing(error) from None
    return PostgresEvents(config.events_dsn)


def journals_of(config: Config) -> journals.Store:
    """Of jobs and runs. Raises `BadInput` without PostgreSQL's extra."""
    if not config.events_dsn:
        folder = config.data / "journals"
        folder.mkdir(mode=0o700, exist_ok=True)
        return SqliteJournals(folder / "journals.sqlite", folder / "bodies")
    try:
        from dayfly_pool.store.postgres_journals import PostgresJournals
    except ImportError as error:
        raise _missing(error) from None
    return PostgresJournals(config.events_dsn)


def _missing(error: ImportError) -> BadInput:
    return BadInput(f"events in PostgreSQL need an extra ({error}): pip install 'dayfly[postgres]'")
