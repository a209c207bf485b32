"""Logs by the standard library: warnings as plain lines, or everything as a JSON object a line."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

Format = Literal["text", "json"]
ROOT = logging.getLogger("svdmerge")
# What every record has; the rest of its attributes is what the call gave as `extra`.
_COMMON = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class JsonFormatter(logging.Formatter):
    """Records as JSON: time in UTC, level, logger, message, and what the call gave besides."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {name: value for name, value in vars(record).items() if name not in _COMMON}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def configure(form: Format) -> None:
    """Log in this form to standard error: in JSON from `info` on, in text warnings alone."""
    for handler in [*ROOT.handlers]:
        ROOT.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter("%(message)s"))
    ROOT.addHandler(handler)
    ROOT.setLevel(logging.INFO if form == "json" else logging.WARNING)


def is_json() -> bool:
    """Whether standard error holds JSON alone, so that nothing else may be written there."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in ROOT.handlers)
