"""End to end: a run on a live phantom, its server on a socket, and the page in headless Chromium, also behind nginx."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from chromium import Chromium
from listening import listening
from nginx import PREFIX, gateway

pytest.importorskip("uvicorn", reason="needs uvicorn (extra serve)")

from serving_setup import TOKEN, png

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.run.controls import Adjustable
from espmedsam_edge.runtime.run.jobs import Job, RunReport
from espmedsam_edge.runtime.run.pipeline import run_pipeline
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.serve.live_view import LiveView
from espmedsam_edge.runtime.serve.options import ServeOptions
from espmedsam_edge.runtime.serve.server import Server
from espmedsam_edge.runtime.serve.serving import serve_alone, serve_run
from espmedsam_edge.runtime.sources.live import LiveOptions
from espmedsam_edge.runtime.sources.opening import open_sources

STATUS = "document.getElementById('status').dataset.status"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    with Chromium("--ignore-certificate-errors") as opened:
        yield opened


@pytest.fixture
def browser(chromium: Chromium) -> Chromium:
    """With nothing of the test before: its page would be taken for this one's, and its errors too."""
    chromium.open("about:blank")
    chromium.wait_for("location.href === 'about:blank'")
    chromium.events.clear()
    return chromium


@pytest.fixture(params=["", "behind nginx"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Where nginx has its files; None: the server is asked directly."""
    return tmp_path if request.param else None


@dataclass
class Running:
    """A run under way, and what it is run by."""

    server: Server
    url: str
    view: LiveView
    controls: Adjustable
    said: list[str]


@contextmanager
def running(
    bundle: Bundle,
    options: ServeOptions,
    source: str = "test://fundus?fps=20&size=160x120",
    folder: Path | None = None,
) -> Iterator[Running]:
    """A run and its server; with a folder for nginx's files behind that, below a path."""
    controls, said = Adjustable(), list[str]()
    sources, failures = open_sources([source], LiveOptions())
    assert failures == []
    with ExitStack() as stack:
        stack.enter_context(listening(said.append))
        segmenter = stack.enter_context(Segmenter.load(bundle, "fundus", threads=1))
        view, server = stack.enter_context(serve_run(options, segmenter, controls, threads=1))
        url = server.url
        if folder is not None:
            url = stack.enter_context(gateway(server.address.port, folder))
        reports: list[RunReport] = []

        def run() -> None:
            reports.append(run_pipeline(segmenter, [Job(feed, []) for feed in sources], [view], controls=controls))
            view.end()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield Running(server, url, view, controls, said)
        finally:
            controls.change(paused=False)
            for feed in sources:
                getattr(feed, "stop", lambda: None)()
            thread.join(60)
            assert not thread.is_alive()


def test_the_page_shows_a_run_and_changes_it(browser: Chromium, toy_bundle_of_two: Bundle, folder: Path | None) -> None:
    with running(toy_bundle_of_two, ServeOptions("0"), folder=folder) as run:
        assert run.said == [f"view: {run.server.url}"]
        browser.resize(1600, 900)
        browser.open(run.url)
        browser.wait_for(f"{STATUS} === 'running'")
        first = int(browser.wait_for("document.getElementById('screen').dataset.frame"))
        browser.wait_for(f"Number(document.getElementById('screen').dataset.frame) > {first + 5}")
        assert browser.evaluate("document.getElementById('screen').width") == 160
        for figure in ("fps", "p50", "p90", "p99"):
            browser.wait_for(f"Number(document.getElementById('{figure}').textContent) > 0")
        assert browser.evaluate("document.getElementById('area').textContent").endswith("%")

        # by keyboard: pause, threshold, opacity, modality
        browser.press(" ")
        browser.wait_for(f"{STATUS} === 'paused'")
        assert run.controls.current().paused
        number = int(browser.evaluate("document.getElementById('screen').dataset.number"))
        browser.press("]")
        browser.wait_for("document.getElementById('threshold-value').textContent === '0.55'")
        browser.wait_for(f"Number(document.getElementById('screen').dataset.number) > {number}")
        assert run.controls.current().threshold == pytest.approx(0.55)
        browser.press(",")
        browser.wait_for("document.getElementById('opacity-value').textContent === '30 %'")
        browser.press("2")
        browser.wait_for("document.querySelector('input[value=colonoscopy]').checked")
        browser.wait_for("document.getElementById('what').textContent === 'colonoscopy: polyp'")
        browser.press(" ")
        browser.wait_for(f"{STATUS} === 'running'")
        assert not run.controls.current().paused

        # by Tab: all controls in the order in which they stand, each with a name and a visible focus
        order = []
        for _ in range(7):
            browser.press("Tab")
            order.append(browser.evaluate("document.activeElement.id || document.activeElement.value"))
            assert browser.evaluate("document.activeElement.matches(':focus-visible')"), order
        controls = ("pause", "colonoscopy", "threshold", "opacity", "fullscreen", "help")
        assert [name for name in order if name in controls] == list(controls)
        unnamed = (
            "[...document.querySelectorAll('button, input, canvas')].filter((e) => !(e.ariaLabel ||"
            " e.textContent.trim() || (e.labels && e.labels.length))).map((e) => e.outerHTML)"
        )
        assert browser.evaluate(unnamed) == []

        # narrow: nothing sticks out
        browser.resize(360, 700)
        assert browser.evaluate("document.documentElement.scrollWidth <= 360")
        assert browser.errors() == []
        if folder is not None:  # nginx goes with the server, so this is the moment
            return

    browser.wait_for(f"{STATUS} === 'lost'")  # the server is gone


def test_the_page_comes_back_after_the_server(browser: Chromium, toy_bundle: Bundle) -> None:
    with running(toy_bundle, ServeOptions("0")) as run:
        port = run.server.address.port
        browser.open(run.server.url)
        browser.wait_for(f"{STATUS} === 'running'")
    browser.wait_for(f"{STATUS} === 'lost'")
    with running(toy_bundle, ServeOptions(str(port))):
        browser.wait_for(f"{STATUS} === 'running'")


def test_the_last_frame_stays_after_the_end(browser: Chromium, toy_bundle_of_two: Bundle) -> None:
    with running(toy_bundle_of_two, ServeOptions("0"), "test://fundus?fps=20&size=160x120&frames=10") as run:
        browser.open(run.server.url)
        browser.wait_for(f"{STATUS} === 'ended'")
        browser.wait_for("document.getElementById('screen').dataset.number")
        assert "ended" in browser.evaluate("document.getElementById('message').innerText")
        browser.press("2")
        browser.wait_for("document.getElementById('what').textContent === 'colonoscopy: polyp'")


def test_a_token_is_asked_for_and_kept_out_of_addresses(
    browser: Chromium, toy_bundle: Bundle, folder: Path | None
) -> None:
    options = ServeOptions("0", TOKEN, trusted_proxies=() if folder is None else ["127.0.0.1"])
    with running(toy_bundle, options, folder=folder) as run:
        browser.call("Network.enable")
        browser.open(run.url)
        browser.wait_for("document.activeElement.id === 'token'")
        browser.type("wrong-wrong-wrong-wrong")
        browser.press("Enter")
        browser.wait_for("document.getElementById('problem').textContent.includes('not the token')")
        browser.evaluate("document.getElementById('token').value = ''")
        browser.type(TOKEN)
        browser.press("Enter")
        browser.wait_for(f"{STATUS} === 'running'")
        assert browser.evaluate("location.href") == run.url
        assert browser.evaluate("document.cookie") == ""  # HttpOnly
        (cookie,) = browser.call("Network.getCookies")["cookies"]
        # Neighbours below other paths of a gateway do not get it, nor does what is not encrypted.
        assert cookie["path"] == ("/" if folder is None else PREFIX.rstrip("/"))
        assert cookie["secure"] == (folder is not None)
        asked = [
            event["params"]["request"]["url"]
            for event in browser.events
            if event["method"] == "Network.requestWillBeSent"
        ]
        assert asked
        assert not any(TOKEN in url for url in asked)
        browser.call("Network.disable")
        browser.evaluate("document.getElementById('logout').click()")
        browser.wait_for(f"location.pathname === '{'/' if folder is None else PREFIX}login'")
        browser.wait_for("document.activeElement.id === 'token'")
        assert browser.call("Network.getCookies")["cookies"] == []
        # A token that was given is not repeated.
        assert run.said == [f"view: {run.server.url}", "a wrong token from 127.0.0.1."]


def test_a_page_of_another_origin_sees_nothing(browser: Chromium, toy_bundle: Bundle) -> None:
    with running(toy_bundle, ServeOptions("0")) as run, serve_alone(ServeOptions("0"), toy_bundle) as other:
        browser.open(other.url)
        browser.wait_for(f"{STATUS} === 'service'")
        attempt = (
            f"new Promise((done) => {{ const s = new WebSocket('{run.server.url.replace('http', 'ws')}live'); "
            "s.onopen = () => done('open'); s.onerror = () => done('refused'); })"
        )
        assert browser.evaluate(attempt) == "refused"
        assert run.server.address != other.address


def test_the_page_comes_back_behind_a_gateway_too(browser: Chromium, toy_bundle: Bundle, tmp_path: Path) -> None:
    with ExitStack() as stack:
        with running(toy_bundle, ServeOptions("0")) as run:
            port = run.server.address.port
            url = stack.enter_context(gateway(port, tmp_path))
            browser.open(url)
            browser.wait_for(f"{STATUS} === 'running'")
        browser.wait_for(f"{STATUS} === 'lost'")
        with running(toy_bundle, ServeOptions(str(port))):
            browser.wait_for(f"{STATUS} === 'running'")


@pytest.mark.parametrize("behind", [False, True])
def test_the_service_is_tried_on_the_page(browser: Chromium, toy_bundle: Bundle, tmp_path: Path, behind: bool) -> None:
    image, data = png(1)
    file = tmp_path / "image.png"
    file.write_bytes(data)
    with Segmenter.load(toy_bundle, threads=1) as segmenter:
        area = segmenter.segment(image).area
    with ExitStack() as stack:
        server = stack.enter_context(serve_alone(ServeOptions("0"), toy_bundle))
        url = stack.enter_context(gateway(server.address.port, tmp_path)) if behind else server.url
        browser.open(url)
        browser.wait_for(f"{STATUS} === 'service'")
        node = browser.call("Runtime.evaluate", expression="document.getElementById('file')")["result"]["objectId"]
        browser.call("DOM.setFileInputFiles", files=[str(file)], objectId=node)
        browser.wait_for(f"document.getElementById('area-pixels').textContent === '{area:,} px'")


def test_a_socket_server_answers_and_frees_its_port(toy_bundle: Bundle) -> None:
    with serve_alone(ServeOptions("0"), toy_bundle) as server:
        with urllib.request.urlopen(f"{server.url}healthz") as answer:
            assert json.load(answer) == {"status": "ok"}
            assert "server" not in {name.lower() for name in answer.headers}
        request = urllib.request.Request(f"{server.url}v1/segment", data=png()[1], headers={"Accept": "image/png"})
        with urllib.request.urlopen(request) as answer:
            assert answer.read(4) == b"\x89PNG"
        with (
            pytest.raises(UserError, match="is taken"),
            serve_alone(ServeOptions(str(server.address.port)), toy_bundle),
        ):
            pass
        port = server.address.port
    with serve_alone(ServeOptions(str(port)), toy_bundle):
        pass
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5)


def test_an_open_address_makes_a_token(toy_bundle: Bundle, said: list[str]) -> None:
    with serve_alone(ServeOptions("0.0.0.0:0"), toy_bundle) as server:
        assert server.token is not None
        assert sum(server.token in line for line in said) == 1
        url = f"http://127.0.0.1:{server.address.port}/metrics"
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(url)
        assert refused.value.code == 401
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {server.token}"})
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 200
