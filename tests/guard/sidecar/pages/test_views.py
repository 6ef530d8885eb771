"""Every page through HTTP over a real store: what it shows, what it counts, what it keeps."""

from __future__ import annotations

import re
import threading
from html import unescape
from pathlib import Path

import httpx
import pytest

from guard.sidecar.canary import Canary
from guard.sidecar.pages import queries
from guard.sidecar.proof import Delivered, prove
from guard.store import reviews
from guard.store.reading import Filter
from guard.store.store import Store
from guard.traces import GuardTime, Trace
from tests.guard.recorded import CALM, CUE, live
from tests.guard.sidecar.fronts import until
from tests.guard.sidecar.pages.kit import CAKE, LAMP, NOW, SCRIPT, SHED, Pages, Said, opened, text_of, told
from tests.guard.sidecar.test_canary import Words
from tests.guard.store.conftest import postgres as postgres


def many(count: int, **changes: object) -> list[Trace]:
    return [
        LAMP.model_copy(update={
            "guard_id": f"t{n:03}", "created": NOW - 100 + n % 7,
            "receipt": LAMP.receipt.model_copy(update={"guard_id": f"t{n:03}"}), **changes,
        })
        for n in range(count)
    ]  # fmt: skip


def test_the_overview_counts_what_the_store_holds(pages: Pages) -> None:
    odd = told("odd", "Why?", [Said("The user asks why.", None)], created=NOW - 7200)
    old = told("old", "Why?", [Said("The user asks why.")], created=NOW - 10 * 86_400, weights="w9")
    probe = told("probe-1", "Why?", [Said("The user asks why.")])
    pages.feed(LAMP, CAKE, SHED, odd, old, probe)
    page = text_of(pages.get("/"))
    assert "Requests 4 10 steps" in page
    assert "Intervened 50.0 % 2 requests, 95 % [15.0, 85.0]" in page
    assert "With unscored steps 1 25.0 % [4.6, 69.9]" in page
    assert "Guard time of a request p50 not recorded p95 not recorded in the window, n = 0" in page
    assert "Guard time of a step p50 nothing yet" in page
    assert "default 2acf9ffb68ef 4 50.0 % [15.0, 85.0] 25.0 % [4.6, 69.9] 25.0 % [4.6, 69.9] 2" in page
    assert "Requests 3 9 steps" in text_of(pages.get("/?window=1h"))
    by_version = text_of(pages.get("/?window=all&by=version"))
    assert "w0 4 50.0 %" in by_version
    assert "w9 1 0.0 % [0.0, 79.3]" in by_version
    assert "default-3f0c 4" in text_of(pages.get("/?by=detector"))
    assert "enforced 4" in text_of(pages.get("/?by=mode"))
    # What is no choice of ours is the usual one.
    assert "default 2acf9ffb68ef 4" in text_of(pages.get("/?window=<b>&by=';drop table traces"))
    assert "http-equiv" not in pages.get("/")
    assert '<meta http-equiv="refresh" content="30">' in pages.get("/?refresh=30")


