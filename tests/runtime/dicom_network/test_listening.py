"""The DICOM listener on loopback: who may send what, what becomes of it, and that nothing of a header is told."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pynetdicom", reason="needs pynetdicom (extra dicom-network)")
pytest.importorskip("highdicom", reason="needs highdicom (extra dicom)")

import pynetdicom
from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from pynetdicom import evt
from pynetdicom.sop_class import BasicTextSRStorage, SegmentationStorage, Verification
from seg_sources import PATIENT, ULTRASOUND, save_dicom

from espmedsam_edge import files
from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.backends.backend import BackendAway
from espmedsam_edge.runtime.dicom_network import inbox as inbox_module
from espmedsam_edge.runtime.dicom_network import listener, service
from espmedsam_edge.runtime.dicom_network.delivery import Delivery, Folder, NotDeliveredError, parse_send
from espmedsam_edge.runtime.dicom_network.inbox import Inbox
from espmedsam_edge.runtime.dicom_network.listener import ListenOptions, listening
from espmedsam_edge.runtime.inference import infer
from espmedsam_edge.runtime.request import ModelOptions, Outputs
from espmedsam_edge.runtime.segmenter import Segmenter

Listen = Callable[..., Any]
FAST = ListenOptions(port=0)


@contextmanager
def served(bundle: Bundle, folder: Path, delivery: Delivery, options: ListenOptions = FAST) -> Iterator[int]:
    """The whole service in a thread; gives the port."""
    ports: list[int] = []
    up, stop = threading.Event(), threading.Event()

    def ready(host: str, port: int) -> None:
        ports.append(port)
        up.set()

    with Segmenter.load(bundle, backend="onnxruntime-cpu", threads=1) as segmenter:
        thread = threading.Thread(
            target=service.serve, args=(options, folder / "queue", delivery, segmenter, stop, ready), daemon=True
        )
        thread.start()
        assert up.wait(60)
        try:
            yield ports[0]
        finally:
            stop.set()
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture(autouse=True)
def _in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_FIRST_PAUSE", 0.1)
    monkeypatch.setattr(service, "_NAP", 0.05)


def send(port: int, *paths: Path, called: str = "ESPMEDSAM", calling: str = "CALLER") -> list[int | None]:
    """The status of each; none where the association was rejected."""
    entity = pynetdicom.AE(ae_title=calling)
    for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian):
        entity.add_requested_context(ULTRASOUND, syntax)
    entity.add_requested_context("1.2.840.10008.5.1.4.1.1.3.1", ExplicitVRLittleEndian)
    association = entity.associate("127.0.0.1", port, ae_title=called)
    if not association.is_established:
        return []
    statuses = [association.send_c_store(path).get("Status") for path in paths]
    association.release()
    return statuses


def soon(condition: Callable[[], object], seconds: float = 60) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.02)
    return False


def found_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.dcm"))


def sources_of(segmentations: list[Path]) -> list[str]:
    """Which instance each is of."""
    return [
        str(dcmread(path).ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].ReferencedSOPInstanceUID)
        for path in segmentations
    ]


def test_what_is_sent_is_segmented_as_infer_does(toy_bundle: Bundle, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.dcm" for number in range(3)]
    uids = [str(save_dicom(path, frames=4 if path.stem == "2" else None).SOPInstanceUID) for path in paths]
    out = tmp_path / "out"
    with served(toy_bundle, tmp_path, Folder(out)) as port:
        assert send(port, *paths) == [0, 0, 0]
        assert soon(lambda: len(found_in(out)) == 3)
    assert sorted(sources_of(found_in(out))) == sorted(uids)
    infer(paths, ModelOptions(toy_bundle, backend="onnxruntime-cpu"), Outputs(dicom_seg=tmp_path / "infer"))
    expected = {dcmread(path).SOPInstanceUID: dcmread(path).PixelData for path in found_in(tmp_path / "infer")}
    assert {dcmread(path).SOPInstanceUID: dcmread(path).PixelData for path in found_in(out)} == expected
    assert not any((tmp_path / "queue" / "waiting").iterdir())
    assert not any((tmp_path / "queue" / "results").iterdir())


@pytest.mark.parametrize("program", ["pynetdicom", "dcmtk"])
def test_the_programs_of_others_send(toy_bundle: Bundle, tmp_path: Path, program: str) -> None:
    storescu = (
        [sys.executable, "-m", "pynetdicom", "storescu"] if program == "pynetdicom" else [shutil.which("storescu")]
    )
    if storescu[0] is None:
        pytest.skip("needs dcmtk's storescu")
    for number in range(2):
        save_dicom(tmp_path / f"{number}.dcm")
    called = ["-aec", "ESPMEDSAM", "127.0.0.1"]
    with served(toy_bundle, tmp_path, Folder(tmp_path / "out")) as port:
        command = [*map(str, storescu), *called, str(port), *(str(tmp_path / f"{number}.dcm") for number in range(2))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert soon(lambda: len(found_in(tmp_path / "out")) == 2)
        if program == "dcmtk":
            done = subprocess.run(
                [*map(str, storescu), "--abort", *called, str(port), str(tmp_path / "0.dcm")], timeout=60
            )
            assert done.returncode == 0
            save_dicom(tmp_path / "sr.dcm", sop_class=BasicTextSRStorage)
            done = subprocess.run([*command[:-2], str(tmp_path / "sr.dcm")], capture_output=True, text=True, timeout=60)
            assert done.returncode != 0
            assert "No presentation context" in done.stderr
            assert subprocess.run(["echoscu", *called, str(port)], timeout=60).returncode == 0


def test_titles_are_checked(toy_bundle: Bundle, tmp_path: Path, said: list[str]) -> None:
    save_dicom(tmp_path / "a.dcm")
    options = ListenOptions("HERE", port=0, allow=("GOOD", "ALSO GOOD"))
    with served(toy_bundle, tmp_path, Folder(tmp_path / "out"), options) as port:
        assert send(port, tmp_path / "a.dcm", called="ESPMEDSAM", calling="GOOD") == []
        assert send(port, tmp_path / "a.dcm", called="HERE", calling="BAD") == []
        assert not found_in(tmp_path / "queue" / "waiting")
        assert send(port, tmp_path / "a.dcm", called="HERE", calling="ALSO GOOD") == [0]
    assert soon(lambda: len([line for line in said if "was rejected" in line]) == 2)
    assert not any("BAD" in line for line in said)


def test_a_peer_that_is_refused_again_and_again_fills_no_log(
    toy_bundle: Bundle, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_dicom(tmp_path / "a.dcm")
    monkeypatch.setattr(listener, "_MINUTE", 2.0)
    with served(toy_bundle, tmp_path, Folder(tmp_path / "out"), ListenOptions("HERE", port=0)) as port:

        def refused(times: int) -> list[str]:
            for _ in range(times):
                assert send(port, tmp_path / "a.dcm", called="ELSEWHERE") == []
            return [line for line in said if "was rejected" in line]

        begin = time.monotonic()
        assert soon(lambda: len(refused(5)) >= 10)
        lines = refused(25)
        if time.monotonic() - begin < 2:  # not on a machine that did something else
            assert len(lines) == 10
        time.sleep(2)
        refused(1)
        assert soon(lambda: any("more such lines were left out" in line for line in said))


def test_more_associations_than_allowed_are_rejected(toy_bundle: Bundle, tmp_path: Path) -> None:
    options = ListenOptions(port=0, associations=2)
    with served(toy_bundle, tmp_path, Folder(tmp_path / "out"), options) as port:
        entity = pynetdicom.AE()
        entity.add_requested_context(Verification)
        open_ones = [entity.associate("127.0.0.1", port, ae_title="ESPMEDSAM") for _ in range(2)]
        assert all(one.is_established for one in open_ones)
        third = entity.associate("127.0.0.1", port, ae_title="ESPMEDSAM")
        assert third.is_rejected
        open_ones[0].release()
        assert soon(lambda: entity.associate("127.0.0.1", port, ae_title="ESPMEDSAM").is_established)
        open_ones[1].release()


def test_connections_that_say_nothing_or_nonsense_are_given_up(
    toy_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_SAY_HELLO", "_SAY_ON"):
        monkeypatch.setattr(listener, name, 1)
    save_dicom(tmp_path / "a.dcm")
    random = np.random.default_rng(2)
    options = ListenOptions(port=0, associations=2)
    with served(toy_bundle, tmp_path, Folder(tmp_path / "out"), options) as port, contextlib.ExitStack() as stack:
        for number in range(12):
            peer = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            if number:
                peer.sendall(bytes([number % 9, 0]) + random.bytes(400))
        assert soon(lambda: send(port, tmp_path / "a.dcm") == [0])


def test_no_picture_and_a_lying_sender_are_refused(toy_bundle: Bundle, tmp_path: Path) -> None:
    data = save_dicom(tmp_path / "a.dcm")
    with served(toy_bundle, tmp_path, Folder(tmp_path / "out")) as port:
        entity = pynetdicom.AE()
        entity.add_requested_context(BasicTextSRStorage)
        entity.add_requested_context(SegmentationStorage)
        assert not entity.associate("127.0.0.1", port, ae_title="ESPMEDSAM").accepted_contexts

        entity = pynetdicom.AE()
        entity.add_requested_context(ULTRASOUND, ExplicitVRLittleEndian)
        association = entity.associate("127.0.0.1", port, ae_title="ESPMEDSAM")
        lie = generate_uid()
        encode = pynetdicom.association.encode

        def encoded(dataset: Any, *arguments: Any) -> Any:
            dataset.SOPInstanceUID = lie
            return encode(dataset, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pynetdicom.association, "encode", encoded)
            assert association.send_c_store(data).get("Status") == 0xA900
        association.release()
        assert send(port, tmp_path / "a.dcm") == [0]


def test_a_peer_that_goes_in_the_middle_leaves_nothing(toy_bundle: Bundle, tmp_path: Path) -> None:
    save_dicom(tmp_path / "a.dcm", (400, 400))
    with served(toy_bundle, tmp_path, Folder(tmp_path / "out")) as port:
        for ending in ("abort", "close"):
            entity = pynetdicom.AE()
            entity.add_requested_context(ULTRASOUND, ExplicitVRLittleEndian)
            association = entity.associate("127.0.0.1", port, ae_title="ESPMEDSAM", max_pdu=4096)
            transport = association.dul.socket
            sent = [0]

            def cut(data: bytes, transport: Any = transport, sent: list[int] = sent, ending: str = ending) -> None:
                sent[0] += 1
                if sent[0] < 8:
                    transport.socket.sendall(data)
                elif ending == "close":
                    transport.socket.shutdown(socket.SHUT_RDWR)
                elif sent[0] == 8:
                    transport.socket.sendall(b"\x07\0\0\0\0\x04\0\0\0\0")  # A-ABORT

            transport.send = cut
            association.dimse_timeout = 1
            association.send_c_store(tmp_path / "a.dcm")
            association.abort()
        waiting = tmp_path / "queue" / "waiting"
        assert list(waiting.iterdir()) == []
        assert send(port, tmp_path / "a.dcm") == [0]
        assert soon(lambda: len(found_in(tmp_path / "out")) == 1)


def test_a_full_disk_refuses_and_loses_nothing(
    toy_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    save_dicom(tmp_path / "a.dcm")
    full, sync = [True], os.fsync

    def fsync(descriptor: int) -> None:
        if full[0] and "/waiting/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with served(toy_bundle, tmp_path, Folder(tmp_path / "out")) as port:
        assert send(port, tmp_path / "a.dcm") == [0xA700]
        assert list((tmp_path / "queue" / "waiting").iterdir()) == []
        assert any("no space left" in line for line in said)
        full[0] = False
        assert send(port, tmp_path / "a.dcm") == [0]
        assert soon(lambda: len(found_in(tmp_path / "out")) == 1)


def test_pictures_wait_for_a_network_elsewhere_that_is_away(
    toy_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    save_dicom(tmp_path / "a.dcm")
    segment, away = Segmenter.segment, [True, True]

    def elsewhere(self: Segmenter, *arguments: Any) -> Any:
        if away:
            away.pop()
            raise BackendAway("no answer of the server.")
        return segment(self, *arguments)

    monkeypatch.setattr(Segmenter, "segment", elsewhere)
    with served(toy_bundle, tmp_path, Folder(tmp_path / "out")) as port:
        assert send(port, tmp_path / "a.dcm") == [0]
        assert soon(lambda: found_in(tmp_path / "out"))
    assert list((tmp_path / "queue" / "failed").iterdir()) == []
    assert sum("no answer of the server. Tried again in" in line for line in said) == 2


def test_some_of_the_disk_is_left_free(
    toy_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    save_dicom(tmp_path / "a.dcm")
    free = [(7 << 20) - 1]
    monkeypatch.setattr(inbox_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, free[0]))
    with served(toy_bundle, tmp_path, Folder(tmp_path / "out"), ListenOptions(port=0, free=7)) as port:
        assert send(port, tmp_path / "a.dcm") == [0xA700]
        assert list((tmp_path / "queue" / "waiting").iterdir()) == []
        assert any("less than 7 MiB are free" in line for line in said)
        free[0] += 1
        assert send(port, tmp_path / "a.dcm") == [0]


def test_what_is_done_is_known_for_some_days(toy_bundle: Bundle, tmp_path: Path) -> None:
    with Inbox(tmp_path / "queue") as inbox:
        for uid in ("1.1", "1.2"):
            inbox.put(uid, [b"content"])
            inbox.finish(inbox.waiting()[0])
    old, new = sorted((tmp_path / "queue" / "done").glob("*/*"))
    long_ago = time.time() - 31 * 24 * 60 * 60
    os.utime(old, (long_ago, long_ago))
    with served(toy_bundle, tmp_path, Folder(tmp_path / "out"), ListenOptions(port=0, remember=30)):
        assert soon(lambda: not old.exists())
    assert new.exists()


def test_a_disk_that_is_full_for_the_results_is_waited_for(
    toy_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    save_dicom(tmp_path / "a.dcm")
    full, sync = [True], os.fsync

    def fsync(descriptor: int) -> None:
        if full[0] and "/results/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with served(toy_bundle, tmp_path, Folder(tmp_path / "out")) as port:
        assert send(port, tmp_path / "a.dcm") == [0]
        assert soon(lambda: any("no space left" in line for line in said))
        assert len(found_in(tmp_path / "queue" / "waiting")) == 1
        full[0] = False
        assert soon(lambda: len(found_in(tmp_path / "out")) == 1)
    assert not found_in(tmp_path / "queue" / "failed")


def test_instances_that_are_too_large_are_cut_off(toy_bundle: Bundle, tmp_path: Path, said: list[str]) -> None:
    save_dicom(tmp_path / "large.dcm", (1200, 1200))
    save_dicom(tmp_path / "small.dcm")
    with served(toy_bundle, tmp_path, Folder(tmp_path / "out"), ListenOptions(port=0, largest=1)) as port:
        assert send(port, tmp_path / "large.dcm") != [0]
        assert any("more than 1 MiB" in line for line in said)
        assert send(port, tmp_path / "small.dcm") == [0]
    assert len(found_in(tmp_path / "out")) <= 1


def test_what_cannot_be_segmented_is_put_aside(toy_bundle: Bundle, tmp_path: Path) -> None:
    save_dicom(tmp_path / "bad.dcm", PixelData=b"\0" * 100)
    save_dicom(tmp_path / "good.dcm")
    with served(toy_bundle, tmp_path, Folder(tmp_path / "out")) as port:
        assert send(port, tmp_path / "bad.dcm", tmp_path / "good.dcm") == [0, 0]
        assert soon(lambda: found_in(tmp_path / "queue" / "failed") and found_in(tmp_path / "out"))
    (reason,) = (tmp_path / "queue" / "failed").glob("*.txt")
    assert "cut off or damaged" in reason.read_text()
    assert not found_in(tmp_path / "queue" / "waiting")


def test_nothing_of_a_header_is_logged(
    toy_bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    data = [save_dicom(tmp_path / "a.dcm"), save_dicom(tmp_path / "b.dcm", PixelData=b"\0" * 9, Rows=48)]
    data.append(save_dicom(tmp_path / "c.dcm", StudyDate="Doe^Jane", PatientAge="SECRET"))

    class Down(Folder):
        def deliver(self, file: Path) -> None:
            raise NotDeliveredError("down")

    with served(toy_bundle, tmp_path, Down(tmp_path)) as port:
        assert set(send(port, *(tmp_path / f"{name}.dcm" for name in "abc"))) == {0}
        queue = tmp_path / "queue"
        assert soon(lambda: len(found_in(queue / "failed")) == 2 and found_in(queue / "results"))
        time.sleep(0.3)
    written = capfd.readouterr()
    told = "\n".join([*(record.getMessage() for record in caplog.records), written.out, written.err])
    names = " ".join(path.name for path in tmp_path.rglob("*"))
    values = [*PATIENT.values(), "SECRET", *(str(one[tag].value) for one in data for tag in _UIDS)]
    assert "Tried again" in told
    assert [value for value in values if value in told or value in names] == []


_UIDS = ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")


def test_the_same_instance_counts_once(toy_bundle: Bundle, tmp_path: Path) -> None:
    save_dicom(tmp_path / "a.dcm")
    out = tmp_path / "out"
    with served(toy_bundle, tmp_path, Folder(out)) as port:
        assert send(port, *[tmp_path / "a.dcm"] * 3) == [0, 0, 0]
        assert soon(lambda: found_in(out) and not found_in(tmp_path / "queue" / "waiting"))
        before = found_in(out)[0].stat().st_mtime_ns
        assert send(port, tmp_path / "a.dcm") == [0]
        time.sleep(0.3)
    with served(toy_bundle, tmp_path, Folder(out)) as port:  # started again
        assert send(port, tmp_path / "a.dcm") == [0]
        time.sleep(0.3)
    assert [path.stat().st_mtime_ns for path in found_in(out)] == [before]


class Archive:
    """Takes C-STORE, once it is up; answers with the next status, then with success."""

    def __init__(self) -> None:
        self.answers: list[int] = []
        self.uids: list[str] = []
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port = taken.getsockname()[1]
        self._entity = pynetdicom.AE(ae_title="ARCHIVE")
        self._entity.require_called_aet = True
        self._entity.add_supported_context(SegmentationStorage, ImplicitVRLittleEndian)

    @contextmanager
    def up(self) -> Iterator[None]:
        self._entity.start_server(("127.0.0.1", self.port), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store)])
        try:
            yield
        finally:
            self._entity.shutdown()

    def _store(self, event: Any) -> int:
        answer = self.answers.pop(0) if self.answers else 0
        if answer == 0 or answer >> 12 == 0xB:
            self.uids.append(str(event.dataset.SOPInstanceUID))
        return answer


def test_an_archive_that_is_down_or_full_gets_everything_later(
    toy_bundle: Bundle, tmp_path: Path, said: list[str]
) -> None:
    paths = [tmp_path / f"{number}.dcm" for number in range(3)]
    for path in paths:
        save_dicom(path)
    archive = Archive()
    delivery = parse_send(f"127.0.0.1:{archive.port}:ARCHIVE", "ESPMEDSAM")
    with served(toy_bundle, tmp_path, delivery) as port:
        assert send(port, *paths) == [0, 0, 0]
        assert soon(lambda: any("there is no connection" in line for line in said))
        assert len(found_in(tmp_path / "queue" / "waiting")) == 3
        archive.answers = [0xA700, 0x0122, 0xB000]
        with archive.up():  # which knows only the implicit encoding
            assert soon(lambda: not found_in(tmp_path / "queue" / "waiting"))
    assert len(archive.uids) == len(set(archive.uids)) == 3
    assert any("it answered A700" in line for line in said)
    assert any("it answered 0122" in line for line in said)


@contextmanager
def dicomweb(answers: list[int]) -> Iterator[tuple[str, list[Any]]]:
    """A service of STOW-RS that answers with these HTTP statuses, then with success; and what it got."""
    got: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            answer = answers.pop(0) if answers else 200
            if answer == 200:
                head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
                for part in BytesParser().parsebytes(head + body).get_payload():
                    got.append(
                        (self.path, self.headers.get("Authorization"), dcmread(BytesIO(part.get_payload(decode=True))))
                    )
            self.send_response(answer)
            self.send_header("Content-Type", "application/dicom+json")
            self.end_headers()
            self.wfile.write(json.dumps({}).encode())

        def log_message(self, form: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/dicom-web", got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_stow_rs(toy_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    pytest.importorskip("dicomweb_client", reason="needs dicomweb-client (extra dicom-network)")
    monkeypatch.setenv("ESPMEDSAM_DICOMWEB_TOKEN", "word")
    uid = str(save_dicom(tmp_path / "a.dcm").SOPInstanceUID)
    with dicomweb([503, 409]) as (url, got), served(toy_bundle, tmp_path, parse_send(url, "ESPMEDSAM")) as port:
        assert send(port, tmp_path / "a.dcm") == [0]
        assert soon(lambda: got)
        assert soon(lambda: not found_in(tmp_path / "queue" / "waiting"))
    ((path, authorization, data),) = got
    assert (path, authorization) == ("/dicom-web/studies", "Bearer word")
    assert data.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == uid
    assert np.any(data.pixel_array)
    assert [line.split(": ")[1].split(".")[0] for line in said if "it answered" in line] == [
        "it answered 503",
        "it answered 409",
    ]


# The last have names that no name service can be asked for.
@pytest.mark.parametrize(
    "text",
    [
        *("archive", "archive:104", "archive:0:PACS", "a:99999:PACS", "ftp://a/b", "a:1:", "http://"),
        *("a..b:104:PACS", f"{'a' * 64}:104:PACS", "\udcff:104:PACS", "https://a..b/c", "https://\udcff/c"),
    ],
)
def test_where_nothing_can_be_sent(text: str) -> None:
    with pytest.raises(UserError, match=r"cannot send to|is no AE title"):
        parse_send(text, "ESPMEDSAM")


@pytest.mark.parametrize(
    "text",
    [
        "https://me:SECRET@host:8042/dicom-web/studies",
        "https://me@host:SECRET@host/dicom-web",
        "https://me:SEC/RET@host/dicom-web",
        "https://me:a SECRET@host/dicom-web",
        "https://me:SECRET@[host/dicom-web",
        "https://host/token=SECRET/dicom-web",
        "https://host/dicom-web?key=SECRET",
        "ftp://me:SECRET@host/b",
    ],
)
def test_what_an_address_hides_is_not_shown(text: str) -> None:
    pytest.importorskip("dicomweb_client", reason="needs dicomweb-client (extra dicom-network)")
    try:
        shown = str(parse_send(text, "ESPMEDSAM"))
    except UserError as error:
        shown = str(error)
    assert "SEC" not in shown
    assert "RET" not in shown


@pytest.mark.parametrize("title", ["", "  ", "SEVENTEEN LETTERS", "BACK\\SLASH", "Ä", "A\n"])
def test_titles_that_are_none(title: str) -> None:
    with pytest.raises(UserError, match="is no AE title"):
        ListenOptions(title)


def test_two_listeners_share_neither_queue_nor_port(tmp_path: Path) -> None:
    with Inbox(tmp_path / "q") as inbox, listening(ListenOptions(port=0), inbox, lambda: None) as (host, port):
        with pytest.raises(UserError, match="another listener uses"):
            Inbox(tmp_path / "q")
        again = listening(ListenOptions(host=host, port=port), inbox, lambda: None)
        with pytest.raises(UserError, match="cannot listen on"), again:
            pass
    with Inbox(tmp_path / "q"):
        pass


@pytest.mark.parametrize("host", ["nowhere.invalid", "192.0.2.1", "a..b", "\udcff", "", "port"])
def test_an_address_that_will_not_do_leaves_no_queue(toy_bundle: Bundle, tmp_path: Path, host: str) -> None:
    with socket.socket() as other, Segmenter.load(toy_bundle, backend="onnxruntime-cpu", threads=1) as segmenter:
        other.bind(("127.0.0.1", 0))
        other.listen()
        host, port = ("127.0.0.1", other.getsockname()[1]) if host == "port" else (host, 0)
        with pytest.raises(UserError, match="cannot listen on"):
            service.serve(
                ListenOptions(host=host, port=port), tmp_path / "q", Folder(tmp_path), segmenter, threading.Event()
            )
    assert not (tmp_path / "q").exists()


def test_a_name_that_is_not_known_for_a_while_is_waited_for(
    toy_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    save_dicom(tmp_path / "a.dcm")
    ask, away = socket.getaddrinfo, [True, True]

    def asked(host: Any, *arguments: Any, **options: Any) -> Any:
        if host == "archive.example":
            if away:
                away.pop()
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
            host = "127.0.0.1"
        return ask(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", asked)
    archive = Archive()
    delivery = parse_send(f"archive.example:{archive.port}:ARCHIVE", "ESPMEDSAM")
    with archive.up(), served(toy_bundle, tmp_path, delivery) as port:
        assert send(port, tmp_path / "a.dcm") == [0]
        assert soon(lambda: archive.uids)
    assert sum("there is no connection. Tried again in" in line for line in said) == 2


@pytest.mark.parametrize("place", ["done", "failed"])
def test_a_disk_that_is_full_for_the_notes_is_waited_for(
    toy_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], place: str
) -> None:
    """What was delivered, or cannot be segmented, is noted once there is room."""
    save_dicom(tmp_path / "a.dcm", **({"PixelData": b"\0" * 100} if place == "failed" else {}))
    full = [True]

    def on_a_full_disk(note: Callable[..., None]) -> Callable[..., None]:
        def noted(self: Inbox, *arguments: str) -> None:
            with files.write_errors(self.folder):
                if full[0]:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            note(self, *arguments)

        return noted

    for name in ("finish", "fail"):
        monkeypatch.setattr(Inbox, name, on_a_full_disk(getattr(Inbox, name)))
    with served(toy_bundle, tmp_path, Folder(tmp_path / "out")) as port:
        assert send(port, tmp_path / "a.dcm") == [0]
        assert soon(lambda: any("no space left" in line for line in said))
        assert len(found_in(tmp_path / "queue" / "waiting")) == 1
        full[0] = False
        assert soon(lambda: not found_in(tmp_path / "queue" / "waiting"))
    assert len(list((tmp_path / "queue" / place).glob("*/*" if place == "done" else "*.dcm"))) == 1
    assert len(found_in(tmp_path / "out")) == (place == "done")


def test_what_somebody_takes_out_of_the_queue_is_gone(tmp_path: Path) -> None:
    with Inbox(tmp_path / "q") as inbox:
        inbox.put("1.1", [b"content"])
        name = inbox.waiting()[0]
        found_in(tmp_path / "q" / "waiting")[0].unlink()
        assert inbox.begin(name) is None


def test_what_others_keep_in_folders_of_these_names_stays(toy_bundle: Bundle, tmp_path: Path) -> None:
    """``--queue`` may name a folder that has its own ``waiting``, ``results`` and ``done``."""
    queue = tmp_path / "queue"
    foreign = [
        queue / name
        for name in ("waiting/scan.dcm", "waiting/.scan.dcm", "results/.draft.dcm", "failed/.x.dcm", "done/2024/report")
    ]
    long_ago = time.time() - 1000 * 24 * 60 * 60
    for file in foreign:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_dicom(file)
        os.utime(file, (long_ago, long_ago))
    with served(toy_bundle, tmp_path, Folder(tmp_path / "out"), ListenOptions(port=0, remember=1)) as port:
        save_dicom(tmp_path / "sent.dcm")
        assert send(port, tmp_path / "sent.dcm") == [0]
        assert soon(lambda: len(found_in(tmp_path / "out")) == 1)
        time.sleep(0.6)  # the foreign ones would have their turn
    assert all(file.is_file() for file in foreign)
    assert len(found_in(tmp_path / "out")) == 1


@pytest.mark.parametrize("kind", ["link", "another user's", "open"])
def test_what_lies_in_a_queue_is_the_users_own(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "q" / "results"
    place.parent.mkdir()
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.mkdir()
        place.chmod(0o777)
    if kind == "another user's":
        if os.geteuid():
            pytest.skip("only the superuser gives folders away")
        os.chown(place, 65534, 65534)
    if kind == "open":
        with Inbox(tmp_path / "q"):
            assert place.stat().st_mode & 0o777 == 0o700
        return
    with pytest.raises(UserError, match="results is a link, or another user's"):
        Inbox(tmp_path / "q")


def test_an_instance_that_ends_its_process_goes_last(tmp_path: Path) -> None:
    with Inbox(tmp_path / "q") as inbox:
        for uid in ("1.1", "1.2", "1.3"):
            inbox.put(uid, [b"content"])
            time.sleep(0.01)
        first, second, third = inbox.waiting()
        assert inbox.begin(first) is not None
    (tmp_path / "q" / "waiting" / f".{first}.0123456789ab.dcm").touch()  # half-written
    with Inbox(tmp_path / "q") as inbox:
        assert inbox.waiting() == [second, third, first]
        inbox.finish(second)
        inbox.put("1.2", [b"again"])
        assert inbox.waiting() == [third, first]
    assert len(list((tmp_path / "q" / "waiting").iterdir())) == 2
