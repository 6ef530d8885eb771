"""The official client, unchanged: chat, responses and models, streamed and not, receipts on each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from guard.traces import read_traces
from tests.guard.sidecar.fronts import HARMFUL, RemoteFront
from tests.tiny import ANSWER, CUE, OPENING, REFUSAL_STEP

QUESTION = HARMFUL["messages"][0]["content"]
Remotes = Callable[..., RemoteFront]


@pytest.fixture
def front(remotes: Remotes) -> RemoteFront:
    return remotes(1)


@pytest.fixture
def client(front: RemoteFront) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{front.http.base_url}/v1", api_key="any", max_retries=0) as made:
        yield made


def turned(front: RemoteFront) -> list[str]:
    """The reasoning after each trigger that may have been chosen."""
    return [f"{OPENING} {t.text} {REFUSAL_STEP}" for t in front.sidecar.runtime.triggers]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_chat(client: openai.OpenAI, front: RemoteFront) -> None:
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=HARMFUL["messages"], seed=3)
    answer = raw.parse()
    receipt = answer.model_extra["reasonguard"]
    assert json.loads(raw.headers["x-reasonguard-receipt"]) == receipt
    assert receipt["guarded"] is True
    said = answer.choices[0].message
    assert said.model_extra["reasoning"] in turned(front)
    assert said.content.strip() == ANSWER
    with client.chat.completions.create(
        model="tiny", messages=HARMFUL["messages"], seed=3, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == said.content
    assert chunks[-1].usage == answer.usage
    assert {**chunks[-1].model_extra["reasonguard"], "guard_id": ""} == {**receipt, "guard_id": ""}


def test_response(client: openai.OpenAI, front: RemoteFront) -> None:
    raw = client.responses.with_raw_response.create(
        model="tiny", input=QUESTION, instructions="Be brief.", max_output_tokens=100, metadata={"a": "b"}
    )
    answer = raw.parse()
    receipt = answer.model_extra["reasonguard"]
    assert json.loads(raw.headers["x-reasonguard-receipt"]) == receipt
    assert (receipt["guarded"], receipt["interventions"], receipt["mode"]) == (True, 1, "substitute")
    reasoning, message = answer.output
    assert (reasoning.type, message.type) == ("reasoning", "message")
    assert reasoning.content[0].text in turned(front)
    assert answer.output_text.strip() == ANSWER
    assert CUE not in raw.text
    assert (answer.status, answer.model, answer.instructions, answer.metadata) == (
        "completed", "tiny", "Be brief.", {"a": "b"},
    )  # fmt: skip
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    trace = next(t for t in read_traces(front.spool)[0] if t.guard_id == receipt["guard_id"])
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(trace.prompt_ids), len(trace.output_ids))


def test_a_streamed_response_ends_as_the_whole_one(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="tiny", input=QUESTION)
    with client.responses.stream(model="tiny", input=QUESTION) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert final.output_text == whole.output_text
    assert [item.type for item in final.output] == ["reasoning", "message"]
    assert final.output[0].content[0].text == whole.output[0].content[0].text
    assert final.usage == whole.usage
    last = events[-1]
    assert last.type == "response.completed"
    receipt = last.response.model_extra["reasonguard"]
    assert {**receipt, "guard_id": ""} == {**whole.model_extra["reasonguard"], "guard_id": ""}
    deltas = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert deltas == whole.output_text
    kinds = [e.type for e in events if not e.type.endswith(".delta")]
    item = ["response.output_item.added", "response.content_part.added"]
    ended = ["response.content_part.done", "response.output_item.done"]
    assert kinds == [
        "response.created", "response.in_progress", *item, "response.reasoning_text.done", *ended,
        *item, "response.output_text.done", *ended, "response.completed",
    ]  # fmt: skip


def test_a_conversation_goes_on_from_what_came_back(client: openai.OpenAI, front: RemoteFront) -> None:
    first = client.responses.create(model="tiny", input=QUESTION)
    history: list[Any] = [{"role": "user", "content": QUESTION}, *(i.model_dump() for i in first.output)]
    second = client.responses.create(model="tiny", input=[*history, {"role": "user", "content": "And then?"}])
    assert second.model_extra["reasonguard"]["guarded"] is True
    prompt = front.sidecar.runtime.table.text(front.engines[0].asked[-1]["prompt"])
    assert f"assistant\n{first.output_text}" in prompt
    assert REFUSAL_STEP not in prompt.split("And then?")[0], "earlier reasoning does not reach the engine"


def test_a_cut_response_is_incomplete(client: openai.OpenAI) -> None:
    cut = client.responses.create(model="tiny", input=QUESTION, max_output_tokens=4)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    with client.responses.create(model="tiny", input=QUESTION, max_output_tokens=4, stream=True) as stream:
        last = list(stream)[-1]
    assert (last.type, last.response.usage.output_tokens) == ("response.incomplete", 4)


def test_an_engine_that_breaks_off_fails_the_response(client: openai.OpenAI, front: RemoteFront) -> None:
    front.engines[0].break_after = 2
    with client.responses.create(model="tiny", input=QUESTION, stream=True) as stream:
        last = list(stream)[-1]
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert last.response.error.code == "server_error"
    front.wait({"1": "The engine cannot be reached (ClientPayloadError)."})
    with pytest.raises(openai.APIStatusError) as caught:
        client.responses.create(model="tiny", input=QUESTION)
    assert caught.value.status_code == 503


def test_refusals_raise_the_clients_own_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="tiny", input=QUESTION, previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"
    assert caught.value.body["message"] == (
        "`previous_response_id` is refused: no response is stored here; send the whole conversation in `input`."
    )
    with pytest.raises(openai.BadRequestError, match="tool calls are not watched yet"):
        client.responses.create(model="tiny", input=QUESTION, tools=[{"type": "web_search"}])
