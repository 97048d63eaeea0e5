"""``POST /v1/segment``: an image in, its mask out, as PNG or as JSON."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import anyio
import anyio.to_thread
from anyio import CapacityLimiter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.crop import Crop, find_picture, parse_crop
from espmedsam_edge.imaging.decode import decode_image, max_pixels
from espmedsam_edge.imaging.decoder_process import PictureDecoder, is_cheap
from espmedsam_edge.imaging.encode import encode_image
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.imaging.header_errors import HeaderError
from espmedsam_edge.imaging.headers import read_header
from espmedsam_edge.imaging.recognition import (
    DOUBTFUL,
    Look,
    confidences,
    likeliest,
    look,
    looks_otherwise,
    recognisable,
    recognise,
)
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.serve.gate import client_of, refusal
from espmedsam_edge.runtime.serve.limits import counted_as
from espmedsam_edge.runtime.serve.metrics import ServiceMetrics
from espmedsam_edge.runtime.serve.panel import Panel
from espmedsam_edge.runtime.serve.seats import Full, Seats

MAX_BODY = 32 << 20
"""Bytes of an image file."""

MAX_PIXELS = 40_000_000
"""Of an image; ``ESPMEDSAM_MAX_PIXELS`` may set less. 40 million take 280 MB while they are segmented, and 0.7 GB
more while their objects are told apart."""

BODY_SECONDS = 30.0
"""How long an image may take to arrive."""

PATIENCE_SECONDS = 8.0
"""How long nothing more of it may come, and how long it may be below ``SLOWEST`` from the beginning."""

SLOWEST = 16 << 10
"""Bytes a second."""

_WAITING, _WAITING_OF_A_CLIENT = 16, 8
_AT_WORK = 4
_PARAMETERS = ("modality", "threshold", "crop")

Made = TypeVar("Made")
Kind = Literal["image/png", "application/json"]
_KINDS: tuple[Kind, ...] = ("application/json", "image/png")


class Refused(Exception):
    """A request that cannot be done, with its answer."""

    def __init__(self, status: int, message: str, hint: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.response = refusal(status, message, hint, headers)


class SegmentService:
    """Answers one image of each client at a time, four in all. The graph alone takes them in turn: what a large picture
    takes before and after it, and a modality's first loading, hold nobody else up.

    Of each client eight more may wait, sixteen in all; others are told to come back.
    """

    def __init__(self, panel: Panel, counts: ServiceMetrics) -> None:
        self._panel, self._counts = panel, counts
        self._decoders = [PictureDecoder() for _ in range(_AT_WORK)]
        self._seats = Seats(self._decoders, _WAITING, _WAITING_OF_A_CLIENT)
        self._threads = CapacityLimiter(2 * _AT_WORK)

    def start(self) -> None:
        """Start a decoder's process, which the first picture then need not wait for."""
        self._decoders[0].start()

    def close(self) -> None:
        """End the decoders' processes."""
        for decoder in self._decoders:
            decoder.close()

    async def answer(self, request: Request) -> Response:
        """The mask, or what is wrong with the request."""
        client = counted_as(client_of(request.scope))
        try:
            kind = preferred_kind(request.headers.get("accept"))
            modality, threshold = self._parameters(request)
            wanted = request.query_params.get("crop")
            if wanted is not None:
                _parsed_crop(wanted)
            async with self._seats.place(client):
                data = await _body(request)
                begin = time.perf_counter()
                async with self._seats.seat(client) as decoder:
                    frame = await self._in_thread(_decode, data, decoder)
                    crop = None if wanted is None else await self._in_thread(_crop, wanted, frame)
                    result, doubt = await self._in_thread(self._segment, frame, crop, modality, threshold)
                    response = await self._in_thread(_encoded, result, kind, doubt)
        except Full:
            hint = "Try again in a second."
            return refusal(503, "too many images are waiting.", hint, {"Retry-After": "1"})
        except Refused as refused:
            return refused.response
        except ClientDisconnect:
            return refusal(400, "the image did not arrive whole.", "Send it again.")
        self._counts.segmented.observe(time.perf_counter() - begin)
        return response

    async def _in_thread(self, function: Callable[..., Made], *arguments: object) -> Made:
        return await anyio.to_thread.run_sync(function, *arguments, limiter=self._threads)

    def _parameters(self, request: Request) -> tuple[str | None, float | None]:
        """The modality, None for what the image looks like, and the threshold."""
        query = request.query_params
        for name in query:
            if name not in _PARAMETERS:
                raise Refused(400, "an unknown parameter was given.", f"Known: {', '.join(_PARAMETERS)}.")
            if len(query.getlist(name)) > 1:
                raise Refused(400, f"{name} was given twice.", "Give it once.")
        names = ", ".join(self._panel.pool.modalities)
        modality = query.get("modality")
        if modality is None:
            segmenter = self._panel.first  # not the one that viewers chose: answers must not change with it
            if self._panel.recognises and len(self._panel.pool.modalities) > 1:
                if len(recognisable(self._panel.pool.modalities)) < len(self._panel.pool.modalities):
                    raise Refused(400, "which modality?", f"Add ?modality=NAME. Known: {names}.")
                return None, _threshold(query.get("threshold"))
            modality = self._panel.pool.modalities[0] if segmenter is None else segmenter.modality
        if modality not in self._panel.pool.modalities:
            raise Refused(400, "no such modality here.", f"Known: {names}.")
        return modality, _threshold(query.get("threshold"))

    def _segment(
        self, frame: Frame, crop: Crop | None, named: str | None, threshold: float | None
    ) -> tuple[Segmentation, str | None]:
        """In a thread, the result and a doubt; the segmenter itself takes one at a time."""
        part = frame if crop is None else crop.of(frame)
        seen = look(part)
        modality = named or _recognised(seen, self._panel.pool.modalities)
        try:
            result = self._panel.pool.get(modality).segment_batch([part], threshold)[0]
            result = result if crop is None else result.placed(crop, (frame.shape[0], frame.shape[1]))
            result = self._panel.finder.found(result.judged(confidences(seen)), name="an image sent")
            return result, None if named is None else _doubt(seen, result)
        except UserError as error:  # not the client's doing, and it may name this machine's files
            raise Refused(503, "the image could not be segmented.", "See the server's own output.") from error


