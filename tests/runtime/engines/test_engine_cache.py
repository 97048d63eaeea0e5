"""The cache: an engine is used only where it fits and is whole; else one line says why and it is rebuilt."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hand_graphs import hand_bundle
from plain_graphs import plain_graph

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.cuda import gpu as cuda_driver
from espmedsam_edge.runtime.cuda.gpu import GpuDevice
from espmedsam_edge.runtime.engines import building_lock as building_lock_module
from espmedsam_edge.runtime.engines import cache as engine_cache
from espmedsam_edge.runtime.engines import child, inventory, tensorrt_api
from espmedsam_edge.runtime.engines.agreement import Agreement
from espmedsam_edge.runtime.engines.building_lock import building_lock
from espmedsam_edge.runtime.engines.cache import EnginePlan, find_or_build
from espmedsam_edge.runtime.engines.precision import Arithmetic, TensorType
from espmedsam_edge.runtime.engines.request import EngineRequest, EngineResult
from espmedsam_edge.runtime.engines.tensorrt_api import TensorRT

ORIN = GpuDevice("Orin", "sm87", 8, 8 << 30, True, "12.6")
RTX_4090 = GpuDevice("NVIDIA GeForce RTX 4090", "sm89", 128, 24 << 30, False, "13.0")


AGREES = Agreement(finite=True, dice=0.9996, foreground=0.3, expected_foreground=0.3001)


class ComputeCapability:
    """The generations that a TensorRT-RTX builds for."""

    __members__ = dict.fromkeys(("NONE", "CURRENT", "SM75", "SM80", "SM86", "SM89", "SM120"))


class Module:
    """Stands for TensorRT-RTX's Python module."""

    ComputeCapability = ComputeCapability


@dataclass
class Machine:
    """A machine to build on, whose builds are instant and counted. ``before`` runs within every build."""

    folder: Path
    gpu: GpuDevice | None = ORIN
    api: TensorRT = field(default_factory=lambda: TensorRT("tensorrt", "10.3.0", object()))
    built: list[EngineRequest] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    before: Callable[[], None] = lambda: None
    content: bytes = b"plan " * 1000
    agreement: Agreement | UserError = AGREES

    def run(self, request: EngineRequest, on_progress: Any = None) -> EngineResult:
        self.before()
        arithmetic = Arithmetic(
            inputs=(TensorType(name="image", dtype="fp32", shape=request.graph.input_shape),),
            outputs=(TensorType(name="logits", dtype="fp32", shape=request.graph.output_shape),),
            layers={"fp16": 3},
            macs={"fp16": 100},
            tensors={},
        )
        if request.command == "build":
            self.built.append(request)
            assert request.plan_path is not None
            request.plan_path.write_bytes(self.content)
        if request.command == "compare":
            if isinstance(self.agreement, UserError):
                raise self.agreement
            return EngineResult(version=self.api.version, agreement=self.agreement)
        loaded = self.gpu is not None
        return EngineResult(
            version=self.api.version,
            arithmetic=arithmetic,
            plan_sha256=hashlib.sha256(self.content).hexdigest(),
            plan_bytes=len(self.content),
            engine_loaded=loaded,
            median_ms=5.0,
        )

    def engine(self, bundle: Bundle, precision: str = "fp16", **options: Any) -> EnginePlan:
        self.said.clear()
        return find_or_build(bundle, bundle.graph(None, precision), cache=self.folder, **options)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> Machine:
    made = Machine(tmp_path / "cache", said=said)
    monkeypatch.setattr(child, "run", lambda *arguments: made.run(*arguments))
    monkeypatch.setattr(engine_cache, "find_gpu", lambda: made.gpu)
    monkeypatch.setattr(engine_cache, "load", lambda flavour: made.api)
    return made


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    graphs = {"fp16": plain_graph(b"graph of fp16"), "int8": plain_graph(b"graph of int8")}
    return hand_bundle(tmp_path / "fundus.bundle", graphs)  # type: ignore[arg-type]


