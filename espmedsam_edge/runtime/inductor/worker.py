"""The child process that compiles a network: torch, and the compilers it starts, may crash; only this process ends."""

from __future__ import annotations

import os
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from espmedsam_edge.errors import UserError
from espmedsam_edge.machine.environment import process_memory
from espmedsam_edge.onnx_file import GraphRefused
from espmedsam_edge.runtime.engines.agreement import agree
from espmedsam_edge.runtime.engines.child_side import Report, answer
from espmedsam_edge.runtime.engines.worker import read_wanted
from espmedsam_edge.runtime.inductor.building import InductorRequest, InductorResult


def main() -> int:
    """Do what the request on standard input asks; 0 when an answer was written."""
    warnings.filterwarnings("ignore")  # torch's own, about itself
    return answer(lambda content, report: build(InductorRequest.model_validate_json(content), report))


def _keep_private(folder: Path) -> None:
    """Have what the compilers leave behind go with the parent's folder, unless the user named a place for it.

    It is native code, and torch would look for it in a folder of /tmp, which is everyone's.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    os.environ["PYTHONSAFEPATH"] = "1"  # of the Pythons that torch starts, as in ``children.OWN_PATH``


def build(request: InductorRequest, report: Report) -> InductorResult:
    """Compile the graph, write the package, run it on a phantom beside ONNX Runtime.

    Raises:
        UserError: an operator that is not known, or what torch or the compiler said.
    """
    began = time.monotonic()
    report("loading torch", 0.0)
    _keep_private(request.package.parent)
    if request.device == "cuda":
        _find_cuda(request.package.parent)
    content = read_wanted(request.graph_path, request.graph.sha256)
    import torch

    from espmedsam_edge.runtime.inductor.network import GraphNetwork
    from espmedsam_edge.runtime.inductor.package import load_package

    torch.set_num_threads(request.threads)
    torch.backends.cudnn.allow_tf32 = False  # what is FP32 is computed so
    network = GraphNetwork(content, request.arithmetic, request.graph.file).eval().to(request.device)
    report("tracing", 0.05)
    try:
        _compile(network, request, report)
    except (GraphRefused, KeyError) as error:
        raise UserError(f"{request.graph_path} is no graph of this program: {error}.", exit_code=1) from error
    except Exception as error:  # of torch, in which a compiler may raise anything
        raise UserError(
            f"torch {torch.__version__} could not compile {request.graph.file}: {_reason(error)}",
            "Update torch or the C++ compiler, or use another backend.",
            exit_code=1,
        ) from error
    seconds = time.monotonic() - began
    report("comparing", 0.95)
    package = load_package(request.package.read_bytes(), request.graph, request.device)

    def run(image: bytes) -> bytes:
        tensor = torch.from_numpy(np.frombuffer(image, np.float32).reshape(request.graph.input_shape).copy())
        return package.run(tensor.to(request.device)).cpu().numpy().tobytes()

    agreement = agree(request.graph, content, run, normalization=request.normalization, threshold=request.threshold)
    return InductorResult(seconds=round(seconds, 3), peak_memory_bytes=process_memory()[1], agreement=agreement)


def _compile(network: Any, request: InductorRequest, report: Report) -> None:
    import torch
    import torch._inductor

    image = torch.zeros(request.graph.input_shape, device=request.device)
    with torch.no_grad():
        program = torch.export.export(network, (image,), strict=False)
        report("compiling", 0.1)
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(request.package),
            inductor_configs={
                "freezing": True,  # weights are constants, laid out as the kernels want them
                "cpp.dynamic_threads": True,  # whatever number of threads it is run with
                "compile_threads": 1 if request.device == "cpu" else request.threads,
                "aot_inductor.precompile_headers": False,  # for the next compilation, which is none of ours
            },
        )


def _find_cuda(folder: Path) -> None:
    """Show the compiler CUDA's headers of torch's own packages, and the driver's library, where the system has none."""
    if not os.environ.get("CUDA_HOME") and not Path("/usr/local/cuda/include/cuda.h").exists():
        spec = find_spec("nvidia")
        places = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or []]
        headers = [file for place in places for file in sorted(place.glob("*/include/cuda.h"))]
        if headers:
            os.environ["CUDA_HOME"] = str(headers[-1].parents[1])
    # The driver installs libcuda.so.1; the name that linkers look for comes with the toolkit.
    names = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib")
    library = next((Path(name) / "libcuda.so.1" for name in names if (Path(name) / "libcuda.so.1").exists()), None)
    if library is not None:
        (folder / "libcuda.so").symlink_to(library)
        os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, [os.environ.get("LIBRARY_PATH"), str(folder)]))


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "error" in line.lower()] or lines or [type(error).__name__]
    return f"{told[0][:300].rstrip('.')}."
