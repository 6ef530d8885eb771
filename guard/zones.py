"""Zones of an output, by generated token ids: pure, incremental, one look-up for a quiet token.

A grammar moves between a few states at marks, which are single token ids; every other id is text. Think tags are the
simplest one: two states, two marks. In a channel format (Harmony) a header names each message between marks, and only
the messages of one channel are the answer. What is not understood is reasoning, which policies watch by default.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from guard.steps import TokenTable, Zone

State = Literal["reasoning", "answer", "between", "header", "lost"]
"""Where an output is: in one of the zones' text, between two messages, in a message's header, or behind a header that
nobody understands."""

#: Header ids that may turn out to be no header. The longest real ones name a function: `assistant`, `commentary
#: to=functions.get_current_weather`, `json` are 14 in gpt-oss's tokenizer.
HEADER_TOKENS = 32

#: Tags of the families we know, most specific first; read from the vocabulary, never assumed.
TAGS = (
    ("<think>", "</think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
)
_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
#: What ends a message; the first is the one that another message may follow.
_ENDS = ("<|end|>", "<|return|>", "<|call|>")
_AUTHOR, _REASONING, _ANSWER = "assistant", "analysis", "final"
#: Texts that mark zones, whether a tokenizer flags their tokens as special or not.
MARKS = frozenset(itertools.chain(*TAGS, (_START, _CHANNEL, _MESSAGE, _CONSTRAIN), _ENDS))

_NAME = rb"[\w.\-]+"
_AUTHORED = re.compile(rb"%b(?: to=%b)?" % (_NAME, _NAME))
_NAMED = re.compile(rb"%b(?: to=%b)?(?: %b)?" % (_NAME, _NAME, _NAME))


@dataclass(frozen=True)
class ZoneGrammar:
    """How one family of models marks its zones."""

    first: State
    """The state before anything is read."""
    moves: Mapping[tuple[State, int], State] = field(default_factory=dict)
    """A state and the mark that leads out of it; in any other state a mark is text."""
    paths: Mapping[tuple[State, Zone], tuple[int, ...]] = field(default_factory=dict)
    """The ids that lead from a state to a zone's text; where there is no entry, none are needed."""
    lead: str = "\n"
    """What a family writes between the answer's mark and its first word."""
    channel: int | None = None
    """In a header: what comes before the channel's name."""
    constrain: int | None = None
    """In a header: what comes before the format of the message, which changes no zone."""

    @property
    def marks(self) -> frozenset[int]:
        """The ids that can move the state."""
        return frozenset(token for _, token in self.moves)

    @property
    def end(self) -> int | None:
        """The one id that leads from reasoning to answer; None where it takes several, or nothing marks reasoning."""
        path = self.paths.get(("reasoning", "answer"), ())
        return path[0] if len(path) == 1 else None

    @property
    def special(self) -> frozenset[int]:
        """All ids that a text must not hold."""
        inner = (self.channel, self.constrain)
        return self.marks | {token for token in inner if token is not None}


def find_grammar(tokenizer: Tokenizer) -> ZoneGrammar:
    """The grammar whose marks are single ids of the tokenizer's; one without marks when no family's are."""
    start, channel, message, *ends = (tokenizer.token_to_id(token) for token in (_START, _CHANNEL, _MESSAGE, *_ENDS))
    if start is not None and channel is not None and message is not None and ends[0] is not None:
        return _channels(tokenizer, start, channel, message, [token for token in ends if token is not None])
    for pair in TAGS:
        first, last = (tokenizer.token_to_id(token) for token in pair)
        if first is not None and last is not None:
            return ZoneGrammar(
                "answer",
                {("answer", first): "reasoning", ("reasoning", last): "answer"},
                {("answer", "reasoning"): (first,), ("reasoning", "answer"): (last,)},
            )
    return ZoneGrammar("answer")


