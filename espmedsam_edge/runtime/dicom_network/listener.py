"""Associations and C-STORE, by pynetdicom: an instance is answered with success once it is on the disk."""

from __future__ import annotations

import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from espmedsam_edge.errors import UserError
from espmedsam_edge.machine.hosts import is_host
from espmedsam_edge.machine.installation import why_missing
from espmedsam_edge.runtime.dicom.discretion import load_pydicom
from espmedsam_edge.runtime.dicom.reading import is_picture_class
from espmedsam_edge.runtime.dicom_network.inbox import Inbox

log = logging.getLogger(__name__)

# Statuses of C-STORE (PS3.4, B.2.3).
SUCCESS, OUT_OF_RESOURCES, DOES_NOT_MATCH, CANNOT_UNDERSTAND, NOT_SUPPORTED = 0x0000, 0xA700, 0xA900, 0xC000, 0x0122
_ELSEWHERE = "Choose another --port or --host."
_MEBIBYTE = 1 << 20
_SAY_HELLO = 5  # seconds, until a connection has asked for an association
_SAY_ON = 60  # seconds, until what was begun goes on
_LARGEST_PDU = 1 << 20  # bytes; an instance comes in many, of 16 KiB as it is agreed
_BEGINNING = 64 << 10  # bytes of a dataset, in which its identifiers are
_MOST_LINES, _MINUTE = 10, 60.0  # of one kind in the log; seconds
_INSTANCE = 0x00080018  # SOPInstanceUID, the last of them


@dataclass(frozen=True)
class ListenOptions:
    """Who may send what.

    Attributes:
        aet: the title that callers must call, of 1 to 16 characters.
        host: the address of this machine that is listened on.
        port: 0: any that is free.
        allow: the titles of those who may call; none: all.
        associations: how many may be open at once; more are rejected for the time being.
        largest: MiB; an association that sends a larger instance is aborted. It is held in memory until it is written.
        free: MiB of the queue's disk; while less is free, instances are refused.
        remember: days that what was delivered is known, so that it is not done twice.
    """

    aet: str = "ESPMEDSAM"
    host: str = "127.0.0.1"
    port: int = 11112
    allow: Sequence[str] = ()
    associations: int = 8
    largest: int = 512
    free: int = 1024
    remember: int = 365

    def __post_init__(self) -> None:
        for title in (self.aet, *self.allow):
            check_title(title)
        if not is_host(self.host):
            raise UserError(f"cannot listen on '{self.host}': no such address.", _ELSEWHERE)


def check_title(title: str) -> None:
    """See that a text is an application entity's title (PS3.5, value representation AE).

    Raises:
        UserError: it is none.
    """
    if not (
        1 <= len(title.strip()) <= len(title) <= 16 and title.isascii() and title.isprintable() and "\\" not in title
    ):
        raise UserError(f"'{title}' is no AE title.", "1 to 16 letters, digits or signs of ASCII, without a backslash.")


def load_pynetdicom() -> Any:
    """pynetdicom's module, kept from logging: what it tells may quote what peers sent.

    Raises:
        UserError: it is missing.
    """
    if (reason := why_missing("pynetdicom", "dicom-network")) is not None:
        raise UserError(reason)
    load_pydicom()
    import pynetdicom

    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)
    return pynetdicom


def check_address(options: ListenOptions) -> None:
    """See that an address can be listened on, before anything is made for what comes there.

    Raises:
        UserError: it is taken, or not this machine's.
    """
    with _listen_errors(options):
        family, kind, protocol, _, place = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)


@contextmanager
def _listen_errors(options: ListenOptions) -> Iterator[None]:
    try:
        yield
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "no such address"
        raise UserError(f"cannot listen on {options.host}:{options.port}: {reason}.", _ELSEWHERE) from None


