"""The images, as far as they can be tried without an image registry: linted, validated, and their lines run.

Their pip lines, entry point and health check are run in fresh virtual environments by ``make containers`` alone: that
downloads hundreds of megabytes.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from nginx import free_port

from espmedsam_edge.bundle import Bundle

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
FILES = sorted(DOCKER.glob("*Dockerfile"))
slow = pytest.mark.skipif("ESPMEDSAM_CONTAINERS" not in os.environ, reason="takes minutes: make containers")


def tool(name: str) -> str:
    """A program beside this Python."""
    program = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip(f"needs {name} (extra dev)")
    return program


@dataclass(frozen=True)
class Dockerfile:
    """Its instructions in order, arguments at their defaults."""

    instructions: list[tuple[str, str]]

    @classmethod
    def read(cls, path: Path) -> Dockerfile:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        text = re.sub(r"\\\n\s*", "", "\n".join(lines))
        instructions = [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line]
        named = [argument.partition("=") for name, argument in instructions if name == "ARG"]
        arguments = {name: value.strip('"') for name, _, value in named}
        return cls(
            [(name, re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], text)) for name, text in instructions]
        )

    def all(self, name: str) -> list[str]:
        return [text for instruction, text in self.instructions if instruction == name]

    def command(self, name: str) -> list[str]:
        """Of ENTRYPOINT, CMD or HEALTHCHECK, which are lists."""
        (text,) = self.all(name)
        return list(json.loads(text[text.index("[") :]))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_images_pass_hadolint_and_run_as_nobody_special(file: Path) -> None:
    said = subprocess.run([tool("hadolint"), str(file)], capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, "")
    image = Dockerfile.read(file)
    assert image.all("USER") == ["10001:10001"]
    assert image.all("FROM")[-1] == image.all("ARG")[0].partition("=")[2]  # the base can be named by its digest
    for name in ("ENTRYPOINT", "CMD", "HEALTHCHECK"):
        assert image.command(name)


def test_services_have_what_their_answers_need() -> None:
    """Also where an image is built for a GPU, as the pages say it."""
    needed = {"serve", "video", "mqtt", "objects"}  # microscopy is counted unless told otherwise
    said = [text for name in ("Dockerfile", "jetpack.Dockerfile") for text in Dockerfile.read(DOCKER / name).all("RUN")]
    lists = [match[1] for text in said for match in re.finditer(r"\.\[([\w,-]+)\]", text)]
    pages = [DOCKER / "Dockerfile", DOCKER / "compose.yaml", ROOT / "docs" / "containers.md"]
    named = [match[1] for page in pages for match in re.finditer(r"EXTRAS=([\w,-]+)", page.read_text())]
    assert len(lists) == 2
    assert len(named) >= 5
    for extras in [*lists, *named]:
        assert needed <= set(extras.split(",")), extras


def test_the_cluster_takes_the_example() -> None:
    example = DOCKER / "kubernetes" / "espmedsam.yaml"
    command = [tool("kubernetes-validate"), "--strict", str(example)]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    parts = {part["kind"]: part for part in yaml.safe_load_all(example.read_text())}
    assert set(parts) == {"Deployment", "Service", "Ingress", "NetworkPolicy", "HorizontalPodAutoscaler"}
    (container,) = parts["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert parts["Deployment"]["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"]
    written = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert written == {"/cache", "/tmp"}  # and nothing else of its file system
    # Every selector finds the pods.
    labels = parts["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert parts["Service"]["spec"]["selector"] == labels
    assert parts["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert parts["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "espmedsam"


def test_compose_fits_together() -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    service = compose["services"]["espmedsam"]
    assert service["read_only"] is True
    assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    for name in ("prometheus", "grafana"):
        for volume in compose["services"][name]["volumes"]:
            if volume.startswith("./"):
                assert (DOCKER / volume.split(":")[0]).exists(), volume
    (scraped,) = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())["scrape_configs"]
    (secret,) = compose["services"]["prometheus"]["secrets"]
    assert scraped["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert scraped["static_configs"][0]["targets"] == [f"{service['hostname']}:8080"]
    assert compose["secrets"][secret]["environment"] in service["environment"]
    (source,) = yaml.safe_load((DOCKER / "grafana" / "datasource.yaml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in dashboard()["panels"]} == {source["uid"]}
    every = [port for one in compose["services"].values() for port in one.get("ports", ())]
    assert all(port.startswith("127.0.0.1:") for port in every)  # nothing is encrypted


def dashboard() -> Any:
    return json.loads((DOCKER / "grafana" / "dashboards" / "espmedsam.json").read_text())


def test_the_dashboard_asks_for_metrics_that_there_are(toy_bundle: Bundle) -> None:
    serving_setup = pytest.importorskip("serving_setup", reason="needs the extra serve")
    with serving_setup.staged(toy_bundle) as stage:
        stage.show()
        stage.client.post("/v1/segment", content=serving_setup.png()[1])
        told = set(re.findall(r"^(\w+)[{ ]", stage.client.get("/metrics").text, re.MULTILINE))
    expressions = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    asked = {name for text in expressions for name in re.findall(r"\b(?:espmedsam|process)_\w+", text)}
    assert len(asked) > 10
    assert asked <= told
    cluster = (DOCKER / "kubernetes" / "espmedsam.yaml").read_text()
    assert set(re.findall(r"seriesQuery: (\w+)", cluster)) <= told
    assert re.findall(r"name: \{ as: (\w+) \}", cluster) == re.findall(r"metric: \{ name: (\w+) \}", cluster)


def test_the_triton_image_takes_several_bundles_of_ones_own(tmp_path: Path) -> None:
    assert "!bundles" in (ROOT / ".dockerignore").read_text().split()
    (line,) = re.findall(r"espmedsam-edge (deploy triton .*)", (DOCKER / "triton.Dockerfile").read_text())
    said = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {line}"], env={"BUNDLES": "bundles/a bundles/b"}, capture_output=True, text=True
    )
    assert said.stdout.split("\n")[2:4] == ["bundles/a", "bundles/b"]


# ------------------------------------------------------------------------------------ run, in the long version


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user may enter, with what an image is built from in ``src``."""
    folder = Path(tempfile.mkdtemp(prefix="container-"))
    folder.chmod(0o755)
    wanted = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    tracked = subprocess.run(["git", "ls-files", "--", *wanted], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "src" / name, follow_symlinks=False)
    yield folder
    shutil.rmtree(folder)


