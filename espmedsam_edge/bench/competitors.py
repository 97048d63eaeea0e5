"""What a bundle can be measured against: another backend or precision, another bundle, any ONNX file, PyTorch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from espmedsam_edge.bench.measure import Contender
from espmedsam_edge.bench.torch_competitor import TorchBackend
from espmedsam_edge.bundle import PRECISIONS, Bundle, Graph
from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.files import read_regular, sha256_file
from espmedsam_edge.imaging.geometry import Tensor
from espmedsam_edge.imaging.overlay import OverlayStyle, color_of
from espmedsam_edge.machine.cores import usable_cores
from espmedsam_edge.runtime.backends.backend import BACKENDS, Backend, Choice
from espmedsam_edge.runtime.onnx_session import open_session
from espmedsam_edge.runtime.segmenter import Segmenter
from espmedsam_edge.runtime.tiling import OFF
from espmedsam_edge.shipped.bundles import is_checkpoint

TORCH: tuple[str, ...] = ("torch", "torch-eager", "torch-compile")
"""The unfused network in PyTorch; "torch" is "torch-eager"."""


class OnnxFileBackend:
    """An ONNX file from anywhere with the bundle's input and logits, whatever their names, in ONNX Runtime's CPU."""

    name = "onnxruntime-cpu"

    def __init__(self, content: bytes, graph: Graph, threads: int, file: Path) -> None:
        session = open_session(content, threads, where=file)
        (image, *others), outputs = session.get_inputs(), session.get_outputs()
        expected = list(graph.input_shape)
        if others or image.type != "tensor(float)" or not _fits(image.shape, expected):
            raise UserError(
                f"{file} takes {[(node.name, node.type, node.shape) for node in (image, *others)]}, "
                f"not one float tensor of {expected}.",
                "Compare with a graph of the same image size and batch.",
            )
        logits = [node for node in outputs if _fits(node.shape, list(graph.output_shape))]
        if not logits:
            raise UserError(
                f"{file} gives {[(node.name, node.shape) for node in outputs]}, "
                f"none of them logits of {list(graph.output_shape)}.",
                "Compare with a graph of the same image size and batch.",
            )
        self._session: Any = session
        self._input, self._output = image.name, logits[0].name
        self.graph = graph
        self.device = f"CPU, {threads} thread{'s' if threads > 1 else ''}"

    def run(self, image: Tensor) -> Tensor:
        return np.asarray(self._session.run([self._output], {self._input: image})[0], np.float32)

    def close(self) -> None:
        self._session = None


def _fits(shape: list[Any], expected: list[int]) -> bool:
    """Whether a graph's shape, with names or None for dynamic sizes, can be the expected one."""
    return len(shape) == len(expected) and all(
        not isinstance(size, int) or size == wanted for size, wanted in zip(shape, expected, strict=True)
    )


def load_first(
    bundle: Bundle,
    modality: str | None,
    precision: str | None,
    backend: str,
    threads: int | None,
    tile: str | int = OFF,
) -> Contender:
    """The bundle's own graph, drawing overlays as ``infer`` does: the one that the others are compared with."""
    style = OverlayStyle(color_of(bundle.graph(modality, precision).modality))
    contender = Contender.load(
        "", lambda: Segmenter.load(bundle, modality, precision, backend, threads=threads, overlay=style, tile=tile)
    )
    graph = contender.segmenter.graph
    contender.name = f"{contender.segmenter.choice.backend.name} {graph.precision}"
    contender.graph_sha256 = graph.sha256
    return contender


def load_competitor(what: str, first: Segmenter, checkpoint: Path | None, threads: int | None) -> Contender:
    """A competitor by name.

    Args:
        what: a backend's name, a precision, a name of ``TORCH`` (needs ``checkpoint``), an ONNX file or another
            bundle's folder. PyTorch runs on the GPU where ``first`` does.
        first: what it is compared with; gives modality, shapes, threshold, normalisation and the overlay to draw.
        checkpoint: the safetensors file the bundle was exported from.
        threads: CPU threads; None: as ``Segmenter.load``.

    Raises:
        BackendUnavailable: this machine cannot run it.
        UserError: none of these, or it is not what it should be; says why.
    """
    bundle, graph, cores = first.bundle, first.graph, threads or usable_cores()
    style, tile = first.frame_options.overlay, first.tiler.asked
    backend = first.choice.backend.name

    def loaded(name: str, bundle: Bundle, graph: Graph, backend: str) -> Contender:
        def load() -> Segmenter:
            threshold = first.threshold
            return Segmenter.load(
                bundle, graph.modality, graph.precision, backend, threshold, threads, style, tile=tile
            )

        return Contender.load(name, load, graph.sha256)

    if what.partition(":")[0] in BACKENDS:
        return loaded(f"{what} {graph.precision}", bundle, graph, what)
    if what in PRECISIONS:
        return loaded(f"{backend} {what}", bundle, bundle.graph(graph.modality, what), backend)
    if what in TORCH:
        return _torch(what, first, checkpoint, cores)
    path = Path(what)
    if path.suffix == ".onnx":
        if not path.is_file():
            raise UserError(f"no file {path} to compare with.", "Name an ONNX file that exists.")
        content = read_regular(path)
        digest = hashlib.sha256(content).hexdigest()
        return _wrapped(path.name, first, lambda: OnnxFileBackend(content, graph, cores, path), digest)
    if path.is_dir():
        other = Bundle.open(path)
        return loaded(path.name, other, other.graph(graph.modality, graph.precision), backend)
    known = [*BACKENDS, *PRECISIONS, *TORCH]
    raise UserError(
        f"'{what}' is nothing to compare with.",
        f"Give a bundle's folder, an .onnx file or a name. {nearest(what, known)}",
    )


def _torch(what: str, first: Segmenter, checkpoint: Path | None, cores: int) -> Contender:
    bundle = first.bundle
    if checkpoint is None:
        raise UserError(f"--compare {what} needs the weights.", "Name them: --checkpoint WEIGHTS.safetensors")
    digest = sha256_file(checkpoint) if checkpoint.is_file() else ""
    if digest and not is_checkpoint(digest, bundle.manifest.weights.checkpoint_sha256):
        raise UserError(
            f"{checkpoint} is not the checkpoint that {bundle.path} was exported from (SHA-256 differs).",
            "Export the bundle from it again, or name the right file.",
        )
    compiled, on_gpu = what == "torch-compile", runs_on_gpu(first)

    def load() -> Backend:
        return TorchBackend(checkpoint, first.graph, cores, digest, compiled=compiled, on_gpu=on_gpu)

    if not compiled:
        return _wrapped("torch eager", first, load, digest)
    return _wrapped(f"torch compile {'fp16' if on_gpu else 'fp32'}", first, load, digest)


def runs_on_gpu(segmenter: Segmenter) -> bool:
    """Whether a segmenter's graph runs on a GPU."""
    return segmenter.frame_backend is not None or segmenter.choice.backend.device == "CUDA"


def _wrapped(name: str, first: Segmenter, load: Callable[[], Backend], digest: str) -> Contender:
    style, tile = first.frame_options.overlay, first.tiler.asked
    return Contender.load(
        name, lambda: Segmenter(first.bundle, Choice(load()), first.threshold, style, tile=tile), digest
    )