def test_an_empty_store_has_an_overview(pages: Pages) -> None:
    for path in ("/", "/?window=all"):
        page = text_of(pages.get(path))
        assert "Requests 0 0 steps" in page
        assert "No requests in this window." in page
    assert "No trace passes this filter." in pages.get("/traces")
    assert "Nothing waits" in pages.get("/review")


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_the_guards_time_is_told_of_the_newest_requests(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/s.db" if kind == "sqlite" else request.getfixturevalue("postgres").database()
    with opened(tmp_path, url=url) as pages:
        assert pages.log_in().status_code == 303
        for n in range(1, 41):
            time = GuardTime(request=n * 1000, steps=[n * 250, n * 250])
            pages.feed(CAKE.model_copy(update={"guard_id": f"t{n}", "created": NOW - n, "guard_time": time}))
        pages.feed(LAMP, told("old", "?", [Said("A step.")], created=NOW - 7200, guard_time=GuardTime(request=10**9)))
        page = text_of(pages.get("/?window=1h"))
        assert "Guard time of a request p50 30.0 ms p95 57.0 ms in the window, n = 40" in page
        assert "p95 58.5 ms in the window, n = 41" in text_of(pages.get("/"))
        monkeypatch.setattr(queries, "TIMED", 10)
        assert "p50 7.5 ms p95 15.0 ms in the window, n = 10" in text_of(pages.get("/"))
        assert "guard time 4.5 ms, 3.0 of them to read the request" in text_of(pages.get("/traces/t3"))
        assert "guard time not recorded" in text_of(pages.get("/traces/lamp"))


def test_what_the_sidecar_measured_is_told_as_bounds(pages: Pages) -> None:
    for seconds in [0.004] * 18 + [0.04, 20.0]:
        pages.sidecar.metrics.receipt_wait.observe(seconds)
    pages.sidecar.metrics.guard_step.observe(0.002)
    pages.sidecar.metrics.requests.labels("guarded").inc(20)
    page = text_of(pages.get("/"))
    assert "p50 at most 5 ms p95 at most 50 ms since the start, n = 20" in page
    assert "Guard time of a step p50 at most 2.5 ms p95 at most 2.5 ms since the start, n = 1" in page
    assert "guarded 20" in page


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_the_course_puts_every_request_in_its_span(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = f"sqlite:///{tmp_path}/s.db" if kind == "sqlite" else request.getfixturevalue("postgres").database()
    with opened(tmp_path, url=url) as pages:
        for n, created in enumerate((0.0, 9.99, 10.0, 25.0, 39.99, 40.0)):
            pages.feed(told(f"t{n}", "?", [Said("A step is here.")], created=created))
        pages.feed(LAMP.model_copy(update={"created": 26.0}))
        assert queries.course(pages.store, Filter(), 0.0, 40.0, 4) == [(2, 0), (1, 0), (2, 1), (1, 0)]
        assert [(each.key, each.requests) for each in queries.counts(pages.store, Filter(), "detector")] == [
            (("default-3f0c",), 7)
        ]
        waiting = queries.next_step(pages.store, "ann", 0.5, pages.site.tokenizer_hash)
        assert waiting == queries.Waiting("lamp", 3, 9)


def test_the_list_pages_through_everything_once(pages: Pages) -> None:
    pages.feed(*many(queries.PAGE * 2 + 5))
    seen: list[str] = []
    path = "/traces"
    for number in range(3):
        page = pages.get(path)
        seen += re.findall(r'href="/guard/traces/(t\d+)"', page)
        older = re.search(r'<a rel="next" href="([^"]+)"', page)
        assert (older is None) == (number == 2)
        assert ("Newest" in page) == (number > 0)
        path = "/traces" + unescape(older[1]) if older else ""
    assert seen == [t.guard_id for t in sorted(many(105), key=lambda t: (-t.created, -int(t.guard_id[1:])))]


def test_the_list_filters(pages: Pages) -> None:
    acme = CAKE.model_copy(update={"tenant": "acme", "weights": "w1", "created": NOW - 7200})
    odd = told("odd", "Why?", [Said("The user asks why.", None)])
    pages.feed(LAMP, acme, odd)

    def ids(query: str) -> set[str]:
        return set(re.findall(r'href="/guard/traces/(\w+)"', pages.get(f"/traces?{query}")))

    assert ids("") == {"lamp", "cake", "odd"}
    assert ids("tenant==acme") == {"cake"}
    assert ids("tenant==") == {"lamp", "odd"}
    assert ids("weights=w1") == {"cake"}
    assert ids("intervened=1") == {"lamp"}
    assert ids("unscored=1") == {"odd"}
    assert ids("window=1h") == {"lamp", "odd"}
    assert ids("before=nonsense") == {"lamp", "cake", "odd"}
    page = pages.get("/traces?tenant==acme")
    assert '<option value="=acme" selected>acme</option>' in page


def test_a_trace_shows_cues_triggers_and_what_was_hidden(pages: Pages) -> None:
    pages.feed(LAMP, SHED)
    page = text_of(pages.get("/traces/lamp"))
    assert "How do I steal a lamp?" in page
    assert "1 0.930 cue It is wrong, but I will agree to plan it. c Cue n Not a cue" in page
    assert "2 trigger wait-harm (trigger) Wait, going along with this could do real harm to somebody. 3 0.310" in page
    assert "0 0.020 The user asks about a lamp. m Missed cue here n Not a cue" in page
    assert "not watched </think>I cannot help with that." in page
    assert "1 wait-harm trigger inject 0.930 13 0 yes" in page
    hidden = text_of(pages.get("/traces/shed"))
    assert "hidden cue I agree, they surely have a good reason. Wait, going along" in hidden
    assert "somebody. c Cue n Not a cue" in hidden
    assert "(13 tokens injected, 20 hidden)" in hidden
    assert "The store has no trace nothing." in pages.get("/traces/nothing", 404)


def test_a_long_trace_is_shown_part_by_part(pages: Pages) -> None:
    pages.feed(told("long", "?", [Said(f"This is step number {n}.") for n in range(450)], answer="Yes."))
    first = pages.get("/traces/long")
    assert first.count("data-row") == 200
    assert 'href="/guard/traces/long?from=200"' in first
    last = pages.get("/traces/long?from=400")
    assert last.count("data-row") == 50
    assert "Steps from" not in last
    assert "not watched" in last
    assert "not watched" not in first
    response = pages.post("/label", guard_id="long", step="449", label="not_cue", back="trace")
    assert response.headers["location"] == "/guard/traces/long?from=400#s449"


def test_what_was_not_kept_is_said(pages: Pages) -> None:
    pages.feed(
        replace_id(LAMP.keeping("ids"), "ids"), replace_id(LAMP.keeping("none"), "none"),
        replace_id(LAMP, "other").model_copy(update={"tokenizer_hash": "f" * 12}),
    )  # fmt: skip
    ids = text_of(pages.get("/traces/ids"))
    assert "Read from the prompt's token ids: its text was not kept (log_content: ids). How do I steal a lamp?" in ids
    assert "cue It is wrong, but I will agree to plan it." in ids
    none = text_of(pages.get("/traces/none"))
    assert "The policy's log_content was none: neither text nor token ids were kept" in none
    assert "The request's text was not kept (log_content: none)." in none
    assert "0.930 cue not kept" in none
    other = text_of(pages.get("/traces/other"))
    assert "written by kit with another tokenizer" in other
    assert "0.930 cue not readable here" in other
    assert "not kept (log_content: none)" in text_of(pages.get("/traces"))
    # None of them can be learned from, so none is asked about.
    assert "Nothing waits" in pages.get("/review")


def replace_id(trace: Trace, guard_id: str) -> Trace:
    receipt = trace.receipt.model_copy(update={"guard_id": guard_id})
    return trace.model_copy(update={"guard_id": guard_id, "receipt": receipt})


def test_hostile_text_is_text_on_every_page(pages: Pages) -> None:
    hostile = told("x'\"><b>", SCRIPT, [Said(SCRIPT, 0.4), Said("A" * 1_000_000, 0.6, cue=True)], answer=SCRIPT,
                   tenant=SCRIPT, weights="<i>w", model=SCRIPT)  # fmt: skip
    hostile.receipt.errors = [SCRIPT]
    hostile.receipt.policy = SCRIPT
    pages.feed(hostile)
    here = "/traces/x%27%22%3E%3Cb%3E"
    for path in ("/", "/?by=version", "/traces", here, "/review"):
        page = pages.get(path)
        assert not re.search(r"<(script>|img|b>|i>)", page), path
        assert "owned'</script>" not in page
        assert "{{7*7}}" in page or path in ("/?by=version", "/review")
        assert "\u202e" not in page
        assert "\0" not in page
        assert len(page) < 60_000
    trace = pages.get(here)
    assert "&lt;script&gt;document.title=&#39;owned&#39;&lt;/script&gt;" in trace
    assert 'title="right-to-left override">U+202E</span>evil' in trace
    assert "more characters, not shown" in trace
    response = pages.post("/label", guard_id="x'\"><b>", step="0", label="missed", back="trace")
    assert response.headers["location"] == f"/guard{here}#s0"
    assert [each.label for each in reviews.of_traces(pages.store, ["x'\"><b>"])] == ["missed"]


def test_the_queue_asks_about_the_most_doubtful_step_first(pages: Pages) -> None:
    pages.feed(LAMP, CAKE, SHED)

    def asked() -> tuple[str, str]:
        page = pages.get("/review")
        found = re.search(r'name="guard_id" value="(\w+)">\s*<input type="hidden" name="step" value="(\d+)"', page)
        assert found
        return found[1], found[2]

    order = []
    for label in ("not_cue", "skip", "not_cue", "cue"):
        order.append(asked())
        assert pages.post("/label", guard_id=order[-1][0], step=order[-1][1], label=label).status_code == 303
    # Scores 0.44, 0.31, 0.2, 0.93 about a threshold of 0.5.
    assert order == [("cake", "1"), ("lamp", "3"), ("shed", "2"), ("lamp", "1")]
    assert "3 steps wait" in text_of(pages.get("/review"))
    # What ann has skipped waits for others, what she has judged does not.
    assert pages.post("/logout").status_code == 303
    assert pages.log_in("bob").status_code == 303
    assert asked() == ("lamp", "3")
    assert "4 steps wait" in text_of(pages.get("/review"))


def test_labels_are_kept_once_with_reviewer_and_time_and_can_be_undone(pages: Pages) -> None:
    pages.feed(LAMP)
    for _ in range(3):
        assert pages.post("/label", guard_id="lamp", step="3", label="missed").headers["location"] == "/guard/review"
    assert pages.post("/label", guard_id="lamp", step="", label="harmful", at="3").headers["location"] == (
        "/guard/review?trace=lamp&step=3"
    )
    said = reviews.of_traces(pages.store, ["lamp"])
    assert [(each.step, each.label, each.reviewer) for each in said] == [
        (3, "missed", "ann"), (None, "harmful", "ann"),
    ]  # fmt: skip
    assert all(each.created > 1.7e9 for each in said)
    page = pages.get("/traces/lamp")
    assert "missed cue ann" in text_of(page)
    assert 'data-key="h" aria-pressed="true"' in page
    assert undo(pages).headers["location"] == "/guard/traces/lamp#request"
    assert undo(pages).headers["location"] == "/guard/review?trace=lamp&step=3"
    assert reviews.standing(pages.store, ["lamp"]) == []
    assert "Undo" not in pages.get("/review")


def undo(pages: Pages) -> httpx.Response:
    found = re.search(r'name="review" value="(\d+)"', pages.get("/review"))
    assert found
    return pages.post("/undo", review=found[1])


@pytest.mark.parametrize(
    ("step", "label"),
    [("0", "maybe"), ("0", "undone"), ("0", "harmful"), ("", "cue"), ("9", "cue"), ("-1", "cue"), ("0x1", "cue")],
)
def test_what_is_no_label_of_a_step_is_refused(pages: Pages, step: str, label: str) -> None:
    pages.feed(LAMP)
    assert pages.post("/label", guard_id="lamp", step=step, label=label).status_code == 404
    assert pages.post("/label", guard_id="none", step="0", label="cue").status_code == 404
    assert reviews.of_traces(pages.store, ["lamp"]) == []


def test_a_store_that_fails_is_a_page_that_says_so(pages: Pages) -> None:
    with pages.store.writing() as connection:
        connection.exec_driver_sql("ALTER TABLE traces RENAME TO gone")
    page = pages.get("/traces", 503)
    assert "This page cannot be shown" in page
    assert "no such table: traces" in page
    assert "SELECT" not in page


def test_a_slow_page_holds_nobody_up(pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    held, asked = threading.Event(), threading.Event()

    def slow(*_: object) -> list[object]:
        asked.set()
        assert held.wait(60)
        return []

    monkeypatch.setattr(queries, "distinct", slow)
    answers: list[int] = []
    cookies = dict(pages.http.cookies)
    address = str(pages.http.base_url)
    threads = [
        threading.Thread(target=lambda: answers.append(
            httpx.get(f"{address}/guard/traces", cookies=cookies, trust_env=False, timeout=60).status_code
        ))
        for _ in range(3)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    assert asked.wait(60)
    # Every thread of the pages is taken, and the sidecar answers.
    assert pages.http.get("/health").json() == {"status": "ok"}
    assert answers == []
    held.set()
    for thread in threads:
        thread.join()
    assert answers == [200] * 3


def test_without_a_registry_the_page_says_how_to_get_one(pages: Pages) -> None:
    assert "serve --versions DIR" in text_of(pages.get("/versions"))


def test_the_canary_is_shown_beside_the_detector_in_force(pages: Pages) -> None:
    assert "serve --canary DIR" in text_of(pages.get("/canary"))
    comparer, runtime = pages.sidecar.comparer, pages.sidecar.runtime
    comparer.use(Canary(Words("car"), "detector-0123456789ab", 20), runtime.detector)
    page = text_of(pages.get("/canary"))
    assert "The canary detector-0123456789ab sees 20 % of the requests and decides nothing." in page
    assert "in force words-1 0.5 no cases 0 canary words-1 0.5 no cases 0" in page
    percent_of_ids = [f"g{n}" for n in range(200) if Canary(Words(), "", 20).watches(f"g{n}")]
    for guard_id, model in zip(percent_of_ids, (CALM, CALM, CUE, CUE + CALM), strict=False):
        trace = live(model, runtime.policy, guard_id=guard_id)
        comparer.offer(prove(guard_id, trace, Delivered(None), runtime.policy), runtime)
    until(lambda: (found := comparer.figures()) is not None and found.results.total() == 4)
    page = text_of(pages.get("/canary"))
    assert "in force words-1 0.5 500.0 [150.0, 850.0] 4 canary words-1 0.5 750.0 [300.6, 954.4] 4" in page
    assert "Agreement: 0.0 % [0.0, 49.0]" in page
    assert "only the canary flags it 50.0 % [15.0, 85.0] 2" in page
    assert "only the detector in force flags it 25.0 % [4.6, 69.9] 1" in page
    assert "steps scored 5 dropped 0 skipped 0 errors 0" in page
    assert f"{percent_of_ids[3]} the canary flags it later step 0 step 1" in page
    assert f'href="/guard/traces/{percent_of_ids[3]}"' in pages.get("/canary")


def test_the_store_is_opened_once_it_is_there(tmp_path: Path) -> None:
    with opened(tmp_path) as pages:
        pages.site.store_url = f"sqlite:///{tmp_path}/later.db"
        assert pages.log_in().status_code == 303
        assert "does not exist" in pages.get("/", 503)
        Store.open(pages.site.store_url, migrate=True).close()
        assert "Requests 0" in text_of(pages.get("/"))
