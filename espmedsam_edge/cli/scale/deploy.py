"""``espmedsam-edge deploy``: a bundle as what other servers serve."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

from espmedsam_edge.terminal import tell

app = typer.Typer(no_args_is_help=True, help="Write bundles as what other servers serve.")


@app.callback()
def _group() -> None:
    """Write bundles as what other servers serve."""


@app.command()
def triton(
    bundles: list[str] = typer.Argument(
        ..., metavar="BUNDLE...", help="Bundles that export or calibrate wrote, or their addresses (hf://, https://)."
    ),
    out: Path = typer.Option(..., "--out", help="The model repository to write: a folder that is not there yet."),
    modality: list[str] = typer.Option([], "--modality", help="Which to write; repeat for several. [default: all]"),
    precision: list[str] = typer.Option(
        [], "--precision", help="Which of the networks; repeat for several. The first segments pictures. [default: all]"
    ),
    engine: Literal["onnxruntime", "tensorrt", "python"] = typer.Option(
        "onnxruntime",
        help="What runs the networks: Triton's ONNX Runtime or TensorRT (engines that build made), or Python.",
    ),
    instances: int = typer.Option(1, min=1, max=64, help="Of each model."),
    threads: int | None = typer.Option(None, min=1, help="CPU threads of an instance. [default: the cores there are]"),
    delay: int = typer.Option(
        2000, min=0, max=1_000_000, help="Microseconds a request waits for others to be batched."
    ),
    cache: Path | None = typer.Option(None, help="The folder under which build kept engines."),
) -> None:
    """Write a model repository for NVIDIA's Triton Inference Server: networks, and modalities that take pictures."""
    from espmedsam_edge.deploy.triton import write_repository
    from espmedsam_edge.deploy.triton_config import Serving
    from espmedsam_edge.destinations import claimed
    from espmedsam_edge.remote_bundles import open_bundle

    with claimed([out]):
        models = write_repository(
            [open_bundle(bundle) for bundle in bundles],
            out,
            modalities=modality,
            precisions=precision,
            engine=engine,
            serving=Serving(instances, threads, delay),
            cache=cache,
        )
    for model in models:
        graph = model.graph
        batch = f", batches of {graph.batch}" if graph.batch > 1 else ""
        needs = f"; needs {model.needs}" if model.needs else ""
        tell(f"{model.name}: {graph.precision} {graph.image_size}x{graph.image_size}{batch}, {model.served_by}{needs}")
    if all(model.graph.batch == 1 for model in models):
        tell("Requests are not gathered: these graphs take one picture a run (export --batch makes others).")
    tell(f"Serve it: tritonserver --model-repository={out.resolve()}")
