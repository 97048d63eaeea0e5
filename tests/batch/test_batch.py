"""Batches on two workers of a local Ray cluster: what infer would give, once, whoever is killed meanwhile."""

from __future__ import annotations

import glob
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from seg_sources import save_dicom
from toy_bundles import save_toy_bundle
from video_files import save_clip

if find_spec("ray") is None:  # not imported: the batch sets its environment first
    pytest.skip("needs Ray (extra ray)", allow_module_level=True)
pytest.importorskip("pyarrow", reason="needs pyarrow (extra ray)")

from pyarrow import parquet

from espmedsam_edge.batch import cluster as clusters
from espmedsam_edge.batch import run as batch_run
from espmedsam_edge.batch import table
from espmedsam_edge.batch.cluster import ClusterOptions, check_worker, cluster
from espmedsam_edge.batch.run import BatchReport, BatchRequest, _settings, run_batch
from espmedsam_edge.batch.table import COLUMNS
from espmedsam_edge.batch.units import Unit, plan_units
from espmedsam_edge.batch.worker import UnitResult, UnitWorker
from espmedsam_edge.cli import main
from espmedsam_edge.destinations import Claims
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.inference import infer
from espmedsam_edge.runtime.request import ModelOptions, Outputs
from espmedsam_edge.runtime.sinks.journal import Journal

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A cluster with room for two workers, started once."""
    with cluster(ClusterOptions(workers=2), 1) as (module, room):
        assert room == 2
        yield module


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle and a folder of inputs, where the batch runs."""
    monkeypatch.chdir(tmp_path)
    save_toy_bundle(tmp_path / "toy.bundle", ("histopathology",))
    generator = np.random.default_rng(3)
    (tmp_path / "in").mkdir()
    for number in range(6):
        assert cv2.imwrite(f"in/p{number}.png", generator.integers(0, 256, (48, 64, 3), np.uint8))
    save_clip(Path("in/clip.avi"), 60)
    save_dicom(Path("in/d.dcm"), PixelSpacing=[0.5, 0.5])
    return tmp_path


def batch(
    worker: type[UnitWorker] = UnitWorker, workers: int = 2, inputs: Sequence[str] = ("in",), **named: Any
) -> BatchReport:
    model = ModelOptions("toy.bundle", backend="onnxruntime-cpu", threads=1)
    return run_batch(BatchRequest(inputs, Path("out"), model, ClusterOptions(workers=workers), **named), worker=worker)


def rows() -> list[dict[str, Any]]:
    found = parquet.read_table("out/frames").to_pylist()
    return sorted(found, key=lambda row: (row["source"], -1 if row["frame"] is None else row["frame"]))


def masks(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def changed(before: dict[Path, int]) -> set[str]:
    return {path.name for path, time in times().items() if before.get(path) != time}


def times() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path("out/masks").rglob("*.png")}


