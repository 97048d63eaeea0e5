"""The picture of the house in the docs is what the code says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def house(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tools/house.py")


def test_the_picture_is_not_stale(house: ModuleType) -> None:
    assert house.PICTURE.read_text() == house.draw(), "draw it anew: python tools/house.py"


def test_every_folder_of_the_package_is_a_room(house: ModuleType) -> None:
    rooms = {room for floor in house.layers() for room in floor}
    package = ROOT / "espmedsam_edge"
    folders = [path.parent.relative_to(ROOT) for path in package.glob("*/__init__.py")]
    folders += [path.parent.relative_to(ROOT) for path in (package / "runtime").glob("*/__init__.py")]
    missing = {".".join(folder.parts) for folder in folders} - rooms
    assert missing == {"espmedsam_edge.runtime"}  # whose rooms stand in its place


def test_a_walk_through_a_room_that_is_not_there_is_refused(house: ModuleType) -> None:
    house.WALKS["nobody's"] = ("#000", "cli attic")
    with pytest.raises(SystemExit, match="attic"):
        house.draw()
