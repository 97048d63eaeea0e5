"""What Triton's Python backend runs: a modality that takes pictures, and a network that takes tensors.

Imported by the ``model.py`` that ``deploy triton`` writes. Triton calls ``initialize`` once, ``execute`` with requests
that it has gathered, and ``finalize`` at the end; ``triton_python_backend_utils`` is the server's own module.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.decode import decode_image, max_pixels
from espmedsam_edge.imaging.decoder_process import PictureDecoder, is_cheap
from espmedsam_edge.imaging.encode import encode_image
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.header_errors import HeaderError
from espmedsam_edge.imaging.headers import read_header
from espmedsam_edge.runtime.backends.backend import load_backend
from espmedsam_edge.runtime.segmentation import NotFinite, Segmentation
from espmedsam_edge.runtime.segmenter import Segmenter

MAX_BYTES, MAX_PIXELS = 32 << 20, 40_000_000
"""Of a picture."""


class _Model(ABC):
    """What both have: Triton's module, and the bundle beside ``model.py``."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load; an error here is told by the server, which does not serve the model then."""
        self.triton: Any = import_module("triton_python_backend_utils")
        parameters = json.loads(args["model_config"]).get("parameters", {})
        threads = parameters.get("threads", {}).get("string_value")
        place = Path(args["model_repository"]) / args["model_version"] / "bundle"
        self.load(Bundle.open(place), None if threads is None else int(threads))

    @abstractmethod
    def load(self, bundle: Bundle, threads: int | None) -> None:
        """Load the bundle's one graph."""

    def refused(self, error: UserError) -> Any:
        """The answer to a request that cannot be done."""
        code = self.triton.TritonError.INVALID_ARG if error.exit_code == 2 else self.triton.TritonError.INTERNAL
        return self.triton.InferenceResponse(error=self.triton.TritonError(str(error), code))

    def tensor(self, request: Any, name: str) -> NDArray[Any] | None:
        """A request's tensor; None: it has none of that name."""
        tensor = self.triton.get_input_tensor_by_name(request, name)
        return None if tensor is None else np.asarray(tensor.as_numpy())


