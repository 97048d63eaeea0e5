"""A network without weights: ONNX whose inputs are the image and every weight, the fusion included as nodes.

Some ten kilobytes that, with a checkpoint, give the graph that ``export`` writes; ``shipped.assembly`` puts the
two together on a device that has neither torch nor the onnx package.
"""

from __future__ import annotations

import warnings

import onnx
import onnxscript.optimizer
import onnxsim
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from espmedsam_edge.export.fusion import FusedSegmenter
from espmedsam_edge.export.graph import OPSET, GraphError, name_nodes, quiet, refuse, strip
from espmedsam_edge.model.config import ModelConfig
from espmedsam_edge.model.esp_medsam import EspMedSam
from espmedsam_edge.onnx_header import with_header
from espmedsam_edge.shipped.assembly import IMAGE, PLACEHOLDER

_PREFIX = "model."


class _FusedOnTheWay(nn.Module):
    """Fuses in every forward pass, so that tracing sees the fusion."""

    def __init__(self, model: EspMedSam, image_size: int) -> None:
        super().__init__()
        self.model = model
        self.image_size = image_size

    def forward(self, image: Tensor) -> Tensor:
        """(1, 3, S, S) -> (1, 1, S/4, S/4)."""
        fused: Tensor = FusedSegmenter(self.model, PLACEHOLDER, self.image_size)(image)
        return fused


def build_skeleton(config: ModelConfig, image_size: int) -> bytes:
    """A configuration's network for one input size.

    Args:
        config: of the checkpoints it will serve.
        image_size: S in pixels, a multiple of 64.

    Returns:
        An ONNX model: inputs ``image`` (1, 3, S, S) and every weight under its checkpoint's name, the modality's being
        ``PLACEHOLDER``; output ``logits`` (1, 1, S/4, S/4).

    Raises:
        GraphError: a shape is not static, or an operator is left that engines refuse.
    """
    model = EspMedSam(config, [PLACEHOLDER]).eval()
    state = model.state_dict()
    image = torch.zeros(1, 3, image_size, image_size)
    with quiet():
        program = torch.onnx.export(
            _FusedOnTheWay(model, image_size),
            (image,),
            input_names=[IMAGE],
            output_names=["logits"],
            opset_version=OPSET,
            dynamo=True,
            optimize=False,  # it would compute what depends on the weights
            verbose=False,
        )
        assert program is not None
        proto: onnx.ModelProto = program.model_proto
        name_nodes(proto)
        _weights_to_inputs(proto, state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            proto = onnxscript.optimizer.optimize(proto)
            proto, _ = onnxsim.simplify(proto, perform_optimization=False)
    strip(proto)
    onnx.checker.check_model(proto, full_check=True)
    refuse(proto)
    unknown = {value.name for value in proto.graph.input} - set(state) - {IMAGE}
    if unknown:
        raise GraphError(f"the skeleton asks for {sorted(unknown)[0]}, which no checkpoint has")
    return with_header(proto.SerializeToString(), {})


def _weights_to_inputs(proto: onnx.ModelProto, state: dict[str, Tensor]) -> None:
    """Every floating-point weight becomes an input of the checkpoint's name; index tables stay constants."""
    graph = proto.graph
    renamed = {}
    kept = []
    for tensor in graph.initializer:
        name = tensor.name.removeprefix(_PREFIX)
        if tensor.data_type == TensorProto.FLOAT and name in state:
            renamed[tensor.name] = name
            graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(tensor.dims)))
        else:
            kept.append(tensor)
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
