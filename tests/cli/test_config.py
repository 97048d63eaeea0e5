"""``infer --config``: options from a file, each as it would be on the command line, which wins."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from espmedsam_edge.cli import build_app, main
from espmedsam_edge.imaging.encode import write_image
from espmedsam_edge.runtime import inference
from espmedsam_edge.runtime.request import InferenceRequest

NUMBERS = (
    "frames",
    "every",
    "threads",
    "opacity",
    "start",
    "duration",
    "max-latency",
    "give-up",
    "fps",
    "threshold",
    "min-area",
    "largest",
)
Infer = Callable[..., tuple[int, str, str]]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    write_image(tmp_path / "picture.png", pixels)
    return tmp_path / "picture.png"


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        (tmp_path / "run.toml").write_text(text)
        return tmp_path / "run.toml"

    return write


def test_a_file_takes_the_place_of_options_and_the_command_line_wins(
    infer: Infer, picture: Path, config: Callable[[str], Path]
) -> None:
    file = config('masks = "here"\njsonl = "lines.jsonl"\nquiet = true\nthreshold = 0.25\noverwrite = false')
    assert infer(picture, "--config", file, "--masks", "there")[0] == 0
    assert Path("there/picture.png").is_file()
    assert Path("lines.jsonl").is_file()
    assert not Path("here").exists()
    code, _, error = infer(picture, "--config", file, "--masks", "there")
    assert (code, "there" in error) == (2, True)  # overwrite = false
    assert infer(picture, "--config", file, "--masks", "there", "--overwrite")[0] == 0


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> Callable[..., InferenceRequest]:
    """What ``infer`` would run, but for the names of files that it also reads, as the configuration's is."""
    requests: list[InferenceRequest] = []

    def stop(request: InferenceRequest) -> None:
        requests.append(request)
        raise KeyboardInterrupt

    def request_of(*arguments: object) -> InferenceRequest:
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            main(["infer", *map(str, arguments)])
        return replace(requests.pop(), also_read=[])

    monkeypatch.setattr(inference, "Inference", stop)
    return request_of


def test_every_option_means_the_same_in_a_file(
    requested: Callable[..., InferenceRequest], config: Callable[[str], Path]
) -> None:
    command: Any = typer.main.get_command(build_app("infer")).commands["infer"]  # type: ignore[attr-defined]
    values: dict[str, Any] = {"decoder": "software", "contours": "rle", "uids": "hashed", "rotate": 90, "serve": 8080}
    values |= {"backend": "openvino", "crop": "1,2,30,40", "opacity": 0.5, "threshold": 0.25, "tile": 256}
    values |= {"export": "coco", "min-confidence": 0.5, "min-area": 4, "largest": 3, "spacing": "0.5mm"}
    values |= {"shard": "1/2", "publish": "mqtt://broker/topic"}
    tried = 0
    plain = requested("picture.png")
    for option in command.params:
        name = option.opts[0].lstrip("-")
        if name in (
            "arguments",
            "config",
            "verbose",
            "quiet",
            "device",
            "arithmetic",
            "provider",
            "token",
            "allow-host",
            "trust-proxy",
            "url",
            "export-to",
        ):
            continue  # not in the request, or only beside another
        value = True if option.is_flag else values.get(name, 2 if name in NUMBERS else "text")
        words = [f"--{name}"] if option.is_flag else [f"--{name}", str(value)]
        by_word = requested("picture.png", *words)
        by_file = requested("--config", config(f'arguments = ["picture.png"]\n{name} = {json.dumps(value)}'))
        assert by_file == by_word != plain, name
        tried += 1
    assert tried > 25
    both = 'serve = 80\nallow-host = ["a", "b"]\ntoken = "t"\nbackend = "openvino"\ndevice = "GPU"\narithmetic = "fp16"'
    words = ["--serve", "80", "--allow-host", "a", "--allow-host", "b", "--token", "t"]
    words += ["--backend", "openvino", "--device", "GPU", "--arithmetic", "fp16"]
    assert requested("p.png", "--config", config(both)) == requested("p.png", *words)
    more = 'serve = 80\ntrust-proxy = ["10.0.0.1"]\nbackend = "triton"\nurl = "http://a:1"'
    words = ["--serve", "80", "--trust-proxy", "10.0.0.1", "--backend", "triton", "--url", "http://a:1"]
    assert requested("p.png", "--config", config(more)) == requested("p.png", *words)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("max_latency = 1", "there is no option 'max_latency'. Did you mean 'max-latency'?"),
        ("config = 'other.toml'", "there is no option 'config'."),
        ("opacity = 3", "opacity: Input should be less than or equal to 1"),
        ("frames = 2.5", "frames: "),
        ("frames = true", "frames: it takes a text or a number."),
        ("decoder = 'fast'", "decoder: it takes one of 'auto', 'software', 'hardware'."),
        ("out = ['a']", "out: it takes one value."),
        ("out = {a = 1}", "out: it takes a text or a number."),
        ("start = 2026-11-28", "start: it takes a text or a number."),
        ("overwrite = 'yes'", "overwrite: it takes true or false."),
        ("allow-host = 'a'", "allow-host: it takes a list"),
        ("arguments = 'a.png'", "arguments: it takes a list"),
        ('masks = "a\\u0000b"', "masks: it takes no text with a character of value 0."),
        ('arguments = ["a\\u0000.png"]', "arguments: it takes no text with a character of value 0."),
        ("masks", "run.toml is not TOML: "),
        (f"a = {'[' * 20000}", "run.toml is not TOML: "),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(
    infer: Infer, picture: Path, config: Callable[[str], Path], text: str, line: str
) -> None:
    code, out, error = infer(picture, "--config", config(text))
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert line in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("place", ["key", "twice", "open", "list"])
def test_a_password_on_a_wrong_line_is_not_told(
    infer: Infer, picture: Path, config: Callable[[str], Path], place: str
) -> None:
    secret = "hunter2-Zauberwort9"
    command: Any = typer.main.get_command(build_app("infer")).commands["infer"]  # type: ignore[attr-defined]
    texts = {
        "key": [f'"{secret}" = true', f'"rtsp://admin:{secret}@camera/" = 1', f"[{secret}]"],
        "twice": [f'"{secret}" = 1\n"{secret}" = 2', f"masks = 1\nmasks.{secret} = 2", f"{{ {secret}"],
        "open": [f'token = "{secret}', f"token = {secret}", f"{secret}", f'x = """{secret}'],
        "list": [f'{option.opts[0].lstrip("-")} = ["{secret}"]' for option in command.params if option.name != "quiet"],
    }
    if place == "list":  # each option that cannot be a text
        texts["list"] += [f'{option.opts[0].lstrip("-")} = "{secret}"' for option in command.params
                          if option.type_descriptor.annotation not in (str, Path)]  # fmt: skip
    for text in texts[place]:
        code, out, error = infer(picture, "--config", config(text))
        if code != 2 or "there is no file" in error:
            continue  # it was a place for a text
        assert not any(part in error + out for part in ("hunter", "Zauber", "wort9")), (text, error)
    assert len(texts[place]) > 2


def test_a_file_that_is_none_is_one_line(infer: Infer, picture: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "missing.toml", tmp_path):
        code, _, error = infer(picture, "--config", path)
        assert (code, error.count("\n")) == (2, 1)
        assert f"cannot read {path}: " in error
