"""Where a server keeps what must survive it: its own files, or a PostgreSQL that servers share."""

from dayfly_pool.config import Config
from dayfly_pool.errors import BadInput
from dayfly_pool.store import archives, declarations, events, journals
from dayfly_pool.store.sqlite_declarations import SqliteDeclarations
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


def declarations_of(config: Config) -> declarations.Store:
    """Of what is declared. Raises `BadInput` without PostgreSQL's extra."""
    if not config.events_dsn:
        return SqliteDeclarations(config.data / "dayfly.sqlite")
    try:
        from dayfly_pool.store.postgres_declarations import PostgresDeclarations
    except ImportError as error:
        raise _missing(error) from None
    return PostgresDeclarations(config.events_dsn)


def archives_of(config: Config) -> archives.Archives | None:
    """Of packages, for all servers; None for one alone. Raises `BadInput` without the extra."""
    if not config.events_dsn:
        return None
    try:
        from dayfly_pool.store.postgres_archives import PostgresArchives
    except ImportError as error:
        raise _missing(error) from None
    return PostgresArchives(config.events_dsn)


def _missing(error: ImportError) -> BadInput:
    return BadInput(
        f"what is kept in PostgreSQL needs an extra ({error}): pip install 'dayfly[postgres]'"
    )
