"""Who may ask: token, cookie, Origin, Host and rate; and the headers of every answer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from serving_setup import BASE, TOKEN, Stage, staged
from starlette.testclient import WebSocketDenialResponse

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.runtime.serve.gate import COOKIE, SESSION_SECONDS, Sessions


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def locked(toy_bundle: Bundle, clock: Clock) -> Iterator[Stage]:
    with staged(toy_bundle, token=TOKEN, clock=clock) as stage:
        yield stage


@pytest.fixture
def unlocked(toy_bundle: Bundle) -> Iterator[Stage]:
    with staged(toy_bundle) as stage:
        yield stage


PATHS = [
    ("GET", "/"),
    ("GET", "/metrics"),
    ("GET", "/page/view.js"),
    ("POST", "/v1/segment"),
    ("POST", "/logout"),
    ("GET", "/x"),
]


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_without_the_token_nothing_is_told(locked: Stage, method: str, path: str) -> None:
    answer = locked.client.request(method, path)
    if path == "/":
        assert (answer.status_code, answer.headers["location"]) == (303, "login")
    else:
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    assert "fundus" not in answer.text


def test_health_and_the_form_are_open(locked: Stage) -> None:
    assert locked.client.get("/healthz").json() == {"status": "ok"}
    page = locked.client.get("/login")
    assert page.status_code == 200
    assert 'name="token"' in page.text
    names = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(names) == 3
    for name in names:
        assert not name.startswith("/"), name  # a gateway may have put the page below a path
        assert locked.client.get(name).status_code == 200, name


def test_a_bearer_token_opens_all(locked: Stage) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert locked.client.get("/metrics", headers=headers).status_code == 200
    with locked.connect(**headers) as socket:
        assert socket.receive_json()["type"] == "hello"


@pytest.mark.parametrize(
    "header", ["Bearer wrong-wrong-wrong-wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer", "", "Bearer ü"]
)
def test_a_wrong_token_opens_nothing(locked: Stage, header: str) -> None:
    assert locked.client.get("/metrics", headers={"Authorization": header.encode()}).status_code == 401
    with (
        pytest.raises(WebSocketDenialResponse) as denied,
        locked.connect(Authorization=header.encode()),
    ):
        pass
    assert denied.value.status_code == 401


def test_the_form_gives_a_cookie_that_scripts_and_other_sites_do_not_get(locked: Stage, clock: Clock) -> None:
    assert locked.client.post("/login", data={"token": "wrong"}).status_code == 401
    answer = locked.client.post("/login", data={"token": TOKEN})
    assert answer.status_code == 200
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert TOKEN not in cookie
    assert locked.client.get("/").status_code == 200  # the client keeps cookies
    with locked.connect() as socket:
        assert socket.receive_json()["token"] is True
    assert locked.client.post("/logout").status_code == 200
    locked.client.cookies.set(COOKIE, answer.headers["set-cookie"].split("=", 1)[1].split(";")[0])
    assert locked.client.get("/metrics").status_code == 401  # the session is over, whoever kept the cookie


def test_sessions_end_and_are_few() -> None:
    clock = Clock()
    sessions = Sessions(clock)
    first = sessions.open()
    assert sessions.known(first)
    assert not sessions.known("ü" + first)
    clock.now += SESSION_SECONDS
    assert not sessions.known(first)
    names = [sessions.open() for _ in range(65)]
    assert [sessions.known(name) for name in names] == [False] + [True] * 64


def test_a_client_that_leaves_while_it_sends_its_token_leaves_no_error(locked: Stage) -> None:
    incoming: list[dict[str, Any]] = [
        {"type": "http.request", "body": b"token=", "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return incoming.pop(0) if incoming else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", BASE.removeprefix("http://").encode()), (b"origin", BASE.encode())]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/login", "raw_path": b"/login", "root_path": "", "query_string": b"", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8080),
    }  # fmt: skip
    anyio.run(locked.client.app, scope, receive, send)
    assert sent[0]["status"] == 400
    assert b"broke off" in b"".join(message.get("body", b"") for message in sent)


def test_guessing_is_slowed_down_for_the_right_token_too(locked: Stage, clock: Clock) -> None:
    codes = [locked.client.post("/login", data={"token": f"guess {n}"}).status_code for n in range(12)]
    assert codes == [401] * 10 + [429] * 2
    assert locked.client.post("/login", data={"token": TOKEN}).status_code == 429
    answer = locked.client.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "60")
    clock.now += 60
    assert locked.client.post("/login", data={"token": TOKEN}).status_code == 200
    assert locked.access.refused == 10


def test_too_many_requests_are_refused(locked: Stage, clock: Clock) -> None:
    codes = [locked.client.get("/healthz").status_code for _ in range(103)]
    assert codes == [200] * 100 + [429] * 3
    clock.now += 1
    assert locked.client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://127.0.0.1:9999", "http://127.0.0.1", "https://localhost:8080", "x"],
)
def test_pages_of_other_origins_get_nothing(unlocked: Stage, origin: str) -> None:
    headers = {"Origin": origin}
    assert unlocked.client.post("/v1/segment", headers=headers, content=b"x").status_code == 403
    with pytest.raises(WebSocketDenialResponse) as denied, unlocked.connect(**headers):
        pass
    assert denied.value.status_code == 403


def test_own_pages_may_ask(unlocked: Stage) -> None:
    with unlocked.connect(Origin=BASE) as socket:
        assert socket.receive_json()["type"] == "hello"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "192.168.0.5:8080", "x:y", "127.0.0.1.evil.example"]
)
def test_other_names_are_not_answered_to(unlocked: Stage, host: str) -> None:
    answer = unlocked.client.get("/", headers={"Host": host})
    assert answer.status_code == 421
    assert host not in answer.headers["content-security-policy"]
    with (
        pytest.raises(WebSocketDenialResponse),
        unlocked.connect(Host=host, Origin=f"http://{host}"),
    ):
        pass


@pytest.mark.parametrize(
    "path", ["/", "/page/view.js", "/metrics", "/healthz", "/nowhere", "/page/..%2findex.html", "/page/login.html"]
)
def test_every_answer_has_its_headers(unlocked: Stage, path: str) -> None:
    answer = unlocked.client.get(path)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    for name, value in {
        "x-content-type-options": "nosniff",
        "cache-control": "no-store",
        "referrer-policy": "no-referrer",
    }.items():
        assert answer.headers[name] == value
    assert "access-control-allow-origin" not in answer.headers
    assert (answer.status_code == 404) == (path not in ("/", "/page/view.js", "/metrics", "/healthz"))


def test_the_page_needs_nothing_from_elsewhere(unlocked: Stage) -> None:
    for name in ("/", "/page/view.js", "/page/curve.js", "/page/service.js", "/page/view.css", "/page/login.js"):
        text = unlocked.client.get(name).text
        assert not re.findall(r"https?://(?!www\.w3\.org)[a-z]", text), name
        assert "style=" not in text
        assert not re.findall(r"\son[a-z]+=", text), name


def test_methods_are_as_they_are(unlocked: Stage) -> None:
    assert unlocked.client.get("/v1/segment").status_code == 405
    assert unlocked.client.post("/metrics").status_code == 405
    assert unlocked.client.post("/login", content=b"token=" + b"x" * 5000).status_code == 413


def test_a_form_of_many_fields_is_refused(toy_bundle: Bundle) -> None:
    with staged(toy_bundle, token=TOKEN) as stage:
        answer = stage.client.post("/login", content="&".join(["token=a"] * 9))
        assert answer.status_code == 400
        assert "no form" in answer.json()["error"]
