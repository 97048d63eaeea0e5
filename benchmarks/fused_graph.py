"""What fusing before export is worth: the fused graph against straight exports and eager PyTorch, in turn, on one CPU.

    python benchmarks/fused_graph.py --name bench-fused-graph-MACHINE

Takes ``espmedsam-s`` of one modality at 1024x1024 with random weights (time does not depend on them) and measures, in
one process tree and in turn:

    fused               what ``espmedsam-edge export`` writes, in ONNX Runtime
    straight            ``torch.onnx.export`` of the unfused network, in ONNX Runtime
    straight-in-place   the same with the attention bias added to a slice of the scores in place, as the published
                        code does: it exports as ScatterND
    torch               the unfused network, eager

The bench's roofline line compares the fused graph with the machine's best matrix product. Writes JSON,
Markdown and a plot into ``benchmarks/results/``. Needs a quiet machine and ten minutes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import types
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from espmedsam_edge.bench.benchmark import BenchRequest, run_benchmark
from espmedsam_edge.bench.measure import BenchSettings
from espmedsam_edge.bench.plot import draw_plot
from espmedsam_edge.bench.report import as_json, as_markdown
from espmedsam_edge.export.exporter import export_bundle
from espmedsam_edge.files import atomic_write
from espmedsam_edge.machine.cores import usable_cores
from espmedsam_edge.model.checkpoint import CheckpointInfo, save_checkpoint
from espmedsam_edge.model.config import model_config
from espmedsam_edge.model.controller import BlockBag
from espmedsam_edge.model.costs import multiply_accumulates
from espmedsam_edge.model.encoder import ControlledAttention
from espmedsam_edge.model.esp_medsam import EspMedSam

RESULTS = Path(__file__).parent / "results"
MODALITY = "fundus"


class LogitsOnly(nn.Module):
    """The unfused network with one input and one output, for ``torch.onnx.export``."""

    def __init__(self, model: EspMedSam) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        output: Tensor = self.model(image, MODALITY).low_res_logits
        return output


def attention_in_place(self: ControlledAttention, x: Tensor, bag: BlockBag | None = None) -> Tensor:
    """``ControlledAttention.forward`` as published: all scores, then a bias added to a part of them."""
    windows, pixels, _ = x.shape
    qkv = self.qkv(self.norm(x)).view(windows, pixels, self.num_heads, 3 * self.key_dim)
    q, k, v = (part.transpose(1, 2) for part in qkv.split(self.key_dim, dim=3))
    assert bag is not None
    k = torch.cat([k, bag.keys.expand(windows, -1, -1, -1)], dim=2)
    v = torch.cat([v, bag.values.expand(windows, -1, -1, -1)], dim=2)
    scores = (q @ k.transpose(2, 3)) * self.scale
    scores[..., :pixels] += self.attention_biases[:, self.attention_bias_idxs]
    scores[..., pixels:] += bag.bias
    x = (scores.softmax(dim=3) @ v).transpose(1, 2).reshape(windows, pixels, self.out_dim)
    result: Tensor = self.proj(x)
    return result


def export_straight(model: EspMedSam, size: int, path: Path) -> None:
    """The unfused network through torch's exporter, nothing done to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            LogitsOnly(model),
            (torch.zeros(1, 3, size, size),),
            str(path),
            input_names=["image"],
            output_names=["logits"],
            opset_version=20,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", required=True, help="of the files in benchmarks/results/, without their ending")
    parser.add_argument("--preset", default="espmedsam-s")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--duration", type=float, default=25.0, help="seconds a contender")
    arguments = parser.parse_args()
    size, threads = arguments.image_size, usable_cores()
    torch.manual_seed(0)
    model = EspMedSam(model_config(arguments.preset), [MODALITY]).eval()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = folder / "random.safetensors"
        save_checkpoint(weights, model, CheckpointInfo(config=model.config, origin="random"))
        bundle, _ = export_bundle(weights, folder / "fused.bundle", image_size=size)
        export_straight(model, size, folder / "straight.onnx")
        for layer in model.modules():
            if isinstance(layer, ControlledAttention):
                layer.forward = types.MethodType(attention_in_place, layer)  # type: ignore[method-assign]
        export_straight(model, size, folder / "straight-in-place.onnx")
        request = BenchRequest(
            bundle.path,
            compare=[str(folder / "straight.onnx"), str(folder / "straight-in-place.onnx"), "torch"],
            checkpoint=weights,
            threads=threads,
        )
        result = run_benchmark(request, BenchSettings(duration=arguments.duration, warmup=3.0))
    data = as_json(result)
    data["model_gmac"] = multiply_accumulates(model.config, size) / 1e9
    atomic_write(RESULTS / f"{arguments.name}.json", json.dumps(data, indent=2) + "\n")
    atomic_write(RESULTS / f"{arguments.name}.md", as_markdown(result))
    atomic_write(RESULTS / f"{arguments.name}.png", draw_plot(result))
    print(as_markdown(result))


if __name__ == "__main__":
    main()
