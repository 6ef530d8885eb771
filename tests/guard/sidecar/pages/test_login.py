"""Who gets in: passwords, cookies, tokens, limits; and that without reviewers there is nothing to get into."""

from __future__ import annotations

import base64
import json
import socket
from functools import partial
from pathlib import Path

import itsdangerous
import pytest
from typer.testing import CliRunner

from cli import app
from guard.errors import UserError
from guard.sidecar.app import create_app
from guard.sidecar.pages.login import COOKIE, SESSION_SECONDS, TRIES, WINDOW
from guard.sidecar.pages.reviewers import Reviewers
from guard.store import reviews
from tests.guard.sidecar.conftest import running
from tests.guard.sidecar.pages.kit import LAMP, PASSWORD, Pages

PAGES = ("/", "/traces", "/traces/lamp", "/review", "/versions", "/canary")


def test_nobody_sees_anything_without_a_login(nobody: Pages) -> None:
    nobody.feed(LAMP)
    for path in PAGES:
        response = nobody.http.get(f"/guard{path}")
        assert response.status_code == 303
        assert response.headers["location"].startswith("/guard/login?next=")
        assert "lamp" not in response.text
    for path in ("/label", "/undo"):
        response = nobody.http.post(f"/guard{path}", data={"guard_id": "lamp", "step": "0", "label": "not_cue"})
        assert response.status_code == 403
    assert nobody.http.get("/guard/nothing").status_code == 404


def test_a_login_opens_every_page_and_goes_where_it_was_asked_to(nobody: Pages) -> None:
    nobody.feed(LAMP)
    response = nobody.log_in()
    assert (response.status_code, response.headers["location"]) == (303, "/guard/review")
    cookie = response.headers["set-cookie"].lower()
    assert "; httponly; samesite=strict" in cookie
    assert "path=/guard;" in cookie
    assert "secure" not in cookie
    for path in PAGES:
        nobody.get(path)
    assert nobody.http.get("/guard/login").headers["location"] == "/guard/"


def test_over_tls_the_cookie_is_secure(nobody: Pages) -> None:
    response = nobody.http.get("/guard/login", headers={"x-forwarded-proto": "https"})
    assert response.headers["set-cookie"].lower().endswith("; httponly; samesite=strict; secure")


@pytest.mark.parametrize("target", ["//evil.example", "https://evil.example", "/\\evil.example", "/a\r\nb: c", "x"])
def test_a_login_never_leads_elsewhere(nobody: Pages, target: str) -> None:
    fields = {"csrf": nobody.token("/login"), "name": "ann", "password": PASSWORD, "next": target}
    assert nobody.http.post("/guard/login", data=fields).headers["location"] == "/guard/"


def test_forged_and_foreign_cookies_open_nothing(pages: Pages) -> None:
    good = pages.http.cookies[COOKIE]
    payload = base64.b64encode(json.dumps({"sid": "x", "csrf": "y"}).encode())
    forged = itsdangerous.TimestampSigner("guessed").sign(payload).decode()
    head, _, tail = good.partition(".")
    session = json.loads(base64.b64decode(head))
    changed = base64.b64encode(json.dumps({**session, "name": "bob"}).encode()).decode() + "." + tail
    for cookie in (forged, changed, "", "a.b.c", head, good[:-2]):
        pages.http.cookies.clear()
        pages.http.cookies.set(COOKIE, cookie, path="/guard")
        assert pages.http.get("/guard/traces").status_code == 303, cookie
    pages.http.cookies.clear()
    pages.http.cookies.set(COOKIE, good, path="/guard")
    assert pages.http.get("/guard/traces").status_code == 200


def test_a_form_without_the_sessions_token_changes_nothing(pages: Pages) -> None:
    pages.feed(LAMP)
    fields = {"guard_id": "lamp", "step": "1", "label": "cue"}
    for path, extra in (("/label", {}), ("/label", {"csrf": ""}), ("/label", {"csrf": "x" * 43}), ("/logout", {})):
        assert pages.http.post(f"/guard{path}", data={**fields, **extra}).status_code == 403
    assert pages.http.post("/guard/label", json={**fields, "csrf": pages.token()}).status_code == 415
    assert pages.http.post("/guard/label", data={"csrf": pages.token(), "x": "y" * 20_000}).status_code == 413
    assert pages.http.post("/guard/label", data={"csrf": pages.token(), **dict.fromkeys("abcdefghijklmnopqrstuvw", "1")}
                           ).status_code == 400  # fmt: skip
    assert reviews.of_traces(pages.store, ["lamp"]) == []
    # Logging in is a form too: a foreign page must not log anybody in as somebody else.
    pages.http.cookies.clear()
    assert pages.http.post("/guard/login", data={"name": "ann", "password": PASSWORD}).status_code == 403


def test_a_form_that_does_not_come_is_waited_for_so_long(pages: Pages) -> None:
    pages.sidecar.limits.body_seconds = 0.2
    url = pages.http.base_url
    kind = "content-type: application/x-www-form-urlencoded"
    for path in ("login", "logout", "label"):
        with socket.create_connection((url.host, url.port or 0), timeout=20) as client:
            client.sendall(f"POST /guard/{path} HTTP/1.1\r\nhost: x\r\n{kind}\r\ncontent-length: 9\r\n\r\n".encode())
            page = b"".join(iter(partial(client.recv, 4096), b""))
            assert page.startswith(b"HTTP/1.1 408 ")
            assert b"The body took longer than 0.2 s." in page


