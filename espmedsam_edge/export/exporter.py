"""A checkpoint in, a bundle out: fuse, trace, simplify, verify, and only then write."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from espmedsam_edge.bundle import (
    REPORT,
    REPORT_TITLE,
    Bundle,
    InputSpec,
    Manifest,
    ManifestHead,
    Weights,
    graph_file_name,
    write_bundle,
)
from espmedsam_edge.errors import UserError
from espmedsam_edge.export.fusion import FusedSegmenter
from espmedsam_edge.export.graph import Storage, build_graph, save_graph, store_weights
from espmedsam_edge.export.verify import ExportAgreement, verify_graph
from espmedsam_edge.modalities import Scale
from espmedsam_edge.model.checkpoint import CheckpointInfo, load_hashed_checkpoint
from espmedsam_edge.model.config import check_image_size
from espmedsam_edge.runtime.tiling import parse_tile
from espmedsam_edge.version import __version__

_TOOLS = ("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime")


@dataclass(frozen=True)
class ExportedGraph:
    """What one modality's export gave: the file's name and size, and how well it agrees with the checkpoint."""

    modality: str
    file: str
    megabytes: float
    nodes: int
    agreement: ExportAgreement


def export_bundle(
    weights: Path,
    out: Path,
    *,
    modalities: Sequence[str] | None = None,
    image_size: int | None = None,
    batch: int = 1,
    storage: Storage = "float32",
    tile: int | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> tuple[Bundle, list[ExportedGraph]]:
    """Export a checkpoint's modalities as FP32 graphs, each verified against the checkpoint before the bundle appears.

    Args:
        weights: a complete checkpoint of this project.
        out: the bundle's folder; an existing bundle is replaced, anything else is refused.
        modalities: which (None: all).
        image_size: S in pixels, a multiple of 64 (None: what each modality was trained for).
        batch: B, fixed in the graph.
        storage: how the weights are stored in the file; computing stays in float32.
        tile: side in pixels of the tiles in which pictures larger than the input are segmented by default (None: as
            the checkpoint states).
        progress: told each step in a few words.

    Raises:
        UserError: an unreadable checkpoint, an unknown modality, an unfit size, nowhere to write.
        GraphError: the graph does not compute what the checkpoint computes; nothing is written.
    """
    model, info, checkpoint_sha256 = load_hashed_checkpoint(weights)
    names = list(dict.fromkeys(modalities or info.modalities))
    for name in names:
        model.bag(name)  # refuses an unknown modality before any work
    if image_size is not None:
        check_image_size(image_size)
    if not 1 <= batch <= 256:
        raise UserError(f"a batch of {batch} cannot be used.", "Choose 1 to 256.")
    if tile is not None:
        parse_tile(tile)
    head = ManifestHead(
        preset=info.config.preset,
        input=InputSpec(normalization=info.normalization),
        weights=Weights(checkpoint_sha256=checkpoint_sha256, origin=info.origin, note=info.provenance.get("note", "")),
        targets={name: info.targets[name] for name in names},
    )
    exported, graphs, accuracy = [], [], {}
    with write_bundle(out) as draft:
        for name in names:
            file = graph_file_name(name, "fp32", len(names))
            size = info.config.size_of(name) if image_size is None else image_size
            progress(f"{name}: fusing and tracing")
            onnx_model = build_graph(FusedSegmenter(model, name, size, batch), size, batch)
            store_weights(onnx_model, storage)
            path = draft.new_file(file)
            content = save_graph(onnx_model, path, head.properties(name, "fp32"))
            graph = draft.graph(file, modality=name, precision="fp32", image_size=size, batch=batch)
            progress(f"{name}: comparing with the checkpoint")
            agreement = verify_graph(model, content, graph, info.normalization, storage)
            graphs.append(graph)
            accuracy[f"{name}/fp32"] = {
                "against": "checkpoint in torch, phantom images",
                "images": agreement.images,
                "max_error_of_logit_range": agreement.max_error,
                "mask_agreement": agreement.mask_agreement,
            }
            exported.append(ExportedGraph(name, file, len(content) / 1e6, len(onnx_model.graph.node), agreement))
        draft.manifest = Manifest(
            **dict(head),
            graphs=graphs,
            tools={"espmedsam-edge": __version__} | {tool: importlib.metadata.version(tool) for tool in _TOOLS},
            accuracy=accuracy,
            scales=_scales(info, names, tile),
        )
        draft.new_file(REPORT).write_text(_report(draft.manifest, exported))
    return Bundle.open(out), exported


def _scales(info: CheckpointInfo, names: Sequence[str], tile: int | None) -> dict[str, Scale]:
    """Of the exported modalities, those that the checkpoint states; all of them where the user names tiles."""
    found = {name: scale for name, scale in info.scales.items() if name in names}
    if tile is None:
        return found
    largest = {name: found[name].largest if name in found else info.config.size_of(name) for name in names}
    return {name: Scale(largest=largest[name], tile=tile) for name in names}


def _report(manifest: Manifest, exported: Sequence[ExportedGraph]) -> str:
    lines = [
        REPORT_TITLE,
        "",
        f"Weights: {manifest.weights.origin}"
        + (" (never trained: the masks mean nothing)" if manifest.weights.origin == "random" else "")
        + f", checkpoint SHA-256 {manifest.weights.checkpoint_sha256}.",
        "",
        "## Export",
        "",
        "Each graph in ONNX Runtime against the checkpoint's network in torch.",
        "",
        "| modality | file | MB | nodes | largest error / logit range | mask agreement |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {graph.modality} | {graph.file} | {graph.megabytes:.1f} | {graph.nodes} "
        f"| {graph.agreement.max_error:.1e} | {graph.agreement.mask_agreement:.4%} |"
        for graph in exported
    ]
    return "\n".join(lines) + "\n"
