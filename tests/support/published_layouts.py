"""Miniature copies of the layouts in which publishers ship their data sets, drawn from phantoms."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from espmedsam_edge.phantoms import phantom

SIZE = (48, 64)


def scene(modality: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A small phantom of the size that these copies use."""
    return phantom(modality, seed, SIZE)


def _write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image), path


def _write_gif(path: Path, mask: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def _write_gz(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(_pnm(image)))


def _pnm(image: np.ndarray) -> bytes:
    """PPM, or PGM for grey pictures, which STARE calls .ppm too."""
    return bytes(cv2.imencode(".pgm" if image.ndim == 2 else ".ppm", image)[1].tobytes())


def write_isic2018(root: Path) -> dict[str, int]:
    seeds = {}
    for part, numbers in (("Training", (0, 1, 2, 3, 4)), ("Validation", (12,)), ("Test", (20, 21))):
        for number in numbers:
            id_ = f"ISIC_{number:07d}"
            image, mask = scene("dermoscopy", number)
            _write(root / f"ISIC2018_Task1-2_{part}_Input" / f"{id_}.jpg", image)
            _write(root / f"ISIC2018_Task1_{part}_GroundTruth" / f"{id_}_segmentation.png", mask)
            seeds[id_] = number
        (root / f"ISIC2018_Task1-2_{part}_Input" / "LICENSE.txt").write_text("CC-0")
    return seeds


def write_montgomery(root: Path) -> dict[str, int]:
    seeds = {}
    for number in range(6):
        id_ = f"MCUCXR_{number:04d}_{number % 2}"
        image, mask = scene("xray", number)
        left, right = mask.copy(), mask.copy()
        left[:, : SIZE[1] // 2] = 0
        right[:, SIZE[1] // 2 :] = 0
        base = root / "NLM-MontgomeryCXRSet" / "MontgomerySet"
        _write(base / "CXR_png" / f"{id_}.png", image[..., 0].astype(np.uint16) * 16)  # 12 bits, as published
        _write(base / "ManualMask" / "leftMask" / f"{id_}.png", left)
        _write(base / "ManualMask" / "rightMask" / f"{id_}.png", right)
        (base / "ClinicalReadings").mkdir(exist_ok=True)
        (base / "ClinicalReadings" / f"{id_}.txt").write_text("Patient's Sex: F")
        seeds[id_] = number
    return seeds


def write_shenzhen(root: Path) -> dict[str, int]:
    seeds = {}
    for number in range(6):
        id_ = f"CHNCXR_{number:04d}_{number % 2}"
        image, mask = scene("xray", number)
        _write(root / "ChinaSet_AllFiles" / "CXR_png" / f"{id_}.png", image)
        if number != 3:  # not every film of the set has a mask
            _write(root / "mask" / "mask" / f"{id_}_mask.png", mask)
            seeds[id_] = number
    return seeds


def write_drive(root: Path) -> dict[str, int]:
    seeds = {}
    for part, numbers, suffix in (("test", (1, 2, 3), "test"), ("training", (21, 22, 23, 24, 25), "training")):
        for number in numbers:
            id_ = f"{number:02d}_{suffix}"
            image, mask = scene("fundus", number)
            _write(root / "DRIVE" / part / "images" / f"{id_}.tif", image)
            _write_gif(root / "DRIVE" / part / "mask" / f"{id_}_mask.gif", np.full(SIZE, 255, np.uint8))
            _write_gif(root / "DRIVE" / part / "1st_manual" / f"{number:02d}_manual1.gif", mask)
            if part == "test":
                _write_gif(root / "DRIVE" / part / "2nd_manual" / f"{number:02d}_manual2.gif", mask * 0)
            seeds[id_] = number
    return seeds


def write_stare(root: Path) -> dict[str, int]:
    seeds = {}
    for number in (1, 2, 44, 77, 139, 162):
        id_ = f"im{number:04d}"
        image, mask = scene("fundus", number)
        _write_gz(root / "stare-images" / f"{id_}.ppm.gz", image)
        _write_gz(root / "labels-vk" / f"{id_}.vk.ppm.gz", mask * 0)
        if number == 44:  # some mirrors ship plain files
            (root / "labels-ah" / f"{id_}.ah.ppm").write_bytes(_pnm(mask))
        else:
            _write_gz(root / "labels-ah" / f"{id_}.ah.ppm.gz", mask)
        seeds[id_] = number
    _write_gz(root / "stare-images" / "im0003.ppm.gz", scene("fundus", 3)[0])  # one of the 380 without vessels drawn
    return seeds


def write_clinicdb(root: Path) -> dict[str, int]:
    seeds = {}
    for number in range(1, 13):
        image, mask = scene("colonoscopy", number)
        _write(root / "CVC-ClinicDB" / "Original" / f"{number}.tif", image)
        _write(root / "CVC-ClinicDB" / "Ground Truth" / f"{number}.tif", np.dstack([mask] * 3))
        seeds[str(number)] = number
    rows = "\n".join(f"{number},{1 + (number - 1) // 3},PNG/Original/{number}.png" for number in range(1, 13))
    (root / "metadata.csv").write_text(f"frame_id,sequence_id,png_image_path\n{rows}\n")
    return seeds


def write_udiat(root: Path) -> dict[str, int]:
    seeds = {}
    for number in range(1, 8):
        id_ = f"{number:06d}"
        image, mask = scene("ultrasound", number)
        _write(root / "BUS" / "original" / f"{id_}.png", image)
        _write(root / "BUS" / "GT" / f"{id_}.png", mask)
        seeds[id_] = number
    return seeds


def write_busi(root: Path) -> dict[str, int]:
    seeds = {}
    base = root / "Dataset_BUSI_with_GT"
    for kind, numbers in (("benign", (1, 2, 3)), ("malignant", (1, 2, 3))):
        for number in numbers:
            id_, seed = f"{kind} ({number})", number + 10 * (kind == "malignant")
            image, mask = scene("ultrasound", seed)
            _write(base / kind / f"{id_}.png", image)
            upper, lower = mask.copy(), mask.copy()
            upper[SIZE[0] // 2 :] = 0
            lower[: SIZE[0] // 2] = 0
            if number == 2:  # two lesions, two files
                _write(base / kind / f"{id_}_mask.png", upper)
                _write(base / kind / f"{id_}_mask_1.png", lower)
            else:
                _write(base / kind / f"{id_}_mask.png", mask)
            seeds[id_] = seed
    _write(base / "normal" / "normal (1).png", scene("ultrasound", 30)[0])
    _write(base / "normal" / "normal (1)_mask.png", np.zeros(SIZE, np.uint8))
    return seeds


def write_dsb2018(root: Path) -> dict[str, int]:
    seeds = {}
    for number in range(6):
        id_ = f"{number:02d}" + "ab" * 20
        image, mask = scene("microscopy", number)
        folder = root / "stage1_train" / id_
        _write(folder / "images" / f"{id_}.png", np.dstack([image, np.full(SIZE, 255, np.uint8)]))  # RGBA, as published
        count, parts = cv2.connectedComponents(mask)
        for part in range(1, count):
            _write(folder / "masks" / f"{part:03d}{'cd' * 10}.png", ((parts == part) * 255).astype(np.uint8))
        seeds[id_] = number
    return seeds


def write_tnbc(root: Path) -> dict[str, int]:
    seeds = {}
    base = root / "TNBC_NucleiSegmentation"
    for slide, count in ((1, 3), (2, 2), (3, 3), (4, 2), (5, 2)):
        for number in range(1, count + 1):
            id_, seed = f"{slide:02d}_{number}", 10 * slide + number
            image, mask = scene("histopathology", seed)
            _write(base / f"Slide_{slide:02d}" / f"{id_}.png", image)
            _write(base / f"GT_{slide:02d}" / f"{id_}.png", mask)
            seeds[id_] = seed
    hidden = root / "__MACOSX" / "TNBC_NucleiSegmentation" / "Slide_01"
    hidden.mkdir(parents=True)
    (hidden / "._01_1.png").write_bytes(b"\0")
    return seeds


def write_photographs(root: Path) -> dict[str, int]:
    seeds = {}
    for number in (1, 2, 3):
        _write(root / "sa_000000" / f"sa_{number}.jpg", scene("dental", number)[0])
        (root / "sa_000000" / f"sa_{number}.json").write_text("{}")
        seeds[f"sa_{number}"] = number
    return seeds


WRITERS: dict[str, Callable[[Path], dict[str, int]]] = {
    "isic2018": write_isic2018,
    "montgomery": write_montgomery,
    "shenzhen": write_shenzhen,
    "drive": write_drive,
    "stare": write_stare,
    "clinicdb": write_clinicdb,
    "udiat": write_udiat,
    "busi": write_busi,
    "dsb2018": write_dsb2018,
    "tnbc": write_tnbc,
    "photographs": write_photographs,
}
"""Layout name -> writes a copy and tells the seed of every id that a conversion must find."""
