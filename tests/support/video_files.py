"""Small clips for tests: what each frame shows is known."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

FRAMES = 12


def clip_frame(number: int, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    """A grey frame with a red square whose place tells its number modulo 12, (H, W, 3) BGR."""
    frame = np.full((*size, 3), 90, np.uint8)
    left = 4 * (number % 12)
    frame[16:32, left : left + 16] = (40, 40, 220)
    return frame


def number_of(frame: np.ndarray) -> int:
    """The number, modulo 12, of a frame that went through a lossy codec."""
    red = frame[16:32, :, 2].astype(int) - frame[16:32, :, 1]
    return round((float(np.argmax(np.convolve(red.mean(axis=0), np.ones(16), "valid")))) / 4)


def save_clip(path: Path, frames: int = FRAMES, size: tuple[int, int] = (48, 64), fps: float = 10) -> Path:
    """Motion JPEG in AVI (or MPEG-4 in MP4) by OpenCV, which every machine can write."""
    fourcc = "MJPG" if path.suffix == ".avi" else "mp4v"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*fourcc), fps, (size[1], size[0]))
    assert writer.isOpened()
    for number in range(frames):
        writer.write(clip_frame(number, size))
    writer.release()
    return path


def cut(path: Path, kept: float) -> Path:
    """Keep the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    return path
