"""Bundles: what is written is read back, and nothing that was changed, cut or led astray is used."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_graphs import plain_graph

from espmedsam_edge.bundle import (
    MANIFEST,
    Bundle,
    Manifest,
    Normalization,
    Precision,
    Weights,
    graph_file_name,
    write_bundle,
)
from espmedsam_edge.errors import UserError

PLAIN = plain_graph(b"not a real network")


def write_plain_bundle(path: Path, content: bytes = PLAIN, **fields: Any) -> Bundle:
    """A bundle whose graph computes nothing: enough for everything that happens before a backend loads it."""
    with write_bundle(path) as draft:
        draft.new_file("fp32.onnx").write_bytes(content)
        graph = draft.graph("fp32.onnx", modality="fundus", precision="fp32", image_size=64)
        weights = Weights(checkpoint_sha256="ab" * 32, origin="imported")
        draft.manifest = Manifest(preset="espmedsam-s", weights=weights, graphs=[graph], **fields)
    return Bundle.open(path)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_plain_bundle(tmp_path / "fundus.bundle")


def edit(bundle: Bundle, **changes: Any) -> None:
    file = bundle.path / MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_graph(bundle: Bundle, **changes: Any) -> None:
    graphs = json.loads((bundle.path / MANIFEST).read_text())["graphs"]
    edit(bundle, graphs=[{**graphs[0], **changes}])


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = write_plain_bundle(
        tmp_path / "b", threshold=0.4, targets={"fundus": "retinal vessels"}, tools={"onnx": "1.17"}
    )
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest == written.manifest
    assert manifest.threshold == 0.4
    assert manifest.modalities == ["fundus"]
    assert manifest.graphs[0].input_shape == (1, 3, 64, 64)
    assert manifest.graphs[0].output_shape == (1, 1, 16, 16)
    assert written.read_graph(written.graph()) == PLAIN


def test_a_bundle_moves(bundle: Bundle, tmp_path: Path) -> None:
    moved = shutil.move(str(bundle.path), tmp_path / "elsewhere")
    opened = Bundle.open(moved)
    assert opened.read_graph(opened.graph())


def test_extending_keeps_what_there_is(bundle: Bundle) -> None:
    with write_bundle(bundle.path, extend=True) as draft:
        assert draft.manifest is not None
        draft.new_file("fp16.onnx").write_bytes(plain_graph(b"half"))
        graph = draft.graph("fp16.onnx", modality="fundus", precision="fp16", image_size=64)
        draft.manifest = draft.manifest.model_copy(update={"graphs": [*draft.manifest.graphs, graph]})
    opened = Bundle.open(bundle.path)
    assert [graph.precision for graph in opened.manifest.graphs] == ["fp32", "fp16"]
    assert opened.graph().precision == "fp32"
    assert opened.read_graph(opened.graph("fundus", "fp16")) == plain_graph(b"half")


def test_replacing_a_file_of_an_extended_bundle_leaves_the_old_content_to_its_readers(bundle: Bundle) -> None:
    """Hard links must be broken before writing, or a failed calibration would have changed the old bundle."""

    def failing() -> None:
        with write_bundle(bundle.path, extend=True) as draft:
            draft.new_file("fp32.onnx").write_bytes(b"other")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert bundle.read_graph(bundle.graph()) == PLAIN


def add_graph(path: Path, precision: Precision, inside: Callable[[], object] = lambda: None) -> None:
    """Extend a bundle as calibrate does; ``inside`` runs while it is being extended."""
    with write_bundle(path, extend=True) as draft:
        inside()
        name = f"{precision}.onnx"
        draft.new_file(name).write_bytes(PLAIN)
        graph = draft.graph(name, modality="fundus", precision=precision, image_size=64)
        assert draft.manifest is not None
        draft.manifest = draft.manifest.model_copy(update={"graphs": [*draft.manifest.graphs, graph]})


def test_two_that_extend_a_bundle_at_once_both_add_to_it(bundle: Bundle) -> None:
    inside, second_inside, go = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        assert go.wait(30)

    # Locks belong to open files, so threads show what processes do.
    first = threading.Thread(target=add_graph, args=(bundle.path, "fp16", hold))
    second = threading.Thread(target=add_graph, args=(bundle.path, "int8", second_inside.set))
    first.start()
    assert inside.wait(30)
    second.start()
    assert not second_inside.wait(0.3)
    go.set()
    first.join(30)
    second.join(30)
    opened = Bundle.open(bundle.path)
    assert [graph.precision for graph in opened.manifest.graphs] == ["fp32", "fp16", "int8"]
    assert all(opened.read_graph(graph) for graph in opened.manifest.graphs)


def test_a_bundle_replaced_while_it_is_extended_is_not_lost(bundle: Bundle, tmp_path: Path) -> None:
    def replace() -> None:
        """As by mv: this program's own commands wait for each other."""
        write_plain_bundle(tmp_path / "other.bundle", threshold=0.4)
        shutil.rmtree(bundle.path)
        (tmp_path / "other.bundle").rename(bundle.path)

    with pytest.raises(UserError, match=r"another command replaced .*fundus\.bundle meanwhile. Run this one again"):
        add_graph(bundle.path, "fp16", replace)
    manifest = Bundle.open(bundle.path).manifest
    assert (manifest.threshold, len(manifest.graphs)) == (0.4, 1)


