"""espmedsam-edge doctor."""

from __future__ import annotations

import json

import typer

from espmedsam_edge.terminal import tell


def command(
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
) -> None:
    """Show what this machine can run, what is missing and the command that adds it."""
    from espmedsam_edge.doctor.diagnosis import diagnose
    from espmedsam_edge.doctor.report import render

    diagnosis = diagnose()
    tell(json.dumps(diagnosis.as_json(), indent=2) if as_json else render(diagnosis))
