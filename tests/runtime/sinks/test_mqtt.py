"""Lines of JSON to Debian's mosquitto: each is published or counted, whatever becomes of the broker."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import cv2
import numpy as np
import pytest
from certificates import make_certificate
from mosquitto import PASSWORD, USER, Mosquitto, hearing
from nginx import free_port
from sink_material import blob, result_of

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.cli import main
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.sinks import mqtt
from espmedsam_edge.runtime.sinks.measurements import LineForm
from espmedsam_edge.runtime.sinks.mqtt import MqttPublisher, open_mqtt, parse_broker
from espmedsam_edge.runtime.sinks.publishing import Publication, open_publisher
from espmedsam_edge.runtime.sources.source import Failure, SourceFrame

DENIED = "[Nn]ot authori[sz]ed|password"
IMAGE = np.zeros((48, 64, 3), np.uint8)
RESULT = result_of(blob((48, 64)))


def opened(address: str, failures: list[Failure] | None = None) -> MqttPublisher:
    return open_mqtt(Publication(address, LineForm({"weights": "random"}), [] if failures is None else failures))


def write(sink: MqttPublisher, numbers: range, pause: float = 0.0) -> None:
    for number in numbers:
        sink.write(SourceFrame(IMAGE, Path("c.mp4"), number, number / 25), RESULT)
        time.sleep(pause)


def test_a_broker_stopped_twice_in_ten_thousand_frames_costs_none(tmp_path: Path, said: list[str]) -> None:
    with Mosquitto(tmp_path) as broker, hearing(broker.port, "ward/masks") as heard:
        failures: list[Failure] = []
        with opened(f"mqtt://127.0.0.1:{broker.port}/ward/masks", failures) as sink:
            write(sink, range(2500), 0.0003)
            for begin in (2500, 6250):
                broker.stop()
                write(sink, range(begin, begin + 1250), 0.0003)
                broker.start()
                write(sink, range(begin + 1250, begin + 3750), 0.0003)
                until = time.monotonic() + 30  # it is tried again after two seconds at most
                while sum("is back after" in line for line in said) < (1 if begin == 2500 else 2):
                    assert time.monotonic() < until
                    time.sleep(0.01)
        assert sink.frames == 10_000
        assert sink.published + sink.dropped == 10_000
        assert len(failures) == (sink.dropped > 0)
        heard.wait_for("ward/masks/status", lambda body: body["status"] == "ended")
        numbers = {line["frame"] for line in heard.of("ward/masks")}
        assert len(numbers) == sink.published  # what counts as published has arrived
    assert sum("is away" in line for line in said) == 2
    assert sum("is back after" in line for line in said) == 2


def test_a_broker_that_was_away_gets_the_newest_lines_and_the_rest_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setattr(mqtt, "MOST_LINES", 100)
    monkeypatch.setattr(mqtt, "_FIRST_SECONDS", 30.0)
    broker, failures = Mosquitto(tmp_path), list[Failure]()
    begin = time.monotonic()
    with ExitStack() as stack:
        with opened(f"mqtt://127.0.0.1:{broker.port}/masks", failures) as sink:
            assert time.monotonic() - begin < 10  # a refused connection is no reason to wait
            write(sink, range(250))
            assert sink.dropped == 150
            stack.enter_context(broker)
            heard = stack.enter_context(hearing(broker.port, "masks"))
            heard.wait_for("masks", lambda line: line["frame"] == 249)
            assert {line["frame"] for line in heard.of("masks")} == set(range(150, 250))
        status = heard.wait_for("masks/status", lambda body: body["status"] == "ended")
    assert {"complete": True, "published": 100, "dropped": 150}.items() <= status.items()
    assert [f"{failure.message}" for failure in failures] == [
        f"150 of 250 lines were not published to {sink.name}: it was away. Check the broker and the network."
    ]
    assert said[0].startswith(f"{sink.name} is away (Connection refused)")


def test_a_broker_that_is_back_right_after_the_end_still_gets_the_lines(tmp_path: Path) -> None:
    with Mosquitto(tmp_path) as broker, opened(f"mqtt://127.0.0.1:{broker.port}/masks") as sink:
        write(sink, range(5), 0.02)
        broker.stop()
        write(sink, range(5, 10))
        broker.start()
        sink.__exit__(None, None, None)
        assert (sink.published, sink.dropped) == (10, 0)


def test_large_lines_are_bounded_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "MOST_BYTES", 2000)
    with opened(f"mqtt://127.0.0.1:{free_port()}/masks") as sink:
        write(sink, range(50))
        line = len(LineForm({"weights": "random"}).line(SourceFrame(IMAGE, Path("c.mp4"), 49, 49 / 25), RESULT))
        assert sink.frames - sink.dropped <= 2000 // line + 1
    assert sink.dropped == 50


def test_a_host_that_does_not_answer_holds_a_run_up_for_a_moment_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mqtt._FIRST_SECONDS <= 2
    monkeypatch.setattr(mqtt, "_FIRST_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=1) as silent:
        begin = time.monotonic()
        with opened(f"mqtt://127.0.0.1:{silent.getsockname()[1]}/masks") as sink:
            write(sink, range(3))
        assert time.monotonic() - begin < 3
    assert (sink.published, sink.dropped) == (0, 3)


def test_tls_and_a_password_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    own, other = make_certificate(tmp_path, "own"), make_certificate(tmp_path, "other")
    (tmp_path / "secret").write_text(PASSWORD + "\n")
    (tmp_path / "wrong").write_text("guess")
    with Mosquitto(tmp_path, own, login=True) as broker:
        place = f"127.0.0.1:{broker.port}/masks"
        with opened(f"mqtts://{USER}@{place}?ca={own.certificate}&password-file={tmp_path}/secret") as sink:
            write(sink, range(5))
        assert (sink.published, sink.dropped) == (5, 0)
        monkeypatch.setenv(mqtt.PASSWORD, PASSWORD)
        with opened(f"mqtts://{USER}@localhost:{broker.port}/masks?ca={own.certificate}") as sink:
            write(sink, range(5))
        assert (sink.published, sink.dropped) == (5, 0)

        refused = {
            f"mqtts://{USER}@{place}?ca={other.certificate}&password-file={tmp_path}/secret": "certificate|self.signed",
            f"mqtts://{USER}@{place}": "certificate|self.signed",
            f"mqtts://{USER}@{place}?ca={own.certificate}&password-file={tmp_path}/wrong": DENIED,
            f"mqtts://{place}?ca={own.certificate}": DENIED,
        }
        for address, reason in refused.items():
            with pytest.raises(UserError, match=reason) as error, opened(address):
                pass
            assert error.value.exit_code == 1
            assert PASSWORD not in str(error.value)
            assert "guess" not in str(error.value)
    assert said == []  # what is raised is not told besides


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("mqtt://h/a/+/b", "wildcard"),
        ("mqtt://h/a/#", "wildcard"),
        ("mqtt://h/#", "wildcard"),
        ("mqtt://h/a%23", "wildcard"),
        ("mqtt://h/a%2Bb", "wildcard"),
        ("mqtt://h", "no topic"),
        ("mqtt://h/", "no topic"),
        ("mqtt:///topic", "no host"),
        ("mqtt://h:99999/a", "not a valid address"),
        ("mqtt://h:0/a", "not a valid address"),
        ("mqtt://\udcff@h/a", "not a valid address"),
        ("mqtt://h/a?client=\udcff", "not a valid address"),
        (f"mqtt://{'u' * 70_000}@h/a", "not a valid address"),
        ("mqtt://a..b/a", "no host"),
        (f"mqtt://{'h' * 64}.example/a", "no host"),
        ("mqtt://h/%ff", "not a valid address"),
        ("mqtt://h/$SYS/x", "nothing can be published"),
        ("mqtt://h/a%00b", "nothing can be published"),
        ("mqtt://u:SECRET@h/a", "has a password in it"),
        ("mqtt://u:SEC#RET@h/a", "before its last '@'"),
        ("mqtt://h/a?qos=2", "no option 'qos'"),
        ("mqtt://h/a?client=", "has no value"),
        ("mqtt://h/a?ca=x.pem", "is for TLS"),
        ("mqtts://h/a?ca=missing.pem", "cannot use the certificates"),
        ("mqtts://h/a?cert=missing.pem", "cannot use the certificates"),
        ("mqtt://u@h/a?password-file=missing", "cannot read the password-file"),
        ("mqtt://u@h/a?password-file=/dev/zero", "cannot read the password-file"),
        ("mqtt://h/a?password-file=/dev/null", "has a password and no user"),
        ("http://h/a", "cannot publish to http://"),
        ("topic", "without ://"),
    ],
)
def test_an_address_that_will_not_do_is_one_line(address: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as refused:
        open_publisher(Publication(address, LineForm(), []))
    assert "SEC" not in str(refused.value)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("password", [b"SECRET\xff", b"SECRET" * 11_000], ids=["bytes", "long"])
def test_a_password_that_mqtt_cannot_send_is_one_line(monkeypatch: pytest.MonkeyPatch, password: bytes) -> None:
    monkeypatch.setitem(os.environb, b"ESPMEDSAM_MQTT_PASSWORD", password)
    with pytest.raises(UserError, match="cannot read ESPMEDSAM_MQTT_PASSWORD: it is no password") as refused:
        open_publisher(Publication("mqtt://u@127.0.0.1:9/a", LineForm(), []))
    assert "SECRET" not in str(refused.value)


def test_addresses_are_read() -> None:
    broker = parse_broker("mqtt://tower%40or@[::1]:1884/ward%203//masks?client=edge-1")
    assert (broker.host, broker.port, broker.topic) == ("::1", 1884, "ward 3//masks")
    assert (broker.user, broker.client, broker.address) == ("tower@or", "edge-1", "mqtt://[::1]:1884")
    assert parse_broker("mqtt://h/a").port == 1883
    assert parse_broker("MQTTS://h/a").port == 8883


def test_the_command_publishes_what_it_writes(
    toy_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        cv2.imwrite(name, np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))

    def command(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(["infer", str(toy_bundle.path), "a.png", "b.png", "--modality", "fundus", *arguments])
        return int(ended.value.code or 0)

    with Mosquitto(tmp_path) as broker, hearing(broker.port, "masks") as heard:
        address = f"mqtt://127.0.0.1:{broker.port}/masks"
        assert command("--publish", address, "--jsonl", "lines.jsonl", "--contours", "rle") == 0
        ended = heard.wait_for("masks/status", lambda body: body["status"] == "ended")
        lines = [json.loads(line) for line in Path("lines.jsonl").read_text().splitlines()]
        assert heard.of("masks") == lines
        assert all("rle" in line for line in lines)
        assert ended["published"] == 2
        assert command("--publish", address, "--masks", "masks", "--resume") == 0
        assert command("--publish", address, "--masks", "masks", "--resume") == 0  # nothing is left to publish
        ended = heard.wait_for("masks/status", lambda body: body.get("published") == 0)
        assert len(heard.of("masks")) == 4
    assert command("--publish", address) == 1  # all was done, but the broker is away
    assert "2 of 2 lines were not published" in capsys.readouterr().err


def test_the_broker_tells_of_a_run_that_was_killed(toy_bundle: Bundle, tmp_path: Path) -> None:
    with Mosquitto(tmp_path) as broker, hearing(broker.port, "masks") as heard:
        address = f"mqtt://127.0.0.1:{broker.port}/masks"
        command = [sys.executable, "-m", "espmedsam_edge", "infer", str(toy_bundle.path), "test://fundus?fps=20"]
        command += ["--publish", address]
        with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, env=os.environ) as process:
            heard.wait_for("masks", lambda line: line["frame"] >= 3)
            assert heard.of("masks/status")[-1]["status"] == "running"
            process.kill()
        heard.wait_for("masks/status", lambda body: body["status"] == "lost")
        with hearing(broker.port, "masks", "another") as late:
            assert late.wait_for("masks/status", bool)["status"] == "lost"  # retained
            assert late.messages[0][2]
