"""``espmedsam-edge push``: a bundle into a repository at Hugging Face."""

from __future__ import annotations

from pathlib import Path

import typer

from espmedsam_edge.terminal import tell


def command(
    bundle: Path = typer.Argument(help="A bundle: the folder that export wrote."),
    address: str = typer.Argument(metavar="hf://OWNER/NAME[@BRANCH]", help="The repository, made if there is none."),
    public: bool = typer.Option(False, "--public", help="Of a repository that is made: everyone may read it."),
) -> None:
    """Put a bundle into a repository at Hugging Face, from which `infer hf://OWNER/NAME` fetches it.

    Only the bundle's own files are written. Log in before: hf auth login.
    """
    from espmedsam_edge.bundle import Bundle
    from espmedsam_edge.remote_bundles import push

    tell(push(Bundle.open(bundle), address, private=not public))
