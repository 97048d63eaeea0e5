"""Bundles by address: fetched once, checked, kept; without a network what is kept runs. The server is here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from bundle_server import BundleServer, serving
from toy_bundles import save_toy_bundle

from espmedsam_edge import Segmenter, remote_bundles
from espmedsam_edge.bundle import PICTURES, Bundle
from espmedsam_edge.cli import main
from espmedsam_edge.errors import UserError
from espmedsam_edge.remote_bundles import fetch, is_remote, open_bundle
from espmedsam_edge.runtime.bundle_choice import means_a_bundle


@pytest.fixture
def server() -> Iterator[BundleServer]:
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def contents(bundle: Bundle) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bundle.path.iterdir()}


@pytest.fixture
def address(server: BundleServer, toy_bundle: Bundle) -> str:
    """Of the toy bundle on the web."""
    server.web |= {f"/models/toy.bundle/{name}": content for name, content in contents(toy_bundle).items()}
    return f"{server.address}/models/toy.bundle"


@pytest.mark.parametrize(
    ("argument", "means"),
    [
        ("hf://owner/name", True),
        ("hf://owner/name@v1", True),
        ("https://example.org/a/fundus.bundle", True),
        ("https://example.org/a/fundus.bundle/", True),
        ("https://example.org/stream.m3u8", False),
        ("http://192.168.1.20/stream", False),
        ("rtsp://example.org/fundus.bundle", False),
    ],
)
def test_addresses_of_bundles_are_told_from_sources(argument: str, means: bool) -> None:
    assert is_remote(argument) == means
    if means or argument.startswith("http"):
        assert means_a_bundle(argument) == means


def test_a_bundle_of_the_web_is_fetched_once_and_runs_without_the_server(
    address: str, server: BundleServer, toy_bundle: Bundle, said: list[str]
) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    with Segmenter.load(address) as segmenter, Segmenter.load(toy_bundle) as original:
        np.testing.assert_array_equal(segmenter.segment(frame).mask, original.segment(frame).mask)
        assert segmenter.bundle.manifest == toy_bundle.manifest
    assert sorted(server.asked) == [f"GET /models/toy.bundle/{name}" for name in ("fp32.onnx", "manifest.json")]
    assert said[0].startswith(f"Fetching {address}: ")
    fetch(address)
    assert len(server.asked) == 3  # the manifest alone
    server.broken = 503
    assert fetch(address).manifest == toy_bundle.manifest
    assert said[-1] == f"{address} cannot be reached (the server answers 503): what was fetched before is used."
    server.server_close()
    assert fetch(address).manifest == toy_bundle.manifest


def test_a_bundle_that_was_changed_is_fetched_anew_and_a_damaged_copy_mended(
    address: str, server: BundleServer, tmp_path: Path
) -> None:
    kept = fetch(address)
    (kept.path / "fp32.onnx").write_bytes(b"damaged")
    assert fetch(address).read_graph(kept.graph()) == server.web["/models/toy.bundle/fp32.onnx"]
    other = save_toy_bundle(tmp_path / "other.bundle", ("colonoscopy",))
    server.web |= {f"/models/toy.bundle/{name}": content for name, content in contents(other).items()}
    assert fetch(address).manifest.modalities == ["colonoscopy"]


def test_a_file_that_is_not_its_manifests_is_not_kept(address: str, server: BundleServer, tmp_path: Path) -> None:
    server.web["/models/toy.bundle/fp32.onnx"] += b" "
    with pytest.raises(UserError, match=r"fp32.onnx is not the file of its manifest .SHA-256 differs."):
        fetch(address)
    assert not list((tmp_path / "cache").rglob("*.onnx"))
    assert not list((tmp_path / "cache").rglob("manifest.json"))


def test_a_manifest_that_leads_elsewhere_is_refused(address: str, server: BundleServer) -> None:
    manifest = json.loads(server.web["/models/toy.bundle/manifest.json"])
    manifest["graphs"][0]["file"] = "../../secret.onnx"
    server.web["/models/toy.bundle/manifest.json"] = json.dumps(manifest).encode()
    with pytest.raises(UserError, match=r"manifest.json: graphs.0.file"):
        fetch(address)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("reference", "line"),
    [
        ("http://example.org/a.bundle", "could be changed on its way. Use https://"),
        ("https://name:secret@example.org/a.bundle", "without name, password"),
        ("https://example.org/a.bundle?token=secret", "without name, password"),
        ("https://[::1/a.bundle", "is no address"),
        ("hf://owner", "names no repository"),
        ("hf://owner/name@", "names no repository"),
        ("hf://owner/../name", "names no repository"),
    ],
)
def test_an_address_that_will_not_do_is_one_line(reference: str, line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        open_bundle(reference)
    assert "secret" not in str(caught.value)


def test_what_is_not_there_or_too_large_is_one_line(
    address: str, server: BundleServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"no.bundle/manifest.json: the server answers 404"):
        fetch(f"{server.address}/no.bundle")
    server.redirects["/models/toy.bundle/fp32.onnx"] = "http://example.org/elsewhere.onnx"
    with pytest.raises(UserError, match="leads to an address that is not https"):
        fetch(address)
    server.redirects.clear()
    monkeypatch.setattr(remote_bundles, "_MAX_GRAPH_BYTES", 100)
    with pytest.raises(UserError, match="a file of the bundle has over 0 MiB"):
        fetch(address)
    server.broken = 503
    with pytest.raises(UserError, match="cannot be reached: the server answers 503"):
        fetch(address)


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_server_that_sends_a_byte_now_and_then_is_not_waited_for(
    address: str, server: BundleServer, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(remote_bundles, "_PATIENCE", 0.3)
    server.dripping = part
    begin = time.monotonic()
    with pytest.raises(UserError, match="cannot be reached: it sends less than 10 kB a second"):
        fetch(address)
    assert time.monotonic() - begin < 10  # it would drip for 20
    server.dripping = ""
    for thread in threading.enumerate():
        if thread.name == "espmedsam-fetch":
            thread.join(10)  # it ends by itself
            assert not thread.is_alive()


@pytest.mark.parametrize("name", ["manifest.json", "fp32.onnx", "."])
@pytest.mark.parametrize("reachable", [True, False])
def test_what_is_kept_is_the_users_alone(
    address: str, server: BundleServer, toy_bundle: Bundle, name: str, reachable: bool
) -> None:
    kept = fetch(address).path / name
    kept.chmod(0o777 if kept.is_dir() else 0o666)
    server.broken = None if reachable else 503
    if reachable:
        assert fetch(address).manifest == toy_bundle.manifest
        assert not kept.stat().st_mode & 0o022  # made anew
        assert "GET /models/toy.bundle/fp32.onnx" in server.asked[2:]
    else:
        with pytest.raises(UserError, match="what is kept is not used: other users may write to"):
            fetch(address)


def test_links_in_a_bundle_are_not_pushed(toy_bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    (tmp_path / "secret.png").write_bytes(b"of a patient")
    (toy_bundle.path / f"fundus-fp32-{PICTURES[0]}").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match="is a link"):
        remote_bundles.push(toy_bundle, "hf://owner/toy")


def test_the_command_takes_an_address(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cv2.imwrite("photo.png", np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    with pytest.raises(SystemExit) as ended:
        main(["infer", address, "photo.png", "--masks", "masks"])
    assert not ended.value.code, capsys.readouterr().err
    assert Path("masks/photo.png").is_file()


class TestHub:
    """Hugging Face's own client, which reads its environment when it is imported: so in processes of its own."""

    @pytest.fixture(autouse=True)
    def _client(self) -> None:
        pytest.importorskip("huggingface_hub")

    def run(self, server: BundleServer, *words: str, **environment: str) -> tuple[int, str, str]:
        home = Path("hub").absolute()
        given = {**os.environ, "HF_ENDPOINT": server.address, "HF_HOME": str(home), "HF_TOKEN": "hf_" + "a" * 34}
        command = [sys.executable, "-m", "espmedsam_edge", *words]
        done = subprocess.run(command, env={**given, **environment}, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    def test_pushed_and_fetched_by_name_and_revision(self, server: BundleServer, toy_bundle: Bundle) -> None:
        (toy_bundle.path / "notes.txt").write_text("of a patient")
        code, out, error = self.run(server, "push", str(toy_bundle.path), "hf://owner/toy")
        assert (code, error) == (0, "")
        first = server.repositories["owner/toy"][-1]
        assert out == f"hf://owner/toy@{first[0]}\n"
        assert set(first[1]) == {"manifest.json", "fp32.onnx"}
        assert server.private["owner/toy"]
        cv2.imwrite("photo.png", np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8))
        for reference in ("hf://owner/toy", f"hf://owner/toy@{first[0]}"):
            code, out, error = self.run(server, "infer", reference, "photo.png", "--masks", "masks")
            assert code == 0, error
            assert "toy.bundle: fundus, fp32" in out
        server.broken = 503
        code, out, error = self.run(server, "infer", "hf://owner/toy", "photo.png", "--masks", "masks")
        assert code == 0, error
        assert "toy.bundle: fundus, fp32" in out

    @pytest.mark.parametrize("words", [("infer", "hf://owner/toy", "photo.png"), ("push", "BUNDLE", "hf://owner/toy")])
    def test_the_password_of_an_endpoint_is_not_told(
        self, server: BundleServer, toy_bundle: Bundle, words: tuple[str, ...]
    ) -> None:
        """Hugging Face's client tells addresses that it cannot reach; this one has them of us alone."""
        words = tuple(str(toy_bundle.path) if word == "BUNDLE" else word for word in words)
        code, out, error = self.run(server, *words, HF_ENDPOINT="http://user:pa55word@127.0.0.1:9")
        assert (code, error.count("\n")) == (1, 1), error
        assert "pa55word" not in out + error

    @pytest.mark.parametrize("part", ["head", "body"])
    def test_a_server_that_sends_a_byte_now_and_then_is_not_waited_for(
        self, server: BundleServer, toy_bundle: Bundle, part: str
    ) -> None:
        server.commit("owner/toy", contents(toy_bundle))
        server.dripping = part
        program = "from espmedsam_edge import remote_bundles as r; r._PATIENCE, r._HUB_PIECE = 0.3, 3000; "
        program += "from espmedsam_edge.cli import main; main()"
        begin = time.monotonic()
        command = [sys.executable, "-c", program, "infer", "hf://owner/toy", "photo.png"]
        home = str(Path("hub").absolute())
        given = {**os.environ, "HF_ENDPOINT": server.address, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(command, env=given, capture_output=True, text=True)
        assert time.monotonic() - begin < 15  # it would drip for 20
        assert done.returncode == 1
        assert "hf://owner/toy cannot be reached: it sends less than 10 kB a second" in done.stderr
        assert "Traceback" not in done.stderr

    def test_what_is_wrong_is_one_line(self, server: BundleServer, toy_bundle: Bundle) -> None:
        server.commit("owner/toy", contents(toy_bundle) | {"fp32.onnx": b"another"})
        for reference, line in (
            ("hf://owner/nothing", "hf://owner/nothing: "),
            ("hf://owner/toy@v9", "hf://owner/toy: "),
            ("hf://owner/toy", "toy: fp32.onnx is not the file of its manifest"),
        ):
            code, out, error = self.run(server, "infer", reference, "photo.png")
            assert (code, out) == (1, ""), error
            assert f"error: {line}" in error
            assert "Traceback" not in error