def test_a_file_system_without_locks_still_extends(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    add_graph(bundle.path, "fp16")
    assert len(Bundle.open(bundle.path).manifest.graphs) == 2


def test_file_names_by_modality() -> None:
    assert graph_file_name("fundus", "fp16", 1) == "fp16.onnx"
    assert graph_file_name("fundus", "fp16", 2) == "fundus-fp16.onnx"


def test_a_folder_that_is_no_bundle_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("x")
    with pytest.raises(UserError, match="exists and is not a bundle"), write_bundle(tmp_path / "photos"):
        pass
    assert (tmp_path / "photos" / "a.jpg").exists()


def test_a_changed_byte_is_found(bundle: Bundle) -> None:
    file = bundle.path / "fp32.onnx"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"fp32\.onnx is not the file that export wrote"):
        bundle.read_graph(bundle.graph())


def test_a_missing_graph_is_reported(bundle: Bundle) -> None:
    (bundle.path / "fp32.onnx").unlink()
    with pytest.raises(UserError, match=r"fp32\.onnx is missing"):
        bundle.read_graph(bundle.graph())


@pytest.mark.parametrize(
    "name", ["../fp32.onnx", "/etc/passwd.onnx", "a/b.onnx", "..", ".hidden.onnx", "a\n.onnx", "a\\b.onnx", "", "x.bin"]
)
def test_a_file_name_that_leaves_the_folder_is_refused(bundle: Bundle, name: str) -> None:
    edit_graph(bundle, file=name)
    with pytest.raises(UserError, match=r"manifest\.json"):
        Bundle.open(bundle.path)


def test_a_link_that_leaves_the_folder_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    file = bundle.path / "fp32.onnx"
    shutil.move(file, tmp_path / "outside.onnx")
    file.symlink_to(tmp_path / "outside.onnx")
    with pytest.raises(UserError, match="leads out of the bundle"):
        bundle.read_graph(bundle.graph())


@pytest.mark.parametrize("version", [0, 2, "1", None, 99, True, 1.0, 10**99])
def test_an_unknown_schema_version_is_named(bundle: Bundle, version: object) -> None:
    edit(bundle, schema_version=version)
    with pytest.raises(UserError, match="schema version") as caught:
        Bundle.open(bundle.path)
    assert "update espmedsam-edge" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"threshold": 1.0}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"graphs": []}, "graphs"),
        ({"surprise": 1}, "surprise"),
        ({"input": {"normalization": {"mean": [0, 0, 0], "std": [1, 0, 1]}}}, "std"),
        ({"input": {"normalization": {"mean": [1e308, 0, 0], "std": [1, 1, 1]}}}, "mean"),  # their quotient overflows
        ({"input": {"normalization": {"mean": [0, 0, 0], "std": [1, 5e-324, 1]}}}, "std"),
        ({"weights": {"checkpoint_sha256": "short", "origin": "trained"}}, "checkpoint_sha256"),
        ({"weights": {"checkpoint_sha256": "ab" * 32, "origin": "found"}}, "origin"),
    ],
)
def test_a_wrong_field_is_named(bundle: Bundle, changes: dict[str, Any], field: str) -> None:
    edit(bundle, **changes)
    with pytest.raises(UserError, match=field):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("changes", [{"image_size": 100}, {"image_size": 0}, {"batch": 0}, {"modality": "Fundus"}])
