"""The server's log on stdout: one JSON object a line, or a line of text for a terminal.

The event loop never waits for whoever reads stdout: lines go through a bounded queue to a thread,
and are counted, not kept, when the reader is too slow.
"""

import json
import logging
import queue
import sys
import threading
import traceback
from datetime import UTC, datetime
from typing import Any, Final, TextIO

LINES_MAX: Final = 10_000
CLOSE_S_MAX: Final = 2.0
_STANDARD: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller gave as `extra`."""
    return {name: value for name, value in record.__dict__.items() if name not in _STANDARD}


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, every extra field, and `error` with its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever the record holds."""
        time = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in fields(record).items():
            line[f"{name}_" if name in line else name] = _rounded(value)
        if record.exc_info:
            line["error"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """For people: the time of day, the sentence, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback below it if there is one."""
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        given = "".join(f" {name}={_rounded(v)}" for name, v in fields(record).items())
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        line = f"{time} {level}{record.getMessage()}{given}"
        if record.exc_info:
            line += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
        return line


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


class Outbox(logging.Handler):
    """Writes the log to stdout from a thread of its own."""

    def __init__(self, form: str, stream: TextIO | None = None) -> None:
        super().__init__()
        self.is_text = form == "text"
        self.setFormatter(TextFormatter() if self.is_text else JsonFormatter())
        self._stream = stream if stream is not None else sys.stdout
        self._lines: queue.Queue[str | None] = queue.Queue(LINES_MAX)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)

    def install(self) -> None:
        """Take over the root logger, at level info."""
        root = logging.getLogger()
        root.handlers[:] = [self]
        root.setLevel(logging.INFO)
        self.start()

    def start(self) -> None:
        """Begin to write what is said."""
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Format now, write later."""
        self.say(self.format(record))

    def say(self, line: str) -> None:
        """Write *line* as it is; never waits."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write what is left, as far as the reader takes it in time."""
        root = logging.getLogger()
        if self in root.handlers:
            root.removeHandler(self)
        if self._thread.is_alive():
            try:
                self._lines.put(None, timeout=CLOSE_S_MAX)
            except queue.Full:
                pass
            self._thread.join(CLOSE_S_MAX)
        super().close()

    def _write(self) -> None:
        try:
            while (line := self._lines.get()) is not None:
                self._stream.write(line + "\n")
                if self._dropped and not self._lines.full():
                    dropped, self._dropped = self._dropped, 0
                    told = logging.makeLogRecord(
                        {"name": "dayfly.log", "levelno": 30, "levelname": "WARNING"}
                    )
                    told.msg, told.dropped = "log lines dropped: stdout is too slow", dropped
                    self._stream.write(self.format(told) + "\n")
                if self._lines.empty():
                    self._stream.flush()
        except (OSError, ValueError):
            pass  # nobody reads any more; the server goes on without a log
