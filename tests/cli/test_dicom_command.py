"""``espmedsam-edge dicom listen``: wrong use is one line before anything is loaded or listened on."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from toy_bundles import save_toy_bundle

pytest.importorskip("pynetdicom", reason="needs pynetdicom (extra dicom-network)")

from espmedsam_edge.cli import main
from espmedsam_edge.runtime.dicom_network.inbox import Inbox


def listen(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["dicom", "listen", *(str(argument) for argument in arguments)])
    return ended.value.code, capsys.readouterr().err


def test_wrong_use_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_toy_bundle(Path("toy.bundle"), ("histopathology",))
    save_toy_bundle(Path("two.bundle"), ("fundus", "colonoscopy"))
    Path("link").symlink_to("dicom-queue/results")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        cases = [
            (("toy.bundle", "--aet", "SEVENTEEN LETTERS"), 2, "is no AE title"),
            (("toy.bundle", "--allow", "BACK\\SLASH"), 2, "is no AE title"),
            (("toy.bundle", "--send", "nowhere"), 2, "cannot send to nowhere"),
            (("toy.bundle", "--send", "a:104:PACS", "--out", "o"), 2, "one place"),
            (("two.bundle",), 2, "--modality fundus|colonoscopy"),
            (("no.bundle",), 2, "no bundle at no.bundle"),
            (("toy.bundle", "--out", "toy.bundle/o"), 2, "is a bundle"),
            (("toy.bundle", "--queue", "toy.bundle/q"), 2, "is a bundle"),
            (
                ("toy.bundle", "--out", "dicom-queue/waiting"),
                2,
                "lies in the queue",
            ),  # files of these names go from there
            (("toy.bundle", "--out", "link"), 2, "lies in the queue"),
            (("toy.bundle", "--port", taken.getsockname()[1]), 2, "cannot listen on"),
            (("toy.bundle", "--host", "no.such.host.invalid"), 2, "cannot listen on"),
        ]
        for arguments, expected, told in cases:
            code, err = listen(capsys, *arguments, "--backend", "onnxruntime-cpu")
            lines = [line for line in err.splitlines() if not line.startswith("Running on")]
            assert (code, len(lines), told in err) == (expected, 1, True), err
    with Inbox(Path("dicom-queue")):
        code, err = listen(capsys, "toy.bundle", "--backend", "onnxruntime-cpu")
        assert (code, "another listener uses dicom-queue" in err) == (2, True)
