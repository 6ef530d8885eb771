"""Generation over HTTP: a real vLLM server gives ids, and a real server in front of it fails in every way."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from align.endpoints import EndpointGenerator, EndpointSpec
from align.generate import Job, Result, answers
from align.pipeline import Workbench
from align.sites import Sites
from guard.errors import UserError
from tests.align.conftest import REQUEST, Server
from tests.guard.sidecar.conftest import running
from tests.tiny import ANSWER, CUE, OPENING, PLAN

#: What stands for a failure: a status, or what else goes wrong.
Fault = int | str


@dataclass
class Front:
    """Forwards to the real server, except for the completions whose turn it is to fail."""

    server: Server
    faults: list[Fault] = field(default_factory=list)
    """One a completion, in order; 0 forwards, and so does what comes after the last."""
    always: Fault = 0
    asked: list[dict[str, object]] = field(default_factory=list)
    keys: Counter[str] = field(default_factory=Counter)
    tokens: list[int] | None = None
    """What /tokenize answers instead of the truth."""

    @property
    def app(self) -> Starlette:
        routes = [Route("/{path:path}", self._route, methods=["GET", "POST"])]
        return Starlette(routes=routes)

    async def _route(self, request: Request) -> Response:
        body = await request.body()
        self.keys[request.headers.get("authorization", "")] += 1
        if request.url.path == "/tokenize" and self.tokens is not None:
            return JSONResponse({"tokens": self.tokens})
        fault: Fault = 0
        if request.url.path == "/v1/completions":
            self.asked.append(json.loads(body))
            fault = self.faults.pop(0) if self.faults else self.always
        if isinstance(fault, int) and fault:
            headers = {"retry-after": "0"} if fault == 429 else {}
            return JSONResponse({"error": {"message": "no"}}, fault, headers)
        if fault == "hang":
            await asyncio.sleep(30)
        if fault == "rubbish":
            return Response(b"{")
        answer = await self._forward(request, body)
        if request.url.path == "/v1/models":
            listed = json.loads(answer.body)
            listed["data"].append({"id": "an-adapter", "max_model_len": None})
            return JSONResponse(listed)
        if fault == "other prompt":
            changed = json.loads(answer.body)
            changed["choices"][0]["prompt_token_ids"].insert(0, 1)
            return JSONResponse(changed)
        if fault == "aborted":
            changed = json.loads(answer.body)
            changed["choices"][0]["finish_reason"] = "abort"
            return JSONResponse(changed)
        return answer

    async def _forward(self, request: Request, body: bytes) -> Response:
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            url = f"{self.server.url}{request.url.path}"
            headers = {"authorization": f"Bearer {self.server.key}", "content-type": "application/json"}
            found = await client.request(request.method, url, content=body, headers=headers)
        return Response(found.content, found.status_code, media_type="application/json")


@pytest.fixture
def jobs(stubborn_bench: Workbench) -> list[Job]:
    prompt = stubborn_bench.prompt(REQUEST)
    return [Job(id=f"job-{n}", prompt_ids=prompt, max_tokens=n) for n in range(1, 13)]


@pytest.fixture
def reply(stubborn_bench: Workbench) -> list[int]:
    """The scripted reply to any request, its EOS included."""
    text = f"{OPENING} {CUE} {' '.join(PLAN)}</think>{ANSWER}<|im_end|>"
    return list(stubborn_bench.tokenizer.encode(text, add_special_tokens=False))


def test_vllm_continues_ids_and_says_how_it_ended(
    vllm_server: Server, stubborn_bench: Workbench, reply: list[int], tmp_path: Path
) -> None:
    generator = vllm_server.generator(stubborn_bench, f"{vllm_server.url}/v1/")
    prompt = stubborn_bench.prompt(REQUEST)
    jobs = [
        Job(id="whole", prompt_ids=prompt, max_tokens=200),
        Job(id="cut", prompt_ids=[*prompt, *reply[:4]], max_tokens=3),
    ]
    found = generator.generate(jobs, tmp_path / "out.jsonl", "test")
    assert generator.context == 512
    assert found["whole"] == Result(id="whole", job=jobs[0].key, output_ids=reply, finish="stop")
    assert found["cut"] == Result(id="cut", job=jobs[1].key, output_ids=reply[4:7], finish="length")


def test_every_failure_is_tried_again_on_whatever_server_is_free(
    vllm_server: Server, stubborn_bench: Workbench, jobs: list[Job], reply: list[int], tmp_path: Path
) -> None:
    one = Front(vllm_server, faults=[500, "hang", 429, "rubbish", 0, "aborted", 503, 0])
    other = Front(vllm_server, always=500)
    with running(one.app) as first, running(other.app) as second:
        generator = vllm_server.generator(stubborn_bench, first, second, concurrency=3, timeout=2.0, attempts=30)
        found = generator.generate(jobs, tmp_path / "out.jsonl", "test")
    assert {i: r.output_ids for i, r in found.items()} == {job.id: reply[: job.max_tokens] for job in jobs}
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["id"] for line in lines) == sorted(job.id for job in jobs)
    assert one.faults == []
    # Twelve answers and six failures; a hung request is tried again.
    assert len(one.asked) == len(jobs) + 6
    assert other.asked
    assert one.keys == {f"Bearer {vllm_server.key}": len(one.asked) + 2}
    asked = one.asked[0]
    assert asked["return_token_ids"] is True
    # What a server would otherwise take from its model's generation config.
    assert (asked["top_p"], asked["repetition_penalty"], asked["min_p"]) == (1.0, 1.0, 0.0)
    assert (asked["temperature"], asked["top_k"]) == (0.6, 20)


def test_what_is_whole_is_kept_when_a_server_goes_down_and_only_the_rest_is_asked_for_again(
    vllm_server: Server, stubborn_bench: Workbench, jobs: list[Job], reply: list[int], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    held = Result(id="job-3", job=jobs[2].key, output_ids=[7], finish="stop").model_dump_json()
    stale = Result(id="job-5", job="another", output_ids=[8], finish="stop").model_dump_json()
    out.write_text(f'{stale}\n{held}\n{{"id": "job-4", "outp')
    front = Front(vllm_server, faults=[0, 0, 0], always=500)
    with running(front.app) as url:
        generator = vllm_server.generator(stubborn_bench, url, concurrency=1, attempts=3)
        with pytest.raises(
            UserError, match=r"\(test\) gave up on a job after 3 attempts; got http.*: HTTP 500"
        ) as said:
            generator.generate(jobs, out, "test")
        assert "run the same command again" in str(said.value)
        assert set(answers(out, jobs)) == {"job-1", "job-2", "job-3", "job-4"}
        front.always, before = 0, len(front.asked)
        found = generator.generate(jobs, out, "test")
    assert len(front.asked) - before == len(jobs) - 4
    assert found["job-3"].output_ids == [7]
    assert found["job-12"].output_ids == reply[:12]


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (400, 'refuses a job with HTTP 400; got {"error":{"message":"no"}}.'),
        (401, "refuses a job with HTTP 401; .* REASONGUARD_ENDPOINT_KEY"),
        ("other prompt", "does not answer in the token ids it was asked in"),
    ],
)
def test_what_cannot_get_better_ends_at_once(
    vllm_server: Server, stubborn_bench: Workbench, jobs: list[Job], tmp_path: Path, fault: Fault, sentence: str
) -> None:
    front = Front(vllm_server, always=fault)
    with running(front.app) as url, pytest.raises(UserError, match=sentence):
        vllm_server.generator(stubborn_bench, url, concurrency=1).generate(jobs, tmp_path / "out.jsonl", "test")
    assert len(front.asked) == 1


def test_a_server_with_another_tokenizer_is_refused(
    vllm_server: Server, stubborn_bench: Workbench, jobs: list[Job], tmp_path: Path
) -> None:
    front = Front(vllm_server, tokens=[1, 2, 3])
    with running(front.app) as url, pytest.raises(UserError, match="which has another tokenizer"):
        vllm_server.generator(stubborn_bench, url).generate(jobs, tmp_path / "out.jsonl", "test")
    assert front.asked == []


def test_a_server_that_is_down_at_the_start_is_told_and_left_out(
    vllm_server: Server, stubborn_bench: Workbench, jobs: list[Job], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    generator = vllm_server.generator(stubborn_bench, "http://127.0.0.1:9", vllm_server.url)
    assert generator.context == 512
    assert len(generator.generate(jobs, tmp_path / "out.jsonl", "test")) == len(jobs)
    told = " ".join(capfd.readouterr().err.split())
    assert "Endpoint http://127.0.0.1:9/v1/models does not answer" in told
    assert told.count("It is left out.") == 1


def test_what_is_no_vllm_server_is_a_sentence(tmp_path: Path) -> None:
    def meet(*urls: str) -> None:
        EndpointGenerator(EndpointSpec(urls=urls), lambda _: [1]).generate([Job(id="a", prompt_ids=[1])], out, "test")

    out = tmp_path / "out.jsonl"
    with running(Starlette()) as url, pytest.raises(UserError, match=r"/v1/models does not answer; got .*404"):
        meet(url)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/v1/models does not answer"):
        meet("http://127.0.0.1:9", "http://127.0.0.1:11")
    for wrong in ("localhost:8000", "http://", "file:///etc"):
        with pytest.raises(UserError, match="--endpoint is no address"):
            meet(wrong)
    with pytest.raises(ValueError, match="an endpoint's guard is its own"):
        EndpointGenerator(EndpointSpec(urls=("http://x",)), lambda _: [1]).generate(
            [Job(id="a", prompt_ids=[1], guard=True)], out, "test"
        )


@pytest.fixture
def leased() -> Callable[[Sites, int], list[str]]:
    """Takes that many leases at once and says whose they were."""

    def take(sites: Sites, count: int) -> list[str]:
        async def run() -> list[str]:
            async def one() -> str:
                async with sites.lease() as site:
                    await asyncio.sleep(0.02)
                    return site.url

            return list(await asyncio.gather(*(one() for _ in range(count))))

        return asyncio.run(run())

    return take


def test_the_least_loaded_server_is_next_and_none_is_overloaded(leased: Callable[[Sites, int], list[str]]) -> None:
    assert leased(Sites(["a", "b"], 2, 1.0), 4) == ["a", "b", "a", "b"]
    began = time.monotonic()
    assert Counter(leased(Sites(["a", "b"], 1, 1.0), 6)) == {"a": 3, "b": 3}
    assert time.monotonic() - began >= 0.06


def test_a_server_rests_longer_after_each_failure_and_failures_together_count_once() -> None:
    async def run() -> list[float]:
        sites = Sites(["a"], 4, 0.02)
        waits = []
        for _ in range(3):
            async with sites.lease() as site:
                site.failed("x")
                site.failed("x")
            began = time.monotonic()
            async with sites.lease():
                waits.append(time.monotonic() - began)
        site.recovered()
        assert site.failures == 0
        return waits

    first, second, third = asyncio.run(run())
    assert first >= 0.019
    assert second >= 0.039
    assert third >= 0.079
