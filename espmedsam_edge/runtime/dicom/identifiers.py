"""DICOM's identifiers of a frame's study, series and instance, plain or as hashes: only where they are asked for."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.machine.installation import install_command
from espmedsam_edge.runtime.dicom.discretion import discreet, read_dataset
from espmedsam_edge.runtime.dicom.reading import is_dicom

KEY_VARIABLE = "ESPMEDSAM_UID_KEY"
FORMS = ("hashed", "plain")
_TAGS = {"study_uid": "StudyInstanceUID", "series_uid": "SeriesInstanceUID", "instance_uid": "SOPInstanceUID"}

_UID = re.compile(r"[0-9.]{1,64}")
"""What an identifier is made of; what else stands in its place may be anybody's name, and is left out."""


class DicomIdentifiers:
    """Reads the three identifiers of a DICOM file; nothing for any other file.

    ``hashed`` gives ``sha256:`` and 32 hexadecimal digits: equal for equal identifiers, so that lines of one study can
    be told to belong together, and not to be turned back. Who holds an identifier can still recognise its hash, unless
    the environment variable ``ESPMEDSAM_UID_KEY`` holds a secret, with which it is then keyed (HMAC).

    Raises:
        UserError: another form, or pydicom is missing.
    """

    def __init__(self, form: str) -> None:
        if form not in FORMS:
            raise UserError(f"identifiers cannot be written '{form}'.", nearest(form, FORMS))
        if find_spec("pydicom") is None:
            raise UserError(
                "pydicom, which reads identifiers, is not installed.", f"Install it: {install_command('dicom')}"
            )
        self._plain = form == "plain"
        self._key = os.environ.get(KEY_VARIABLE, "").encode()
        self._read = lru_cache(maxsize=64)(_read_identifiers)

    def __call__(self, path: Path) -> Mapping[str, str]:
        """``study_uid``, ``series_uid`` and ``instance_uid`` of a DICOM file, as far as it has such."""
        found = self._read(path)
        return found if self._plain else {name: self._hashed(uid) for name, uid in found.items()}

    def _hashed(self, uid: str) -> str:
        digest = hmac.digest(self._key, uid.encode(), "sha256") if self._key else hashlib.sha256(uid.encode()).digest()
        return f"sha256:{digest.hex()[:32]}"


def _read_identifiers(path: Path) -> dict[str, str]:
    if not is_dicom(path):
        return {}

    def told(fault: str) -> UserError:
        return UserError(
            f"cannot read the identifiers of {path}{fault and f': {fault}'}.", "Copy it again.", exit_code=1
        )

    with discreet(told) as dicom:
        dicom.dataset = header = read_dataset(path, _TAGS.values())
        found = {name: str(header[tag].value) for name, tag in _TAGS.items() if header.get(tag)}
        return {name: uid for name, uid in found.items() if _UID.fullmatch(uid)}
