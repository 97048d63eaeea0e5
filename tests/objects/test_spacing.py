"""How far pixels lie apart: as users write it, as files state it, and through turning and cropping to the results."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from seg_sources import save_dicom
from skimage.measure import regionprops
from toy_bundles import save_toy_bundle

from espmedsam_edge import ModelOptions, ObjectOptions, Outputs, ReadingOptions, infer, infer_frames
from espmedsam_edge.errors import UserError
from espmedsam_edge.objects.spacing import parse_spacing
from espmedsam_edge.objects.stated import stated_spacing


@pytest.mark.parametrize(
    ("text", "spacing"),
    [
        ("0.25um", (0.00025, 0.00025)),
        ("0.25 µm", (0.00025, 0.00025)),
        ("250nm", (0.00025, 0.00025)),
        ("0.4,0.3mm", (0.4, 0.3)),
        (" 0.4 , 0.3 MM ", (0.4, 0.3)),
        ("0.05cm", (0.5, 0.5)),
        ("tiff", None),
    ],
)
def test_a_spacing_is_read_as_it_is_written(text: str, spacing: tuple[float, float] | None) -> None:
    found = parse_spacing(text)
    assert found == (None if spacing is None else pytest.approx(spacing))


@pytest.mark.parametrize(
    "text",
    [
        "0mm",
        "-1mm",
        "nanmm",
        "infmm",
        "1e308mm",
        "1e-30um",
        "0.3",
        "mm",
        "",
        "1,2,3mm",
        "1,mm",
        "0,1mm",
        "1,nan mm",
        "dpi",
    ],
)
def test_what_is_no_spacing_is_one_line(text: str) -> None:
    with pytest.raises(UserError) as refused:
        ReadingOptions(spacing=text)
    assert f"spacing '{text}'" in str(refused.value)
    assert "0.25um" in str(refused.value)


@given(st.text(max_size=20) | st.floats().map(lambda value: f"{value}mm"))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_spacing_in_reason_or_refused(text: str) -> None:
    try:
        found = parse_spacing(text)
    except UserError:
        return
    assert found is None or all(1e-6 <= side <= 1e4 for side in found)


PICTURE = np.random.default_rng(1).integers(0, 256, (30, 40), np.uint8)


def saved(name: str, **options: Any) -> Path:
    tifffile.imwrite(name, PICTURE, **options)
    return Path(name)


@pytest.mark.usefixtures("in_tmp")
def test_programs_state_a_spacing_and_a_resolution_counts_when_asked() -> None:
    ome = {"axes": "YX", "PhysicalSizeX": 0.3, "PhysicalSizeY": 400, "PhysicalSizeYUnit": "nm"}
    assert stated_spacing(saved("a.ome.tif", metadata=ome)) == pytest.approx((4e-4, 3e-4))
    for byteorder in ("<", ">"):
        fiji = saved("b.tif", imagej=True, resolution=(4, 5), metadata={"unit": "um"}, byteorder=byteorder)
        assert stated_spacing(fiji) == pytest.approx((1 / 5000, 1 / 4000))
        for unit, factor in ((2, 25.4), (3, 10.0)):
            plain = saved("c.tif", resolution=(300, 150), resolutionunit=unit, byteorder=byteorder, bigtiff=unit == 3)
            assert stated_spacing(plain) is None
            assert stated_spacing(plain, resolution=True) == pytest.approx((factor / 150, factor / 300))
            turned = saved(
                "d.tif",
                resolution=(300, 150),
                resolutionunit=unit,
                extratags=[(274, 3, 1, 6, True)],
                byteorder=byteorder,
            )
            assert stated_spacing(turned, resolution=True) == pytest.approx((factor / 300, factor / 150))
    assert stated_spacing(saved("e.tif", imagej=True, resolution=(4, 4), metadata={"unit": "\\u00B5m"})) is not None
    assert stated_spacing(saved("f.tif", imagej=True, resolution=(4, 4), metadata={"unit": "pixel"})) is None
    assert stated_spacing(saved("g.tif", resolution=(1, 1), resolutionunit=1), resolution=True) is None


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize("value", ["0", "nan", "inf", "1e308", "-1", "many", ""])
def test_what_a_file_states_beyond_reason_is_not_known(value: str) -> None:
    path = saved("a.ome.tif", metadata={"axes": "YX", "PhysicalSizeX": 0.33333, "PhysicalSizeY": 0.33333})
    assert stated_spacing(path) is not None
    path.write_bytes(path.read_bytes().replace(b'"0.33333"', f'"{value:<7}"'.encode()))
    assert stated_spacing(path) is None


@pytest.mark.usefixtures("in_tmp")
def test_damaged_files_state_nothing() -> None:
    data = saved("a.ome.tif", metadata={"axes": "YX", "PhysicalSizeX": 0.3, "PhysicalSizeY": 0.3}).read_bytes()
    random = np.random.default_rng(7)
    for _ in range(300):
        broken = bytearray(data[: random.integers(0, len(data) + 1)])
        for place in random.integers(0, max(1, len(broken)), 6):
            broken[place : place + 1] = bytes([random.integers(256)])
        Path("b.tif").write_bytes(broken)
        for resolution in (False, True):
            found = stated_spacing(Path("b.tif"), resolution=resolution)
            assert found is None or all(1e-6 <= side <= 1e4 for side in found)
    assert stated_spacing(Path("missing.tif")) is None


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def disc(size: tuple[int, int] = (120, 160)) -> Any:
    image = np.zeros(size, np.uint8)
    cv2.ellipse(image, (100, 50), (30, 18), 20, 0, 360, 255, -1)
    return image


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize("rotate", [0, 90, 180, 270])
@pytest.mark.parametrize("crop", [None, (60, 20, 90, 80)])
def test_an_anisotropic_spacing_is_right_after_turning_and_cropping(
    tmp_path: Path, rotate: int, crop: tuple[int, ...] | None
) -> None:
    """Of rows 0.4 mm and columns 0.1 mm apart, as regionprops measures the mask between such rows and columns."""
    save_dicom(Path("a.dcm"), (120, 160), PixelSpacing=[0.4, 0.1], PixelData=disc().tobytes())
    bundle = save_toy_bundle(tmp_path / "toy.bundle", ("histopathology",), image_size=512).path
    if crop is not None and rotate in (90, 270):
        x, y, width, height = crop
        crop = (120 - y - height, x, height, width) if rotate == 90 else (y, 160 - x - width, height, width)
    elif crop is not None and rotate == 180:
        crop = (160 - crop[0] - crop[2], 120 - crop[1] - crop[3], *crop[2:])
    reading = ReadingOptions(rotate=rotate, crop=crop)
    model = ModelOptions(bundle, objects=ObjectOptions(instances=True))
    ((frame, result),) = infer_frames("a.dcm", model, reading=reading)
    spacing = (0.4, 0.1) if rotate in (0, 180) else (0.1, 0.4)
    assert frame.spacing == spacing
    assert result.instances is not None
    (one,) = result.instances.measured
    (reference,) = regionprops(result.instances.labels, spacing=spacing)
    assert one.physical is not None
    assert one.physical.area == pytest.approx(reference.area) == pytest.approx(one.area * 0.04)
    assert one.eccentricity == pytest.approx(reference.eccentricity)
    points = np.concatenate([reference.coords + half for half in ([0.5, 0], [-0.5, 0], [0, 0.5], [0, -0.5])]) * spacing
    assert one.physical.longest == pytest.approx(pdist(points).max())
    fields = result.instances.to_dict()["instances"][0]
    assert fields["mm"]["area"] == pytest.approx(one.physical.area, rel=1e-6)
    assert "perimeter" not in fields["mm"]


@pytest.mark.usefixtures("in_tmp")
def test_what_the_user_says_counts_and_microscopes_are_told_in_micrometres(tmp_path: Path) -> None:
    bundle = save_toy_bundle(tmp_path / "toy.bundle", ("histopathology",), image_size=512).path
    tifffile.imwrite("a.tif", disc(), resolution=(254, 254), resolutionunit=2)
    outputs = Outputs(jsonl="r.jsonl", objects="o.csv", csv="a.csv", overwrite=True)
    model = ModelOptions(bundle, objects=ObjectOptions(instances=True))
    for given_spacing, millimetres, unit in (("0.25um", 0.00025, "um"), ("tiff", 0.1, "mm"), (None, None, "")):
        report = infer("a.tif", model, outputs, ReadingOptions(spacing=given_spacing))
        assert not report.failures
        line = json.loads(Path("r.jsonl").read_text())
        with Path("o.csv").open(newline="") as stream:
            (row,) = csv.DictReader(stream)
        with Path("a.csv").open(newline="") as stream:
            (areas,) = csv.DictReader(stream)
        assert row["unit"] == unit
        if millimetres is None:
            assert "spacing_mm" not in line
            assert (row["area"], row["longest"], areas["area_mm2"]) == ("", "", "")
            continue
        assert line["spacing_mm"] == pytest.approx([millimetres] * 2)
        factor = millimetres * (1000 if unit == "um" else 1)
        for name in ("longest", "shortest", "perimeter", "equivalent_diameter"):
            assert float(row[name]) == pytest.approx(factor * float(row[f"{name}_px"]), rel=1e-5)
        assert float(row["area"]) == pytest.approx(factor**2 * float(row["area_px"]), rel=1e-5)
        for found in (line["area_mm2"], float(areas["area_mm2"])):
            assert found == pytest.approx(millimetres**2 * line["area"], rel=1e-4)


@pytest.mark.usefixtures("in_tmp")
def test_stacks_and_videos_have_it_on_every_frame(tmp_path: Path) -> None:
    bundle = save_toy_bundle(tmp_path / "toy.bundle", ("histopathology",)).path
    tifffile.imwrite(
        "s.ome.tif", np.stack([disc()] * 3), metadata={"axes": "TYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    )
    writer = cv2.VideoWriter("v.avi", cv2.VideoWriter.fourcc(*"MJPG"), 10, (160, 120))
    for _ in range(3):
        writer.write(cv2.cvtColor(disc(), cv2.COLOR_GRAY2BGR))
    writer.release()
    assert [frame.spacing for frame, _ in infer_frames("s.ome.tif", bundle)] == [pytest.approx((5e-4, 5e-4))] * 3
    for text, spacing in ((None, None), ("tiff", None), ("2mm", (2.0, 2.0))):
        frames = infer_frames("v.avi", bundle, reading=ReadingOptions(spacing=text))
        assert [frame.spacing for frame, _ in frames] == [spacing] * 3


def test_the_command_says_no_in_one_line(capsys: pytest.CaptureFixture[str], call: Callable[..., int]) -> None:
    for text in ("0um", "nanmm", "1e308mm", "5"):
        assert call("infer", "a.png", "--spacing", text) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def call() -> Callable[..., int]:
    from espmedsam_edge.cli import main

    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        return ended.value.code if isinstance(ended.value.code, int) else 99

    return run
