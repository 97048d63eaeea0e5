"""What can be evaluated: a bundle on any backend, without torch; a checkpoint or a teacher in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from espmedsam_edge.bundle import MANIFEST, Bundle, Normalization
from espmedsam_edge.errors import UserError
from espmedsam_edge.evaluation.paper import STUDENT, TEACHER
from espmedsam_edge.files import open_regular, read_json
from espmedsam_edge.imaging.geometry import Frame, Tensor, preprocess
from espmedsam_edge.imaging.views import VIEWS, average
from espmedsam_edge.modalities import views_of
from espmedsam_edge.runtime.tiling import AUTO

if TYPE_CHECKING:
    from espmedsam_edge.model.esp_medsam import EspMedSam
    from espmedsam_edge.model.teacher import EspMedSamTeacher


Predict = Callable[[Frame], Tensor]
"""Low-resolution logits, (h, w) float32, of a frame (H, W, 3) uint8 BGR."""


class Candidate(Protocol):
    """A model under evaluation."""

    @property
    def name(self) -> str:
        """Its path, for reports."""

    @property
    def method(self) -> str:
        """The paper's name for this kind of network."""

    @property
    def untrained(self) -> bool:
        """Its weights are random, so its scores mean nothing."""

    @property
    def threshold(self) -> float:
        """The probability from which a pixel is foreground."""

    @property
    def modalities(self) -> list[str]:
        """What it can segment."""

    def check(self, modality: str) -> None:
        """Raise UserError if what was asked for is not there for one of ``modalities``."""

    def predictor(self, modality: str) -> AbstractContextManager[Predict]:
        """Load one modality; freed when the block ends."""


@dataclass
class BundleCandidate:
    """A bundle's graphs of one precision on one backend."""

    bundle: Bundle
    precision: str | None = None
    backend: str = "auto"
    threads: int | None = None
    tile: str | int = AUTO
    method: str = STUDENT
    tta: bool = False

    @property
    def name(self) -> str:
        """The bundle's path."""
        return str(self.bundle.path)

    @property
    def untrained(self) -> bool:
        """Whether the weights were never trained."""
        return self.bundle.manifest.weights.origin == "random"

    @property
    def threshold(self) -> float:
        """The manifest's."""
        return self.bundle.manifest.threshold

    @property
    def modalities(self) -> list[str]:
        """The modalities with a graph."""
        return self.bundle.manifest.modalities

    def check(self, modality: str) -> None:
        """Raise UserError if the modality has no graph of the precision."""
        self.bundle.graph(modality, self.precision)

    @contextmanager
    def predictor(self, modality: str) -> Iterator[Predict]:
        """Load the modality's graph."""
        from espmedsam_edge.runtime.segmenter import Segmenter

        with Segmenter.load(
            self.bundle, modality, self.precision, self.backend, threads=self.threads, tta=self.tta, tile=self.tile
        ) as segmenter:
            segmenter.choice.tell()
            yield lambda frame: segmenter.segment(frame).logits


@dataclass
class TorchCandidate:
    """The student of a checkpoint, or a teacher, in PyTorch."""

    name: str
    network: EspMedSam | EspMedSamTeacher
    size_of: Callable[[str], int]  # modality -> side of the input in pixels
    normalization: Normalization
    method: str
    untrained: bool
    device: str = "cpu"
    threshold: float = 0.5
    tta: bool = False

    @property
    def modalities(self) -> list[str]:
        """What it was trained for."""
        return list(self.network.modalities)

    def check(self, modality: str) -> None:
        """A network has all its modalities in the one precision."""

    @contextmanager
    def predictor(self, modality: str) -> Iterator[Predict]:
        """The network is loaded already; this picks the modality."""
        import torch

        def run(images: Tensor) -> Tensor:
            with torch.inference_mode():
                output = self.network(torch.from_numpy(images).to(self.device), modality)
            return np.asarray(output.low_res_logits.float().cpu().numpy())

        def predict(frame: Frame) -> Tensor:
            image = preprocess(frame, self.size_of(modality), self.normalization)
            views = VIEWS[views_of(modality) if self.tta else "none"]
            return np.asarray(average(run, image, views, len(views))[0, 0], np.float32)

        yield predict


def open_candidate(
    path: Path,
    *,
    precision: str | None = None,
    backend: str = "auto",
    threads: int | None = None,
    sam: Path | None = None,
    device: str = "auto",
    tta: bool = False,
    tile: str | int = AUTO,
) -> Candidate:
    """Open whatever a path holds: a bundle's folder, a checkpoint or a teacher.

    Args:
        path: the folder, or the ``.safetensors`` file.
        precision, backend, threads, tile: of a bundle, as ``Segmenter.load`` takes them.
        sam: SAM's checkpoint, for a teacher that was saved without it.
        device: of a checkpoint: "cpu", "cuda" or "auto".
        tta: average over mirrored and turned copies, those that each modality allows.

    Raises:
        UserError: nothing of the kind is there, or an option does not go with what is.
    """
    if path.is_dir() or (not path.exists() and path.suffix != ".safetensors"):
        if path.is_dir() and not (path / MANIFEST).is_file():
            raise UserError(f"{path} is no bundle.", "Name a bundle or a .safetensors checkpoint before the datasets.")
        return BundleCandidate(Bundle.open(path), precision, backend, threads, tile, tta=tta)
    if tile != AUTO:
        raise UserError(
            f"{path} is a checkpoint: its images are taken whole.",
            f"Tiles are a bundle's. Export it: espmedsam-edge export {path}",
        )
    if precision not in (None, "fp32") or backend not in ("auto", "torch"):
        raise UserError(
            f"{path} is a checkpoint: PyTorch runs it in float32.",
            f"Export it, then evaluate the bundle: espmedsam-edge export {path}",
        )
    return _open_checkpoint(path, sam, device, tta)


def _open_checkpoint(path: Path, sam: Path | None, device: str, tta: bool) -> TorchCandidate:
    import torch

    from espmedsam_edge.model.checkpoint import load_checkpoint
    from espmedsam_edge.model.teacher_checkpoint import load_teacher

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("PyTorch sees no CUDA GPU here.", "Leave --device out.")
    if _is_teacher(path):
        teacher, about = load_teacher(path, sam)
        return TorchCandidate(
            str(path), teacher.to(device), about.heads.size_of, Normalization(), TEACHER, False, device, tta=tta
        )
    model, info = load_checkpoint(path)
    return TorchCandidate(
        str(path),
        model.to(device),
        info.config.size_of,
        info.normalization,
        STUDENT,
        info.origin == "random",
        device,
        tta=tta,
    )


def _is_teacher(path: Path) -> bool:
    """Whether a safetensors file's header marks it as a teacher; False for what has no such header."""
    try:
        with open_regular(path) as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = read_json(stream.read(length)) if length < 100_000_000 else {}
    except (OSError, ValueError):
        return False
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return isinstance(metadata, dict) and "espmedsam-teacher" in metadata
