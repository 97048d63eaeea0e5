"""Put bags that were trained apart into one checkpoint.

    python tools/join_bags.py shipped.safetensors joined.safetensors colonoscopy=runs/colonoscopy xray=runs/xray

Of each run, what belongs to that modality alone (its bag, query and MLP) is taken; what the modalities share must be
what it was in the first checkpoint, bit for bit. The provenance is the first checkpoint's and a line for each run.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch

from espmedsam_edge.errors import UserError
from espmedsam_edge.model.checkpoint import CheckpointInfo, load_checkpoint, read_checkpoint, save_checkpoint
from espmedsam_edge.training.trainable import modality_names


def join(base: Path, bags: dict[str, Path], out: Path) -> CheckpointInfo:
    """Write ``out``: ``base`` with the bags of the run folders ``bags``, by modality.

    Raises:
        UserError: ``base`` lacks a modality, or a run changed what all share.
    """
    network, info = load_checkpoint(base)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    shared = set(state).difference(*(modality_names(network, name) for name in network.modalities))
    provenance = dict(info.provenance)
    for modality, run in bags.items():
        network.bag(modality)  # raises with the nearest name
        trained, of_run = read_checkpoint(run / "weights.safetensors")
        for name in sorted(shared):
            if not torch.equal(state[name], trained[name].to(state[name].dtype)):
                raise UserError(
                    f"{run} changed {name}, which all modalities share.",
                    "Join runs of the recipe bag-more, begun from the checkpoint that they are joined to.",
                )
        state |= {name: trained[name] for name in modality_names(network, modality)}
        said = provenance.get(f"then_{modality}")
        provenance[f"then_{modality}"] = "; ".join(filter(None, [said, _line(run, of_run)]))
    info = info.model_copy(update={"provenance": provenance})
    save_checkpoint(out, state, info)
    return info


def _line(run: Path, info: CheckpointInfo) -> str:
    with (run / "valid.csv").open(newline="") as stream:
        first = float(next(csv.DictReader(stream))["score"])
    facts = info.provenance
    return (
        f"its bag, query and MLP alone: {facts['steps']} steps, validation {first:.4f} to {facts['best_score']},"
        f" recipe {facts['recipe_sha256'][:12]}"
    )


def main() -> None:
    """Join."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("bags", nargs="+", metavar="MODALITY=RUN")
    arguments = parser.parse_args()
    bags = {name: Path(run) for name, _, run in (text.partition("=") for text in arguments.bags)}
    try:
        info = join(arguments.base, bags, arguments.out)
    except UserError as error:
        parser.error(str(error))
    print("\n".join(f"{key}: {text}" for key, text in info.provenance.items() if key.startswith("then_")))


if __name__ == "__main__":
    main()
