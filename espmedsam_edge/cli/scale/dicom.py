"""``espmedsam-edge dicom``: pictures from the DICOM network in; segmentations to a folder or an archive out."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import typer

log = logging.getLogger(__name__)

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Take pictures from the DICOM network, segment them, send the segmentations on."""


@app.command()
def listen(
    bundle: str | None = typer.Argument(None, help="[default: the weights that came with the program]"),
    port: int = typer.Option(11112, min=0, max=65535, help="Listened on; 0 for any that is free."),
    host: str = typer.Option("127.0.0.1", help="This machine's address to listen on; 0.0.0.0 for all it has."),
    aet: str = typer.Option("ESPMEDSAM", help="The AE title that callers must call."),
    allow: list[str] | None = typer.Option(None, metavar="AET", help="A caller's title, several times. [default: all]"),
    associations: int = typer.Option(8, min=1, help="Open at once, at most; more are rejected."),
    largest: int = typer.Option(512, min=1, metavar="MIB", help="Instances that are larger are not taken."),
    free: int = typer.Option(
        1024, min=0, metavar="MIB", help="While the queue's disk has less, instances are refused."
    ),
    remember: int = typer.Option(
        365,
        min=1,
        max=36_500,
        metavar="DAYS",
        help="What is done is known that long; sent again later, it is done again.",
    ),
    queue: Path = typer.Option(Path("dicom-queue"), help="A folder for what was received and is not delivered yet."),
    out: Path | None = typer.Option(
        None, help="A folder for the segmentations. [default: dicom-segmentations, unless --send says where]"
    ),
    send: str | None = typer.Option(
        None, metavar="HOST:PORT:AET|URL", help="Send segmentations by C-STORE, or by STOW-RS to https://HOST/PATH."
    ),
    modality: str | None = typer.Option(None, help="What to segment. [default: the bundle's only one]"),
    precision: str | None = typer.Option(None, help="fp32, fp16 or int8. [default: fp32, else what there is]"),
    backend: str = typer.Option("auto", help="What runs the graph; auto takes the best that works here."),
    threshold: float | None = typer.Option(None, help="Probability from which a pixel counts. [default: the bundle's]"),
    threads: int | None = typer.Option(None, min=1, help="CPU threads. [default: the cores there are]"),
) -> None:
    """Take C-STORE, answer once an instance is on the disk, segment it and deliver its DICOM-SEG.

    Ctrl-C or SIGTERM ends it; what is received and not delivered is done when it is started again.
    """
    from espmedsam_edge.destinations import Destination, check_destinations, claimed
    from espmedsam_edge.errors import UserError
    from espmedsam_edge.marks import SEGMENTATION
    from espmedsam_edge.runtime.bundle_choice import choose_bundle
    from espmedsam_edge.runtime.dicom_network.delivery import Delivery, Folder, parse_send
    from espmedsam_edge.runtime.dicom_network.listener import ListenOptions, load_pynetdicom
    from espmedsam_edge.runtime.dicom_network.service import serve
    from espmedsam_edge.runtime.segmenter import Segmenter

    options = ListenOptions(aet, host, port, allow or (), associations, largest, free, remember)
    load_pynetdicom()
    if send is not None and out is not None:
        raise UserError("segmentations go to one place.", "Leave --out or --send out.")
    folder = out or Path("dicom-segmentations")
    places = [queue] if send is not None else [folder, queue]
    if send is None and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(queue)):
        raise UserError(f"{folder} lies in the queue, whose files go.", "Choose another --out, or another --queue.")
    check_destinations([Destination(place / "any.dcm", SEGMENTATION) for place in places])
    delivery: Delivery = Folder(folder) if send is None else parse_send(send, aet)
    chosen = choose_bundle(bundle, modality, precision)
    if chosen.modality is None:
        raise UserError("the modality of what comes cannot be told.", f"Name it: --modality {'|'.join(chosen.among)}")

    def ready(address: str, number: int) -> None:
        log.info("Listening on %s:%d as %s; segmentations go to %s.", address, number, aet, delivery)

    with (
        claimed(places),
        Segmenter.load(
            chosen.bundle_of(chosen.modality), chosen.modality, precision, backend, threshold, threads
        ) as segmenter,
    ):
        segmenter.choice.tell()
        try:
            serve(options, queue, delivery, segmenter, threading.Event(), ready)
        except KeyboardInterrupt:
            log.info("Ended; what is not delivered is in %s.", queue)
