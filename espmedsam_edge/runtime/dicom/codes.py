"""What a modality's mask shows, in the codes that DICOM prescribes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from espmedsam_edge.modalities import target_of

Code = tuple[str, str, str]
"""Value, coding scheme, meaning."""

_ANATOMY: Code = ("91723000", "SCT", "Anatomical Structure")
_ABNORMAL: Code = ("49755003", "SCT", "Morphologically Abnormal Structure")
_TISSUE: Code = ("85756007", "SCT", "Tissue")

OWN_SCHEME = "99ESPMEDSAM"
"""The coding scheme of targets that a user added: a private one."""


@dataclass(frozen=True)
class SegmentCodes:
    """The codes of a segment: DICOM's property category, property type and, where it is known, anatomic region."""

    category: Code
    kind: Code
    region: Code | None = None


_KNOWN: dict[str, SegmentCodes] = {
    "dermoscopy": SegmentCodes(_ABNORMAL, ("95324001", "SCT", "Skin lesion"), ("39937001", "SCT", "Skin")),
    "xray": SegmentCodes(_ANATOMY, ("39607008", "SCT", "Lung")),
    "ultrasound": SegmentCodes(_ABNORMAL, ("52988006", "SCT", "Lesion"), ("76752008", "SCT", "Breast")),
    "fundus": SegmentCodes(_ANATOMY, ("59820001", "SCT", "Blood Vessel"), ("5665001", "SCT", "Retina")),
    "microscopy": SegmentCodes(_ANATOMY, ("84640000", "SCT", "Nucleus")),
    "colonoscopy": SegmentCodes(_ABNORMAL, ("41329004", "SCT", "Polyp"), ("71854001", "SCT", "Colon")),
}
_PUBLISHED_TARGETS: dict[str, str] = {name: target_of(name) for name in _KNOWN}


def codes_of(modality: str) -> SegmentCodes:
    """The codes of a modality's target; private ones for a target that is not the published one."""
    target = target_of(modality)
    if _PUBLISHED_TARGETS.get(modality) == target:
        return _KNOWN[modality]
    value = re.sub(r"[^A-Z0-9]+", "_", target.upper()).strip("_")[:16] or "TARGET"
    return SegmentCodes(_TISSUE, (value, OWN_SCHEME, target[:64]))
