"""What an engine without our guard must be able to do: asked before anything is served, a UserError says what is
missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

import httpx
from pydantic import BaseModel

from guard.errors import UserError
from guard.sidecar.errors import ApiError
from guard.sidecar.upstream import Upstream
from guard.triggers import POOL
from guard.zones import find_grammar

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KEY_VARIABLE = "REASONGUARD_UPSTREAM_KEY"
_MESSAGE = {"role": "user", "content": "Say hello."}
_SCRIPTS = "Ünïcode, 漢字, кириллица, 🙂 and 3.14159\n\tdef f(x): return x"


def base_url(given: str) -> str:
    """An engine's URL without `/v1`; UserError when it is none, or holds a password."""
    parts = _split(given)
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UserError("--upstream is no URL of an engine", got=given, wanted="something like http://10.0.0.7:8000")
    if parts.username is not None or parts.password is not None:
        raise UserError(
            "--upstream holds a password, which every local user can read on the command line",
            fix=f"Put the engines' key into {KEY_VARIABLE}",
        )
    return given.rstrip("/").removesuffix("/v1").rstrip("/")


def _split(given: str) -> SplitResult | None:
    """A URL's parts; None where its host or port is none."""
    try:
        parts = urlsplit(given)
        # Both look at more than the other: the port's range, the host's characters.
        fits = parts.port != 0 and bool(httpx.URL(given).host) and not any(map(str.isspace, given))
    except (ValueError, httpx.InvalidURL):
        return None
    return parts if fits else None


class _Card(BaseModel):
    id: str
    root: str | None = None
    parent: str | None = None


class _Listed(BaseModel):
    data: list[_Card]


@dataclass(frozen=True)
class Offer:
    """What an engine serves: the name of its first model, and all names that lead to it or to an adapter on it.

    An address may stand before other models as well; their tokenizers were not compared, and no probe has shown
    anything of them.
    """

    model: str
    names: frozenset[str]


async def check_remote(client: Upstream, url: str, tokenizer: Tokenizer) -> Offer:
    """UserError when the engine answers and cannot be guarded by substitution; ApiError when it does not answer."""
    offer = await _offer(client, url)
    try:
        prompt, _ = await client.render({"messages": [_MESSAGE]})
    except ApiError as error:
        raise _lacking(url, error, "renders no chat as token ids: POST /tokenize", "vLLM's own /tokenize") from error
    await _same_tokenizer(client, url, tokenizer)
    body = {"model": offer.model, "prompt": prompt, "max_tokens": 2, "temperature": 0}
    try:
        ids = [token async for piece in client.continue_ids(body) for token in piece.ids]
    except ApiError as error:
        what = "does not continue token ids: POST /v1/completions with a prompt of ids and `return_token_ids`"
        raise _lacking(url, error, what, "vLLM 0.11 or newer") from error
    if not ids:
        raise UserError(f"Upstream {url} streams no token ids", wanted="`return_token_ids`, as in vLLM 0.11 or newer")
    return offer


async def _offer(client: Upstream, url: str) -> Offer:
    response = await client.models()
    if response.status_code in (401, 403):
        raise UserError(
            f"Upstream {url} refuses the key", got=f"HTTP {response.status_code}", fix=f"Put it into {KEY_VARIABLE}"
        )
    try:
        first, *others = _Listed.model_validate_json(response.content).data
    # No card at all is a ValueError as well.
    except ValueError as error:
        raise UserError(f"Upstream {url} lists no model", got=f"HTTP {response.status_code} at /v1/models") from error
    same = {c.id for c in others if c.parent == first.id or (c.root is not None and c.root == first.root)}
    return Offer(first.id, frozenset({first.id, *same}))


async def _same_tokenizer(client: Upstream, url: str, tokenizer: Tokenizer) -> None:
    """Ids have no meaning but the tokenizer's: the marks, every trigger and some scripts must be the same there."""
    marks: list[str] = [str(tokenizer.id_to_token(token)) for token in sorted(find_grammar(tokenizer).marks)]
    for text in (*marks, *(t.text for t in POOL), _SCRIPTS):
        ours: Any = tokenizer.encode(text, add_special_tokens=False).ids
        theirs = await client.encode(text)
        if theirs != ours:
            raise UserError(
                f"Upstream {url} has another tokenizer than --model: {text[:40]!r} has other ids there",
                got=str(theirs[:8]), wanted=str(ours[:8]),
            )  # fmt: skip


def _lacking(url: str, error: ApiError, what: str, wanted: str) -> UserError | ApiError:
    if error.status == 503:
        return error
    return UserError(f"Upstream {url} {what}", got=error.message, wanted=wanted)
