"""The cache is the user's alone: nothing in it is used that another user owns or may write."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from espmedsam_edge.errors import UserError
from espmedsam_edge.machine import cache
from espmedsam_edge.machine.cache import CACHE_VARIABLE, cache_place, distrusted, make_private, read_kept

STRANGER = 54321


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A file in a folder of a cache."""
    make_private(tmp_path / "cache" / "engines", tmp_path / "cache")
    file = tmp_path / "cache" / "engines" / "a.plan"
    file.write_bytes(b"plan")
    file.chmod(0o600)
    return file


def test_what_is_made_is_the_user_s_alone_and_used(kept: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    assert stat.S_IMODE(root.stat().st_mode) == stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    assert distrusted(kept, root) is None
    assert read_kept(kept, root) == b"plan"
    with pytest.raises(FileNotFoundError):
        read_kept(kept.with_name("b.plan"), root)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666, 0o777])
@pytest.mark.parametrize("place", ["file", "folder", "root"])
def test_what_others_may_write_is_not_used(kept: Path, tmp_path: Path, mode: int, place: str) -> None:
    root = tmp_path / "cache"
    path = {"file": kept, "folder": kept.parent, "root": root}[place]
    path.chmod(mode | 0o100)
    assert distrusted(kept, root) == f"other users may write to {path}"
    with pytest.raises(PermissionError, match="other users may write to"):
        read_kept(kept, root)
    if place == "root":
        with pytest.raises(UserError, match=r"the cache is not used: other users may write .*ESPMEDSAM_CACHE"):
            make_private(kept.parent, root)


@pytest.mark.parametrize("place", ["file", "folder", "root"])
def test_what_another_user_owns_is_not_used(kept: Path, tmp_path: Path, place: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only the superuser can give a file away")
    root = tmp_path / "cache"
    path = {"file": kept, "folder": kept.parent, "root": root}[place]
    os.chown(path, STRANGER, STRANGER)
    with pytest.raises(PermissionError, match=f"belongs to another user .number {STRANGER}"):
        read_kept(kept, root)
    if place != "file":
        with pytest.raises(UserError, match="belongs to another user"):
            make_private(kept.parent, root)


def test_what_the_superuser_owns_is_used_by_others(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only the superuser has files of its own and others'")
    monkeypatch.setattr(cache.os, "geteuid", lambda: STRANGER)
    assert read_kept(kept, tmp_path / "cache") == b"plan"


def test_a_shared_folder_with_the_sticky_bit_may_hold_the_cache(kept: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    root.chmod(0o1777)  # as /tmp
    assert read_kept(kept, root) == b"plan"
    make_private(kept.parent, root)
    kept.chmod(0o1666)  # which says nothing of a file
    with pytest.raises(PermissionError):
        read_kept(kept, root)


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_who_may_write_above_the_cache_could_put_another_there(tmp_path: Path, mode: int) -> None:
    root = tmp_path / "a" / "b" / "cache"
    make_private(root / "engines", root)
    (tmp_path / "a").chmod(mode)
    link = tmp_path / "link"
    link.symlink_to(root)
    for place in (root, link):
        reason = distrusted(place / "engines", place)
        assert reason is None if mode & 0o1000 else f"other users may write to {tmp_path / 'a'}" in str(reason)
        if reason is not None:
            with pytest.raises(UserError, match="the cache is not used: other users may write"):
                make_private(place / "engines", place)


@pytest.mark.parametrize("make", [os.symlink, lambda target, link: os.mkfifo(link)])
def test_links_and_pipes_are_not_read(kept: Path, tmp_path: Path, make: Callable[[Path, Path], None]) -> None:
    file = kept.with_name("b.plan")
    make(kept, file)
    with pytest.raises(OSError, match=r"symbolic links|no ordinary file|is a link|may write"):
        read_kept(file, tmp_path / "cache")


def test_a_folder_that_is_a_link_is_not_used(kept: Path, tmp_path: Path) -> None:
    link = tmp_path / "cache" / "kernels"
    link.symlink_to(kept.parent)
    assert distrusted(link / "a.plan", tmp_path / "cache") == f"{link} is a link"


def test_folders_of_earlier_versions_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A usual mask lets others read, some let a group write; the root is closed in its usual place alone."""
    root = tmp_path / "espmedsam-edge"
    (root / "engines").mkdir(parents=True)
    for folder in (root, root / "engines"):
        folder.chmod(0o775)
    with pytest.raises(UserError, match="other users may write"):
        make_private(root / "engines", root)
    monkeypatch.setattr(cache, "_usual_place", lambda: root)
    make_private(root / "engines", root)
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (root, root / "engines")} == {0o700}


@pytest.mark.parametrize("place", ["~nobody-of-that-name/cache", "x" * 5_000, "/".join("x" * 300 for _ in range(3))])
def test_a_cache_that_cannot_be_is_one_line(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, place)
    with pytest.raises(UserError, match="the cache cannot be at") as refused:
        cache_place()
    assert len(str(refused.value)) < 500
