"""Logs as one JSON object a line, through the standard library's logging.

Whoever logs gives what the line is about as `extra`; all of that is carried over.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

_OWN = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"})
"""What every record has; the rest is its `extra`."""


class JsonFormatter(logging.Formatter):
    """One line a record. What a caller sent is escaped, so that it cannot make lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _OWN and key not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to(stream: TextIO = sys.stderr, level: str = "INFO") -> None:
    """Sends everything this process logs to `stream`, in place of where it went before."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    logging.captureWarnings(True)
    for chatty in ("alembic", "httpx", "matplotlib", "PIL", "urllib3"):
        logging.getLogger(chatty).setLevel(max(root.level, logging.WARNING))
