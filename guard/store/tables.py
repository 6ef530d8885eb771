"""The store's tables: what the newest migration makes, as SQLAlchemy sees it.

`traces.document` is the spool's line and the one thing that a trace is read back from; the other columns of `traces`,
and `steps` and `interventions`, are taken from it for questions that are asked of many traces at once.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)
from sqlalchemy.types import TypeDecorator

VERSION_TABLE = "reasonguard_version"
_ESCAPED = "\x01"
metadata = MetaData()


class AnyText(TypeDecorator[str]):
    """Text that may hold what Postgres refuses: NUL, and lone surrogates, which are no UTF-8.

    Such a text is stored as U+0001 and Python's `unicode_escape` of it; any other as it is. Equal texts are stored
    equal. Compared by code points, as Python does.
    """

    impl = Text
    cache_ok = True

    def __init__(self) -> None:
        super().__init__()

    def load_dialect_impl(self, dialect: Any) -> Any:
        """Without a collation of its own Postgres would sort by the database's language."""
        return dialect.type_descriptor(Text(collation="C") if dialect.name == "postgresql" else Text())

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        """Escapes what needs it."""
        if value is None or not (value.startswith(_ESCAPED) or "\0" in value or _has_surrogate(value)):
            return value
        return _ESCAPED + value.encode("unicode_escape").decode("ascii")

    def process_result_value(self, value: str | None, dialect: Any) -> str | None:
        """The text that was bound."""
        if value is None or not value.startswith(_ESCAPED):
            return value
        return value[1:].encode("ascii").decode("unicode_escape")


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _flag(name: str) -> Column[bool]:
    return Column(name, Boolean, nullable=False)


def _count(name: str) -> Column[int]:
    return Column(name, Integer, nullable=False)


def _text(name: str) -> Column[str]:
    return Column(name, AnyText, nullable=False)


def _of_trace(**options: Any) -> Column[str]:
    return Column("guard_id", AnyText, ForeignKey("traces.guard_id", ondelete="CASCADE"), nullable=False, **options)


traces = Table(
    "traces",
    metadata,
    Column("guard_id", AnyText, primary_key=True),
    # Where its line begins in the spool: of two lines with one guard id the later one holds.
    _text("file"),
    Column("at", BigInteger, nullable=False),
    Column("created", Double, nullable=False),
    _text("model"),
    _text("weights"),
    _text("tenant"),
    _text("tokenizer_hash"),
    Column("log_content", String(4), nullable=False),
    _count("prompt_tokens"),
    _count("output_tokens"),
    _text("policy"),
    _text("policy_hash"),
    _text("detector"),
    _text("engine"),
    _flag("shadow"),
    _flag("probe"),
    _flag("clean"),
    _count("seen"),
    _count("scored"),
    _count("unscored"),
    _count("unreadable"),
    _count("cues"),
    _count("interventions"),
    _count("injected_tokens"),
    _count("replaced_tokens"),
    _count("enforcement_failed"),
    # Microseconds; none in traces from before they were kept.
    Column("guard_us", BigInteger),
    Column("document", Text, nullable=False),
    Index("ix_traces_created", "created"),
    Index("ix_traces_policy_hash", "policy_hash", "created"),
    Index("ix_traces_weights", "weights", "created"),
    Index("ix_traces_tenant", "tenant", "created"),
)
steps = Table(
    "steps",
    metadata,
    _of_trace(primary_key=True),
    Column("index", Integer, primary_key=True, autoincrement=False),
    _count("start"),
    _count("end"),
    _text("zone"),
    Column("score", Double),
    _flag("cue"),
    _flag("injected"),
    _flag("unreadable"),
)
interventions = Table(
    "interventions",
    metadata,
    _of_trace(primary_key=True),
    Column("index", Integer, primary_key=True, autoincrement=False),
    _count("step"),
    _count("at"),
    _text("trigger_id"),
    _text("rung"),
    _text("mode"),
    Column("score", Double),
    _count("forced"),
    _flag("completed"),
)
reviews = Table(
    "reviews",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    _of_trace(),
    # Of the trace's steps; none: about the whole trace.
    Column("step", Integer),
    _text("label"),
    _text("reviewer"),
    Column("created", Double, nullable=False),
    _text("note"),
    Index("ix_reviews_guard_id", "guard_id", "step", "created"),
    Index("ix_reviews_created", "created"),
)
spool_files = Table(
    "spool_files",
    metadata,
    # Of the file's first trace, so that a file that was moved or copied is known again.
    Column("id", String(64), primary_key=True),
    _text("name"),
    Column("offset", BigInteger, nullable=False),
    # The last line before the offset: if it is no longer there, the file is another and is read from its start.
    Column("last_at", BigInteger, nullable=False),
    Column("last_hash", String(64), nullable=False),
    _count("malformed"),
)