def moved(text: str, place: Path) -> str:
    """A line of an image with its folders elsewhere, and Python's environments made by a Python that all may use."""
    text = re.sub(r"(?<![\w.])/(opt|cache|models)\b", rf"{place}/\1", text)
    return re.sub(r"(/usr/bin/)?python3 -m venv( --system-site-packages)?", f"{PYTHON} -m venv", text)


def environment(image: Dockerfile, place: Path) -> dict[str, str]:
    """An image's variables and nothing of this machine's but how to reach a package index."""
    words = [word for text in image.all("ENV") for word in shlex.split(text)]
    told = {name: moved(value, place) for name, _, value in (word.partition("=") for word in words)}
    passed_on = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_"))}
    path = told.pop("PATH", "").replace("$PATH", "") or f"{place}/opt/venv/bin:"
    return {**passed_on, **told, "PATH": f"{path}/usr/bin:/bin:/usr/sbin"}


def for_everyone(program: Path) -> bool:
    """Whether every user reaches a Python, and it makes environments; one below root's home is root's alone."""
    if not program.exists() or not all(folder.stat().st_mode & 0o001 for folder in program.resolve().parents):
        return False
    return subprocess.run([program, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0


SYSTEM = Path("/usr/bin/python3")
PYTHON = SYSTEM if not for_everyone(Path(sys.executable)) and for_everyone(SYSTEM) else Path(sys.executable)


def build(image: Dockerfile, place: Path) -> None:
    (place / "opt").mkdir(exist_ok=True)
    for line in image.all("RUN"):
        if "apt-get" in line:
            continue
        done = subprocess.run(
            ["sh", "-e", "-c", moved(line, place)],
            cwd=place / "src",
            env={"HOME": str(Path.home())} | environment(image, place),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=900,
        )
        assert done.returncode == 0, (line, done.stdout[-3000:])


@slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become the image's user")
@pytest.mark.parametrize("name", ["Dockerfile", "jetpack.Dockerfile"])
def test_the_service_is_installed_starts_and_is_healthy(name: str, place: Path) -> None:
    image = Dockerfile.read(DOCKER / name)
    build(image, place)
    if name == "Dockerfile":
        bill = json.loads((place / "opt" / "venv" / "sbom.cdx.json").read_text())
        assert {"espmedsam-edge", "numpy", "onnxruntime", "uvicorn", "scikit-image"} <= {
            one["name"] for one in bill["components"]
        }
    port, told = free_port(), environment(image, place)
    user = 10001 if for_everyone(PYTHON) else None
    command = [word.replace("8080", str(port)) for word in image.command("ENTRYPOINT") + image.command("CMD")]
    check = [word.replace("8080", str(port)) for word in image.command("HEALTHCHECK")]

    def healthy() -> bool:
        return subprocess.run(check, env=told, capture_output=True, timeout=30, cwd="/tmp", user=user).returncode == 0

    assert not healthy()
    with subprocess.Popen(command, env=told, cwd="/tmp", user=user, group=user, stderr=subprocess.PIPE) as process:
        try:
            until = time.monotonic() + 300
            while not healthy():
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < until
                time.sleep(1)
            process.send_signal(signal.SIGTERM)  # as docker stop
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert not healthy()


@slow
def test_the_triton_image_installs_and_writes_its_models(place: Path) -> None:
    image = Dockerfile.read(DOCKER / "triton.Dockerfile")
    subprocess.run([str(PYTHON), "-m", "venv", str(place / "opt" / "venv")], check=True)
    build(image, place)
    names = {path.name for path in (place / "models").iterdir()}
    assert {"fundus", "fundus_fp32", "microscopy", "microscopy_fp32"} <= names
    assert (place / "models" / "fundus_fp32" / "1" / "model.onnx").is_file()


@slow
@pytest.mark.parametrize("extras", re.findall(r"EXTRAS=(\S+)", (DOCKER / "Dockerfile").read_text()))
def test_what_each_variant_asks_for_can_be_had(extras: str, place: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", f".[{extras}]"]
    done = subprocess.run(command, cwd=place / "src", capture_output=True, text=True, timeout=900)
    if "placeholder package which downloads a real wheel" in done.stderr:
        pytest.skip("NVIDIA's own index is not reached from here")
    assert done.returncode == 0, done.stderr[-3000:]
    would = done.stdout[done.stdout.index("Would install") :]
    for extra, package in (("trt", "tensorrt"), ("rtx", "tensorrt-rtx"), ("serve", "uvicorn"), ("mqtt", "paho-mqtt")):
        assert (extra not in extras.split(",")) or package in would.replace("_", "-")
