"""What the tests of infer share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from toy_bundles import save_toy_bundle

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.cli import main

Outcome = tuple[int, str, str]


@pytest.fixture
def toy_bundle(tmp_path: Path) -> Bundle:
    """Of a modality that nothing is recognised as: the pictures here are made up, and each would be doubted."""
    return save_toy_bundle(tmp_path / "toy.bundle", ("histopathology",))


@pytest.fixture
def infer(
    toy_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Run the command on the toy bundle, in an empty folder: exit code, standard output, standard error."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*arguments: object, bundle: Path = toy_bundle.path) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["infer", str(bundle), *(str(argument) for argument in arguments)])
        written = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0 if code is None else 99), written.out, written.err

    return run