class TestUse:
    def test_builds_once_and_then_finds(self, machine: Machine, bundle: Bundle) -> None:
        first, second = machine.engine(bundle), machine.engine(bundle)
        assert (first.built_now, second.built_now) == (True, False)
        assert first.path == second.path
        assert first.path.read_bytes() == machine.content  # raw: any TensorRT tool can load it
        assert len(machine.built) == 1
        assert machine.said == []

    def test_the_sidecar_says_where_it_came_from(self, machine: Machine, bundle: Bundle) -> None:
        plan = machine.engine(bundle)
        written = json.loads(plan.path.with_suffix(".json").read_text())
        assert written["graph"]["sha256"] == bundle.graph(None, "fp16").sha256
        assert (written["flavour"], written["version"], written["cuda"]) == ("tensorrt", "10.3.0", "12.6")
        assert written["gpu"] == {"name": "Orin", "sm": "sm87", "sm_count": 8}
        assert written["arithmetic"]["macs"] == {"fp16": 100}
        assert written["median_ms"] == 5.0
        assert written["agreement"] == AGREES.model_dump()
        assert written["bundle"] == str(bundle.path.resolve())

    def test_graphs_do_not_share_engines(self, machine: Machine, bundle: Bundle) -> None:
        assert machine.engine(bundle, "fp16").path != machine.engine(bundle, "int8").path

    def test_a_moved_bundle_keeps_its_engine(self, machine: Machine, bundle: Bundle, tmp_path: Path) -> None:
        machine.engine(bundle)
        moved = Bundle.open(bundle.path.rename(tmp_path / "elsewhere.bundle"))
        assert not machine.engine(moved).built_now

    def test_force_builds_again(self, machine: Machine, bundle: Bundle) -> None:
        machine.engine(bundle)
        assert machine.engine(bundle, force=True).built_now

    def test_tf32_is_another_engine(self, machine: Machine, bundle: Bundle) -> None:
        machine.engine(bundle)
        assert machine.engine(bundle, tf32=True).built_now
        assert machine.said == [
            "fundus fp16: the engine in the cache is not used, it was built without TF32; building anew."
        ]
        assert not machine.engine(bundle).built_now

    def test_the_folder_comes_from_the_environment(self, machine: Machine, bundle: Bundle, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
        monkeypatch.setenv("ESPMEDSAM_CACHE", str(tmp_path / "chosen"))
        plan = find_or_build(bundle, bundle.graph(None, "fp16"))
        assert plan.path.parent == tmp_path / "chosen" / "engines"


class TestStaleAndForeign:
    """Each is one line why, then a rebuild; the old one is never used."""

    @pytest.fixture(autouse=True)
    def _first(self, machine: Machine, bundle: Bundle) -> None:
        self.old = machine.engine(bundle)

    def reason(self, machine: Machine, bundle: Bundle, **options: Any) -> str:
        plan = machine.engine(bundle, **options)
        assert plan.built_now
        (line,) = machine.said
        assert not machine.engine(bundle, **options).built_now, "the rebuilt engine must fit"
        return line.removeprefix("fundus fp16: the engine in the cache is not used, ").removesuffix("; building anew.")

    def test_an_older_graph(self, machine: Machine, bundle: Bundle, tmp_path: Path) -> None:
        newer = hand_bundle(bundle.path, {"fp16": plain_graph(b"a newer graph of fp16")})
        assert self.reason(machine, newer) == "it was built from an older fp16.onnx"
        assert not self.old.path.exists(), "nothing will want it again"

    def test_another_tensorrt(self, machine: Machine, bundle: Bundle) -> None:
        machine.api = TensorRT("tensorrt", "10.16.1.11", object())
        expected = "it was built by TensorRT 10.3.0 and this is TensorRT 10.16.1.11"
        assert self.reason(machine, bundle) == expected
        assert self.old.path.exists(), "the other version may come back"

    def test_another_gpu(self, machine: Machine, bundle: Bundle) -> None:
        machine.gpu = RTX_4090
        expected = "it was built for Orin (SM 8.7, 8 SMs) and this is for NVIDIA GeForce RTX 4090 (SM 8.9, 128 SMs)"
        assert self.reason(machine, bundle) == expected

    def test_the_same_gpu_with_fewer_multiprocessors(self, machine: Machine, bundle: Bundle) -> None:
        """As Orin boards of one name have, by their power mode and memory."""
        machine.gpu = GpuDevice("Orin", "sm87", 4, 4 << 30, True, "12.6")
        assert "8 SMs) and this is for Orin (SM 8.7, 4 SMs)" in self.reason(machine, bundle)

    def test_an_engine_file_under_another_s_name(self, machine: Machine, bundle: Bundle) -> None:
        """Renaming a foreign engine to the name that fits does not make it fit."""
        machine.gpu = RTX_4090
        fitting = machine.engine(bundle).path
        for suffix in (".plan", ".json"):
            text = self.old.path.with_suffix(suffix).read_bytes()
            fitting.with_suffix(suffix).write_bytes(text.replace(self.old.path.stem.encode(), fitting.stem.encode()))
        assert "it was built for Orin" in self.reason(machine, bundle)

    @pytest.mark.parametrize("position", [0, 2500, 4999])
    def test_a_flipped_bit(self, position: int, machine: Machine, bundle: Bundle) -> None:
        content = bytearray(self.old.path.read_bytes())
        content[position] ^= 1 << (position % 8)
        self.old.path.write_bytes(content)
        assert self.reason(machine, bundle) == "its plan is damaged (SHA-256 differs)"

    def test_a_plan_cut_short(self, machine: Machine, bundle: Bundle) -> None:
        os.truncate(self.old.path, 1000)
        assert self.reason(machine, bundle) == "its plan has 1000 bytes, not 5000"

    def test_a_plan_that_is_gone(self, machine: Machine, bundle: Bundle) -> None:
        self.old.path.unlink()
        assert self.reason(machine, bundle) == "its plan is gone"

    def test_a_sidecar_that_is_gone(self, machine: Machine, bundle: Bundle) -> None:
        self.old.path.with_suffix(".json").unlink()
        assert self.reason(machine, bundle) == "it has no sidecar"

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"plan": "../../etc/passwd"}', b"\xff" * 100])
    def test_a_sidecar_that_is_not_one(self, content: bytes, machine: Machine, bundle: Bundle) -> None:
        self.old.path.with_suffix(".json").write_bytes(content)
        assert self.reason(machine, bundle) == "its sidecar cannot be read"

    def test_a_sidecar_that_points_elsewhere(self, machine: Machine, bundle: Bundle, tmp_path: Path) -> None:
        """A file name in a sidecar must not make us load another file."""
        values = json.loads(self.old.path.with_suffix(".json").read_text())
        (tmp_path / "evil.plan").write_bytes(machine.content)
        values["plan"] = "../../evil.plan"
        self.old.path.with_suffix(".json").write_text(json.dumps(values))
        assert self.reason(machine, bundle) == "its sidecar cannot be read"


