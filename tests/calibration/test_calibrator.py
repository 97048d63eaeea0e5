"""calibrate as its users meet it: what is written, reused, refused, warned of, and left alone."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from listening import listening
from onnx import numpy_helper
from trained_graphs import MODALITY, hostile, save_bundle, save_images, tensor, trained_graph
from typer.testing import CliRunner
from written_headers import check_bundle

pytest.importorskip("modelopt", reason="needs nvidia-modelopt (extra calibrate)")

from espmedsam_edge.bundle import CALIBRATION, Bundle
from espmedsam_edge.calibration import calibrator, modelopt_tools
from espmedsam_edge.calibration.calibrator import calibrate
from espmedsam_edge.calibration.gate import GateResult, ImageResult
from espmedsam_edge.calibration.images import find_images
from espmedsam_edge.calibration.network import Network
from espmedsam_edge.calibration.plan import quantisable_nodes
from espmedsam_edge.calibration.record import read_record
from espmedsam_edge.calibration.report import CalibrationSummary, plot_sensitivity, section
from espmedsam_edge.calibration.request import CalibrationRequest
from espmedsam_edge.calibration.search import Sensitivity
from espmedsam_edge.calibration.segments import SegmentedRunner
from espmedsam_edge.cli import build_app, main
from espmedsam_edge.errors import UserError
from espmedsam_edge.export.graph import store_weights
from espmedsam_edge.imaging.decode import read_image
from espmedsam_edge.imaging.geometry import Frame
from espmedsam_edge.runtime.backends.backend import load_backend
from espmedsam_edge.runtime.sources import files as sources

pytestmark = pytest.mark.xdist_group("calibrator")  # one process makes what they share

PROGRAM = [sys.executable, "-m", "espmedsam_edge"]


class Log:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps = 0

    def phase(self, title: str, total: int | None) -> None:
        self.lines.append(f"[{title}]")

    def step(self) -> None:
        self.steps += 1

    def calibrate(self, *arguments: Any) -> CalibrationSummary:
        """``calibrate`` with this listener, whose lines it remembers, too."""
        with listening(self.lines.append):
            return calibrate(*arguments, self)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images(tmp_path_factory.mktemp("images"), 12)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> tuple[Path, Log]:
    """A bundle with both precisions."""
    path, log = tmp_path_factory.mktemp("bundle") / "b.bundle", Log()
    save_bundle(path)
    for precision in ("fp16", "int8"):
        # Twice the default budgets: a network trained for seconds, on 64 x 64 pixels, has blurred edges.
        budget = {"fp16": 0.2, "int8": 1.0}[precision]
        request = CalibrationRequest(MODALITY, precision, budget=budget, threads=1)  # type: ignore[arg-type]
        log.calibrate(path, request, find_images([str(pictures)], held_out=3))
    return path, log


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    save_bundle(tmp_path / "b.bundle")
    return tmp_path / "b.bundle"


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_both_graphs_are_in_the_bundle_and_run(finished: tuple[Path, Log]) -> None:
    bundle = Bundle.open(finished[0])
    check_bundle(bundle, ["fp16", "int8"])
    for precision in ("fp32", "fp16", "int8"):
        graph = bundle.graph(MODALITY, precision)
        backend = load_backend(bundle, graph, "onnxruntime-cpu", 1).backend
        assert np.isfinite(backend.run(np.zeros(graph.input_shape, np.float32))).all()
        backend.close()
    for precision, low in (("fp16", ("fp16",)), ("int8", ("int8", "fp16"))):
        entry = bundle.manifest.accuracy[f"{MODALITY}/{precision}"]
        assert entry["dice_loss_mean"] <= entry["budget"]
        assert sum(entry["macs"].get(name, 0) for name in low) >= 0.9
        assert entry["calibration_images"] == 10
    assert "nvidia-modelopt" in bundle.manifest.tools


def test_the_report_keeps_the_others_sections(finished: tuple[Path, Log]) -> None:
    report = (finished[0] / "report.md").read_text()
    headings = [line for line in report.splitlines() if line.startswith("## ")]
    assert headings == ["## Export", f"## Calibrate: {MODALITY} fp16", f"## Calibrate: {MODALITY} int8"]
    for name in (f"{MODALITY}-fp16-worst.jpg", f"{MODALITY}-int8-worst.jpg"):
        assert f"({name})" in report
        assert (finished[0] / name).stat().st_size > 1000


def test_the_second_run_reused_the_first_ones_ranges(finished: tuple[Path, Log]) -> None:
    assert finished[1].text.count("[measuring ranges]") == 1
    assert f"{CALIBRATION} reused, measured on 10 images" in finished[1].text
    record = json.loads((finished[0] / CALIBRATION).read_text())
    assert record["modalities"][MODALITY]["images"] == 10


def test_ranges_are_measured_anew_for_other_images_or_another_graph(
    finished: tuple[Path, Log], pictures: Path, tmp_path: Path
) -> None:
    path = tmp_path / "copy.bundle"
    shutil.copytree(finished[0], path)
    log = Log()
    fewer = [str(file) for file in sorted(pictures.iterdir())[:5]]
    request = CalibrationRequest(MODALITY, "fp16", budget=1.0, pictures=False, threads=1)
    log.calibrate(path, request, find_images(fewer))
    assert "not reused: the images have changed (measured on 10, now 4)" in log.text
    assert not (path / f"{MODALITY}-fp16-worst.jpg").exists()  # nor the picture of the graph that was replaced
    (path / CALIBRATION).write_text('{"schema_version": 1, "modalities": {"dermoscopy": 3}}')
    assert read_record(path)[1] is not None
    other = save_bundle(tmp_path / "other.bundle", hostile(trained_graph()))
    shutil.copy(finished[0] / CALIBRATION, other.path)
    log = Log()
    log.calibrate(other.path, request, find_images([str(pictures)], held_out=3))
    assert "not reused: the graph has changed" in log.text


@pytest.mark.parametrize(
    "forget",
    [
        lambda measured: measured["largest"].clear(),
        lambda measured: measured["largest"].popitem(),
        lambda measured: measured["thresholds"].clear(),
        lambda measured: measured["thresholds"].popitem(),
        lambda measured: next(iter(measured["thresholds"].values())).popitem(),
    ],
    ids=["all magnitudes", "one magnitude", "all thresholds", "one tensor's thresholds", "one method's threshold"],
)
def test_an_incomplete_record_is_not_reused(
    finished: tuple[Path, Log],
    pictures: Path,
    forget: Callable[[dict[str, Any]], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "copy.bundle"
    shutil.copytree(finished[0], path)
    record = json.loads((path / CALIBRATION).read_text())
    forget(record["modalities"][MODALITY])
    (path / CALIBRATION).write_text(json.dumps(record))

    def stop(*args: object, **kwargs: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(calibrator, "measure_ranges", stop)
    log = Log()
    with pytest.raises(InterruptedError):
        log.calibrate(path, CalibrationRequest(MODALITY, "int8"), find_images([str(pictures)], held_out=3))
    assert re.search(rf"{CALIBRATION} not reused: it lacks numbers of \d+ tensors, the first '", log.text)


def test_weights_stored_in_float16_are_quantised_as_others(
    finished: tuple[Path, Log], pictures: Path, tmp_path: Path
) -> None:
    model = trained_graph()
    store_weights(model, "float16")
    stored = save_bundle(tmp_path / "b.bundle", model)
    request = CalibrationRequest(MODALITY, "int8", budget=1.0, threads=1)
    calibrate(stored.path, request, find_images([str(pictures)], held_out=3), Log())
    accuracy, wanted = (Bundle.open(p).manifest.accuracy[f"{MODALITY}/int8"] for p in (stored.path, finished[0]))
    assert accuracy["macs"] == wanted["macs"]
    assert accuracy["size_of_fp32"] == pytest.approx(wanted["size_of_fp32"], rel=0.01)  # not of the smaller file
    lowered = Network.parse((stored.path / "int8.onnx").read_bytes())
    products = [node for node in lowered.nodes if lowered.macs(node)]
    quantised = [node.name for node in products if lowered.product_type(node) == "int8"]
    assert quantised == [node.name for node in quantisable_nodes(Network.of(trained_graph()))]


def test_a_hostile_network_passes(tmp_path: Path, pictures: Path) -> None:
    path = save_bundle(tmp_path / "b.bundle", hostile(trained_graph())).path
    request = CalibrationRequest(MODALITY, "fp16", budget=0.2, threads=1)
    summary = calibrate(path, request, find_images([str(pictures)], held_out=3), Log())
    assert summary.result.passed
    assert any("values over" in reason for reason in summary.kept)


def test_over_the_budget_the_cheapest_groups_are_kept_higher(
    finished: tuple[Path, Log], bundle: Path, pictures: Path
) -> None:
    shutil.copy(finished[0] / CALIBRATION, bundle)
    accuracy = Bundle.open(finished[0]).manifest.accuracy
    lost = accuracy[f"{MODALITY}/int8"]["dice_loss_mean"]
    budget = 0.65 * lost  # less than INT8 loses, more than FP16 does
    assert budget > accuracy[f"{MODALITY}/fp16"]["dice_loss_mean"]
    request = CalibrationRequest(MODALITY, "int8", method="percentile", budget=budget, threads=1)
    summary = calibrate(bundle, request, find_images([str(pictures)], held_out=3), Log())
    assert summary.raised
    assert summary.result.passed
    assert summary.macs["int8"] > 0
    report = (bundle / "report.md").read_text()
    assert "Layer groups kept in FP16" in report
    assert all(group in report for group in summary.raised)


def test_int8_for_a_processor_is_in_the_bundle_and_runs(
    finished: tuple[Path, Log], bundle: Path, pictures: Path
) -> None:
    shutil.copy(finished[0] / CALIBRATION, bundle)
    request = CalibrationRequest(MODALITY, "int8", budget=1.0, threads=1, target="cpu")
    summary = calibrate(bundle, request, find_images([str(pictures)], held_out=3), Log())
    assert set(summary.macs) == {"int8", "fp32"}
    opened = Bundle.open(bundle)
    assert opened.manifest.accuracy[f"{MODALITY}/int8"]["target"] == "cpu"
    assert "what is not INT8 is FP32" in (bundle / "report.md").read_text()
    backend = load_backend(opened, opened.graph(MODALITY, "int8"), "onnxruntime-cpu", 1).backend
    assert np.isfinite(backend.run(np.zeros(backend.graph.input_shape, np.float32))).all()


def test_what_to_lower_to_must_be_named(bundle: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", str(bundle), str(pictures)])
    assert ended.value.code == 2
    assert "Name it: --precision fp16|int8" in capsys.readouterr().err


def test_fp16_is_not_for_a_processor(bundle: Path, pictures: Path) -> None:
    request = CalibrationRequest(MODALITY, "fp16", threads=1, target="cpu")
    with pytest.raises(UserError, match="a processor gains nothing from fp16"):
        calibrate(bundle, request, find_images([str(pictures)], held_out=3), Log())


def test_a_budget_out_of_reach_writes_nothing(finished: tuple[Path, Log], bundle: Path, pictures: Path) -> None:
    shutil.copy(finished[0] / CALIBRATION, bundle)
    before = contents(bundle)
    request = CalibrationRequest(MODALITY, "int8", method="max", budget=1e-6, threads=1)
    with pytest.raises(UserError, match="no choice of layers brings int8 within 1e-06") as raised:
        calibrate(bundle, request, find_images([str(pictures)], held_out=3), Log())
    assert raised.value.exit_code == 1
    assert contents(bundle) == before


@pytest.mark.parametrize("where", ["measure_ranges", "lower", "with_section"])
def test_control_c_leaves_the_bundle_as_it_was(
    bundle: Path, pictures: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    before = contents(bundle)
    monkeypatch.setattr(calibrator, where, interrupt)
    request = CalibrationRequest(MODALITY, "fp16", budget=5.0, threads=1)
    with pytest.raises(KeyboardInterrupt):
        calibrate(bundle, request, find_images([str(pictures)], held_out=2), Log())
    assert contents(bundle) == before
    assert [file.name for file in bundle.parent.iterdir()] == [bundle.name]


@pytest.mark.parametrize("moment", ["measuring", "writing"])
def test_a_real_ctrl_c_leaves_the_bundle_as_it_was(bundle: Path, pictures: Path, tmp_path: Path, moment: str) -> None:
    before = contents(bundle)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    script = (
        "import os, signal, sys\n"
        "from espmedsam_edge.calibration import calibrator\n"
        "from espmedsam_edge.cli import main\n"
        "if sys.argv.pop(1) == 'writing':\n"  # the draft of the new bundle is half written
        "    calibrator.section = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "main(sys.argv[1:])\n"
    )
    arguments = ["calibrate", bundle, pictures, "--precision", "fp16", "--budget", "5", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, moment, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert process.stderr is not None
    if moment == "measuring":
        while "Only 10 images calibrate" not in process.stderr.readline():  # said just before the first is measured
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode not in (0, None)
    assert "Traceback" not in error
    assert contents(bundle) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == [bundle.name, temporary.name]
    assert not list(temporary.glob("espmedsam-*"))


def test_true_masks_are_what_counts_where_there_are_some(bundle: Path, pictures: Path) -> None:
    images = find_images([str(pictures)], held_out=3, masks=pictures.parent / "truth")
    summary = calibrate(bundle, CalibrationRequest(MODALITY, "fp16", budget=0.3, threads=1), images, Log())
    assert summary.result.mean_drop is not None
    assert summary.result.loss == summary.result.mean_drop
    accuracy = Bundle.open(bundle).manifest.accuracy[f"{MODALITY}/fp16"]
    assert accuracy["against_true_masks"] is True
    alike = 100 - summary.result.mean_disagreement  # which a mean of gains and losses says nothing of
    assert accuracy["dice_loss_mean"] == pytest.approx(summary.result.mean_drop, abs=1e-4)
    assert accuracy["dice_to_fp32_mean"] == pytest.approx(alike, abs=1e-4)
    assert f"; {100 - alike:.3f} points between the two graphs' masks" in str(summary.result)
    report = (bundle / "report.md").read_text()
    assert f"| Dice to the FP32 mask | {alike:.3f} |" in report
    assert f"| Dice points lost on the true mask | {summary.result.mean_drop:+.3f} |" in report


def test_bundles_that_cannot_be_calibrated(
    finished: tuple[Path, Log], bundle: Path, pictures: Path, tmp_path: Path
) -> None:
    images = find_images([str(pictures)])
    with pytest.raises(UserError, match="no modality 'fundus'"):
        calibrate(bundle, CalibrationRequest("fundus", "fp16"), images, Log())
    with pytest.raises(UserError, match="cannot calibrate to fp32"):
        calibrate(bundle, CalibrationRequest(MODALITY, "fp32"), images, Log())
    with pytest.raises(UserError, match="budget of 0"):
        calibrate(bundle, CalibrationRequest(MODALITY, "fp16", budget=0.0), images, Log())
    quantised = onnx.load(str(finished[0] / "int8.onnx"))
    del quantised.metadata_props[:]  # a graph of an earlier version says nothing of itself
    with pytest.raises(UserError, match="is already quantised"):
        calibrate(
            save_bundle(tmp_path / "q.bundle", quantised).path, CalibrationRequest(MODALITY, "int8"), images, Log()
        )
    only = tmp_path / "only.bundle"
    shutil.copytree(finished[0], only)
    manifest = json.loads((only / "manifest.json").read_text())
    manifest["graphs"] = [graph for graph in manifest["graphs"] if graph["precision"] == "int8"]
    (only / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="holds only int8 for dermoscopy"):
        calibrate(only, CalibrationRequest(MODALITY, "fp16"), images, Log())


def test_a_broken_network_is_refused(tmp_path: Path, pictures: Path) -> None:
    model = trained_graph()
    weight = next(constant for constant in model.graph.initializer if constant.name == "encoder.reduce")
    weight.CopyFrom(numpy_helper.from_array(np.full(tuple(weight.dims), np.inf, np.float32), weight.name))
    path = save_bundle(tmp_path / "b.bundle", model).path
    with pytest.raises(UserError, match="is not finite on image 1"):
        calibrate(path, CalibrationRequest(MODALITY, "fp16", threads=1), find_images([str(pictures)]), Log())


def test_without_modelopt_one_line_says_what_to_install(
    bundle: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise modelopt_tools.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(modelopt_tools.metadata, "version", missing)
    with pytest.raises(UserError, match=r"not installed.*espmedsam-edge\[calibrate\]"):
        calibrate(bundle, CalibrationRequest(MODALITY, "fp16"), find_images([str(pictures)]), Log())


def test_no_room_for_temporary_files_is_one_line(bundle: Path, pictures: Path, tmp_path: Path) -> None:
    """A limit on file sizes is the full disk that any machine can set up."""
    before = contents(bundle)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = subprocess.run(
        [*PROGRAM, "calibrate", bundle, pictures, "--precision", "fp16", "--threads", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert done.returncode == 1
    notices, error = done.stderr.splitlines()  # the first is on how few images there are
    assert notices.startswith("warning: Only 10 images calibrate")
    assert error.startswith(f"error: cannot write {temporary}: File too large.")
    assert contents(bundle) == before
    assert not list(temporary.glob("espmedsam-*"))


def test_every_temporary_file_has_its_errors_told(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Bundle.open(bundle)
    graph = opened.graph(MODALITY, "fp32")
    network = Network.parse(opened.read_graph(graph))
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    for write in (
        lambda: SegmentedRunner(network, 1),
        lambda: modelopt_tools.to_fp16(network.model, lambda name: True),
        lambda: modelopt_tools.quantise(network.model, [], {}, tensor(0)),
    ):
        with pytest.raises(UserError, match=r"cannot write .*/file: Not a directory"):
            write()


def test_numbers_of_threads_that_cannot_be_meant_are_refused(
    toy_bundle: Bundle, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["calibrate", str(toy_bundle.path), str(pictures), "--precision", "fp16", "--threads"]
    for threads in (-1, 0, 1025):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, str(threads)])
        assert ended.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(("error: Invalid value for '--threads'", f"error: {threads} threads asked for."))
        with pytest.raises(UserError, match=f"{threads} threads asked for. Give a number from 1 to 1024"):
            calibrate(
                toy_bundle.path,
                CalibrationRequest("fundus", "fp16", threads=threads),
                find_images([str(pictures)]),
                Log(),
            )


def test_the_command_reports_a_bad_file_and_finishes(bundle: Path, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "some"
    shutil.copytree(pictures, folder)
    (folder / "case 1.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    arguments = ["calibrate", str(bundle), str(folder), "--precision", "fp16", "--budget", "1", "--threads", "1"]
    result = CliRunner().invoke(build_app("calibrate"), arguments)
    assert result.exit_code == 1
    assert "case 1.png" in result.output
    assert "warning: Only 10 images calibrate" in result.output
    assert "gate passed" in result.output
    assert Bundle.open(bundle).graph(MODALITY, "fp16")


def test_a_run_that_reuses_ranges_warns_of_the_images_all_the_same(bundle: Path, tmp_path: Path) -> None:
    folder = save_images(tmp_path, 6, "ultrasound")
    (folder / "case 1.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    arguments = ["calibrate", str(bundle), str(folder), "--precision", "fp16", "--budget", "50", "--threads", "1"]
    for run in (1, 2):
        result = CliRunner().invoke(build_app("calibrate"), arguments)
        assert ("reused, measured on 4 images" in result.output) == (run == 2), result.output
        assert "warning: These images do not look like dermoscopy" in result.output
        assert "case 1.png" in result.output
        assert result.exit_code == 1
        assert "These images do not look like dermoscopy" in (bundle / "report.md").read_text()


def test_images_that_can_be_read_by_now_are_measured(
    bundle: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DICOM files, once their decoder is installed: their content is what it was."""
    images = find_images([str(pictures)], held_out=3)
    request = CalibrationRequest(MODALITY, "fp16", budget=1.0, pictures=False, threads=1)
    with monkeypatch.context() as before:
        before.setattr(sources, "read_image", _but("case 1.png"))
        calibrate(bundle, request, images, Log())
    assert len(images.failures) == 1
    log = Log()
    log.calibrate(bundle, request, find_images([str(pictures)], held_out=3))
    assert "not reused: 10 of the images can be read, it was measured on 9" in log.text


