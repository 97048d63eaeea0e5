"""Whether a backend builds, loads and runs a small network of the shipped weights on this GPU, and agrees with the CPU.

    python tools/gpu_check_engine.py BACKEND --out DIR

Writes DIR/engine-BACKEND.json: what runs, milliseconds of each stage, the mask pixels that equal ONNX Runtime's on
the CPU, what was told. Ends with 0 if it works, 1 if it does not, 3 if it is not installed here.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

SMALL = "microscopy"
"""What the engines are made of, 448 x 448."""
EQUAL_PIXELS = 0.9999  # FP32 by other kernels: pixels on the edge may differ
MISSING = 3


class _Kept(logging.Handler):
    """Keeps what the package tells."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


def check_engine(backend: str, out: Path) -> int:
    """Build and run it, compare its mask with ONNX Runtime's, and write the JSON."""
    from espmedsam_edge.errors import UserError
    from espmedsam_edge.phantoms import phantom_clip
    from espmedsam_edge.runtime.backends.backend import BACKENDS, unavailable
    from espmedsam_edge.runtime.cuda.gpu import find_gpu
    from espmedsam_edge.runtime.segmenter import Segmenter
    from espmedsam_edge.shipped.bundles import shipped_bundle

    said: list[str] = []
    logger = logging.getLogger("espmedsam_edge")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Kept(said))
    found: dict[str, Any] = {"backend": backend, "gpu": str(find_gpu()), "works": False, "error": None, "said": said}
    out.mkdir(parents=True, exist_ok=True)
    asked = "inductor:cuda" if backend == "inductor" else backend  # which else takes the processor where CUDA lacks
    reason = unavailable(asked) if backend in BACKENDS else "this version does not have it."
    if reason is not None:
        print(reason)
        return MISSING
    try:
        ((frame, _),) = phantom_clip(SMALL, 0, 1, (480, 640))
        bundle = shipped_bundle(SMALL)
        begin = time.monotonic()
        with Segmenter.load(bundle, SMALL, "fp32", asked) as segmenter:
            found["device"] = segmenter.choice.backend.device
            mask = segmenter.segment(frame).mask
            found["seconds"] = round(time.monotonic() - begin, 1)  # to the first mask: built, loaded, warmed up
            if segmenter.frame_backend is not None:
                runs = [segmenter.stage_seconds([frame]) for _ in range(20)]
                found["stages_ms"] = {stage: 1000 * sorted(run[stage] for run in runs)[10] for stage in runs[0]}
        with Segmenter.load(bundle, SMALL, "fp32", "onnxruntime-cpu") as reference:
            found["equal_pixels"] = float((mask == reference.segment(frame).mask).mean())
        found["works"] = found["equal_pixels"] >= EQUAL_PIXELS
    except UserError as error:
        found["error"] = str(error)
    (out / f"engine-{backend}.json").write_text(json.dumps(found, indent=2) + "\n")
    print(found["error"] or f"{found['device']}: {found['equal_pixels']:.4%} of mask pixels equal ONNX Runtime's")
    return 0 if found["works"] else 1


def main() -> int:
    """Check the one that is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("backend")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    return check_engine(arguments.backend, arguments.out.resolve())


if __name__ == "__main__":
    sys.exit(main())