def test_a_graph_that_cannot_be_is_refused(bundle: Bundle, changes: dict[str, Any]) -> None:
    edit_graph(bundle, **changes)
    with pytest.raises(UserError, match=r"graphs\.0"):
        Bundle.open(bundle.path)


def test_two_graphs_for_one_purpose_are_refused(bundle: Bundle) -> None:
    graph = bundle.manifest.graphs[0].model_dump(mode="json")
    edit(bundle, graphs=[graph, {**graph, "file": "other.onnx"}])
    with pytest.raises(UserError, match="share a file or a modality and precision"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"schema_version": 1}'])
def test_a_broken_manifest_is_one_line(bundle: Bundle, content: bytes) -> None:
    (bundle.path / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        Bundle.open(bundle.path)


def test_missing_places_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no bundle at .*espmedsam-edge export"):
        Bundle.open(tmp_path / "absent")
    with pytest.raises(UserError, match=r"cannot read .*name too long"):
        Bundle.open(tmp_path / ("n" * 300))
    with pytest.raises(UserError, match=r"is not a bundle: it has no manifest\.json"):
        Bundle.open(tmp_path)


def test_modalities_and_precisions_are_suggested(bundle: Bundle) -> None:
    with pytest.raises(UserError, match="Did you mean 'fundus'"):
        bundle.graph("fundos")
    with pytest.raises(UserError, match="Did you mean 'fp16'"):
        bundle.graph("fundus", "f16")
    with pytest.raises(UserError, match=r"no int8 graph for fundus, only fp32\. Add it: espmedsam-edge calibrate"):
        bundle.graph("fundus", "int8")


def test_what_calibrate_counted_is_read_as_far_as_it_makes_sense(bundle: Bundle) -> None:
    def counted(macs: object) -> dict[str, float]:
        edit(bundle, accuracy={"fundus/fp32": {"macs": macs}, "fundus/fp16": {"macs": {"fp16": 0.5}}})
        manifest = Bundle.open(bundle.path).manifest
        return manifest.macs(manifest.graphs[0])

    assert counted({"fp16": 0.9, "fp32": 0.1}) == {"fp16": 0.9, "fp32": 0.1}
    assert counted({"fp16": "most", "fp32": float("nan"), "int8": 10**400, "fp8": -1}) == {}
    assert counted([1, 2]) == counted(None) == {}
    assert bundle.manifest.macs(bundle.graph()) == {}


WILD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_manifest_is_valid_or_one_clear_error(bundle: Bundle, data: st.DataObject) -> None:
    document = copy.deepcopy(bundle.manifest.model_dump(mode="json"))
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from(places(document)))
        target = document
        for key in parents:
            if not isinstance(target, dict | list) or (isinstance(target, dict) and key not in target):
                break
            target = target[key]
        if isinstance(target, dict) and data.draw(st.booleans()):
            target.pop(last, None)
        elif isinstance(target, dict) or (isinstance(target, list) and isinstance(last, int) and last < len(target)):
            target[last] = data.draw(WILD)
    (bundle.path / MANIFEST).write_text(json.dumps(document))
    try:
        opened = Bundle.open(bundle.path)
        for graph in opened.manifest.graphs:
            assert opened.graph_path(graph).parent == bundle.path
            opened.read_graph(graph)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017 (both outcomes are right)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 2000), byte=st.integers(0, 255), cut=st.integers(0, 50))
def test_a_damaged_manifest_file_is_valid_or_one_clear_error(
    bundle: Bundle, position: int, byte: int, cut: int
) -> None:
    content = bytearray((json.dumps(bundle.manifest.model_dump(mode="json"), indent=2)).encode())
    content[position % len(content)] = byte
    (bundle.path / MANIFEST).write_bytes(content[: len(content) - cut])
    try:
        Bundle.open(bundle.path)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017 (both outcomes are right)