class TestAccuracy:
    """What the engine computes is compared with ONNX Runtime before the engine is used."""

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"finite": False}, "fp16.onnx is wrong: it gives logits that are not numbers. It is not kept."),
            ({"foreground": 0.0}, "is wrong: it gives an empty mask of a phantom, where ONNX Runtime finds 30.0 %"),
            ({"foreground": 1.0}, "is wrong: it gives a full mask of a phantom, where ONNX Runtime finds 30.0 %"),
        ],
    )
    def test_a_wrong_engine_fails_the_build_and_is_not_kept(
        self, change: dict[str, Any], words: str, machine: Machine, bundle: Bundle
    ) -> None:
        machine.agreement = AGREES.model_copy(update=change)
        with pytest.raises(UserError, match=words) as caught:
            machine.engine(bundle)
        assert caught.value.exit_code == 1
        assert not list((machine.folder / "engines").glob("*.plan"))

    def test_a_doubtful_engine_is_kept_and_told_of(self, machine: Machine, bundle: Bundle) -> None:
        machine.agreement = AGREES.model_copy(update={"dice": 0.975})
        assert machine.engine(bundle).built_now
        (line,) = machine.said
        assert line.startswith("fundus fp16: mask of a phantom 97.50 % Dice to ONNX Runtime's, which is little")
        assert not machine.engine(bundle).built_now

    def test_an_empty_mask_is_right_where_onnxruntime_s_is_empty(self, machine: Machine, bundle: Bundle) -> None:
        machine.agreement = Agreement(finite=True, dice=1.0, foreground=0.0, expected_foreground=0.0)
        assert str(machine.engine(bundle).sidecar.agreement) == "mask of a phantom empty, as ONNX Runtime's"
        machine.agreement = Agreement(finite=True, dice=0.0, foreground=0.2, expected_foreground=0.0)
        found = machine.engine(bundle, force=True).sidecar.agreement
        assert str(found) == "mask of a phantom 0.00 % Dice to ONNX Runtime's"

    def test_what_cannot_be_compared_is_told_and_used(self, machine: Machine, bundle: Bundle) -> None:
        machine.agreement = UserError("onnxruntime 1.19 cannot load fp16.onnx.", exit_code=1)
        assert machine.engine(bundle).sidecar.agreement is None
        assert machine.said == [
            "fundus fp16: the engine was not compared with ONNX Runtime: onnxruntime 1.19 cannot load fp16.onnx."
        ]

    def test_a_sidecar_written_before_engines_were_compared_is_read(self, machine: Machine, bundle: Bundle) -> None:
        file = machine.engine(bundle).path.with_suffix(".json")
        values = json.loads(file.read_text())
        del values["agreement"]
        file.write_text(json.dumps(values))
        assert not machine.engine(bundle).built_now


