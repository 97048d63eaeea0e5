"""USB cameras, with a double of OpenCV's capture: what is asked of the driver, and what happens when it is gone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest
from listening import listening

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.sources import camera as camera_source
from espmedsam_edge.runtime.sources.camera import CameraFeed, cameras
from espmedsam_edge.runtime.sources.live import BackOff, LiveSource
from espmedsam_edge.runtime.sources.uris import parse_uri


class Capture:
    """Stands for cv2.VideoCapture; ``made`` keeps each that was opened."""

    made: ClassVar[list[Capture]]
    works = True
    frames = 3

    def __init__(self, device: str, api: int) -> None:
        self.device, self.api = device, api
        self.settings: dict[int, float] = {}
        self.patience = os.environ.get("OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT")
        self.left = self.frames
        self.released = False
        self.made.append(self)

    def set(self, setting: int, value: float) -> bool:
        self.settings[setting] = value
        return setting != cv2.CAP_PROP_BUFFERSIZE  # as drivers that refuse it

    def get(self, setting: int) -> float:
        return 30.0 if setting == cv2.CAP_PROP_FPS else 0.0

    def isOpened(self) -> bool:
        return self.works

    def read(self) -> tuple[bool, Any]:
        self.left -= 1
        return (True, np.full((48, 64, 3), self.left, np.uint8)) if self.left >= 0 else (False, None)

    def release(self) -> None:
        self.released = True


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> type[Capture]:
    class Mine(Capture):
        made: ClassVar[list[Capture]] = []

    monkeypatch.setattr(camera_source.cv2, "VideoCapture", Mine)
    return Mine


def feed(device: Path, options: str = "") -> CameraFeed:
    uri = parse_uri(f"v4l2://{device}{options}")
    assert uri is not None
    return CameraFeed(uri)


@pytest.fixture
def device(tmp_path: Path) -> Path:
    path = tmp_path / "video0"
    path.touch()
    return path


def test_mjpg_and_a_buffer_of_one_are_asked_for(capture: type[Capture], device: Path) -> None:
    camera = feed(device, "?size=1280x720&fps=60")
    camera.open()
    (made,) = capture.made
    assert (made.device, made.api) == (str(device), cv2.CAP_V4L2)
    settings = list(made.settings)
    assert made.settings[cv2.CAP_PROP_FOURCC] == cv2.VideoWriter.fourcc(*"MJPG")
    assert made.settings[cv2.CAP_PROP_BUFFERSIZE] == 1
    assert made.settings[cv2.CAP_PROP_FRAME_WIDTH] == 1280
    assert made.settings[cv2.CAP_PROP_FRAME_HEIGHT] == 720
    assert made.settings[cv2.CAP_PROP_FPS] == 60
    assert settings.index(cv2.CAP_PROP_FOURCC) < settings.index(cv2.CAP_PROP_FRAME_WIDTH)
    assert camera.fps == 30
    camera.close()
    assert made.released


def test_a_silent_camera_is_noticed_soon(capture: type[Capture], device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV waits ten seconds unless this variable, which it reads only once, is set before its first capture."""
    monkeypatch.delenv("OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT", raising=False)
    feed(device).open()
    monkeypatch.setenv("OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT", "7")
    feed(device).open()
    assert [made.patience for made in capture.made] == ["3", "7"]  # what the user has set stays


def test_this_opencv_knows_the_variable() -> None:
    texts = [library.read_bytes() for library in Path(cv2.__file__).parent.rglob("*.so*")]
    here = [text for text in texts if b"VIDEOIO(V4L2" in text]
    if not here:
        pytest.skip("this OpenCV has no Video4Linux, or keeps it elsewhere")
    assert any(b"OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT" in text for text in here)


def test_another_format(capture: type[Capture], device: Path) -> None:
    feed(device, "?format=YUYV").open()
    assert capture.made[0].settings[cv2.CAP_PROP_FOURCC] == cv2.VideoWriter.fourcc(*"YUYV")
    with pytest.raises(UserError, match="four letters"):
        feed(device, "?format=H.264")


def test_unplugged_and_plugged_in_again(capture: type[Capture], device: Path) -> None:
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        if "dropped out" in line and not gone:
            gone.append(device.rename(device.with_name("gone")))

    gone: list[Path] = []
    camera = feed(device)
    opened = camera.open

    def open_and_plug_in() -> None:
        try:
            opened()
        except UserError:
            gone[0].rename(device)
            raise

    camera.open = open_and_plug_in  # type: ignore[method-assign]
    with listening(tell), LiveSource(camera, "v4l2:///dev/video0", "video0", BackOff(0.001, 0.001)) as source:
        frames = iter(source)
        while source.reconnects < 2:
            next(frames)
    assert "is it unplugged?" in lines[0]
    assert "is back after" in lines[1]
    assert all(made.released for made in capture.made)


def test_a_missing_camera_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camera_source, "glob", lambda pattern: ["/dev/video10", "/dev/video2"])
    with pytest.raises(UserError) as caught:
        feed(tmp_path / "video9").open()
    assert f"no camera {tmp_path / 'video9'}. There are /dev/video2, /dev/video10." in str(caught.value)
    assert caught.value.exit_code == 1
    monkeypatch.setattr(camera_source, "glob", lambda pattern: [])
    assert cameras() == []
    with pytest.raises(UserError, match="no camera at all"):
        feed(tmp_path / "video9").open()


def test_what_is_no_camera_is_one_line(capture: type[Capture], device: Path) -> None:
    capture.works = False
    with pytest.raises(UserError, match="cannot open the camera"):
        feed(device).open()
    assert capture.made[0].released


def test_a_file_that_is_no_device_is_refused_by_opencv_too(device: Path) -> None:
    with pytest.raises(UserError, match="cannot open the camera"):
        feed(device).open()
