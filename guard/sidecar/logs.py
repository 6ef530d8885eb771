"""What `serve` writes to standard error: lines for a terminal, or one JSON object a line. Never content, never keys.

What an exception says can quote what a client sent or a model wrote (a validation error does), so its kind and its
places in the code are all that is logged of it. The fields of a JSON line come from a fixed list.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Literal

Format = Literal["text", "json"]
#: `extra` fields that a line may carry.
FIELDS = (
    "event", "route", "status", "seconds", "guard_id", "result", "policy", "policy_hash", "mode", "url", "model",
    "trace_id", "detector", "canary",
)  # fmt: skip


class TextFormatter(logging.Formatter):
    """One line, and for an exception the places it came through."""

    def formatException(self, ei: object) -> str:
        """Kinds and places, without what the exceptions say."""
        return _without_words(ei)

    def format(self, record: logging.LogRecord) -> str:
        """Uncached, since another handler may have cached the traceback with its words."""
        record.exc_text = None
        return super().format(record)


class JsonFormatter(TextFormatter):
    """One JSON object: time (UTC), level, logger, message, and the fields it was given."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, in ASCII."""
        milliseconds = int(record.msecs)
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{milliseconds:03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name in FIELDS if (value := getattr(record, name, None)) is not None}
        if record.exc_info:
            line["exception"] = _without_words(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


def set_up(form: Format) -> None:
    """Sends every logger of this process to standard error in one form: warnings as text, requests too as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter("%(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("guard").setLevel(logging.INFO if form == "json" else logging.WARNING)


def _without_words(info: object) -> str:
    error = info[1] if isinstance(info, tuple) and len(info) == 3 else None
    if not isinstance(error, BaseException):
        return ""
    chain = []
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        places = traceback.extract_tb(cause.__traceback__)
        chain.append(" ".join([type(cause).__name__, *(f"{each.filename}:{each.lineno}" for each in places)]))
        cause = cause.__cause__ or cause.__context__
    return " < ".join(chain)
