"""Graphs whose masks mean something: the tiny preset, trained on phantoms for a few seconds."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import onnx
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from once import once
from onnx import ModelProto, numpy_helper

from espmedsam_edge.bundle import Bundle, Manifest, Normalization, Weights, graph_file_name, write_bundle
from espmedsam_edge.export.fusion import FusedSegmenter
from espmedsam_edge.export.graph import build_graph
from espmedsam_edge.imaging.geometry import preprocess
from espmedsam_edge.model.config import model_config
from espmedsam_edge.model.esp_medsam import EspMedSam
from espmedsam_edge.phantoms import phantom

MODALITY = "dermoscopy"
SIZE = 64


def tensor(seed: int, size: int = SIZE) -> NDArray[np.float32]:
    """A phantom as the network's input."""
    return preprocess(phantom(MODALITY, seed, (size, size))[0], size, Normalization())


def trained_bytes(size: int = SIZE) -> bytes:
    """The trained graph, serialised."""
    return once(f"trained-{size}.onnx", lambda: _trained(size))


def _trained(size: int) -> bytes:
    torch.manual_seed(7)
    torch.set_num_threads(1)  # so small a network only loses time on more
    model = EspMedSam(model_config("espmedsam-tiny"), [MODALITY])
    _train(model)
    return build_graph(FusedSegmenter(model.eval(), MODALITY, size), size).SerializeToString()


def _train(model: EspMedSam, steps: int = 60, size: int = SIZE) -> None:
    """Adam on cross-entropy and soft Dice: to some 80 % Dice on new phantoms, logits from -10 to 7."""
    images = torch.from_numpy(np.concatenate([tensor(seed, size) for seed in range(100, 124)]))
    low = (size // 4, size // 4)
    masks = [
        cv2.resize(phantom(MODALITY, s, (size, size))[1], low, interpolation=cv2.INTER_AREA) for s in range(100, 124)
    ]
    truths = torch.from_numpy(np.stack(masks))[:, None].float() / 255
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(0, len(images), (4,))
        logits, truth = model(images[chosen], MODALITY).low_res_logits, truths[chosen]
        shown = torch.sigmoid(logits)
        overlap = (2 * (shown * truth).sum() + 1) / (shown.sum() + truth.sum() + 1)
        loss = functional.binary_cross_entropy_with_logits(logits, truth) + 1 - overlap
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def trained_graph(size: int = SIZE) -> ModelProto:
    """A fresh copy of the trained graph."""
    return onnx.load_from_string(trained_bytes(size))


def save_bundle(path: Path, model: ModelProto | None = None, size: int = SIZE, modality: str = MODALITY) -> Bundle:
    """A bundle of one FP32 graph."""
    with write_bundle(path) as draft:
        name = graph_file_name(modality, "fp32", 1)
        draft.new_file(name).write_bytes(trained_bytes(size) if model is None else model.SerializeToString())
        entry = draft.graph(name, modality=modality, precision="fp32", image_size=size)
        draft.manifest = Manifest(
            preset="espmedsam-tiny",
            weights=Weights(checkpoint_sha256="0" * 64, origin="trained"),
            graphs=[entry],
        )
        draft.new_file("report.md").write_text("# What each step measured\n\n## Export\n\nTrained.\n")
    return Bundle.open(path)


def save_images(folder: Path, count: int, modality: str = MODALITY, size: int = 160) -> Path:
    """Phantoms and their masks: folder/images, folder/masks."""
    for part in ("pictures", "truth"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        image, mask = phantom(modality, seed, (size, size))
        cv2.imwrite(str(folder / "pictures" / f"case {seed}.png"), image)
        cv2.imwrite(str(folder / "truth" / f"case {seed}.png"), mask)
    return folder / "pictures"


def hostile(model: ModelProto, factor: float = 3e5) -> ModelProto:
    """The same function with activations far past 65,504: rescaled where the next layer undoes it exactly.

    Values of an attention (V columns of the projection and the bag's tokens up, the output projection down), and the
    hidden layer of a decoder MLP (ReLU lets positive factors through).
    """
    model = onnx.load_from_string(model.SerializeToString())
    constants = {constant.name: constant for constant in model.graph.initializer}

    def scale(name: str, by: float, columns: slice = slice(None)) -> None:
        values = numpy_helper.to_array(constants[name]).copy()
        values[..., columns] *= by
        constants[name].CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))

    block = "encoder.stages.1.0.attention"
    width = constants[f"{block}.proj"].dims[0]
    value_columns = slice(2 * width, 3 * width)
    scale(f"{block}.qkv", factor, value_columns)
    scale(f"{block}.qkv_bias", factor, value_columns)
    scale(f"{block}.values", factor)
    scale(f"{block}.proj", 1 / factor)
    up, down = (f"decoder.layers.0.layer.mlp.lin{k}/" for k in (1, 2))
    for node in model.graph.node:
        for name in node.input:
            if name in constants and node.name.startswith(up):
                scale(name, factor)
            elif name in constants and node.name.startswith(down) and node.op_type == "MatMul":
                scale(name, 1 / factor)
    return model
