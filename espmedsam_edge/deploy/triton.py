"""A model repository: the folder that NVIDIA's Triton serves as it is."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from espmedsam_edge.bundle import Bundle, Graph, Manifest, write_bundle
from espmedsam_edge.deploy.triton_config import (
    WARMUP_FILE,
    Engine,
    Serving,
    as_text,
    network_config,
    pictures_config,
)
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import atomic_directory
from espmedsam_edge.imaging.encode import encode_image
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.runtime.engines.cache import EnginePlan, cache_folder
from espmedsam_edge.runtime.engines.inventory import entries

_MODEL = '''"""Made by espmedsam-edge deploy; runs where espmedsam-edge is installed for Triton's Python."""

from espmedsam_edge.deploy.triton_model import {name} as TritonPythonModel  # noqa: F401
'''
_WARMUP_SIZE = (480, 640)


@dataclass(frozen=True)
class Model:
    """A model that was written.

    Attributes:
        name: in the repository.
        graph: what it runs.
        served_by: Triton's backend for it.
        needs: what the server must have besides; empty: nothing.
    """

    name: str
    graph: Graph
    served_by: str
    needs: str = ""


def write_repository(
    bundles: Sequence[Bundle],
    out: Path,
    *,
    modalities: Sequence[str] = (),
    precisions: Sequence[str] = (),
    engine: Engine = "onnxruntime",
    serving: Serving = Serving(),
    cache: Path | None = None,
) -> list[Model]:
    """Write, for each graph, a model of the network alone, and for each modality one that takes pictures.

    Args:
        bundles: with no modality in two of them.
        out: the repository; nothing may be there yet.
        modalities: those to write; empty: all.
        precisions: those of the networks; empty: all. Pictures are segmented with fp32, else the first of these.
        engine: what runs the networks: Triton's ONNX Runtime, TensorRT with engines from the cache, or Python.
        serving: how.
        cache: the folder under which engines are kept; None: the usual one.

    Raises:
        UserError: ``out`` exists, two bundles would share a model's name, or there is no engine of a graph.
    """
    chosen = _chosen(bundles, modalities, precisions)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists.", "Name a folder that does not, or remove it: a server may be serving it.")
    plans = (
        {graph.sha256: _plan(bundle, graph, cache) for bundle, graphs in chosen for graph in graphs}
        if engine == "tensorrt"
        else {}
    )
    models: list[Model] = []
    with atomic_directory(out) as folder:
        for bundle, graphs in chosen:
            for graph in graphs:
                models.append(_network(folder, bundle, graph, engine, serving, plans.get(graph.sha256)))
            for modality in dict.fromkeys(graph.modality for graph in graphs):
                best = next(graph for graph in graphs if graph.modality == modality)
                models.append(_pictures(folder, bundle, best, serving))
    return models


def _chosen(
    bundles: Sequence[Bundle], modalities: Sequence[str], precisions: Sequence[str]
) -> list[tuple[Bundle, list[Graph]]]:
    """The graphs of each bundle, of a modality the best for pictures first."""
    chosen: list[tuple[Bundle, list[Graph]]] = []
    owners: dict[str, Bundle] = {}
    for bundle in bundles:
        names = [name for name in bundle.manifest.modalities if not modalities or name in modalities]
        graphs: list[Graph] = []
        for name in names:
            if name in owners:
                raise UserError(
                    f"{owners[name].path} and {bundle.path} both have {name}, and a model's name stands for one graph.",
                    "Name one of them, or write two repositories.",
                )
            owners[name] = bundle
            of = [graph for graph in bundle.manifest.graphs if graph.modality == name]
            wanted = [bundle.graph(name, one) for one in precisions] or [
                bundle.graph(name),
                *(graph for graph in of if graph != bundle.graph(name)),
            ]
            if len({(graph.image_size, graph.batch) for graph in wanted}) > 1:
                sizes = ", ".join(f"{graph.precision} {graph.image_size} (batch {graph.batch})" for graph in wanted)
                raise UserError(
                    f"the graphs of {name} in {bundle.path} are of different sizes: {sizes}.", "Name one: --precision."
                )
            graphs += wanted
        if graphs:
            chosen.append((bundle, graphs))
    missing = [name for name in modalities if name not in owners]
    if missing or not chosen:
        known = sorted({name for bundle in bundles for name in bundle.manifest.modalities})
        raise UserError(f"no bundle has {', '.join(missing) or 'a modality'}.", f"Known: {', '.join(known)}.")
    return chosen


def _plan(bundle: Bundle, graph: Graph, cache: Path | None) -> EnginePlan:
    folder = cache_folder(cache)
    for entry in entries(folder, verify=True):
        sidecar = entry.sidecar
        if sidecar is None or entry.damaged is not None or sidecar.flavour != "tensorrt":
            continue
        if sidecar.graph.sha256 == graph.sha256:
            return EnginePlan(folder / sidecar.plan, sidecar)
    raise UserError(
        f"no engine of {graph.modality} {graph.precision} in {folder}.",
        f"Build it on the GPU that serves it: espmedsam-edge build {bundle.path} --backend tensorrt",
        exit_code=1,
    )


def _network(
    folder: Path, bundle: Bundle, graph: Graph, engine: Engine, serving: Serving, plan: EnginePlan | None
) -> Model:
    name = f"{graph.modality}_{graph.precision}"
    config = network_config(name, graph, bundle.manifest, engine, serving)
    version = _model(folder / name, as_text(config))
    if plan is not None:
        (version / "model.plan").write_bytes(plan.read())
        needs = f"TensorRT {plan.sidecar.version} and {plan.sidecar.place}"
        return Model(name, graph, "tensorrt", needs)
    if engine == "onnxruntime":
        (version / "model.onnx").write_bytes(bundle.read_graph(graph))
    else:
        _python(version, bundle, graph, "NetworkModel")
    return Model(name, graph, engine)


def _pictures(folder: Path, bundle: Bundle, graph: Graph, serving: Serving) -> Model:
    place = folder / graph.modality
    version = _model(place, as_text(pictures_config(graph, bundle.manifest, serving)))
    _python(version, bundle, graph, "PictureModel")
    picture = encode_image(phantom(graph.modality, 0, _WARMUP_SIZE)[0], ".png")
    (place / "warmup").mkdir()
    (place / "warmup" / WARMUP_FILE).write_bytes(struct.pack("<I", len(picture)) + picture)
    return Model(graph.modality, graph, "python")


def _model(place: Path, config: str) -> Path:
    """A model's folder; returns that of its version, for its files."""
    version = place / "1"
    if place.exists():
        raise UserError(f"two models would be called {place.name}.", "Write two repositories: --modality.")
    version.mkdir(parents=True)
    (place / "config.pbtxt").write_text(config)
    return version


def _python(version: Path, bundle: Bundle, graph: Graph, name: str) -> None:
    """A model of Triton's Python backend, with a bundle of its one graph beside it."""
    (version / "model.py").write_text(_MODEL.format(name=name))
    content = bundle.read_graph(graph)  # checked
    with write_bundle(version / "bundle") as draft:
        draft.new_file(graph.file).write_bytes(content)
        manifest = bundle.manifest.model_dump() | {"graphs": [graph.model_dump()]}
        draft.manifest = Manifest.model_validate(manifest)