class TestTargets:
    @pytest.fixture(autouse=True)
    def _rtx(self, machine: Machine) -> None:
        machine.api = TensorRT("tensorrt-rtx", "1.7.1", Module())

    def test_without_a_gpu_the_usual_generations(self, machine: Machine, bundle: Bundle) -> None:
        machine.gpu = None
        plan = machine.engine(bundle)
        assert plan.sidecar.targets == ("sm86", "sm89", "sm120")
        assert machine.said == ["No GPU here: building for sm86, sm89, sm120. Choose with --target."]
        assert plan.sidecar.median_ms is None

    def test_for_the_gpu_s_own_generation(self, machine: Machine, bundle: Bundle) -> None:
        machine.gpu = RTX_4090
        assert machine.engine(bundle).sidecar.targets == ("sm89",)

    def test_a_gpu_of_a_generation_without_a_name_is_built_for_as_it_is(self, machine: Machine, bundle: Bundle) -> None:
        machine.gpu = GpuDevice("NVIDIA Next", "sm130", 132, 141 << 30, False, "14.0")
        plan = machine.engine(bundle)
        assert plan.sidecar.targets == ()
        assert plan.sidecar.place == "NVIDIA Next (SM 13.0, 132 SMs)"

    @pytest.mark.parametrize("sm", ["sm90", "sm87", "sm100", "sm70"])
    def test_a_gpu_that_it_refuses_to_load_on_is_known_before_anything_is_built(
        self, machine: Machine, bundle: Bundle, sm: str
    ) -> None:
        machine.gpu = GpuDevice("NVIDIA H200", sm, 132, 141 << 30, False, "13.0")
        with pytest.raises(UserError, match=r"is not for NVIDIA H200: it runs on SM .* and not on SM \d+\.\d") as told:
            machine.engine(bundle)
        assert "--backend tensorrt, inductor or onnxruntime-cuda" in told.value.hint
        assert machine.built == []
        assert machine.engine(bundle, targets=["sm89"]).sidecar.targets == ("sm89",)  # to be carried elsewhere

    def test_an_engine_for_more_generations_serves_each(self, machine: Machine, bundle: Bundle) -> None:
        machine.gpu = None
        machine.engine(bundle, targets=["sm86", "sm89"])
        machine.gpu = RTX_4090
        assert not machine.engine(bundle).built_now

    def test_an_engine_for_other_generations_does_not(self, machine: Machine, bundle: Bundle) -> None:
        machine.gpu = None
        machine.engine(bundle, targets=["sm86"])
        machine.engine(bundle, targets=["sm86", "sm120"])
        assert "it was built for sm86 and not for sm120" in machine.said[0]

    def test_tensorrt_without_a_gpu_says_where_to_build(self, machine: Machine, bundle: Bundle) -> None:
        machine.api, machine.gpu = TensorRT("tensorrt", "10.3.0", object()), None
        with pytest.raises(UserError, match="builds an engine on the GPU it will run on, and there is none here"):
            machine.engine(bundle)