def _transfer_syntaxes(pynetdicom: Any) -> list[Any]:
    """What can be read here: plain data, and compressed ones that there is a decoder for."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    found = []
    for name in pynetdicom.ALL_TRANSFER_SYNTAXES:
        syntax = UID(name)
        if syntax.is_deflated:
            continue
        if syntax.is_compressed:
            try:
                if not get_decoder(syntax).is_available:
                    continue
            except NotImplementedError:
                continue
        found.append(syntax)
    return found


@contextmanager
def listening(options: ListenOptions, inbox: Inbox, received: Callable[[], None]) -> Iterator[tuple[str, int]]:
    """Take instances while the block lasts; gives the address that is listened on.

    Args:
        options: who may send what.
        inbox: takes what comes.
        received: called when something has come, from threads of the associations.

    Raises:
        UserError: pynetdicom is missing, or the address is taken or not this machine's.
    """
    pynetdicom = load_pynetdicom()
    evt, tell = pynetdicom.evt, _Sparing()
    entity = pynetdicom.AE(ae_title=options.aet)
    entity.maximum_associations = options.associations
    entity.acse_timeout, entity.network_timeout = _SAY_HELLO, _SAY_ON  # until then a silent one counts as open
    entity.require_called_aet = True
    entity.require_calling_aet = list(options.allow)
    syntaxes = _transfer_syntaxes(pynetdicom)
    for context in pynetdicom.AllStoragePresentationContexts:
        if is_picture_class(context.abstract_syntax):
            entity.add_supported_context(context.abstract_syntax, syntaxes)
    entity.add_supported_context(pynetdicom.sop_class.Verification)

    def store(event: Any) -> int:
        status = _store(event, inbox, tell)
        if status == SUCCESS:
            received()
        return status

    def bounded(event: Any) -> None:
        message = event.assoc.dimse.message
        if message is not None and message.data_set.tell() > options.largest * _MEBIBYTE:
            tell(logging.WARNING, f"%s sends an instance of more than {options.largest} MiB; cut off.", _peer(event))
            threading.Thread(target=event.assoc.abort, daemon=True).start()  # this one's thread is what it waits for

    def said(line: str) -> Callable[[Any], None]:
        return lambda event: tell(logging.WARNING, line, _peer(event))

    handlers = [
        (evt.EVT_CONN_OPEN, _bound_reads),
        (evt.EVT_C_STORE, store),
        (evt.EVT_PDU_RECV, bounded),
        (evt.EVT_REJECTED, said("%s was rejected: see --aet, --allow, --associations.")),
        (evt.EVT_ABORTED, said("%s ended an association without releasing it.")),
    ]
    with _listen_errors(options):
        server = entity.start_server((options.host, options.port), block=False, evt_handlers=handlers)
    try:
        yield server.socket.getsockname()[:2]
    finally:
        entity.shutdown()


def _bound_reads(event: Any) -> None:
    """See that a peer neither fills memory with one message of the protocol nor leaves it half-sent for ever."""
    transport = event.assoc.dul.socket
    transport.socket.settimeout(_SAY_ON)
    read = transport.recv

    def recv(count: int) -> bytearray:
        if count > _LARGEST_PDU:
            raise OSError("a message of the protocol is too large")
        return bytearray(read(count))

    transport.recv = recv


class _Sparing:
    """Logs what peers do: of each kind ten lines a minute, and how many more there were, so that none fills a disk."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: dict[str, float] = {}
        self._lines: dict[str, int] = {}

    def __call__(self, level: int, line: str, *values: object) -> None:
        with self._lock:
            now = time.monotonic()
            more = 0
            if now - self._begun.get(line, -math.inf) > _MINUTE:
                more = self._lines.get(line, 0) - _MOST_LINES
                self._begun[line], self._lines[line] = now, 0
            self._lines[line] += 1
            if self._lines[line] > _MOST_LINES:
                return
        log.log(level, line, *values)
        if more > 0:
            log.log(level, "%d more such lines were left out before this one.", more)


def _store(event: Any, inbox: Inbox, tell: _Sparing) -> int:
    """Keep an instance; the status that answers it."""
    from pynetdicom.dsutils import encode_file_meta

    request = event.request
    if not is_picture_class(request.AffectedSOPClassUID):
        return NOT_SUPPORTED
    try:
        meta = encode_file_meta(event.file_meta)
        content: Any = request.DataSet.getbuffer()
        fault = _mismatch(request, event.context.transfer_syntax)
    except Exception:  # noqa: BLE001 (whatever a peer sent: it is refused, and quoted nowhere)
        return CANNOT_UNDERSTAND
    if fault:
        return DOES_NOT_MATCH
    try:
        inbox.put(str(request.AffectedSOPInstanceUID), (bytes(128), b"DICM", meta, content))
    except (OSError, UserError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        tell(logging.ERROR, "an instance of %s is refused, as it cannot be kept: %s", _peer(event), why)
        return OUT_OF_RESOURCES
    finally:
        content.release()
    return SUCCESS


def _mismatch(request: Any, syntax: str) -> bool:
    """Whether a dataset says it is of another class, or another instance, than its sender did."""
    from io import BytesIO

    from pydicom.filereader import read_dataset
    from pydicom.uid import UID

    named = UID(syntax)
    dataset = read_dataset(
        BytesIO(request.DataSet.getbuffer()[:_BEGINNING]),
        named.is_implicit_VR,
        named.is_little_endian,
        stop_when=lambda tag, vr, length: tag > _INSTANCE,
    )
    return (str(dataset.SOPClassUID), str(dataset.SOPInstanceUID)) != (
        str(request.AffectedSOPClassUID),
        str(request.AffectedSOPInstanceUID),
    )


def _peer(event: Any) -> str:
    """The address of who sent it; its title is its own invention, and is not repeated."""
    return str(event.assoc.requestor.address)
