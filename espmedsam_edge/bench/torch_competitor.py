"""The unfused model of a checkpoint run by PyTorch, eager or compiled, on the CPU or on a GPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from espmedsam_edge.bundle import Graph
from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.imaging.geometry import Tensor
from espmedsam_edge.machine.installation import install_command
from espmedsam_edge.runtime.backends.backend import BackendUnavailable

_NEEDED = ("torch", "torchvision", "timm", "segment_anything", "safetensors")
"""Modules that the network is made of and read with."""


class TorchBackend:
    """A checkpoint's network in PyTorch, its controller bags apart as they are trained.

    Eager it computes in FP32. Compiled (``torch.compile``, on a GPU with CUDA graphs) it computes in FP16 on a GPU and
    in FP32 on the CPU.
    """

    name = "torch"

    def __init__(
        self,
        checkpoint: Path,
        graph: Graph,
        threads: int,
        sha256: str = "",
        *,
        compiled: bool = False,
        on_gpu: bool = False,
    ) -> None:
        """Load, and compile at the first run.

        Args:
            sha256: of the checkpoint; "": whatever it has.

        Raises:
            BackendUnavailable: torch or what the network is made of is missing, or torch lacks this GPU.
            UserError: the checkpoint lacks the modality, or is another one.
        """
        missing = [name for name in _NEEDED if find_spec(name) is None]
        if missing:
            raise BackendUnavailable(f"not installed: {', '.join(missing)}.", install_command("export"), exit_code=1)
        import torch

        from espmedsam_edge.model.checkpoint import load_hashed_checkpoint

        if on_gpu and not torch.cuda.is_available():
            raise BackendUnavailable(
                f"torch {torch.__version__} finds no GPU, and the CPU would be no comparison.",
                "Install a torch built for this machine's CUDA.",
                exit_code=1,
            )
        torch.set_num_threads(threads)
        model, _, digest = load_hashed_checkpoint(checkpoint)
        if sha256 and digest != sha256:
            raise UserError(f"{checkpoint} was replaced meanwhile.", "Run this again.", exit_code=1)
        if graph.modality not in model.modalities:
            raise UserError(
                f"checkpoint {checkpoint} has no modality '{graph.modality}'.",
                nearest(graph.modality, model.modalities),
            )
        self.precision = "fp16" if compiled and on_gpu else "fp32"
        self._place = torch.device("cuda" if on_gpu else "cpu")
        self._dtype = torch.float16 if self.precision == "fp16" else torch.float32
        network: Any = model.eval().requires_grad_(False).to(self._place, self._dtype)
        self._model = torch.compile(network, mode="reduce-overhead" if on_gpu else None) if compiled else network
        self.graph = graph
        self.device = torch.cuda.get_device_name() if on_gpu else f"CPU, {threads} thread{'s' if threads > 1 else ''}"

    def run(self, image: Tensor) -> Tensor:
        import torch

        with torch.inference_mode():
            logits = self._network(torch.from_numpy(image).to(self._place, self._dtype))
            return np.asarray(logits.float().cpu().numpy(), np.float32)

    def network_seconds(self, image: Tensor) -> float | None:
        """Seconds on the GPU of the network alone, its input there already; None on the CPU."""
        import torch

        if self._place.type != "cuda":
            return None
        there = torch.from_numpy(image).to(self._place, self._dtype)
        events: Any = torch.cuda.Event
        begin, end = events(enable_timing=True), events(enable_timing=True)
        with torch.inference_mode():
            torch.cuda.synchronize()
            begin.record()
            self._network(there)
            end.record()
            end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def close(self) -> None:
        vars(self).pop("_model", None)

    def _network(self, image: Any) -> Any:
        from torch._dynamo.exc import TorchDynamoException

        try:
            return self._model(image, self.graph.modality).low_res_logits
        except TorchDynamoException as error:
            line = " ".join(str(error).split())[:200] or type(error).__name__
            raise BackendUnavailable(
                f"torch.compile failed: {line}", "It needs a C++ compiler, and on a GPU Triton.", exit_code=1
            ) from error
