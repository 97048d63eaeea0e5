"""Where segmentations go: a folder, an archive by C-STORE or by STOW-RS; the same instance twice is one there."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from espmedsam_edge.closing import Closing
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_path
from espmedsam_edge.machine.hosts import is_host
from espmedsam_edge.machine.installation import why_missing
from espmedsam_edge.runtime.dicom.discretion import load_pydicom, read_whole
from espmedsam_edge.runtime.dicom_network.listener import OUT_OF_RESOURCES, check_title, load_pynetdicom
from espmedsam_edge.runtime.sources.uris import check_login, without_secrets

TOKEN_VARIABLE = "ESPMEDSAM_DICOMWEB_TOKEN"  # noqa: S105  # nosec B105 (the variable's name)
_SECONDS = 30
_SEND = "HOST:PORT:AET (C-STORE) or https://HOST/PATH (STOW-RS)."


class NotDeliveredError(Exception):
    """It did not arrive; says why, and may work later.

    Attributes:
        nothing_arrives: whether others would not arrive either.
    """

    def __init__(self, why: str, *, nothing_arrives: bool = True) -> None:
        super().__init__(why)
        self.nothing_arrives = nothing_arrives


class Delivery(Protocol):
    """Takes segmentations to where they go."""

    def __str__(self) -> str:
        """Where, for messages."""

    def deliver(self, file: Path) -> None:
        """Take one there; it is kept there when this returns.

        Raises:
            NotDeliveredError: it could not be.
        """

    def close(self) -> None:
        """Let go of a connection; the next delivery opens another."""


class Folder(Closing):
    """A folder of files.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def deliver(self, file: Path) -> None:
        """See ``Delivery``."""
        try:
            with atomic_path(self._folder / file.name) as temporary:
                shutil.copyfile(file, temporary)
        except (OSError, UserError) as error:
            raise NotDeliveredError(str(error)) from error


class Archive(Closing):
    """An application entity that takes C-STORE.

    Args:
        host, port: its address.
        aet: its title.
        own: the title that it is called by.
    """

    def __init__(self, host: str, port: int, aet: str, own: str) -> None:
        self._address, self._aet = (host, port), aet
        self._pynetdicom = load_pynetdicom()
        self._entity = self._pynetdicom.AE(ae_title=own)
        for syntax in ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2"):  # explicit, as they are written, and implicit
            self._entity.add_requested_context(self._pynetdicom.sop_class.SegmentationStorage, syntax)
        for name in ("acse_timeout", "dimse_timeout", "network_timeout", "connection_timeout"):
            setattr(self._entity, name, _SECONDS)
        self._association: Any = None

    def __str__(self) -> str:
        return f"{self._address[0]}:{self._address[1]}"

    def deliver(self, file: Path) -> None:
        """See ``Delivery``; the association stays open for the next."""
        if self._association is None or not self._association.is_established:
            try:
                self._association = self._entity.associate(*self._address, ae_title=self._aet)
            except OSError as error:  # no address is known for the name now, or too many files are open
                raise NotDeliveredError("there is no connection") from error
        if not self._association.is_established:
            refused = self._association.is_rejected
            raise NotDeliveredError("it rejected the association" if refused else "there is no connection")
        if not self._association.accepted_contexts:
            self.close()
            raise NotDeliveredError("it takes no segmentations")
        try:
            status = self._association.send_c_store(file)
        except (RuntimeError, ValueError, OSError):  # ended meanwhile; what it says may quote
            raise NotDeliveredError("the association ended") from None
        code = status.get("Status")
        if code is None:
            raise NotDeliveredError("it did not answer")
        if code != 0 and code >> 12 != 0xB:  # warnings: it is kept
            raise NotDeliveredError(f"it answered {code:04X}", nothing_arrives=code == OUT_OF_RESOURCES)

    def close(self) -> None:
        """Release the association."""
        if self._association is not None and self._association.is_established:
            self._association.release()
        self._association = None


class DicomWeb(Closing):
    """A service that takes STOW-RS; ``ESPMEDSAM_DICOMWEB_TOKEN`` is sent as its bearer token.

    Args:
        url: of the service, without ``/studies``.
    """

    def __init__(self, url: str) -> None:
        if (reason := why_missing("dicomweb_client", "dicom-network")) is not None:
            raise UserError(reason)
        load_pydicom()
        from dicomweb_client import DICOMwebClient

        token = os.environ.get(TOKEN_VARIABLE)
        self._url = url.rstrip("/").removesuffix("/studies")
        self._client = DICOMwebClient(self._url, headers={"Authorization": f"Bearer {token}"} if token else None)
        self._client.set_http_retry_params(retry=False)

    def __str__(self) -> str:
        parts = urlsplit(self._url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{without_secrets(parts.path)}"

    def deliver(self, file: Path) -> None:
        """See ``Delivery``."""
        try:
            answer = self._client.store_instances([read_whole(file)])
            refused = answer.get("FailedSOPSequence")
        except Exception as error:  # noqa: BLE001 (of HTTP, of sockets and of answers that are none; they may quote)
            code = getattr(getattr(error, "response", None), "status_code", None)
            why = "there is no connection" if code is None else f"it answered {code}"
            raise NotDeliveredError(why, nothing_arrives=code not in (400, 409)) from None
        if refused:
            raise NotDeliveredError(f"it answered {_reason(refused[0]):04X}", nothing_arrives=False)


def _reason(item: Any) -> int:
    try:
        return int(item.FailureReason)
    except (AttributeError, TypeError, ValueError):
        return 0


def parse_send(text: str, own: str) -> Delivery:
    """``HOST:PORT:AET`` for C-STORE, ``https://...`` for STOW-RS.

    Args:
        text: as the user wrote it.
        own: the title that an archive is called by.

    Raises:
        UserError: it is neither, or a package is missing.
    """
    if re.match("https?://", text):
        check_login(text)
        with suppress(ValueError):
            if (host := urlsplit(text).hostname) and is_host(host) and text.isprintable() and " " not in text:
                return DicomWeb(text)
        raise UserError("cannot send to this address.", _SEND)
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(\d{1,5}):(.+)", text)
    if match is None or not 0 < int(match[2]) < 1 << 16 or not is_host(match[1]):
        shown = "this address" if "@" in text else text
        raise UserError(f"cannot send to {shown}.", _SEND)
    check_title(match[3])
    return Archive(match[1].strip("[]"), int(match[2]), match[3], own)
