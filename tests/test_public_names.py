"""What the package gives at its front is documented, each with an example that runs."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import cv2
import pytest
from toy_bundles import save_toy_bundle

import espmedsam_edge
from espmedsam_edge.phantoms import phantom

NAMES = [name for name in espmedsam_edge.__all__ if name != "__version__"]
PAGE = Path(__file__).parents[1] / "docs" / "api.md"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the bundle that is made of the weights that came with the program, once."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_runs_as_it_is_written(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a picture, ``retina.png``, and a bundle, ``fundus.bundle``."""
    monkeypatch.setenv("ESPMEDSAM_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    save_toy_bundle(tmp_path / "fundus.bundle")
    cv2.imwrite("retina.png", phantom("fundus", seed=1, size=(120, 160))[0])
    named = getattr(espmedsam_edge, name)
    examples = doctest.DocTestFinder(recurse=False).find(named, name, globs={})
    assert len(examples) == 1
    assert "+SKIP" not in examples[0].docstring
    done = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST).run(examples[0])
    assert done.attempted >= 2
    assert done.failed == 0


def test_every_public_name_is_on_the_page() -> None:
    assert sorted(re.findall(r"^::: espmedsam_edge\.(\w+)$", PAGE.read_text(), re.M)) == sorted(NAMES)
