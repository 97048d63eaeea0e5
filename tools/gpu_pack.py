"""What gpu_check.sh needs on a machine with a GPU and torch but without a network: packages, and a bundle in FP16.

    python tools/gpu_pack.py --out load [--python 3.12] [--part 28] [--only PACKAGE]...

Writes load/p0/load-00, load/p1/load-01, ...: one archive in parts of so many MiB. There, with all parts in a folder:

    mkdir gpu && cat load-* | tar -xJ -C gpu
    PYTHONPATH=$PWD/gpu/site tools/gpu_check.sh --bundle gpu/fundus.bundle --out results

Packages are unpacked already, so that nothing is installed there. Takes a few minutes here; needs pip, a network, xz
and the extra ``calibrate``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from espmedsam_edge.bundle import Bundle, Manifest, write_bundle
from espmedsam_edge.imaging.encode import encode_image
from espmedsam_edge.phantoms import phantom

MODALITY = "fundus"  # what gpu_check measures
PACKAGES = (
    "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "platformdirs",  # the program's
    "onnxruntime-gpu", "av", "segment-anything", "mobilesam-mirror", "efficientsam", "x-segment-anything",
)  # fmt: skip
"""Without those that come with torch, and those of which a machine that has CUDA's torch has its own."""

LEFT_OUT = ("libonnxruntime_providers_tensorrt.so", "libonnxruntime_providers_nv_tensorrt_rtx.so")
"""Parts of packages that are large and not asked for."""

_GLIBC = (39, 35, 34, 31, 28, 27, 24, 17)
_PICTURES, _SIZE = 24, (584, 565)  # phantoms: FP16 measures nothing on them, its gate compares with FP32


def fetch(packages: list[str], python: str, site: Path) -> None:
    """Unpack packages for another Python on x86-64 Linux; pydantic's core is that of its version."""
    wanted = [package for package in packages if package != "pydantic-core"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    command += ["--target", str(site), "--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    command += ["--python-version", python]
    for version in _GLIBC:
        command += ["--platform", f"manylinux_2_{version}_x86_64"]
    command += ["--platform", "manylinux2014_x86_64"]
    subprocess.run([*command, *wanted], check=True)
    if "pydantic-core" in packages:
        (metadata,) = site.glob("pydantic-*.dist-info/METADATA")
        lines = metadata.read_text().splitlines()
        (core,) = (line.split(": ")[1] for line in lines if line.startswith("Requires-Dist: pydantic-core"))
        subprocess.run([*command, core], check=True)
    for name in LEFT_OUT:
        for file in site.rglob(name):
            file.unlink()


def bundle_in_fp16(place: Path) -> None:
    """The bundle of the weights that came with the program, with its FP16 graph alone: that in FP32 is there anyway."""
    with tempfile.TemporaryDirectory() as folder:
        whole, pictures = Path(folder, f"{MODALITY}.bundle"), Path(folder, "pictures")
        pictures.mkdir()
        for seed in range(_PICTURES):
            (pictures / f"{seed}.png").write_bytes(encode_image(phantom(MODALITY, seed, _SIZE)[0], ".png"))
        command = [sys.executable, "-m", "espmedsam_edge"]
        subprocess.run([*command, "weights", "--modality", MODALITY, "--out", str(whole)], check=True)
        subprocess.run([*command, "calibrate", str(whole), str(pictures), "--precision", "fp16"], check=True)
        bundle = Bundle.open(whole)
        graph = bundle.graph(MODALITY, "fp16")
        with write_bundle(place) as draft:
            draft.new_file(graph.file).write_bytes(bundle.read_graph(graph))
            manifest = bundle.manifest.model_dump() | {"graphs": [graph.model_dump()]}
            draft.manifest = Manifest.model_validate(manifest)


def pack(load: Path, out: Path, part: int) -> list[Path]:
    """An archive of a folder, in parts of so many MiB at most, each in a folder of its own."""
    size, parts = part << 20, []
    with subprocess.Popen(["tar", "-C", str(load), "-I", "xz -T0 -4", "-c", "."], stdout=subprocess.PIPE) as archive:
        assert archive.stdout is not None
        while content := archive.stdout.read(size):
            parts.append(out / f"p{len(parts)}" / f"load-{len(parts):02d}")
            parts[-1].parent.mkdir()
            parts[-1].write_bytes(content)
    if archive.returncode:
        sys.exit("tar failed")
    return parts


def main() -> None:
    """Fetch, make and pack."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--python", default="3.12", help="of that machine")
    parser.add_argument("--part", type=int, default=28, help="MiB")
    parser.add_argument("--only", action="append", choices=PACKAGES, help="of the packages; may be given several times")
    parser.add_argument("--no-bundle", action="store_true", help="the packages alone")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        fetch(arguments.only or list(PACKAGES), arguments.python, Path(folder, "site"))
        if not arguments.no_bundle:
            bundle_in_fp16(Path(folder, f"{MODALITY}.bundle"))
        for place in pack(Path(folder), arguments.out, arguments.part):
            print(f"{place}: {place.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