def _but(name: str) -> Callable[..., Frame]:
    """What reads all images but one."""

    def read(path: Path, largest: int | None = None) -> Frame:
        if path.name == name:
            raise UserError(f"cannot read {path}.", exit_code=1)
        return read_image(path, largest)

    return read


def image_result(disagreement: float = 0.0, drop: float | None = None, **changes: bool) -> ImageResult:
    return ImageResult(disagreement, drop, changes.get("finite", True), changes.get("vanished", False), 0.0)


def test_the_report_says_where_its_plot_was_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    summary = CalibrationSummary(
        modality=MODALITY,
        precision="int8",
        file="int8.onnx",
        size=1,
        reference_size=4,
        macs={"int8": 1.0},
        network=Network.of(trained_graph()),
        result=GateResult(0.1, (image_result(),)),
        images=1,
        reused=False,
        method="max",
        kept={},
        raised=("encoder.neck",),
        ranking=[Sensitivity("encoder.neck", 0.2, 0.1, True, 0.3)],
    )
    assert "left out" not in section(summary, [])
    monkeypatch.setattr("espmedsam_edge.machine.installation.find_spec", lambda name: None)
    assert "plot was left out: no matplotlib (pip install 'espmedsam-edge[calibrate]')" in section(summary, [])
    assert not plot_sensitivity(tmp_path / "plot.png", summary.ranking, summary.raised, "")
    extras = (Path(__file__).parents[2] / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    (extra,) = (line for line in extras.splitlines() if line.startswith("calibrate = "))
    assert "matplotlib" in extra


def test_the_gates_verdict() -> None:
    assert GateResult(0.1, (image_result(0.05), image_result(0.12))).passed
    assert not GateResult(0.1, (image_result(0.05), image_result(0.2))).passed
    assert not GateResult(0.1, (image_result(0.0, finite=False),)).passed
    assert not GateResult(0.1, (image_result(0.0, vanished=True),)).passed
    assert GateResult(0.1, (image_result(1.0, 0.05), image_result(1.0, -0.2))).passed
    assert not GateResult(0.1, (image_result(60.0, 0.0),)).passed  # equally bad by chance
