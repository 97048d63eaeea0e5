"""A backend as it is asked for: by a name with words after it, or by options."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.cli import main
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.backends.backend_spec import ARITHMETICS, HINTS, BackendSpec
from espmedsam_edge.runtime.request import ModelOptions


@pytest.mark.parametrize("device", ["", "CPU", "GPU.1"])
@pytest.mark.parametrize("arithmetic", ["", *ARITHMETICS])
@pytest.mark.parametrize("hint", ["", *HINTS])
def test_what_is_written_is_read_again(device: str, arithmetic: str, hint: str) -> None:
    assert BackendSpec.parse(str(BackendSpec("openvino", device, arithmetic, hint=hint))).hint == hint
    spec = BackendSpec("openvino", device, arithmetic)
    assert BackendSpec.parse(str(spec)) == spec
    assert ModelOptions(backend="openvino", device=device, arithmetic=arithmetic).backend_spec() == str(spec)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("openvino", "openvino:throughput"),
        ("openvino:GPU:bf16", "openvino:GPU:bf16:throughput"),
        ("openvino:bf16:latency", "openvino:bf16:latency"),
        ("onnxruntime", "onnxruntime"),
        ("tensorrt", "tensorrt"),
    ],
)
def test_for_many_frames_throughput_counts_unless_it_was_said(name: str, expected: str) -> None:
    assert str(BackendSpec.parse(name).for_many()) == expected


def test_a_provider_is_onnx_runtimes() -> None:
    assert BackendSpec.parse("onnxruntime:CoreML").provider == "CoreML"
    assert ModelOptions(backend="onnxruntime", provider="dml").backend_spec() == "onnxruntime:dml"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "GPU"}, "the device 'GPU' was asked of backend auto, which takes none. .*--backend openvino"),
        ({"backend": "onnxruntime", "arithmetic": "bf16"}, "arithmetic 'bf16' was asked of backend onnxruntime"),
        ({"backend": "openvino", "provider": "dml"}, "provider 'dml' .*--backend onnxruntime"),
        ({"backend": "openvino", "arithmetic": "bf61"}, "unknown arithmetic 'bf61'. Did you mean 'bf16'"),
        ({"backend": "openvino:GPU", "device": "NPU"}, "two values of device: 'GPU' and 'NPU'"),
    ],
)
def test_what_does_not_fit_is_one_line(options: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        ModelOptions(**options)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2


def test_infer_takes_them_as_options(toy_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if find_spec("openvino") is None:
        pytest.skip("needs the extra openvino")
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    arguments = ["infer", str(toy_bundle.path), str(tmp_path / "a.png"), "--masks", str(tmp_path / "masks")]
    options = ["--backend", "openvino", "--device", "cpu", "--arithmetic", "graph", "--threads", "1"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *options])
    assert ended.value.code in (0, None)
    assert "openvino:cpu:graph (CPU, 1 thread, arithmetic as the graph has it)" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--device", "GPU"])
    assert ended.value.code == 2
    assert "--backend openvino" in capsys.readouterr().err
