"""Everything of NVIDIA ModelOpt that this package uses: AutoCast to FP16 and the INT8 quantiser, nothing else.

Both are told what to do with which node, from ranges that were measured before on all images: ModelOpt's own
measurement keeps every tensor of every image (8 GB for four images of 1024 x 1024) and its rules know neither this
network's attention nor its token side. A release that changes its interface fails here, with a line that says so.
"""

from __future__ import annotations

import inspect
import logging
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from espmedsam_edge.errors import UserError
from espmedsam_edge.files import temporary_folder

_AUTOCAST = (
    "modelopt.onnx.autocast",
    "convert_to_mixed_precision",
    ("onnx_path", "low_precision_type", "keep_io_types", "data_max", "custom_rule"),
)
_QUANTISER = (
    "modelopt.onnx.quantization",
    "quantize",
    (
        "onnx_path", "quantize_mode", "calibration_data", "calibration_method", "calibration_cache_path",
        "calibration_eps", "nodes_to_quantize", "output_path", "log_level", "high_precision_dtype", "passes", "dq_only",
        "kwargs",
    ),
)  # fmt: skip
_RULE = ("modelopt.onnx.autocast.nodeclassifier", "NodeRuleBase")

_INSTALL = "Install it: pip install 'espmedsam-edge[calibrate]'"


def version() -> str:
    """The installed ModelOpt's version.

    Raises:
        UserError: not installed.
    """
    try:
        return metadata.version("nvidia-modelopt")
    except metadata.PackageNotFoundError as error:
        raise UserError("calibrate needs NVIDIA ModelOpt, which is not installed.", _INSTALL) from error


def check_interface() -> None:
    """Import what is used and see that it takes what it is given.

    Raises:
        UserError: ModelOpt or a package it imports is missing, or a release changed its interface.
    """
    for module, name, parameters in (_AUTOCAST, _QUANTISER):
        _function(module, name, parameters)
    _rule_class()


def to_fp16(model: ModelProto, keep: Callable[[str], bool]) -> ModelProto:
    """AutoCast: nodes to FP16 but those whose name ``keep`` accepts, with Casts between; input and output stay float32.

    Raises:
        UserError: ModelOpt is missing, has changed, or failed.
    """
    convert = _function(*_AUTOCAST)

    class MeasuredRule(_rule_class()):  # type: ignore[misc]
        """Keeps in FP32 what the plan says."""

        def _check_inner(self, node: Any) -> bool:
            return keep(node.name)

        def _log_skipped(self, node: Any, **kwargs: Any) -> None:
            """ModelOpt would print a line a node."""

    with _workplace(model) as file:
        converted: ModelProto = convert(
            str(file), low_precision_type="fp16", keep_io_types=True, data_max=np.inf, custom_rule=MeasuredRule()
        )
    return converted


def quantise(
    model: ModelProto, nodes: Sequence[str], thresholds: Mapping[str, float], image: NDArray[np.float32]
) -> ModelProto:
    """The INT8 quantiser: Q/DQ around the activations of ``nodes``, their weights stored as INT8 with DequantizeLinear.

    Args:
        model: in FP32.
        nodes: names of Conv and MatMul nodes; each weight is quantised by output channel, symmetric.
        thresholds: where each of their input activations is clipped; +-threshold becomes +-127.
        image: one real input; ModelOpt wants to run the graph once, its ranges are replaced by ``thresholds``.

    Returns:
        All else in FP32.

    Raises:
        UserError: ModelOpt is missing, has changed, or failed.
    """
    quantize = _function(*_QUANTISER)
    with _workplace(model) as file:
        cache, output = file.with_name("ranges.cache"), file.with_name("int8.onnx")
        lines = [f"{name}: {struct.pack('!f', value / 127).hex()}" for name, value in thresholds.items()]
        cache.write_text("\n".join(["espmedsam-edge", *lines]) + "\n")
        quantize(
            str(file),
            quantize_mode="int8",
            calibration_data={model.graph.input[0].name: image},
            calibration_method="max",
            calibration_cache_path=str(cache),
            calibration_eps=["cpu"],
            nodes_to_quantize=[f"^{re.escape(name)}$" for name in nodes],
            output_path=str(output),
            log_level="CRITICAL",
            high_precision_dtype="fp32",  # to_fp16 follows, which knows the nodes to keep
            passes=[],
            dq_only=True,
            enable_gemv_detection_for_trt=False,
        )
        return onnx.load(str(output))


def _function(module: str, name: str, parameters: Sequence[str]) -> Callable[..., Any]:
    function = getattr(_module(module), name, None)
    if function is None:
        raise _changed(f"{module} has no {name}")
    missing = [parameter for parameter in parameters if parameter not in inspect.signature(function).parameters]
    if missing:
        raise _changed(f"{module}.{name} takes no {', '.join(missing)}")
    return function  # type: ignore[no-any-return]


def _rule_class() -> Any:
    module, name = _RULE
    rule = getattr(_module(module), name, None)
    if rule is None or not hasattr(rule, "_check_inner"):
        raise _changed(f"{module} has no {name} with _check_inner")
    return rule


def _module(name: str) -> Any:
    version()
    try:
        with _quiet():
            module = import_module(name)
    except ImportError as error:
        if (error.name or "").startswith("modelopt"):
            raise _changed(f"there is no {error.name}") from error
        reason = str(error).splitlines()[0] or "a package it needs is missing"
        raise UserError(f"NVIDIA ModelOpt cannot be imported: {reason}.", _INSTALL) from error
    return module


@contextmanager
def _quiet() -> Iterator[None]:
    """ModelOpt sets up loggers of its own at each call; its lines would break the progress bar."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _changed(what: str) -> UserError:
    return UserError(
        f"NVIDIA ModelOpt {version()} is not one this program knows: {what}.",
        "Install a release that works: pip install 'nvidia-modelopt==0.47.0'",
    )


@contextmanager
def _workplace(model: ModelProto) -> Iterator[Path]:
    """A folder with the model in it, for ModelOpt to litter; its failures become one line."""
    with temporary_folder() as folder:
        file = folder / "fp32.onnx"
        file.write_bytes(model.SerializeToString())
        try:
            with _quiet():
                yield file
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            first = (str(e).strip() or type(e).__name__).splitlines()[0][:300]
            raise UserError(
                f"NVIDIA ModelOpt {version()} failed: {type(e).__name__}: {first}",
                "Try another release: pip install 'nvidia-modelopt==0.47.0'; if it stays so, report it.",
                exit_code=1,
            ) from e