def test_logging_out_ends_the_session_for_every_copy_of_its_cookie(pages: Pages) -> None:
    kept = pages.http.cookies[COOKIE]
    assert pages.post("/logout").headers["location"] == "/guard/login"
    pages.http.cookies.clear()
    pages.http.cookies.set(COOKIE, kept, path="/guard")
    assert pages.http.get("/guard/traces").status_code == 303


def test_a_session_ends_with_time_with_its_reviewer_and_with_their_password(pages: Pages) -> None:
    now = pages.logins.now()
    pages.logins.now = lambda: now + SESSION_SECONDS - 1
    pages.get("/traces")
    pages.logins.now = lambda: now + SESSION_SECONDS + 60
    pages.get("/traces", 303)
    pages.logins.now = lambda: now
    pages.get("/traces")
    pages.reviewers.add("ann", "another long password")
    pages.get("/traces", 303)
    assert pages.log_in(password="another long password").status_code == 303
    pages.reviewers.remove("ann")
    pages.get("/traces", 303)


def test_wrong_tries_are_limited_by_name_and_by_address(nobody: Pages) -> None:
    now = nobody.logins.now()
    nobody.logins.now = lambda: now
    wrong = [nobody.log_in("eve" if n % 2 else "ann", "wrong password").status_code for n in range(TRIES + 1)]
    assert wrong == [401] * TRIES + [429]
    assert nobody.log_in().status_code == 429
    assert not nobody.logins.allowed("bob", "127.0.0.1")
    assert nobody.logins.allowed("bob", "10.0.0.1")
    nobody.logins.now = lambda: now + WINDOW + 1
    # What was right does not count.
    assert [nobody.log_in().status_code] == [303]
    for _ in range(2 * TRIES):
        assert nobody.logins.allowed("bob", "10.0.0.2")
        nobody.logins.forgive("bob", "10.0.0.2")


def test_without_reviewers_there_are_no_pages(nobody: Pages) -> None:
    import httpx

    with running(create_app(nobody.sidecar)) as address:
        for path in ("/guard", "/guard/", "/guard/login", "/guard/static/pages.js"):
            assert httpx.get(address + path, trust_env=False).status_code == 404


def test_a_slash_too_few_leads_on_without_a_name_and_one_too_many_nowhere(pages: Pages) -> None:
    """Behind TLS a `Location` with a name in it would begin with http://."""
    answer = pages.http.get("/guard", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (307, "/guard/")
    for method, path in (("POST", "/v1/chat/completions/"), ("GET", "/guard/traces/")):
        assert pages.http.request(method, path, follow_redirects=False).status_code == 404


def test_every_answer_carries_the_headers(pages: Pages) -> None:
    for path in ("/", "/nothing", "/login", "/static/pages.css", "/static/../app.py"):
        headers = pages.http.get(f"/guard{path}").headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"


def test_the_file_of_reviewers(tmp_path: Path) -> None:
    path = tmp_path / "new" / "reviewers.json"
    reviewers = Reviewers(path)
    assert reviewers.add("ann", PASSWORD)
    assert not reviewers.add("ann", PASSWORD + "2")
    assert path.stat().st_mode & 0o777 == 0o600
    assert PASSWORD not in path.read_text()
    assert reviewers.verify("ann", PASSWORD + "2")
    assert not reviewers.verify("ann", PASSWORD)
    assert not reviewers.verify("eve", "")
    with pytest.raises(UserError, match="A reviewer's name; got a b"):
        reviewers.add("a b", PASSWORD)
    with pytest.raises(UserError, match="at least 10 characters"):
        reviewers.add("bob", "short")
    with pytest.raises(UserError, match="has no reviewer bob; wanted ann"):
        reviewers.remove("bob")
    for damaged in ("", "[]", "[" * 100_000, '{"ann": 1}', '{"ann": "scrypt$a$b"}', '{"a b": "x"}'):
        path.write_text(damaged)
        with pytest.raises(UserError, match="is damaged"):
            Reviewers(path).hashes()
        assert not Reviewers(path).verify("ann", PASSWORD)
    path.unlink()
    with pytest.raises(UserError, match=r"does not exist. `reviewers add NAME` makes it"):
        Reviewers(path).hashes()


def test_the_commands(tmp_path: Path) -> None:
    file = str(tmp_path / "reviewers.json")

    def run(*args: str, typed: str = "") -> tuple[int, str]:
        result = CliRunner().invoke(app, ["reviewers", *args, "--file", file], input=typed)
        return result.exit_code, result.output

    code, output = run("add", "ann", typed=f"{PASSWORD}\n{PASSWORD}\n")
    assert code == 0
    assert PASSWORD not in output
    assert f"ann may log in at /guard/ of `serve --reviewers {file}`." in output
    assert Reviewers(Path(file)).verify("ann", PASSWORD)
    assert run("ls") == (0, "ann\n")
    assert run("remove", "ann") == (0, "ann can no longer log in.\n")
    assert run("ls") == (0, "")
