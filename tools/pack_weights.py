"""Pack a trained checkpoint into the weights that ship with the package.

    python tools/pack_weights.py runs/s/weights.safetensors
    python tools/pack_weights.py                            # the networks alone, for the weights that are there

Writes espmedsam_edge/weights/: the checkpoint in 8 bits, the network without weights for each input size, and their
SHA-256. With a checkpoint, a network that is there already is kept; run it without after a change in ``export``.
``tools/accuracy.py`` measures the result. Takes a minute.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
from pathlib import Path

import numpy as np

from espmedsam_edge.export.skeleton import build_skeleton
from espmedsam_edge.files import atomic_write
from espmedsam_edge.model.checkpoint import CheckpointInfo, read_checkpoint
from espmedsam_edge.shipped.bundles import CHECKPOINT, METADATA_KEY, SUMS, UNPACKED, WEIGHTS, skeleton_name
from espmedsam_edge.shipped.packed import read_packed, unpack, write_packed


def main() -> None:
    """Pack."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--levels", type=int, default=63, help="largest magnitude of a weight: 127, 63 or 31")
    arguments = parser.parse_args()
    out: Path = arguments.out
    written = [out / CHECKPOINT]
    if arguments.checkpoint is None:
        info = CheckpointInfo.model_validate_json(read_packed(written[0])[1][METADATA_KEY])
    else:
        state, info = read_checkpoint(arguments.checkpoint)
        info = info.model_copy(update={"scales": {}})  # of all modalities they stand in scales.json, with their tiles
        arrays = {name: np.asarray(value.numpy()) for name, value in state.items()}
        out.mkdir(parents=True, exist_ok=True)
        levels = arguments.levels
        write_packed(written[0], arrays, {METADATA_KEY: info.model_dump_json()}, lambda name: levels)
    print(f"{written[0]}: {written[0].stat().st_size / 1e6:.1f} MB")
    for side in sorted({info.config.size_of(name) for name in info.modalities}):
        written.append(out / skeleton_name(side))
        if arguments.checkpoint is None or not written[-1].is_file():
            atomic_write(written[-1], lzma.compress(build_skeleton(info.config, side), preset=9))
        print(f"{written[-1]}: {written[-1].stat().st_size / 1e3:.0f} kB")
    for old in out.glob("network-*.onnx.xz"):
        if old not in written:
            old.unlink()
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in written]
    lines.append(f"{hashlib.sha256(unpack(written[0].read_bytes())).hexdigest()}  {UNPACKED}\n")
    atomic_write(out / SUMS, "".join(lines))


if __name__ == "__main__":
    main()
