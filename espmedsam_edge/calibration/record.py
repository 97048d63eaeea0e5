"""``calibration.json``: what was measured for each modality, reused while graph and images are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from espmedsam_edge.bundle import CALIBRATION, FormatVersion, Name, Sha256
from espmedsam_edge.calibration.histogram import METHODS, Method
from espmedsam_edge.calibration.network import Network
from espmedsam_edge.calibration.plan import quantised_tensors
from espmedsam_edge.calibration.ranges import Ranges, measured_tensors
from espmedsam_edge.files import read_regular

_MAX_BYTES = 64 << 20
_Magnitude = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Threshold = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Measured(BaseModel, extra="forbid", frozen=True):
    """One modality's measurement.

    Attributes:
        graph_sha256: of the FP32 graph that was measured.
        images: how many images.
        images_sha256: over their content; see ``CalibrationImages.content_hash``.
        largest: the largest magnitude of each tensor.
        thresholds: for each tensor to be quantised, where each method clips.
    """

    graph_sha256: Sha256
    images: Annotated[int, Field(ge=1)]
    images_sha256: Sha256
    largest: dict[str, _Magnitude]
    thresholds: dict[str, dict[Method, _Threshold]]

    @property
    def ranges(self) -> Ranges:
        """As measured."""
        return Ranges(dict(self.largest), {name: dict(values) for name, values in self.thresholds.items()})


class CalibrationRecord(BaseModel, extra="forbid", frozen=True):
    """The contents of ``calibration.json``."""

    schema_version: FormatVersion = 1
    modalities: dict[Name, Measured] = {}

    def with_modality(self, modality: str, measured: Measured) -> CalibrationRecord:
        """A record with one modality's measurement added or replaced."""
        return CalibrationRecord(modalities={**self.modalities, modality: measured})

    def to_json(self) -> str:
        """Indented, for people too."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


def read_record(bundle: Path) -> tuple[CalibrationRecord, str | None]:
    """A bundle's record (an empty one where there is none), and why it could not be used, or None."""
    file = bundle / CALIBRATION
    if not file.is_file():
        return CalibrationRecord(), None
    try:
        return CalibrationRecord.model_validate_json(read_regular(file, _MAX_BYTES)), None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        return CalibrationRecord(), f"{CALIBRATION} is not valid ({where}: {first['msg']})"
    except OSError as error:
        return CalibrationRecord(), f"{CALIBRATION} cannot be read ({error.strerror})"


def why_stale(measured: Measured, network: Network, graph_sha256: str, images: int, images_sha256: str) -> str | None:
    """Why a measurement must not be reused, or None."""
    if measured.graph_sha256 != graph_sha256:
        return "the graph has changed"
    if measured.images_sha256 != images_sha256:
        return f"the images have changed (measured on {measured.images}, now {images})"
    lacking = [name for name in measured_tensors(network) if name not in measured.largest]
    lacking += [name for name in quantised_tensors(network) if len(measured.thresholds.get(name, ())) < len(METHODS)]
    if lacking:
        return f"it lacks numbers of {len(lacking)} tensors, the first '{lacking[0]}'"
    return None