def _doubt(seen: Look, result: Segmentation) -> str | None:
    """A warning where an image is plainly not of the modality that it is segmented as."""
    modality = result.modality
    if not recognisable([modality]):
        return None
    if (found := looks_otherwise(seen, modality)) is not None:
        return f"the image looks like {found} and was segmented as {modality}."
    if result.confidence is None or result.confidence >= DOUBTFUL:
        return None
    return f"the image looks unlike {modality}, as which it was segmented (confidence {result.confidence:.2f})."


def _encoded(result: Segmentation, kind: Kind, doubt: str | None) -> Response:
    headers = {"X-Modality": result.modality, "X-Threshold": str(result.threshold)}
    headers |= {} if result.confidence is None else {"X-Confidence": f"{result.confidence:.4f}"}
    headers |= {} if doubt is None else {"X-Warning": doubt}
    if kind == "application/json":
        return JSONResponse(measurements(result) | ({} if doubt is None else {"warning": doubt}), headers=headers)
    try:
        return Response(encode_image(result.mask, ".png"), media_type=kind, headers=headers)
    except UserError as error:
        raise Refused(503, "the mask could not be written.", "Ask for JSON.") from error


def _recognised(frame: Look, among: Sequence[str]) -> str:
    guess = recognise(frame, among)
    if guess is not None and guess.sure:
        return guess.modality
    message = f"the image looks like none of the modalities with certainty{likeliest(frame, among)}."
    raise Refused(400, message, f"Add ?modality=NAME. Known: {', '.join(among)}.")


