"""A DICOM listener that is killed loses nothing that it answered; the long version is benchmarks/dicom_kill.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from toy_bundles import save_toy_bundle

pytest.importorskip("pynetdicom", reason="needs pynetdicom (extra dicom-network)")


def test_what_was_answered_is_archived_once(load_script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    bundle = save_toy_bundle(tmp_path / "toy.bundle", ("histopathology",)).path
    benchmark = load_script("benchmarks/dicom_kill.py")
    found = benchmark.send_and_kill(bundle, tmp_path, studies=12, instances=2, associations=8, kills=4)
    assert (found["pictures"], found["kills"], found["answered_with_success"], found["archived"]) == (24, 4, 24, 24)
    assert found["answered_and_not_archived"] == 0
    assert found["with_more_than_one_segmentation"] == 0
    assert (found["left_in_the_queue"], found["failed"]) == (0, 0)