@pytest.mark.usefixtures("ray", "work")
def test_a_batch_is_what_infer_gives_and_goes_on_by_content() -> None:
    Path("in/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    report = batch(chunk=1, inputs=("in", "gone.png"))
    assert (report.before, report.frames, len(report.failures)) == (0, 67, 2)
    expected = infer(["in"], ModelOptions("toy.bundle"), Outputs(masks="whole", jsonl="whole.jsonl"))
    assert expected.frames == 67
    assert masks(Path("out/masks")) == masks(Path("whole"))
    lines = [json.loads(line) for line in Path("whole.jsonl").read_text().splitlines()]
    wanted = sorted((line["source"], line["frame"], line["time"], line["area"]) for line in lines if line["time"] != 0)
    found = rows()
    assert list(found[0]) == list(COLUMNS)
    failed = [row for row in found if row["error"] is not None]
    assert [row["source"] for row in failed] == ["gone.png", "in/broken.png"]
    done = [row for row in found if row["error"] is None]
    assert sorted((r["source"], r["frame"], r["time_s"], r["area_px"]) for r in done if r["time_s"] != 0) == wanted
    assert all(Path("out", row["mask"]).is_file() for row in done)
    assert [row["area_mm2"] for row in done if row["source"] == "in/d.dcm"] == [
        row["area_px"] / 4 for row in done if row["source"] == "in/d.dcm"
    ]
    assert len({row["unit"] for row in done if row["source"] == "in/clip.avi"}) >= 2

    before = times()
    Path("in/broken.png").unlink()
    os.utime("in/p0.png")
    assert cv2.imwrite("in/p1.png", np.full((48, 64, 3), 255, np.uint8))
    Path("out/masks/p2.png").unlink()
    again = batch(chunk=1, workers=1)
    assert (again.frames, again.failures) == (2, [])
    assert changed(before) == {"p1.png", "p2.png"}
    assert Counter((row["source"], row["frame"]) for row in rows() if row["error"] is None).most_common(1)[0][1] == 1
    assert [row["error"] for row in rows()] == [None] * 67  # what failed and is asked for no more is gone
    assert batch(chunk=1).workers == 0


@pytest.mark.usefixtures("ray", "work")
def test_workers_that_end_lose_nothing_and_do_nothing_twice() -> None:
    for name in ("once", "always", "full"):
        shutil.copy("in/p0.png", f"in/{name}.png")
    clip = Path("in/clip.avi")
    clip.unlink()

    class Deadly(UnitWorker):
        def do(self, unit: Unit) -> UnitResult:
            name = Path(unit.path).stem
            seen = self._out / "seen"
            if name == "always" or (name == "once" and not seen.exists()):
                seen.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "full":
                from ray.exceptions import ObjectStoreFullError

                raise ObjectStoreFullError("no room")
            return super().do(unit)

    report = batch(Deadly)
    assert report.units == 10
    assert report.frames == 8
    found = rows()
    assert Counter(row["source"] for row in found).most_common(1)[0][1] == 1
    errors = {row["source"]: row["error"] for row in found if row["error"] is not None}
    assert set(errors) == {"in/always.png", "in/full.png"}
    assert errors["in/always.png"] == "given up after 3 tries: it ended its worker's process"
    assert "ObjectStoreFullError" in errors["in/full.png"]
    assert sorted(path.stem for path in Path("out/masks").glob("*.png")) == ["d", "once", *(f"p{n}" for n in range(6))]
    assert sorted(report.failures) == sorted(errors.values())


@pytest.mark.usefixtures("ray", "work")
def test_a_driver_that_ends_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a file of the table and the journal, where units would be in the table twice or never."""
    done, calls = Journal.done, []

    def ends(self: Journal, *arguments: Any, **named: Any) -> None:
        calls.append(arguments[0])
        if len(calls) == 4:
            raise RuntimeError("killed")
        done(self, *arguments, **named)

    monkeypatch.setattr(table, "_SECONDS", 1e9)  # all in one file
    monkeypatch.setattr(Journal, "done", ends)
    with pytest.raises(RuntimeError, match="killed"):
        batch(workers=1)
    assert len(list(Path("out/frames").iterdir())) == 1
    monkeypatch.setattr(Journal, "done", done)
    report = batch(workers=1)
    assert report.before == 3
    assert len(rows()) == 67
    assert Counter((row["source"], row["frame"]) for row in rows()).most_common(1)[0][1] == 1


def test_sigterm_ends_it_as_ctrl_c_does(work: Path) -> None:
    """As a scheduler or a service manager sends it, while workers are at work."""
    program = """
import os, signal, sys
from espmedsam_edge.batch import table
from espmedsam_edge.cli import main
add = table.Table.add
def ended(self, unit, result):
    add(self, unit, result)
    os.kill(os.getpid(), signal.SIGTERM)
table.Table.add = ended
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", program, "batch", "toy.bundle", "in", "--out", "out", "--workers", "1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    told = subprocess.run([*command, "--threads", "1"], env=environment, capture_output=True, text=True)
    assert told.returncode == 130
    assert told.stderr.splitlines()[-1].startswith("interrupted: what is done is noted")
    assert "***" not in told.stderr
    assert len(rows()) >= 1


@pytest.mark.usefixtures("ray", "work")
def test_the_page_is_followed_word_by_word() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text().partition("## On Ray")[2]
    (command,) = (
        line for line in page.splitlines() if line.startswith("espmedsam-edge batch") and "--address" not in line
    )
    os.rename("toy.bundle", "colonoscopy.bundle")
    os.rename("in", "studies")
    os.mkdir("videos")
    save_clip(Path("videos/a.avi"), 4)
    os.rename("videos/a.avi", "videos/a.mp4")
    words = [name for word in shlex.split(command)[1:] for name in (sorted(glob.glob(word)) or [word])]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code in (0, None)
    python = page.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(python, names)
    assert (names["table"].num_rows, names["failed"].num_rows, names["areas"].num_rows) == (71, 0, 9)


def test_the_stretches_of_a_video_have_each_frame_once(work: Path) -> None:
    model = ModelOptions(work / "toy.bundle", backend="onnxruntime-cpu", threads=1)
    worker = UnitWorker(model, str(work), masks=False)
    whole, _ = plan_units(["in/clip.avi"], 1000)
    (alone,) = [worker.do(unit).rows for unit in whole]
    for chunk in (0.31, 0.5, 1.0):
        units, failures = plan_units(["in/clip.avi"], chunk)
        assert (len(units) > 2, failures) == (True, [])
        parts = [row for unit in units for row in worker.do(unit).rows]
        assert [{**row, "unit": ""} for row in parts] == [{**row, "unit": ""} for row in alone]
        assert len({unit.label for unit in units}) == len(units)
    assert len(alone) == 60


def test_what_fails_is_not_read_to_its_end(work: Path) -> None:
    with open(work / "huge", "wb") as file:
        file.truncate(1 << 40)
    os.mkfifo(work / "pipe")
    worker = UnitWorker(ModelOptions("toy.bundle", threads=1), str(work), masks=False)
    for name in ("huge", "pipe"):
        result = worker.do(Unit(str(work / name), name, ""))
        assert len(result.failures) == 1
        assert not result.sha256


def test_a_batch_and_other_runs_keep_from_each_other_s_places(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = work / "out" / "masks" / "p0.png"
    with Claims() as other:
        with other.planning():
            other.add([mask])
        with pytest.raises(UserError, match=r"another run is writing to .*p0\.png"):
            batch()
    assert not mask.exists()
    said: list[str] = []

    def beside(*arguments: object) -> None:
        del arguments
        with pytest.raises(UserError) as caught:
            infer(["in/p0.png"], ModelOptions("toy.bundle"), Outputs(masks=Path("out/masks")))
        said.append(caught.value.message)

    monkeypatch.setattr(batch_run, "_run", beside)  # while the batch goes on
    batch()
    assert said == ["another run is writing to out/masks/p0.png."]


def test_what_changes_results_is_what_is_done_anew(work: Path) -> None:
    del work
    request = BatchRequest(["in"], Path("out"), ModelOptions("toy.bundle"))
    settings = _settings(request)
    assert _settings(replace(request, inputs=["other"], model=ModelOptions("toy.bundle", threads=3))) == settings
    model = ModelOptions("toy.bundle", threshold=0.6)
    others = [replace(request, chunk=0.5), replace(request, masks=False), replace(request, model=model)]
    assert len({settings, *map(_settings, others)}) == 4


def test_a_table_keeps_what_others_left_there(tmp_path: Path) -> None:
    """Files of other batches, with other settings; files of other programs."""
    pyarrow = pytest.importorskip("pyarrow")

    def run(source: str, settings: str) -> None:
        def asked(label: str) -> bool:
            return label == source

        with Journal(tmp_path / "journal") as journal:
            rows = table.Table(tmp_path, journal, settings, lambda record: True, asked)
            unit = Unit(f"/{source}", source, "")
            if not rows.has(unit):
                found = {"source": source, "frame": 0, "modality": settings, "mask": None, "unit": unit.label}
                rows.add(unit, UnitResult([found], sha256="00", size=(8, 8)))
            rows.flush()

    def found() -> list[tuple[str, str]]:
        held = [row for path in sorted(places) for row in parquet.read_table(path).to_pylist()]
        return sorted((row["source"], row["modality"]) for row in held)

    run("a", "one")
    theirs = tmp_path / "frames" / "part-00000.parquet"
    parquet.write_table(pyarrow.table({"unit": ["kg"], "error": [None]}), theirs)
    places: set[Path] = set()
    for source, settings, expected in (
        ("b", "two", [("a", "one"), ("b", "two")]),
        ("a", "one", [("a", "one"), ("b", "two")]),
        ("a", "two", [("a", "two"), ("b", "two")]),
        ("c", "one", [("a", "two"), ("b", "two"), ("c", "one")]),
    ):
        run(source, settings)
        places = set((tmp_path / "frames").iterdir()) - {theirs}
        assert found() == expected
    assert parquet.read_table(theirs)["unit"].to_pylist() == ["kg"]
    next(iter(places)).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"part-\w+\.parquet is damaged"):
        run("a", "one")


def test_a_cluster_on_this_machine_is_nobody_elses(tmp_path: Path) -> None:
    """Who has not its token is refused, also where Ray keeps one for all in the home folder."""
    place = tmp_path / ".ray" / "auth_token"
    place.parent.mkdir()
    place.write_text("ab" * 32)
    program = """
import os, subprocess, sys
from espmedsam_edge.batch.cluster import ClusterOptions, cluster
with cluster(ClusterOptions(workers=1), 1) as (ray, _):
    address = ray.get_runtime_context().gcs_address
    look = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
    look += ".internal_kv_keys(b'', None, timeout=5)"
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    for more in ({"RAY_AUTH_MODE": "token"}, {k: v for k, v in os.environ.items() if k.startswith("RAY_AUTH_")}):
        command = [sys.executable, "-c", look, address]
        asked = subprocess.run(command, env=others | more, capture_output=True)
        print(asked.returncode, b"InvalidAuthToken" in asked.stderr)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    told = subprocess.run(
        [sys.executable, "-c", program], env=environment | {"HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert told.stdout.splitlines() == ["1 True", "0 False"], told.stderr


def test_what_a_cluster_on_this_machine_writes_is_the_users_alone_and_goes_with_it(tmp_path: Path) -> None:
    """Every folder above a file of Ray's that others may enter lies in one that they may not; so does every socket."""
    program = """
import stat, sys
from pathlib import Path
from espmedsam_edge.batch.cluster import ClusterOptions, cluster
with cluster(ClusterOptions(workers=1), 1) as (ray, _):
    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    files = [path for path in session.rglob("*") if not path.is_dir()]
    print(len(files) > 5, any(not stat.S_IMODE(folder.stat().st_mode) & 0o77 for folder in session.parents))
print(session.exists(), any(folder.name.startswith("espmedsam-") for folder in session.parents if folder.exists()))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    told = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert told.stdout.splitlines() == ["True True", "False False"], told.stderr


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (("--modality", "iris"), "has no modality 'iris'"),
        (("--precision", "fp64"), "unknown precision 'fp64'"),
        (("--backend", "warp"), "unknown backend 'warp'"),
        (("--threshold", "nan"), "threshold nan is not between"),
    ],
)
def test_wrong_use_writes_nothing_and_starts_no_cluster(
    work: Path, capsys: pytest.CaptureFixture[str], wrong: tuple[str, str], told: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["batch", "toy.bundle", "in", "--out", "out", *wrong])
    assert (ended.value.code, told in capsys.readouterr().err, Path("out").exists()) == (2, True, False)


@pytest.mark.parametrize("made", ["", "out", "out/mine"])
def test_a_cluster_that_is_away_leaves_no_folder_but_the_users_own(
    work: Path, made: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = clusters._load_ray(local=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # where other tests of this process have one
    (work / made).mkdir(parents=True, exist_ok=True)
    request = BatchRequest(["in"], Path("out"), ModelOptions("toy.bundle"), ClusterOptions("127.0.0.1:1"))
    with pytest.raises(UserError, match="no Ray cluster at"):
        run_batch(request)
    assert (work / "out").exists() == bool(made)
    assert (work / made).exists()


def test_results_go_where_nothing_of_the_user_is(work: Path) -> None:
    def refused(told: str, inputs: str = "in", out: str = "out") -> None:
        with pytest.raises(UserError, match=told) as error:
            run_batch(BatchRequest([inputs], Path(out), ModelOptions("toy.bundle")))
        assert error.value.exit_code == 2

    refused("is a bundle", out="toy.bundle")
    refused("is a bundle", out="toy.bundle/below")
    (work / "out" / "masks").mkdir(parents=True)
    (work / "out" / "masks" / "p3.png").write_text("mine")
    refused(r"p3\.png exists and is no picture of this program")
    shutil.copy("in/p1.png", "out/masks/p3.png")
    refused("would replace an input", inputs="out/masks/p3.png")
    assert (work / "out" / "masks" / "p3.png").read_bytes() == Path("in/p1.png").read_bytes()


def test_what_is_wrong_with_a_cluster_is_one_line(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = UnitWorker(ModelOptions(work / "toy.bundle"), str(work), masks=True).about()
    check_worker(about, str(work))
    for name, value, told in (
        ("python", "3.9.1", r"has Python 3\.9\.1"),
        ("package", "0.0.1", r"has espmedsam-edge 0\.0\.1"),
        ("sees", False, "does not see"),
    ):
        with pytest.raises(UserError, match=told):
            check_worker({**about, name: value}, str(work))
    mismatch = RuntimeError(
        "Version mismatch: The cluster was started with:\n Ray: 2.0\n Python: 3.9.1\nThis process\n"
    )
    for error, told in (
        (mismatch, "of another Python or Ray"),
        (ConnectionError("ray client\nfailed"), "no Ray cluster"),
    ):
        found = clusters._why(error, ClusterOptions("ray://far:10001"))
        assert (told in found.message, "\n" in str(found), found.exit_code) == (True, False, 1)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        for address in (f"127.0.0.1:{nobody.getsockname()[1]}", f"ray://127.0.0.1:{nobody.getsockname()[1]}"):
            with pytest.raises(UserError, match=f"no Ray cluster at {address}: "):
                clusters._check_there(address)
    with pytest.raises(UserError, match="no room"):
        clusters._room({"CPU": 1.0}, ClusterOptions("far:6379"), 1)
    assert clusters._room({"CPU": 9.0, "GPU": 2.0}, ClusterOptions("far:6379", gpus=0.25), 1) == 8
    assert clusters._room({"CPU": 33.0}, ClusterOptions("far:6379"), 4) == 8
    for wrong in (ClusterOptions, lambda **named: ClusterOptions(**named)):
        with pytest.raises(UserError, match="gpus"):
            wrong(gpus=1.5)
