"""Checks of what any OpenAI-compatible gateway should do: routes, streams, errors, limits."""

from __future__ import annotations

import json

import httpx

from tests.conformance.gateway import (
    CHAT,
    COMPLETIONS,
    Check,
    Failed,
    Gateway,
    Skipped,
    need,
    refused,
    spoken,
    streamed,
)


def models(gate: Gateway) -> None:
    listed = gate.answered(gate.http.get("/v1/models"))
    need(gate.named() in [card["id"] for card in listed["data"]], "the model is not listed")


def chat_answers(gate: Gateway) -> None:
    answer = gate.chat()
    need(answer["object"] == "chat.completion", f"object {answer['object']}")
    need(answer["choices"][0]["message"]["role"] == "assistant", "the message is not the assistant's")
    need(spoken(answer).strip(), "neither reasoning nor content")


def chat_streams(gate: Gateway) -> None:
    events = gate.events()
    chunks = [event for event in events if event.get("choices")]
    need(len(chunks) > 2, f"{len(chunks)} chunks: it was not streamed")
    need(chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length"), "the last chunk has no finish_reason")
    need(len({event["id"] for event in chunks}) == 1, "the chunks have several ids")


def stream_is_the_whole(gate: Gateway) -> None:
    need(streamed(gate.events()) == spoken(gate.chat()), "the streamed text is another than the whole one")


def seed_gives_the_same_text(gate: Gateway) -> None:
    body = {"temperature": 1, "seed": 11}
    response = gate.http.post(CHAT, json=gate.body(**body))
    if response.status_code == 400:
        raise Skipped(refused(response))
    need(streamed(gate.events(**body)) == spoken(gate.answered(response)), "the same seed gave another text")


def text_parts_are_one_text(gate: Gateway) -> None:
    parts = [{"type": "text", "text": "Say"}, {"type": "text", "text": "hello."}]
    gate.chat(messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}])