def measurements(result: Segmentation) -> dict[str, Any]:
    """``Segmentation.to_dict`` and the outlines: each a list of [x, y] in pixels, holes left out."""
    return {**result.to_dict(), "contours": [contour.tolist() for contour in result.contours()]}


def preferred_kind(accept: str | None) -> Kind:
    """What an Accept header asks for; JSON where it does not matter.

    Raises:
        Refused: neither JSON nor PNG.
    """
    if accept is None or not accept.strip():
        return _KINDS[0]
    best: dict[Kind, tuple[float, int]] = {}
    for part in accept.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weight = next((_weight(p[2:]) for p in parameters if p.startswith("q=")), 1.0)
        for kind in _KINDS:
            exactness = {kind: 2, f"{kind.split('/')[0]}/*": 1, "*/*": 0}.get(name)
            if exactness is not None and (kind not in best or exactness >= best[kind][1]):
                best[kind] = (weight, exactness)
    wanted = [kind for kind in _KINDS if best.get(kind, (0.0, 0))[0] > 0]
    if not wanted:
        raise Refused(406, "only JSON and PNG are made here.", "Accept: application/json or image/png.")
    return max(wanted, key=lambda kind: best[kind])


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        return 0.0
    return weight if math.isfinite(weight) else 0.0


def _threshold(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        threshold = float(text)
    except ValueError:
        threshold = math.nan
    if not 0 < threshold < 1:
        raise Refused(400, "the threshold is not a number between 0 and 1.", "0.5 is usual.")
    return threshold


def _parsed_crop(text: str) -> Crop | None:
    try:
        return parse_crop(text)
    except UserError as error:
        raise Refused(400, "the crop is not four whole numbers, or it is empty.", error.hint) from error


def _crop(text: str, frame: Frame) -> Crop | None:
    """The part of an image that a request names, or the picture in it."""
    crop = _parsed_crop(text)
    if crop is None:
        return find_picture([frame])
    try:
        crop.check((frame.shape[0], frame.shape[1]))
    except UserError as error:
        raise Refused(400, error.message, error.hint) from error
    return crop


async def _body(request: Request) -> bytes:
    """The request's body, refused as soon as it is too large or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("multipart/"):  # curl --data-binary says urlencoded, which it then is not
        raise Refused(
            415,
            "a form is not an image.",
            "Send the file alone: curl --data-binary @image.png",
        )
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced) > MAX_BODY:
        raise _too_large()
    parts: list[bytes] = []
    size = 0
    try:
        begun = anyio.current_time()
        with anyio.fail_after(PATIENCE_SECONDS) as limit:
            async for part in request.stream():
                size += len(part)
                allowed = min(BODY_SECONDS, PATIENCE_SECONDS + size / SLOWEST)
                limit.deadline = min(begun + allowed, anyio.current_time() + PATIENCE_SECONDS)
                if size > MAX_BODY:
                    raise _too_large()
                parts.append(part)
    except TimeoutError:
        raise Refused(408, "the image took too long to arrive.", "Send it again, or a smaller one.") from None
    return b"".join(parts)


def _too_large() -> Refused:
    return Refused(413, f"the image file is over {MAX_BODY >> 20} MiB.", "Compress it, or shrink the image.")


def _decode(data: bytes, decoder: PictureDecoder) -> Frame:
    """In a thread: small pictures here, others in the decoder's process."""
    if not data:
        raise Refused(400, "the image is empty.", "Send an image file as the request's body.")
    try:
        header = read_header(data)
        pixels = header.width * header.height
        if pixels > min(MAX_PIXELS, max_pixels()):
            raise Refused(413, f"the image is {header.width}x{header.height} pixels, too many.", "Shrink it.")
        return decode_image(data) if is_cheap(header.format, pixels, len(data)) else decoder.decode(data)
    except HeaderError as error:
        raise Refused(422, f"cannot read the image: {error}.", "Send a JPEG, PNG, TIFF, BMP or WebP file.") from error
    except UserError as error:
        raise Refused(422, error.message, "Send another image.") from error
