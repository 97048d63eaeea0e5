"""What a run is asked for (network, reading, outputs; None always means the default), and what it reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from espmedsam_edge.annotations.formats import check_format
from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.imaging.crop import parse_crop
from espmedsam_edge.objects.options import ObjectOptions
from espmedsam_edge.objects.spacing import parse_spacing
from espmedsam_edge.runtime.backends.backend import DeviceUse, check_known
from espmedsam_edge.runtime.backends.backend_spec import BackendSpec
from espmedsam_edge.runtime.run.jobs import LiveReport
from espmedsam_edge.runtime.segmentation import check_threshold
from espmedsam_edge.runtime.serve.options import ServeOptions
from espmedsam_edge.runtime.sources.selection import Selection
from espmedsam_edge.runtime.sources.shards import Shard
from espmedsam_edge.runtime.sources.source import Failure
from espmedsam_edge.runtime.tiling import AUTO, parse_tile

if TYPE_CHECKING:
    from espmedsam_edge.runtime.segmenter import Segmenter

Decoder = Literal["auto", "software", "hardware"]
Contours = Literal["none", "polygons", "rle", "both"]
Uids = Literal["hashed", "plain"]
_FASTEST = 10_000  # frames a second


def _check_least(name: str, value: float | None, least: float) -> None:
    if value is not None and not value >= least:
        raise UserError(f"{name} {value} is less than {least}.", f"Give {least} or more, or leave it out.")


def _check_known(name: str, value: str, known: Iterable[str]) -> None:
    if value not in (names := tuple(known)):
        raise UserError(f"no {name} '{value}'.", nearest(value, names))


@dataclass(frozen=True)
class ModelOptions:
    """Which network segments, and on what.

    Examples:
        >>> from espmedsam_edge import ModelOptions, infer_frames
        >>> model = ModelOptions("fundus.bundle", threshold=0.4, threads=2)
        >>> [result.threshold for frame, result in infer_frames("retina.png", model)]
        [0.4]

    Attributes:
        bundle: a bundle, its path or address (``remote_bundles``); None: made from the weights that came along.
        modality: what to segment; None: the bundle's only one, else what each picture is recognised as (videos by
            their first frame); one that is not clear fails.
        precision: "fp32", "fp16" or "int8"; None: fp32, else what there is.
        backend: a name of ``runtime.backends.backend.BACKENDS``, such as "openvino:GPU" with the words after it that
            ``BackendSpec`` knows, or "auto" for the best that works here.
        threshold: the probability (between 0 and 1) from which a pixel is foreground; None: the bundle's.
        threads: CPU threads; None: the physical cores the process may use.
        device: of backend openvino: CPU, GPU, NPU or AUTO; None: the CPU.
        arithmetic: of backend openvino: what it computes in, fp32, bf16, fp16 or "graph"; None: fp32.
        provider: of backend onnxruntime: the name of one of its execution providers; None: CUDA or the CPU.
        tta: average the network over mirrored and turned copies of each frame, those that the modality allows.
        min_confidence: 0 to 1: results whose ``Segmentation.confidence`` is lower have an empty mask, and count as
            failures of files; 0.5 is where a picture looks like something else. None: none does.
        tile: how pictures larger than those of the training are segmented: "off", whole; a number, in tiles of that
            many pixels; "auto", as the bundle says of its modality.
        objects: which of a mask's objects count, and whether they are told apart.
        url: of backend triton: the server, which serves what ``deploy triton`` wrote from this bundle.
    """

    bundle: Bundle | str | Path | None = None
    modality: str | None = None
    precision: str | None = None
    backend: str = "auto"
    threshold: float | None = None
    threads: int | None = None
    device: str | None = None
    arithmetic: str | None = None
    provider: str | None = None
    tta: bool = False
    tile: str | int = AUTO
    objects: ObjectOptions = field(default_factory=ObjectOptions)
    url: str | None = None
    min_confidence: float | None = None

    def __post_init__(self) -> None:
        _check_least("threads", self.threads, 1)
        if self.min_confidence is not None and not 0 <= self.min_confidence <= 1:
            raise UserError(f"min_confidence {self.min_confidence} is not from 0 to 1.", "0.5 is usual.")
        if self.threshold is not None:
            check_threshold(self.threshold)
        parse_tile(self.tile)
        check_known(self.backend_spec())

    def backend_spec(self) -> str:
        """The backend with its device, arithmetic and provider, as ``Segmenter.load`` takes it."""
        return str(BackendSpec.parse(self.backend).with_words(self.device, self.arithmetic, self.provider, self.url))

    def to_load(self) -> dict[str, Any]:
        """What the view and the service need to load networks that are asked for later, as their functions take it."""
        names = ("precision", "threshold", "threads", "tta", "tile", "objects")
        return {"backend": self.backend_spec(), **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class ReadingOptions:
    """How sources are read, and when to end.

    Examples:
        >>> from espmedsam_edge import ReadingOptions, infer_frames
        >>> turned = ReadingOptions(rotate=90, crop="auto")
        >>> [result.mask.shape for frame, result in infer_frames("retina.png", "fundus.bundle", reading=turned)]
        [(160, 120)]

    Attributes:
        frames: stop after that many frames of each source; None: read all.
        duration: stop reading after that many seconds; None: read all.
        max_latency: seconds; refuse frames of live sources that are older; None: refuse none.
        give_up: give a live source up that is gone for that many seconds; None: never.
        decoder: of streams: "software" is PyAV, "hardware" the Jetson's, "auto" hardware where there is one.
        anonymous_names: call sources source-1, source-2-0001, ... in results and messages: names may hold a patient's.
        crop: the part of each frame that is segmented, (x, y, width, height) in pixels, or that as text; "auto": the
            picture inside black borders and text panels. Results are the whole frame's, with nothing outside.
        rotate: turn frames clockwise by 90, 180 or 270 degrees, before ``crop``; results are the turned frame's.
        start: leave out so many seconds of each video, camera and stream at first.
        every: take each so many-th frame of them. Indices and times stay the source's.
        fps: take at most so many frames a second of them.
        spacing: how far pixels lie apart, with a unit: "0.25um", "0.4,0.3mm" (rows, columns), or "tiff" for the
            resolution that TIFFs state; None: as DICOM, OME and ImageJ say, else unknown.
        shard: do a share of the files, "2/8" the second of eight; its tables are named so. None: all.
    """

    frames: int | None = None
    duration: float | None = None
    max_latency: float | None = None
    give_up: float | None = None
    decoder: Decoder = "auto"
    anonymous_names: bool = False
    crop: str | Sequence[int] | None = None
    rotate: int = 0
    start: float | None = None
    every: int | None = None
    fps: float | None = None
    spacing: str | None = None
    shard: str | None = None

    def __post_init__(self) -> None:
        if self.shard is not None:
            Shard.parse(self.shard)
        _check_least("frames", self.frames, 1)
        _check_least("every", self.every, 1)
        if self.fps is not None and not 0 < self.fps <= _FASTEST:
            raise UserError(f"fps {self.fps} is not a number over 0.", "For one frame every two seconds: 0.5")
        if self.fps is not None and self.every is not None:
            raise UserError("every and fps cannot be given together.", "Leave one of them out.")
        if self.rotate not in (0, 90, 180, 270):
            raise UserError(f"rotate {self.rotate} is none of 90, 180 and 270.", "Degrees, clockwise.")
        self.selection()  # checks ``crop`` and ``spacing``
        for name in ("duration", "max_latency", "give_up", "start"):
            _check_least(name, getattr(self, name), 0)
        _check_known("decoder", self.decoder, get_args(Decoder))

    def selection(self) -> Selection:
        """What of the sources is segmented, for one run."""
        text = self.crop if isinstance(self.crop, str) or self.crop is None else ",".join(map(str, self.crop))
        crop = None if text is None else parse_crop(text)
        auto = text is not None and crop is None
        spacing = None if self.spacing is None else parse_spacing(self.spacing)
        resolution = self.spacing is not None and spacing is None
        return Selection(self.start or 0.0, self.every or 1, self.fps, self.rotate, crop, auto, spacing, resolution)


@dataclass(frozen=True)
class Outputs:
    """What is written, and where. None: that result is not wanted, but for ``out``.

    Examples:
        >>> from espmedsam_edge import Outputs, infer
        >>> infer("retina.png", "fundus.bundle", Outputs(masks="masks", csv="areas.csv")).results
        {'masks': PosixPath('masks'), 'areas': PosixPath('areas.csv')}

    Attributes:
        out: overlays: a file for one image or video, else a folder. None: ``NAME-overlay.png`` or ``.mp4``, or the
            folder ``overlays``, in the working folder; none at all if other results alone are asked for. "-":
            Matroska, of a picture PNG, on standard output.
        masks: a folder for masks: PNG, 0 and 255, at the frame's size.
        mask_video: masks as video, white on black: a file for one video, else a folder.
        jsonl: a file for one line of JSON a frame; "-" for standard output.
        contours: in those lines, the mask as polygons, as COCO's rle, or both.
        uids: in those lines, DICOM's study, series and instance identifiers, "hashed" or "plain"; None: neither.
        csv: a file for a table of the area in each frame, and of the number of objects; "-" for standard output.
        labels: a folder for the numbers of objects: PNG of 16 bits, or TIFF of 32 where there are over 65,535.
        objects: a file for a table of every object in each frame; "-" for standard output.
        plot: a PNG of the area over time.
        dicom_seg: DICOM-SEG of DICOM inputs: a .dcm file for one, else a folder. Holds the source's patient data.
        dicom_sr: structured reports of DICOM inputs, with the size of each object: a .dcm file for one, else a folder.
            Hold the source's patient data, and refer to the DICOM-SEGs where there are any.
        stream: where the overlay is sent: udp://HOST:PORT, rtp://HOST:PORT or rtsp://SERVER/PATH.
        publish: where the lines of JSON are sent: mqtt://HOST/TOPIC, mqtts://HOST/TOPIC.
        opacity: of the overlay's tint, 0 to 1.
        overwrite: True: replace files that exist, whatever they are; False: none; None: only results of this program
            of the same kind. Inputs, bundles and the cache are never written to. Results of cameras and streams stay,
            and new ones are numbered.
        export: a format of ``annotations.formats.FORMATS``: pictures and masks for annotation tools.
        export_to: their folder, which must be new or empty unless ``overwrite`` is True; None: "annotations".
        resume: note what is finished in a journal beside the results, and go on from what is noted there.
    """

    out: str | Path | None = None
    masks: str | Path | None = None
    mask_video: str | Path | None = None
    jsonl: str | Path | None = None
    contours: Contours = "none"
    uids: Uids | None = None
    csv: str | Path | None = None
    labels: str | Path | None = None
    objects: str | Path | None = None
    plot: str | Path | None = None
    dicom_seg: str | Path | None = None
    dicom_sr: str | Path | None = None
    stream: str | None = None
    publish: str | None = None
    opacity: float = 0.35
    overwrite: bool | None = None
    export: str | None = None
    export_to: str | Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.opacity <= 1:
            raise UserError(f"opacity {self.opacity} is not from 0 to 1.", "0.35 is usual.")
        if self.export is not None:
            check_format(self.export)
        elif self.export_to is not None:
            raise UserError("export_to names a folder, and no format is named.", "Such as: --export coco")
        _check_known("contours", self.contours, get_args(Contours))
        if self.uids is not None:
            _check_known("uids", self.uids, get_args(Uids))


@dataclass(frozen=True)
class InferenceRequest:
    """One run.

    Examples:
        >>> from espmedsam_edge import Inference, InferenceRequest, ModelOptions, ReadingOptions
        >>> request = InferenceRequest("test://fundus", ModelOptions("fundus.bundle"), reading=ReadingOptions(frames=2))
        >>> with Inference(request) as run:
        ...     [result.modality for frame, result in run.frames()]
        ['fundus', 'fundus']

    Attributes:
        sources: one or several: images, videos, DICOM files, folders, globs, cameras and streams, or "-" for standard
            input, as the command takes them.
        model: which network; or a segmenter that is loaded already and stays the caller's.
        outputs: what is written; None: nothing.
        reading: how sources are read.
        serve: where the run is shown in the browser; None: nowhere. Then nothing is written unless asked for.
        also_read: further files that no result may replace, as the one of ``--config``.

    Raises:
        UserError: from any of these classes: a value that is out of its range.
    """

    sources: str | Path | Sequence[str | Path]
    model: ModelOptions | Segmenter = ModelOptions()
    outputs: Outputs | None = Outputs()
    reading: ReadingOptions = ReadingOptions()
    serve: ServeOptions | None = None
    also_read: Sequence[str | Path] = ()

    def __post_init__(self) -> None:
        for name in ("dicom_seg", "dicom_sr"):
            if self.reading.rotate and self.outputs is not None and getattr(self.outputs, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} lies on its source's own pixels.", f"Leave --rotate or {option} out.")

    @property
    def named(self) -> list[str]:
        """The sources, each as it was named."""
        sources = [self.sources] if isinstance(self.sources, (str, Path)) else self.sources
        return [str(source) for source in sources]


@dataclass(frozen=True)
class NetworkReport:
    """One of the networks of a run whose pictures were recognised: what it was, and how many frames it segmented.

    ``why`` is as that of ``InferenceReport``.
    """

    bundle: Path
    modality: str
    precision: str
    backend: str
    frames: int
    why: str = ""


@dataclass(frozen=True)
class InferenceReport:
    """What a run did.

    Examples:
        >>> from espmedsam_edge import infer
        >>> report = infer(["retina.png", "missing.png"], "fundus.bundle")
        >>> report.frames, report.modality, report.trained
        (1, 'fundus', True)
        >>> [failure.message for failure in report.failures]
        ['no file missing.png. Check the name.']

    Attributes:
        failures: inputs and outputs that failed, each with the line that says why and what next.
        bundle: the path of the bundle that ran; None: no source could be opened, so nothing ran.
        modality, precision: what was segmented (several modalities with commas), and with which graph.
        backend: what ran the graph.
        why: why that one was taken, a clause, where several could be.
        networks: each, where pictures were recognised; ``bundle`` and ``backend`` are the first one's.
        passed_over: why each better backend was not taken, a line each.
        trained: whether the masks mean anything.
        frames: how many were segmented and written.
        seconds: wall time.
        stage_seconds: time spent in each of ``run.jobs.STAGES``.
        live: what became of each live source.
        results: what was written: "overlays", "masks", "measurements", ... and where.
        gpu_memory: what the run held on its GPU; None without one.
        unjudged: modalities whose results have no confidence, since what their pictures look like is not known.
        interrupted: Ctrl-C ended a run of live sources; what they gave is finished.
        unfinished: Ctrl-C ended it with files under way, whose results were removed.
        done: how many files an earlier run had finished, which were left as they are.
    """

    failures: list[Failure]
    bundle: Path | None = None
    modality: str = ""
    precision: str = ""
    backend: str = ""
    why: str = ""
    passed_over: Sequence[str] = ()
    trained: bool = True
    networks: Sequence[NetworkReport] = ()
    frames: int = 0
    seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    live: list[LiveReport] = field(default_factory=list)
    results: dict[str, Path] = field(default_factory=dict)
    gpu_memory: DeviceUse | None = None
    unjudged: Sequence[str] = ()
    interrupted: bool = False
    unfinished: bool = False
    done: int = 0