class TestFolder:
    def test_a_failed_build_leaves_no_engine(self, machine: Machine, bundle: Bundle) -> None:
        def fail() -> None:
            raise UserError("it broke.", exit_code=1)

        machine.before = fail
        with pytest.raises(UserError, match="it broke"):
            machine.engine(bundle)
        left = [path for path in (machine.folder / "engines").iterdir() if path.suffix != ".lock"]
        assert left == []

    def test_an_interrupted_rebuild_leaves_the_old_engine_unused_but_whole(
        self, machine: Machine, bundle: Bundle
    ) -> None:
        old = machine.engine(bundle)

        def interrupt() -> None:
            raise KeyboardInterrupt

        machine.before = interrupt
        with pytest.raises(KeyboardInterrupt):
            machine.engine(bundle, force=True)
        machine.before = lambda: None
        assert not machine.engine(bundle).built_now
        assert old.path.read_bytes() == machine.content

    @pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
    def test_a_folder_that_may_not_be_written(
        self, code: int, machine: Machine, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        open_ = os.open

        def refuse(path: Any, flags: int, *mode: Any) -> int:
            if flags & os.O_CREAT:
                raise OSError(code, os.strerror(code))
            return open_(path, flags, *mode)

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(UserError, match=r"engine cache .* cannot be written: .*--cache or \$ESPMEDSAM_CACHE"):
            machine.engine(bundle)
        assert machine.built == [], "it must fail before minutes of building"

    def test_a_fitting_engine_is_used_from_a_read_only_folder(
        self, machine: Machine, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machine.engine(bundle)
        open_ = os.open

        def read_only(path: Any, flags: int, *mode: Any) -> int:
            assert not flags & os.O_CREAT, "no file may be made"
            return open_(path, flags, *mode)

        monkeypatch.setattr(os, "open", read_only)
        assert not machine.engine(bundle).built_now

    def test_a_folder_that_is_a_file(self, machine: Machine, bundle: Bundle) -> None:
        machine.folder.write_text("not a folder")
        with pytest.raises(UserError, match="cannot be written"):
            machine.engine(bundle)

    def test_a_disk_without_room_is_found_before_building(
        self, machine: Machine, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine_cache.shutil, "disk_usage", lambda path: _Usage())
        with pytest.raises(UserError, match="has 10 MiB free; this build needs 64 MiB"):
            machine.engine(bundle)
        assert machine.built == []

    def test_a_disk_that_fills_up_during_the_build(self, machine: Machine, bundle: Bundle) -> None:
        def full() -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        machine.before = full
        with pytest.raises(UserError, match=r"no space left to write .*plan"):
            machine.engine(bundle)
        assert not list((machine.folder / "engines").glob("*.plan"))

    def test_a_changed_graph_file_is_never_built(self, machine: Machine, bundle: Bundle) -> None:
        (bundle.path / "fp16.onnx").write_bytes(b"tampered with")
        with pytest.raises(UserError, match="SHA-256 differs"):
            machine.engine(bundle)
        assert machine.built == []


@dataclass
class _Usage:
    free: int = 10 << 20


class TestTwoProcesses:
    def test_one_builds_and_the_other_waits(self, machine: Machine, bundle: Bundle) -> None:
        """Two users of one engine at a time; locks are per open file, so threads show what processes do."""
        building, go = threading.Event(), threading.Event()

        def hold() -> None:
            building.set()
            assert go.wait(30)

        machine.before = hold
        graph = bundle.graph(None, "fp16")
        plans: list[EnginePlan] = []
        said = machine.said

        def want() -> None:
            plans.append(find_or_build(bundle, graph, cache=machine.folder))

        first = threading.Thread(target=want)
        first.start()
        assert building.wait(30)
        second = threading.Thread(target=want)
        second.start()
        _until(lambda: bool(said))
        go.set()
        first.join(30)
        second.join(30)
        assert len(machine.built) == 1
        assert sorted(plan.built_now for plan in plans) == [False, True]
        assert len(said) == 1
        assert said[0].startswith("Another process is building fundus-fp16-")

    def test_a_killed_builder_leaves_the_lock_to_the_next(self, tmp_path: Path) -> None:
        context = multiprocessing.get_context("spawn")
        ready = context.Event()
        holder = context.Process(target=_hold_lock, args=(tmp_path, ready))
        holder.start()
        assert ready.wait(60)
        with inventory.unlocked(tmp_path, "stem") as free:
            assert not free
        holder.kill()
        holder.join(30)
        with building_lock(tmp_path, "stem") as waited:
            assert not waited

    def test_a_lock_file_removed_while_waiting_is_made_anew(self, tmp_path: Path) -> None:
        """Else one process would hold the removed file's lock and another the new file's."""
        entered = threading.Event()
        leave = threading.Event()

        def wait_for_it() -> None:
            with building_lock(tmp_path, "stem"):
                entered.set()
                leave.wait(30)

        with building_lock(tmp_path, "stem"):
            waiter = threading.Thread(target=wait_for_it)
            waiter.start()
            time.sleep(0.3)
            (tmp_path / "stem.lock").unlink()
        assert entered.wait(30)
        with inventory.unlocked(tmp_path, "stem") as free:
            assert not free, "the waiter holds the file that is there"
        leave.set()
        waiter.join(30)

    def test_a_file_system_without_locks_still_builds(
        self, machine: Machine, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*arguments: Any) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(building_lock_module.fcntl, "flock", refuse)
        assert machine.engine(bundle).built_now


def _hold_lock(folder: Path, ready: Any) -> None:
    with building_lock(folder, "stem"):
        ready.set()
        time.sleep(60)


def _until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class TestInventory:
    @pytest.fixture
    def folder(self, machine: Machine) -> Path:
        return machine.folder / "engines"

    def test_verify_finds_the_damaged_one(self, machine: Machine, bundle: Bundle, folder: Path) -> None:
        machine.engine(bundle, "int8")
        plan = machine.engine(bundle, "fp16")
        plan.path.write_bytes(b"x" * len(machine.content))
        found = inventory.entries(folder, verify=True)
        assert [(entry.sidecar.graph.precision, entry.damaged) for entry in found if entry.sidecar] == [
            ("fp16", "its plan is damaged (SHA-256 differs)"),
            ("int8", None),
        ]
        assert all(entry.damaged is None for entry in inventory.entries(folder)), "a list reads no plans"

    def test_clean_removes_the_damaged_and_the_outdated_and_keeps_the_rest(
        self, machine: Machine, bundle: Bundle, folder: Path
    ) -> None:
        kept = machine.engine(bundle, "int8")
        machine.engine(bundle, "fp16").path.write_bytes(b"damaged")
        other = hand_bundle(bundle.path.with_name("other.bundle"), {"fp16": plain_graph(b"another")})
        machine.engine(other)
        for file in other.path.iterdir():
            file.unlink()
        other.path.rmdir()
        removed = inventory.clean(folder)
        assert sorted(removal.why for removal in removed) == [
            f"its bundle {other.path} is gone",
            "its plan has 7 bytes, not 5000",
        ]
        assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".lock", ".plan"]
        assert kept.path.exists()

    def test_a_dry_run_removes_nothing(self, machine: Machine, bundle: Bundle, folder: Path) -> None:
        machine.engine(bundle).path.write_bytes(b"damaged")
        before = sorted(folder.iterdir())
        assert len(inventory.clean(folder, dry_run=True)) == 1
        assert sorted(folder.iterdir()) == before

    def test_all_removes_all(self, machine: Machine, bundle: Bundle, folder: Path) -> None:
        machine.engine(bundle, "fp16")
        machine.engine(bundle, "int8")
        (folder / "timing-10.3.0-sm87-8.cache").write_bytes(b"timings")
        inventory.clean(folder, everything=True)
        assert list(folder.iterdir()) == []

    def test_a_changed_graph_makes_its_engine_outdated(self, machine: Machine, bundle: Bundle, folder: Path) -> None:
        machine.engine(bundle)
        hand_bundle(bundle.path, {"fp16": plain_graph(b"a newer graph")})
        (entry,) = inventory.entries(folder)
        assert entry.outdated == f"{bundle.path} has another fp16 graph of fundus now"

    def test_what_a_build_holds_is_left_alone(self, machine: Machine, bundle: Bundle, folder: Path) -> None:
        plan = machine.engine(bundle)
        with building_lock(folder, plan.path.stem):
            assert inventory.clean(folder, everything=True) == []
        assert plan.path.exists()

    def test_leftovers_of_broken_off_builds_go(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        old = folder / ".fundus-fp16-64x1-tensorrt-sm87-0123456789.0123456789ab.plan"
        fresh = folder / ".fundus-int8-64x1-tensorrt-sm87-0123456789.0123456789ab.plan"
        orphan = folder / "fundus-fp32-64x1-tensorrt-sm87-0123456789ab.plan"
        for file in (old, fresh, orphan):
            file.write_bytes(b"half a plan")
        os.utime(old, (0, 0))
        removed = inventory.clean(folder)
        assert {removal.name for removal in removed} == {old.name, orphan.name}
        assert [path.name for path in folder.iterdir()] == [fresh.name]

    def test_no_folder_is_no_error(self, tmp_path: Path) -> None:
        assert inventory.clean(tmp_path / "none") == []
        assert inventory.entries(tmp_path / "none") == []


class TestInt8EarnsItsPlace:
    """FP16 engines come from the cache: often they were built by an earlier command."""

    def lines(self, machine: Machine, bundle: Bundle, int8_ms: float | None) -> list[str]:
        int8 = machine.engine(bundle, "int8")
        timed = EnginePlan(int8.path, int8.sidecar.model_copy(update={"median_ms": int8_ms}))
        return engine_cache.int8_not_faster(bundle, [timed])

    @pytest.mark.parametrize(("int8_ms", "told"), [(6.0, True), (5.0, True), (4.9, False), (None, False)])
    def test_said_when_it_is_not_faster(
        self, int8_ms: float | None, told: bool, machine: Machine, bundle: Bundle
    ) -> None:
        machine.engine(bundle, "fp16")
        lines = self.lines(machine, bundle, int8_ms)
        assert bool(lines) == told
        if told:
            assert lines[0].startswith(f"fundus: int8 takes {int8_ms:.2f} ms and fp16 5.00 ms on Orin")

    def test_nothing_to_compare_with(self, machine: Machine, bundle: Bundle) -> None:
        assert self.lines(machine, bundle, 6.0) == []

    def test_an_engine_of_an_older_graph_another_gpu_or_another_tensorrt_does_not_count(
        self, machine: Machine, bundle: Bundle
    ) -> None:
        machine.gpu = RTX_4090
        machine.engine(bundle, "fp16")
        machine.gpu, machine.api = ORIN, TensorRT("tensorrt", "10.16.1.11", object())
        machine.engine(bundle, "fp16")
        machine.api = TensorRT("tensorrt", "10.3.0", object())
        assert self.lines(machine, bundle, 6.0) == []
        machine.engine(bundle, "fp16")
        assert len(self.lines(machine, bundle, 6.0)) == 1
        int8 = (bundle.path / "int8.onnx").read_bytes()
        newer = hand_bundle(bundle.path, {"fp16": plain_graph(b"a newer graph"), "int8": int8})
        assert self.lines(machine, newer, 6.0) == []


@pytest.mark.rtx
@pytest.mark.usefixtures("no_gpu")
def test_rtx_for_real_and_found_again(tmp_path: Path, rtx: TensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    from hand_graphs import hand_graph

    made = hand_bundle(tmp_path / "b", {precision: hand_graph(precision) for precision in ("fp32", "fp16", "int8")})
    for graph in made.manifest.graphs:
        plan = find_or_build(made, graph, targets=["sm86", "sm120"], cache=tmp_path)
        again = find_or_build(made, graph, targets=["sm120"], cache=tmp_path)
        assert (plan.built_now, again.built_now) == (True, False)
        assert plan.sidecar.arithmetic.share(graph.precision) > 0.9
        assert plan.sidecar.version == rtx.version
        assert cuda_driver.find_gpu() is None
        assert tensorrt_api.load().flavour == "tensorrt-rtx"


class TestTrust:
    def test_what_is_made_is_the_user_s_alone(self, machine: Machine, bundle: Bundle) -> None:
        machine.engine(bundle)
        folder = machine.folder / "engines"
        modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
        assert (machine.folder.stat().st_mode & 0o777, folder.stat().st_mode & 0o777, modes) == (0o700, 0o700, {0o600})

    @pytest.mark.parametrize("suffix", [".plan", ".json"])
    def test_an_engine_that_others_may_write_is_not_used(self, machine: Machine, bundle: Bundle, suffix: str) -> None:
        plan = machine.engine(bundle)
        plan.path.with_suffix(suffix).chmod(0o666)
        again = machine.engine(bundle)
        assert again.built_now
        assert "other users may write to" in " ".join(machine.said)
        assert not machine.engine(bundle).built_now  # what was built now is closed again

    @pytest.mark.parametrize("suffix", [".plan", ".json"])
    def test_an_engine_of_another_user_is_not_used(self, machine: Machine, bundle: Bundle, suffix: str) -> None:
        if os.geteuid() != 0:
            pytest.skip("only the superuser can give a file away")
        plan = machine.engine(bundle)
        os.chown(plan.path.with_suffix(suffix), 54321, 54321)
        assert machine.engine(bundle).built_now
        assert "belongs to another user" in " ".join(machine.said)

    def test_a_cache_of_another_user_is_not_used(self, machine: Machine, bundle: Bundle) -> None:
        if os.geteuid() != 0:
            pytest.skip("only the superuser can give a folder away")
        machine.engine(bundle)
        os.chown(machine.folder, 54321, 54321)
        with pytest.raises(UserError, match=r"the cache is not used: .* belongs to another user"):
            machine.engine(bundle)