@pytest.mark.parametrize("extend", [False, True])
def test_a_killed_command_leaves_the_old_bundle(bundle: Bundle, extend: bool) -> None:
    script = f"""
import time
from espmedsam_edge.bundle import write_bundle
with write_bundle({str(bundle.path)!r}, extend={extend}) as draft:
    draft.new_file("fp32.onnx").write_bytes(b"half a gra")
    draft.new_file("manifest.json").write_text("{{")
    print("writing", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdout.close()
    opened = Bundle.open(bundle.path)
    assert opened.manifest == bundle.manifest
    assert opened.read_graph(opened.graph()) == PLAIN


def test_a_command_killed_at_any_moment_leaves_a_whole_bundle(tmp_path: Path) -> None:
    """Rewrites a bundle over and over; whenever the kill comes, one of the versions is there in full."""
    path = tmp_path / "b"
    write_plain_bundle(path, plain_graph(b"0" * 1000))
    script = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parent / "support")!r}]
from pathlib import Path
from plain_graphs import plain_graph
from test_bundle import write_plain_bundle
print("writing", flush=True)
for number in range(1, 100_000):
    write_plain_bundle(Path({str(path)!r}), plain_graph(str(number % 10).encode() * 1000))
"""
    for delay in (0.01, 0.04, 0.09):
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONHASHSEED": "0"}
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.wait(10)
        process.stdout.close()
        opened = Bundle.open(path)
        content = opened.read_graph(opened.graph())
        assert content in [plain_graph(str(digit).encode() * 1000) for digit in range(10)]


def test_normalization_is_imagenets_unless_said() -> None:
    assert Normalization().mean == (0.485, 0.456, 0.406)
    assert Normalization().std == (0.229, 0.224, 0.225)


NOTES = {"notes.txt": "mine", "sub/thesis.txt": "chapter one"}


def with_notes(folder: Path) -> None:
    for name, text in NOTES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_a_new_bundle_replaces_the_old_ones_files_alone(tmp_path: Path) -> None:
    path = tmp_path / "b"
    write_plain_bundle(path)
    old = json.loads((path / MANIFEST).read_text())
    old["graphs"][0]["file"] = "other.onnx"
    (path / "fp32.onnx").rename(path / "other.onnx")
    (path / MANIFEST).write_text(json.dumps(old))
    (path / "report.md").write_text("# What each step measured\n\nold\n")
    with_notes(path)
    write_plain_bundle(path)
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert files == {MANIFEST, "fp32.onnx", *NOTES}
    assert {name: (path / name).read_text() for name in NOTES} == NOTES
    assert Bundle.open(path).read_graph(Bundle.open(path).graph()) == PLAIN


@pytest.mark.parametrize("manifest", ["{}", "not JSON", '{"name": "app", "version": 3}', "", None])
def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path, manifest: str | None) -> None:
    path = tmp_path / "app"
    with_notes(path)
    if manifest is not None:
        (path / MANIFEST).write_text(manifest)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="app exists and is not a bundle"):
        write_plain_bundle(path)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("extend", [False, True])
@pytest.mark.parametrize("name", ["new.onnx", "report.md", "calibration.json"])
def test_a_foreign_file_in_a_bundle_stands_in_the_way(bundle: Bundle, name: str, extend: bool) -> None:
    (bundle.path / name).write_text("written by hand")

    def write() -> None:
        with write_bundle(bundle.path, extend=extend) as draft:
            draft.new_file(name).write_bytes(b"ours")

    with pytest.raises(UserError, match=rf"{name} in the bundle's folder is no file of the bundle"):
        write()
    assert (bundle.path / name).read_text() == "written by hand"
    assert Bundle.open(bundle.path).manifest == bundle.manifest


def test_a_link_to_a_bundle_stays_one(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle.path)
    write_plain_bundle(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert Bundle.open(bundle.path).graph().file == "fp32.onnx"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-be"])
def test_a_manifest_in_another_encoding_than_is_written_is_refused(toy_bundle: Bundle, encoding: str) -> None:
    file = toy_bundle.path / MANIFEST
    file.write_bytes(file.read_text(encoding="utf-8").encode(encoding))
    with pytest.raises(UserError, match="is not JSON: "):
        Bundle.open(toy_bundle.path)
