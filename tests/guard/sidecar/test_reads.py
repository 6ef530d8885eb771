"""What the engine streams arrives in reads of any size: torn events, several at once. The client gets the same."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.sidecar.upstream import Events
from tests.guard.sidecar.test_sidecar import HELLO, Front, Start, start

__all__ = ["start"]

#: A line separator that no event may be cut at, and letters of two to four bytes.
WORDS = ["Über", " 日本\u2028", " 🦜."]
#: In the middle of a letter of four bytes.
TORN = "🦜".encode()[:2]


def after(mark: bytes) -> Callable[[bytes], list[bytes]]:
    """Two writes, the first of which ends behind the mark."""

    def cut(whole: bytes) -> list[bytes]:
        at = whole.index(mark) + len(mark)
        return [whole[:at], whole[at:]]

    return cut


CUTS: dict[str, Callable[[bytes], list[bytes]]] = {
    "all at once": lambda whole: [whole],
    "inside a letter": after(TORN),
    "inside an event's name": after(b"\n\nda"),
    "between an event's line feeds": after(b"}\n"),
    "before the end's mark": after(b"data: [DO"),
    "in small pieces": lambda whole: [whole[at : at + 41] for at in range(0, len(whole), 41)],
}


def chunks(front: Front) -> list[bytes]:
    """A streamed reply's body as the sidecar has written it, write by write."""
    url, body = urlsplit(str(front.http.base_url)), json.dumps({**HELLO, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection((url.hostname or "", url.port or 0), timeout=30) as connection:
        connection.sendall(head.encode() + body)
        came = b"".join(iter(lambda: connection.recv(65536), b""))
    rest, found = came.partition(b"\r\n\r\n")[2], []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        found.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    return found


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_events_arrive_complete_and_in_order_however_they_are_read(
    start: Start, cut: Callable[[bytes], list[bytes]]
) -> None:
    front = start()
    front.engine.words, front.engine.cut = WORDS, cut
    *events, last = front.events()
    assert [e["choices"][0]["delta"]["content"] for e in events] == WORDS
    assert (last["choices"], last["reasonguard"]["guarded"]) == ([], True)
    assert front.counted() == {"guarded": 1}


def test_what_comes_in_one_read_goes_out_in_one_write_and_the_receipt_after_it(start: Start) -> None:
    front = start()
    front.engine.cut = CUTS["all at once"]
    words, receipt, end = chunks(front)
    assert (words.count(b"data: "), words.count(b"\n\n")) == (3, 3)
    assert [part[:21] for part in receipt.split(b"data: ")[1:]] == [b'{"id":"c1","created":', b"[DONE]\n\n"]
    assert end == b""


@pytest.mark.parametrize("nothing", [b"{nope", b"[1]", b"\xff"])
def test_what_came_before_an_event_that_is_none_is_delivered_then_the_error_and_a_receipt(
    start: Start, nothing: bytes
) -> None:
    front = start()
    front.engine.cut = lambda whole: [whole.split(b"\n\n")[0] + b"\n\ndata: " + nothing + b"\n\n" + whole]
    first, last = front.events()
    assert first["choices"][0]["delta"]["content"] == "One"
    assert (last["error"]["code"], last["reasonguard"]["guarded"]) == ("engine_unavailable", False)


@given(events=st.lists(st.text(st.characters(exclude_characters="\r\n"))), data=st.data())
def test_where_a_stream_is_torn_changes_no_event(events: list[str], data: Any) -> None:
    wanted = [event.encode("utf-8", "surrogatepass").strip() for event in events]
    whole = b"".join(b"data: %b\n\n: a comment\n" % each for each in wanted)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)))))
    reader = Events()
    found = [reader.cut(whole[a:b]) for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert [each for read in found for each in read] == wanted
