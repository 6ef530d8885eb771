"""What a directory is about, written once as a card beside what is made there: a run that is about something else is
refused, and told what differs."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from align.disk import write_whole
from classifiers.judge import Judge
from guard.errors import UserError
from guard.runtime import GuardRuntime
from guard.weights import weights_hash

Card = TypeVar("Card", bound=BaseModel)


class Parts(BaseModel):
    """What lies under a run's paths, or comes with the program where it names none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: str
    """Empty while they are not known: a hub name's before they are in the local cache."""
    tokenizer: str
    policy: str
    detector: str
    judge: str

    @classmethod
    def of(cls, model: str, runtime: GuardRuntime, judge: Judge) -> Self:
        """Hashes and versions of what was loaded."""
        return cls(
            weights=weights_hash(model), tokenizer=runtime.tokenizer_hash, policy=runtime.policy.hash,
            detector=runtime.detector.version, judge=judge.version,
        )  # fmt: skip

    def claim(self, out: Path) -> None:
        """Keeps them in `out/parts.json`; UserError where that has others."""
        path = out / "parts.json"
        held = read_card(path, Parts)
        known = self if self.weights or held is None else self.model_copy(update={"weights": held.weights})
        new = ["weights"] if held is not None and not held.weights else []
        claim(path, known, f"{out} was begun with something else under the same names", new)


def claim(path: Path, card: BaseModel, taken: str, free: Collection[str] = ()) -> None:
    """Writes a card where there is none yet, and again where a `free` field has changed. UserError, beginning with
    `taken`, where another field has."""
    held = read_card(path, type(card))
    if held is not None:
        check(held, card, taken, free)
    if held != card:
        write_whole(path, card.model_dump_json(indent=1))


def check(held: BaseModel, card: BaseModel, taken: str, free: Collection[str] = ()) -> None:
    """UserError, beginning with `taken`, that names the first field of two cards which differs and is not `free`."""
    for name in type(card).model_fields:
        got, wanted = getattr(card, name), getattr(held, name)
        if got != wanted and name not in free:
            raise UserError(
                f"{taken}: `{name}` differs", got=_shown(got), wanted=_shown(wanted), fix="Choose another --out"
            )  # fmt: skip


def read_card(path: Path, kind: type[Card]) -> Card | None:
    """The card in a file; None where there is none, or where an earlier program was killed before it had written it.
    UserError where it is no such card."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not text.strip():
        return None
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{path} is damaged, or another version's, at {'.'.join(map(str, first['loc'])) or 'its beginning'}",
            got=first["msg"], fix="Choose another --out",
        ) from error  # fmt: skip


def _shown(value: object) -> str:
    if isinstance(value, BaseModel):
        return value.model_dump_json()
    return "none" if value in (None, "") else str(value)