def _channels(tokenizer: Tokenizer, start: int, channel: int, message: int, ends: list[int]) -> ZoneGrammar:
    # Where a header leads is read from its text: its entry says only that `message` ends it.
    moves: dict[tuple[State, int], State] = {("between", start): "header", ("header", message): "reasoning"}
    for token in ends:
        moves["reasoning", token] = moves["answer", token] = "between"

    def spelled(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

    paths: dict[tuple[State, Zone], tuple[int, ...]] = {}
    names: tuple[tuple[Zone, str], ...] = (("reasoning", _REASONING), ("answer", _ANSWER))
    for zone, name in names:
        named = (*spelled(_AUTHOR), channel, *spelled(name), message)
        paths["header", zone] = named
        paths["between", zone] = (start, *named)
    paths["reasoning", "answer"] = (ends[0], *paths["between", "answer"])
    paths["answer", "reasoning"] = (ends[0], *paths["between", "reasoning"])
    paths["lost", "answer"] = (message, *paths["reasoning", "answer"])
    return ZoneGrammar("between", moves, paths, "", channel, tokenizer.token_to_id(_CONSTRAIN))


class ZoneReader:
    """Where one output is. Ids outside `grammar.marks` change nothing unless the state is `header`."""

    __slots__ = ("_header", "_table", "grammar", "state")

    def __init__(self, grammar: ZoneGrammar, table: TokenTable, state: State | None = None) -> None:
        self.grammar = grammar
        self.state: State = state or grammar.first
        self._table = table
        self._header: list[int] = []

    @property
    def zone(self) -> Zone:
        """The zone of the next token, if it is text."""
        return "answer" if self.state == "answer" else "reasoning"

    def feed(self, token: int) -> bool:
        """Takes the next id; False when it is text, True when it is part of the grammar."""
        target = self.grammar.moves.get((self.state, token))
        if target is None:
            return self.state == "header" and self._heads(token)
        self.state = self._named() if self.state == "header" else target
        self._header.clear()
        return True

    def skim(self, ids: Iterable[int]) -> list[int]:
        """Takes ids; returns those of the first text among them."""
        runs: list[list[int]] = [[]]
        for token in ids:
            if not self.feed(token) and token not in self.grammar.special:
                runs[-1].append(token)
            elif runs[-1]:
                runs.append([])
        return runs[0]

    def path(self, zone: Zone) -> tuple[int, ...]:
        """The ids that must come before a text of that zone."""
        path, channel = self.grammar.paths.get((self.state, zone), ()), self.grammar.channel
        # A prompt may end with the header's author.
        return path[path.index(channel) :] if channel is not None and self._header else path

    def copy(self) -> ZoneReader:
        """A reader that stands at the same place."""
        twin = ZoneReader(self.grammar, self._table, self.state)
        twin._header = self._header.copy()
        return twin

    def _heads(self, token: int) -> bool:
        self._header.append(token)
        if len(self._header) <= HEADER_TOKENS:
            return True
        self._header.clear()
        self.state = "lost"
        return False

    def _named(self) -> State:
        """Where a header leads. One that is not understood loses the output: what it says afterwards is reasoning."""
        grammar = self.grammar
        parts = _split(self._header, grammar.channel)
        author = self._spelled(parts[0])
        if len(parts) > 2 or author is None or not _AUTHORED.fullmatch(author):
            return "lost"
        if len(parts) == 1:
            return "reasoning"
        body = [self._spelled(part) for part in _split(parts[1], grammar.constrain)]
        if len(body) > 2 or None in body or not _NAMED.fullmatch((body[0] or b"").removesuffix(b" ")):
            return "lost"
        final = body[0] == _ANSWER.encode() or (len(body) == 2 and body[0] == _ANSWER.encode() + b" ")
        return "answer" if final and author == _AUTHOR.encode() else "reasoning"

    def _spelled(self, ids: list[int]) -> bytes | None:
        """The bytes of ordinary ids; None when one of them is special or none of the tokenizer's."""
        pieces = self._table.bytes_of
        if any(not 0 <= i < len(pieces) or not pieces[i] or i in self._table.markers for i in ids):
            return None
        return b"".join(pieces[i] for i in ids)


def _split(ids: list[int], mark: int | None) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == mark:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts
