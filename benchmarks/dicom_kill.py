"""What SIGKILL takes of a DICOM listener: studies are sent by several associations, and it is killed at random moments.

    python benchmarks/dicom_kill.py BUNDLE --name dicom-kill-MACHINE [--studies 200] [--kills 10]

Senders, listener and archive are on loopback. A sender repeats what was not answered with success, as modalities do.
Every instance that was answered so must be in the archive, as one segmentation and no more, however often it was sent.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundImageStorage, generate_uid
from pynetdicom import AE, evt
from pynetdicom.sop_class import SegmentationStorage

from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.environment import collect_environment

RESULTS = Path(__file__).parent / "results"
_SECONDS = 600  # after which a run that does not end has failed

# Imports once and forks: a listener that is killed is followed by another within a fraction of a second.
_LISTEN = """
import os, sys
import highdicom, onnxruntime, pynetdicom
from espmedsam_edge.cli import main
from espmedsam_edge.cli.scale import dicom
from espmedsam_edge.runtime.dicom_network import delivery, service
while True:
    child = os.fork()
    if child == 0:
        try:
            main(sys.argv[1:])
        finally:
            os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
"""


def instance(study: str, number: int, seed: int) -> Dataset:
    """A small ultrasound picture of nobody."""
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID = UltrasoundImageStorage, generate_uid()
    data.StudyInstanceUID, data.SeriesInstanceUID = study, generate_uid(entropy_srcs=[study])
    data.PatientID, data.PatientName, data.Modality, data.InstanceNumber = "0", "Nobody", "US", number
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.Rows, data.Columns, data.PixelRepresentation = 48, 64, 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
    data.PixelData = np.random.default_rng(seed).integers(0, 256, 48 * 64, np.uint8).tobytes()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return data


class Archive:
    """Takes segmentations and counts which picture each is of."""

    def __init__(self) -> None:
        self.segmentations: dict[str, set[str]] = {}  # picture -> its segmentations
        self.arrived = 0
        self._lock = threading.Lock()
        entity = AE(ae_title="ARCHIVE")
        entity.add_supported_context(SegmentationStorage)
        self._entity = entity
        server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, self._take)])
        self.port = server.socket.getsockname()[1]

    def _take(self, event: Any) -> int:
        data = event.dataset
        source = data.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].ReferencedSOPInstanceUID
        with self._lock:
            self.arrived += 1
            self.segmentations.setdefault(str(source), set()).add(str(data.SOPInstanceUID))
        return 0

    def close(self) -> None:
        """Stop."""
        self._entity.shutdown()


def _send(port: int, waiting: queue.Queue[list[Dataset]], answered: Counter[str], tries: Counter[str]) -> None:
    entity = AE(ae_title="SENDER")
    entity.add_requested_context(UltrasoundImageStorage, ExplicitVRLittleEndian)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = entity.connection_timeout = 5
    while True:
        try:
            study = waiting.get_nowait()
        except queue.Empty:
            return
        left = list(study)
        while left:
            association = entity.associate("127.0.0.1", port, ae_title="ESPMEDSAM")
            for data in list(left):
                if not association.is_established:
                    break
                tries[str(data.SOPInstanceUID)] += 1
                try:
                    status = association.send_c_store(data)
                except (RuntimeError, ValueError):
                    break
                if status.get("Status") == 0:
                    answered[str(data.SOPInstanceUID)] += 1
                    left.remove(data)
            if association.is_established:
                association.release()
            if left:
                time.sleep(0.05)


def send_and_kill(
    bundle: Path, folder: Path, *, studies: int, instances: int, associations: int, kills: int, seed: int = 0
) -> dict[str, Any]:
    """One run; what was sent, answered and archived."""
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)
    archive = Archive()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    options = ["--port", str(port), "--queue", str(folder / "queue"), "--send", f"127.0.0.1:{archive.port}:ARCHIVE"]
    command = [sys.executable, "-c", _LISTEN, "dicom", "listen", str(bundle), *options, "--threads", "1"]
    with (folder / "listener.log").open("w") as log:
        listener = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert listener.stdout is not None
    children = [int(listener.stdout.readline())]
    waiting: queue.Queue[list[Dataset]] = queue.Queue()
    pictures = 0
    for number in range(studies):
        uid = generate_uid()
        waiting.put([instance(uid, one + 1, 1000 * number + one) for one in range(instances)])
        pictures += instances
    answered, tries = Counter[str](), Counter[str]()
    senders = [
        threading.Thread(target=_send, args=(port, waiting, answered, tries), daemon=True) for _ in range(associations)
    ]
    generator, begin = random.Random(seed), time.monotonic()
    try:
        for sender in senders:
            sender.start()
        for kill in range(kills):
            share = (kill + generator.random()) / kills
            while len(answered) + archive.arrived < share * 1.8 * pictures and time.monotonic() - begin < _SECONDS:
                time.sleep(0.002)
            time.sleep(generator.random() * 0.05)
            os.kill(children[-1], signal.SIGKILL)
            children.append(int(listener.stdout.readline()))
        for sender in senders:
            sender.join(max(0.0, _SECONDS + begin - time.monotonic()))
        while len(archive.segmentations) < len(answered) and time.monotonic() - begin < _SECONDS:
            time.sleep(0.02)
        time.sleep(1)  # for what would come twice
    finally:
        listener.kill()
        os.kill(children[-1], signal.SIGKILL)
        listener.wait()
        listener.stdout.close()
        archive.close()
    left = [path.name for path in (folder / "queue" / "waiting").iterdir()]
    return {
        "pictures": pictures,
        "associations": associations,
        "kills": len(children) - 1,
        "sent": sum(tries.values()),
        "answered_with_success": len(answered),
        "archived": len(archive.segmentations),
        "answered_and_not_archived": len(set(answered) - set(archive.segmentations)),
        "with_more_than_one_segmentation": sum(len(found) > 1 for found in archive.segmentations.values()),
        "deliveries": archive.arrived,
        "left_in_the_queue": len(left),
        "failed": len(list((folder / "queue" / "failed").iterdir())),
        "seconds": round(time.monotonic() - begin, 1),
    }


def main() -> None:
    """Run it and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--instances", type=int, default=4, help="of each study")
    parser.add_argument("--associations", type=int, default=8)
    parser.add_argument("--kills", type=int, default=10)
    given = parser.parse_args()
    environment = collect_environment()
    with tempfile.TemporaryDirectory() as folder:
        result = send_and_kill(
            given.bundle,
            Path(folder),
            studies=given.studies,
            instances=given.instances,
            associations=given.associations,
            kills=given.kills,
        )
    whole = {"kind": "dicom-kill", "environment": environment, "result": result}
    atomic_write(RESULTS / f"{given.name}.json", json.dumps(whole, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