def usage_adds_up(gate: Gateway) -> None:
    usage = gate.chat()["usage"]
    need(usage["completion_tokens"] > 0, "no completion tokens")
    need(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"], f"{usage}")


def usage_chunk_when_asked(gate: Gateway) -> None:
    asked = [event for event in gate.events(stream_options={"include_usage": True}) if event.get("usage")]
    need(len(asked) == 1, f"{len(asked)} chunks with usage")
    need(asked[0]["choices"] == [], "the usage chunk has choices")


def no_usage_chunk_unasked(gate: Gateway) -> None:
    need(not any(event.get("usage") for event in gate.events()), "a usage chunk that nobody asked for")


def max_tokens_ends_the_output(gate: Gateway) -> None:
    answer = gate.chat(max_tokens=3)
    need(answer["choices"][0]["finish_reason"] == "length", "finish_reason is not `length`")
    need(answer["usage"]["completion_tokens"] == 3, f"{answer['usage']['completion_tokens']} tokens instead of 3")


def stop_ends_the_output(gate: Gateway) -> None:
    word = next(word for word in reversed(spoken(gate.chat()).split()) if len(word) > 2)
    response = gate.http.post(CHAT, json=gate.body(stop=[word]))
    if response.status_code == 400:
        raise Skipped(refused(response))
    need(word not in spoken(gate.answered(response)), "the stop string is in the text")


def tools_pass_or_are_refused(gate: Gateway) -> None:
    function = {"name": "clock", "description": "The time.", "parameters": {"type": "object", "properties": {}}}
    response = gate.http.post(CHAT, json=gate.body(tools=[{"type": "function", "function": function}]))
    if response.status_code == 400:
        raise Skipped(refused(response))
    gate.answered(response)


def responses_answer(gate: Gateway) -> None:
    answer = gate.answered(gate.response())
    need((answer["object"], answer["status"]) in {("response", "completed"), ("response", "incomplete")}, str(answer))
    need({item["type"] for item in answer["output"]} <= {"reasoning", "message"}, "items of another type")
    usage = answer["usage"]
    need(usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"], f"{usage}")


def responses_stream(gate: Gateway) -> None:
    whole = gate.answered(gate.response())
    events = gate.events("/v1/responses")
    need([e["sequence_number"] for e in events] == list(range(len(events))), "the events are not numbered in order")
    need(events[0]["type"] == "response.created", f"it begins with {events[0]['type']}")
    last = events[-1]
    need(last["type"] == f"response.{whole['status']}", f"it ends with {last['type']}")
    texts = [[item["content"][0]["text"] for item in each["output"]] for each in (whole, last["response"])]
    need(texts[0] == texts[1], "the streamed text is another than the whole one")


def completions_answer(gate: Gateway) -> None:
    answer = gate.answered(gate.completion())
    need(answer["object"] == "text_completion", f"object {answer['object']}")
    need(isinstance(answer["choices"][0]["text"], str), "the choice has no text")
    need(answer["choices"][0]["finish_reason"] in ("stop", "length"), "the choice has no finish_reason")


def completions_stream(gate: Gateway) -> None:
    whole = gate.answered(gate.completion())
    events = gate.events(COMPLETIONS)
    text = "".join(choice["text"] for event in events for choice in event["choices"])
    need(text == whole["choices"][0]["text"], "the streamed text is another than the whole one")


def unknown_model(gate: Gateway) -> None:
    refused(gate.http.post(CHAT, json=gate.body(model="no-such-model")), 400, 404)


def malformed_json(gate: Gateway) -> None:
    for content in (b"", b"{", b"\xff\xfe", b'{"messages": [NaN]}', b"[" * 20_000):
        refused(gate.http.post(CHAT, content=content, headers={"content-type": "application/json"}), 400, 422)


def not_an_object(gate: Gateway) -> None:
    for content in (b"[]", b"1", b'"text"', b"null"):
        refused(gate.http.post(CHAT, content=content, headers={"content-type": "application/json"}), 400, 422)


def no_messages(gate: Gateway) -> None:
    for messages in ([], None, "hello", [{"role": "boss", "content": "x"}], [{"role": "user", "content": 5}]):
        refused(gate.http.post(CHAT, json={**gate.body(), "messages": messages}), 400, 422)


def wrong_types(gate: Gateway) -> None:
    for name, value in (("max_tokens", "many"), ("max_tokens", -1), ("temperature", "hot"), ("stream", "yes")):
        refused(gate.http.post(CHAT, json=gate.body(**{name: value})), 400, 422)


def lone_surrogate(gate: Gateway) -> None:
    content = json.dumps(gate.body("\ud800")).encode()
    refused(gate.http.post(CHAT, content=content, headers={"content-type": "application/json"}), 400, 422)


def too_large_a_body(gate: Gateway) -> None:
    content = json.dumps(gate.body("x" * gate.max_body)).encode()
    try:
        response = gate.http.post(CHAT, content=content, headers={"content-type": "application/json"})
    except httpx.TransportError:
        return  # It may hang up before it has read all of it.
    refused(response, 400, 413)


def unknown_route(gate: Gateway) -> None:
    refused(gate.http.post("/v1/no/such/route", json={}), 404)


def wrong_method(gate: Gateway) -> None:
    refused(gate.http.get(CHAT), 404, 405)


def engine_routes_are_closed(gate: Gateway) -> None:
    routes = ("/invocations", "/tokenize", "/detokenize", "/collective_rpc", "/v1/load_lora_adapter", "/sleep",
              "/inference/v1/generate", "/pooling")  # fmt: skip
    for route in routes:
        status = gate.http.post(route, json=gate.body()).status_code
        if status not in (401, 403, 404, 405):
            raise Failed(f"{route} answers HTTP {status}")


CHECKS: tuple[Check, ...] = (
    models, chat_answers, chat_streams, stream_is_the_whole, seed_gives_the_same_text, text_parts_are_one_text,
    usage_adds_up, usage_chunk_when_asked, no_usage_chunk_unasked, max_tokens_ends_the_output, stop_ends_the_output,
    tools_pass_or_are_refused, responses_answer, responses_stream, completions_answer,
    completions_stream, unknown_model, malformed_json, not_an_object,
    no_messages, wrong_types, lone_surrogate, too_large_a_body, unknown_route, wrong_method, engine_routes_are_closed,
)  # fmt: skip