class PictureModel(_Model):
    """A picture a request in; mask, area, boxes out."""

    def load(self, bundle: Bundle, threads: int | None) -> None:
        """See ``_Model.load``."""
        self._segmenter = Segmenter.load(bundle, threads=threads)
        self._decoder = PictureDecoder()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests, those of one batch in one run of the graph; each failure is its own request's."""
        asked: list[tuple[Frame, float | None] | UserError] = []
        for request in requests:
            try:
                asked.append((self._frame(request), self._threshold(request)))
            except UserError as error:
                asked.append(error)
        results = iter(self._segmented([one[0] for one in asked if not isinstance(one, UserError)]))
        answers = []
        for request, one in zip(requests, asked, strict=True):
            found = one if isinstance(one, UserError) else next(results)
            if isinstance(found, UserError):
                answers.append(self.refused(found))
            else:
                threshold = None if isinstance(one, UserError) else one[1]
                answers.append(self._answer(request, found if threshold is None else found.at(threshold)))
        return answers

    def _segmented(self, frames: Sequence[Frame]) -> Sequence[Segmentation | UserError]:
        if not frames:
            return []
        try:
            return self._segmenter.segment_batch(frames)
        except NotFinite as error:
            return error.outcomes or [error] * len(frames)
        except UserError as error:
            return [error] * len(frames)

    def _frame(self, request: Any) -> Frame:
        encoded, frame = self.tensor(request, "image"), self.tensor(request, "frame_bgr")
        if (encoded is None) == (frame is None):
            raise UserError("a request has one picture: image, or frame_bgr.", "Give one of the two.")
        given = encoded if frame is None else frame
        assert given is not None
        if given.shape[0] != 1 or not given.size:
            raise UserError(
                f"a request has one picture, not {given.shape[0]}.", "The server makes batches of requests."
            )
        if frame is None:
            return self._decoded(bytes(given.reshape(-1)[0]))
        if given.shape[1] * given.shape[2] > min(MAX_PIXELS, max_pixels()):
            raise UserError(f"the frame is {given.shape[2]}x{given.shape[1]} pixels, too many.", "Shrink it.")
        return np.ascontiguousarray(given[0])

    def _decoded(self, data: bytes) -> Frame:
        if not data or len(data) > MAX_BYTES:
            raise UserError(f"the image has {len(data)} bytes; 1 to {MAX_BYTES} are taken.", "Send an image file.")
        try:
            header = read_header(data)
        except HeaderError as error:
            raise UserError(f"cannot read the image: {error}.", "Send a JPEG, PNG, TIFF, BMP or WebP file.") from error
        pixels = header.width * header.height
        if pixels > min(MAX_PIXELS, max_pixels()):
            raise UserError(f"the image is {header.width}x{header.height} pixels, too many.", "Shrink it.")
        return decode_image(data) if is_cheap(header.format, pixels, len(data)) else self._decoder.decode(data)

    def _threshold(self, request: Any) -> float | None:
        given = self.tensor(request, "threshold")
        if given is None:
            return None
        threshold = float(given.reshape(-1)[0]) if given.size else np.nan
        if not 0 < threshold < 1:
            raise UserError("the threshold is not a number between 0 and 1.", "0.5 is usual.")
        return threshold

    def _answer(self, request: Any, result: Segmentation) -> Any:
        wanted = set(request.requested_output_names())
        made: dict[str, Callable[[], NDArray[Any]]] = {
            "mask": lambda: result.mask[None],
            "mask_png": lambda: _text(encode_image(result.mask, ".png")),
            "area": lambda: np.array([[result.area]], np.int64),
            "boxes": lambda: boxes_of(result)[None],
            "json": lambda: _text(json.dumps(result.to_dict(), separators=(",", ":")).encode()),
        }
        tensors = [self.triton.Tensor(name, make()) for name, make in made.items() if name in wanted]
        return self.triton.InferenceResponse(output_tensors=tensors)

    def finalize(self) -> None:
        """Free what is held."""
        self._segmenter.close()
        self._decoder.close()


def boxes_of(result: Segmentation) -> NDArray[np.int32]:
    """(N, 4) int32: x, y, width and height in pixels of each connected part of the mask, the largest first."""
    count, _, stats, _ = cv2.connectedComponentsWithStats(result.mask, connectivity=8)
    parts = np.asarray(stats[1:count], np.int32)
    return np.ascontiguousarray(parts[np.argsort(-parts[:, cv2.CC_STAT_AREA], kind="stable"), :4])


def _text(content: bytes) -> NDArray[Any]:
    return np.array([[content]], np.object_)


class NetworkModel(_Model):
    """Normalised planes in, logits out, for servers without a backend of their own for the graph."""

    def load(self, bundle: Bundle, threads: int | None) -> None:
        """See ``_Model.load``."""
        self._graph = bundle.graph()
        self._backend = load_backend(bundle, self._graph, threads=threads).backend

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests, as many in one run of the graph as it takes."""
        images = [self.tensor(request, "image") for request in requests]
        given = np.concatenate([image for image in images if image is not None])
        logits = np.empty((len(given), *self._graph.output_shape[1:]), np.float32)
        try:
            for start in range(0, len(given), self._graph.batch):
                some = given[start : start + self._graph.batch]
                whole = np.zeros(self._graph.input_shape, np.float32)
                whole[: len(some)] = some
                logits[start : start + len(some)] = self._backend.run(whole)[: len(some)]
        except UserError as error:
            return [self.refused(error) for _ in requests]
        ends = np.cumsum([0 if image is None else len(image) for image in images])
        return [
            self.triton.InferenceResponse(output_tensors=[self.triton.Tensor("logits", part)])
            for part in np.split(logits, ends[:-1])
        ]

    def finalize(self) -> None:
        """Free what is held."""
        self._backend.close()
