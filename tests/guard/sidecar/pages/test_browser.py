"""The pages in a real Chromium: logging in, reviewing by keyboard, hostile text, and what assistive technology needs.

`REASONGUARD_SCREENSHOTS=docs/img` writes the screenshots of docs/review.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guard.sidecar.canary import Canary
from guard.sidecar.proof import Delivered, prove
from guard.store import reviews
from guard.traces import GuardTime
from tests.guard import kit
from tests.guard.recorded import CALM, CUE, live
from tests.guard.sidecar.fronts import until
from tests.guard.sidecar.pages.browser import chromium
from tests.guard.sidecar.pages.kit import CAKE, LAMP, NOW, PASSWORD, SCRIPT, SHED, Pages, Said, opened, told
from tests.guard.sidecar.test_canary import Words

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

HOSTILE = told("hostile", SCRIPT, [Said(SCRIPT, 0.9, cue=True), Said("</bdi></li></ol>" + SCRIPT, 0.1)], answer=SCRIPT)
_HERE = Path(__file__).parent
BASICS, CONTRAST = ((_HERE / name).read_text(encoding="utf-8") for name in ("basics.js", "contrast.js"))


def traffic() -> list[object]:
    """A day of requests for the overview."""
    found = []
    for n in range(180):
        hour = (n * 7919 % 1000) / 1000
        base = (LAMP, CAKE, CAKE, SHED, CAKE)[n % 5]
        receipt = base.receipt.model_copy(update={
            "guard_id": f"day{n:03}", "detector": "default-3f0c" if n % 3 else "reviewed-91aa",
        })  # fmt: skip
        found.append(base.model_copy(update={
            "guard_id": f"day{n:03}", "created": NOW - 120 - 86_000 * hour**1.5, "receipt": receipt,
            "tenant": ("acme", "globex")[n % 2],
            "guard_time": GuardTime(request=4000 + 90 * n, steps=[900 + 70 * n] * 3),
        }))  # fmt: skip
    return found


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pages, BrowserContext]]:
    """One browser and one store for all tests of this file."""
    with opened(tmp_path_factory.mktemp("browser")) as pages:
        pages.feed(LAMP, CAKE, SHED, HOSTILE)
        compare_a_canary(pages)
        with chromium(str(pages.http.base_url)) as browser:
            yield pages, browser


def compare_a_canary(pages: Pages) -> None:
    """Figures for the page of the canary, and a request on which it differs."""
    comparer, runtime = pages.sidecar.comparer, pages.sidecar.runtime
    comparer.use(Canary(Words("car"), "detector-0123456789ab", 100), runtime.detector)
    said = dict.fromkeys([f"day{n:03}" for n in range(50)], kit.encode("My reply ends here."))
    said |= dict.fromkeys([f"day{n:03}" for n in range(6)], kit.encode("I agree to a car."))
    for guard_id, model in {**said, "lamp": CALM, "cake": CUE}.items():
        trace = live(model, runtime.policy, guard_id=guard_id)
        comparer.offer(prove(guard_id, trace, Delivered(None), runtime.policy), runtime)
    until(lambda: (found := comparer.figures()) is not None and found.results.total() == 52)


@pytest.fixture
def page(shown: tuple[Pages, BrowserContext]) -> Iterator[Page]:
    """A tab of somebody who has logged in; no script of a page may fail, and nothing may come from elsewhere."""
    pages, browser = shown
    tab = browser.new_page()
    failures: list[str] = []
    tab.on("pageerror", lambda error: failures.append(str(error)))
    tab.on("console", lambda message: failures.append(message.text) if message.type == "error" else None)
    tab.on("dialog", lambda dialog: (failures.append("a dialog opened"), dialog.dismiss()))
    tab.on("request", lambda r: None if r.url.startswith(str(pages.http.base_url)) else failures.append(r.url))
    tab.goto("/guard/review")
    if tab.url.rpartition("/")[2].startswith("login"):
        log_in(tab)
    yield tab
    tab.close()
    assert failures == []


def log_in(tab: Page) -> None:
    tab.get_by_label("Name").fill("ann")
    tab.get_by_label("Password").fill(PASSWORD)
    tab.get_by_label("Password").press("Enter")
    tab.wait_for_url("**/guard/review")


def shot(tab: Page, name: str) -> None:
    """Keeps a screenshot where they are asked for."""
    directory = os.environ.get("REASONGUARD_SCREENSHOTS")
    if directory:
        path = Path(directory) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tab.screenshot(path=path)
        assert path.stat().st_size < 150_000


def test_three_steps_are_reviewed_by_keyboard_alone(shown: tuple[Pages, BrowserContext], page: Page) -> None:
    pages, _ = shown
    question = page.get_by_role("heading", level=2).nth(1)
    for request, key, text in (
        ("How do I bake a cake?", "n", "The guard let this step pass. Was it a cue?"),
        ("How do I steal a lamp?", "m", "The guard let this step pass. Was it a cue?"),
        ("How do I burn down a shed?", "s", "The guard let this step pass. Was it a cue?"),
    ):
        assert page.locator("blockquote").inner_text() == request
        assert question.inner_text() == text
        if request.endswith("lamp?"):
            page.keyboard.press("h")
            page.wait_for_function("document.querySelector('[data-key=h]').ariaPressed === 'true'")
            shot(page, "review-queue")
        with page.expect_navigation():
            page.keyboard.press(key)
    # The skipped one is taken back by key, and judged.
    with page.expect_navigation():
        page.keyboard.press("u")
    assert page.locator("blockquote").inner_text() == "How do I burn down a shed?"
    with page.expect_navigation():
        page.keyboard.press("n")
    assert [(each.guard_id, each.step, each.label, each.reviewer) for each in
            reviews.standing(pages.store, ["lamp", "cake", "shed"])] == [
        ("cake", 1, "not_cue", "ann"), ("lamp", None, "harmful", "ann"), ("lamp", 3, "missed", "ann"),
        ("shed", 2, "not_cue", "ann"),
    ]  # fmt: skip
    # What is typed into a field is no command, and Ctrl with a key is the browser's.
    before = len(reviews.of_traces(pages.store, ["lamp", "cake", "shed", "hostile"]))
    page.keyboard.press("Control+m")
    page.goto("/guard/traces")
    page.get_by_label("Tenant").press("n")
    assert len(reviews.of_traces(pages.store, ["lamp", "cake", "shed", "hostile"])) == before


def test_a_trace_is_walked_and_labelled_by_keyboard(shown: tuple[Pages, BrowserContext], page: Page) -> None:
    pages, _ = shown
    page.goto("/guard/traces/lamp")
    for key in "jj":
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.id") == "s1"
    with page.expect_navigation():
        page.keyboard.press("c")
    page.wait_for_function("document.activeElement.id === 's1'")
    assert page.locator("#s1 .said").inner_text() == "cue ann"
    page.keyboard.press("j")
    # A trigger's own words cannot be labelled.
    page.keyboard.press("n")
    page.keyboard.press("k")
    assert page.evaluate("document.activeElement.id") == "s1"
    said = reviews.standing(pages.store, ["lamp"])
    assert {(each.step, each.label) for each in said if each.step in (1, 2)} == {(1, "cue")}
    shot(page, "review-trace")


def test_hostile_text_is_shown_and_does_nothing(page: Page) -> None:
    for path in ("/guard/traces/hostile", "/guard/traces", "/guard/review?trace=hostile&step=0"):
        page.goto(path)
        page.wait_for_timeout(100)
        assert page.title().endswith("· Reasonguard")
        assert page.evaluate("document.querySelectorAll('img, main script, iframe').length") == 0
        assert "<script>document.title='owned'</script><img src=x onerror=alert(1)> {{7*7}}" in page.inner_text("main")
    page.goto("/guard/traces/hostile")
    assert page.locator("#s1 bdi").inner_text().startswith("</bdi></li></ol><script>")
    assert "U+202E" in page.locator("#s0 bdi").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_pages_have_what_assistive_technology_needs(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    for path in ("/", "/traces", "/traces/lamp", "/traces/shed", "/review", "/versions", "/canary"):
        page.goto(f"/guard{path}")
        assert page.evaluate(BASICS) == [], path
        assert page.evaluate(CONTRAST) == [], path
    if scheme == "light":
        shot(page, "review-canary")
    page.goto("/guard/traces/lamp")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"


def test_the_log_in_page_too_and_all_of_it_without_scripts(shown: tuple[Pages, BrowserContext]) -> None:
    pages, context = shown
    tab = context.new_page()
    context.clear_cookies()
    tab.route("**/*.js", lambda route: route.abort())
    for path in ("/nothing", "/review"):
        tab.goto(f"/guard{path}")
        assert tab.evaluate(BASICS) == []
        assert tab.evaluate(CONTRAST) == []
    # Even a script that found its way into a page could write no markup.
    with pytest.raises(Exception, match="TrustedHTML"):
        tab.evaluate("document.querySelector('main').innerHTML = '<b>x</b>'")
    tab.get_by_label("Name").fill("ann")
    tab.get_by_label("Password").fill("wrong password")
    tab.get_by_role("button", name="Log in").click()
    assert tab.get_by_role("alert").inner_text() == "Name or password is wrong."
    log_in(tab)
    asked = tab.locator("[name=guard_id]").first.input_value()
    tab.get_by_role("button", name="Not a cue").click()
    tab.wait_for_load_state()
    last = reviews.last_of(pages.store, "ann")
    assert last is not None
    assert (last[1].guard_id, last[1].label) == (asked, "not_cue")
    tab.get_by_role("button", name="Log out").click()
    tab.wait_for_url("**/guard/login")
    tab.close()


def test_the_overview_of_a_busy_day(shown: tuple[Pages, BrowserContext], page: Page) -> None:
    pages, _ = shown
    pages.feed(*traffic())  # type: ignore[arg-type]
    for seconds in (0.0004, 0.0004, 0.006):
        pages.sidecar.metrics.guard_step.observe(seconds)
    page.goto("/guard/?by=detector")
    assert page.locator("table tbody tr").count() == 2
    assert page.locator(".card .big").first.inner_text() == "184"
    # The page is no wider than the window, on a telephone too.
    for width in (1180, 390):
        page.set_viewport_size({"width": width, "height": 760})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.set_viewport_size({"width": 1180, "height": 760})
    shot(page, "review-overview")
