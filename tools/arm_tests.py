"""Runs the device side's tests as an ARM board would, without one: Debian's arm64 Python and aarch64 wheels in QEMU.

    make test-arm                                  # on Debian, x86-64; nothing is installed on the machine
    python tools/arm_tests.py tests/runtime/test_segmenter.py -x

Everything lies in build/arm: Debian's packages (QEMU's user mode among them), unpacked there, and the wheels that pip
finds for that Python on aarch64. ESPMEDSAM_QEMU names another qemu-aarch64. Emulated code takes thirty times its time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # before Python 3.11
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "arm"
SYSTEM, SITE, APT, HOST = FOLDER / "system", FOLDER / "site", FOLDER / "apt", FOLDER / "host"
DEBIAN = ("python3:arm64", "libstdc++6:arm64", "zlib1g:arm64", "qemu-user-static")
EXTRAS = ("video", "dicom", "serve")
FOR_TESTS = ("pytest>=8", "pytest-timeout", "hypothesis", "onnx>=1.17", "httpx>=0.27")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
TESTS = (
    "tests/runtime/backends/test_onnxruntime_backend.py",
    "tests/runtime/test_segmenter.py",
    "tests/runtime/test_inference.py",
    "tests/runtime/sinks/test_sinks.py",
)
_MANY_SECONDS = 3600  # for one test


class NotHereError(Exception):
    """What this machine lacks, in one line."""


def main() -> int:
    """Fetch what is missing, run the tests, and give pytest's exit code; 1 where that cannot be done here."""
    try:
        check_machine()
        if not (FOLDER / ".done").is_file():
            shutil.rmtree(FOLDER, ignore_errors=True)
            fetch_system()
            fetch_wheels()
            (FOLDER / ".done").touch()
        python = write_launcher()
    except NotHereError as error:
        print(f"make test-arm: {error}", file=sys.stderr)
        return 1
    options = ["-p", "no:cacheprovider", "--timeout", str(_MANY_SECONDS), "--basetemp", str(FOLDER / "tmp")]
    command = [str(python), "-m", "pytest", *options, *(sys.argv[1:] or TESTS)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def check_machine() -> None:
    """Raise where this cannot work."""
    machine = os.uname().machine
    if machine == "aarch64":
        raise NotHereError("this is an ARM machine: make test runs the tests as they are.")
    lacking = [name for name in ("apt-get", "dpkg-deb") if shutil.which(name) is None]
    if sys.platform != "linux" or machine != "x86_64" or lacking:
        raise NotHereError(f"it needs Debian or Ubuntu on x86-64{f', with {lacking[0]}' if lacking else ''}.")


def fetch_system() -> None:
    """Have apt find and fetch the packages, in a state of its own, and unpack them."""
    print(f"Fetching Debian's arm64 Python and QEMU into {FOLDER} (once)", flush=True)
    for folder in ("state/lists/partial", "cache/archives/partial", "log"):
        (APT / folder).mkdir(parents=True)
    (APT / "status").touch()
    settings = {
        "APT::Architectures": ["amd64", "arm64"],
        "Dir::State": APT / "state", "Dir::State::status": APT / "status", "Dir::Cache": APT / "cache",
        "Dir::Log": APT / "log", "APT::Sandbox::User": "root", "APT::Install-Recommends": "false",
        "Acquire::http::Timeout": "20", "Acquire::Languages": "none", "Debug::NoLocking": "true",
    }  # fmt: skip
    lines = ["#clear APT::Architectures;"]
    for name, value in settings.items():
        words = "; ".join(f'"{word}"' for word in value) if isinstance(value, list) else None
        lines.append(f"{name} {{ {words}; }};" if words else f'{name} "{value}";')
    (APT / "apt.conf").write_text("\n".join(lines) + "\n")
    environment = {**os.environ, "APT_CONFIG": str(APT / "apt.conf")}
    for words in (["update"], ["install", "--download-only", "--yes", *DEBIAN]):
        done = subprocess.run(
            ["apt-get", "-qq", *words], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
    packages = sorted((APT / "cache" / "archives").glob("*.deb"))
    if done.returncode or not packages:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise NotHereError(f"apt does not find {' '.join(DEBIAN)} in this system's sources: {reason}")
    for package in packages:
        place = HOST if package.name.endswith("_amd64.deb") else SYSTEM
        place.mkdir(exist_ok=True)
        subprocess.run(["dpkg-deb", "--extract", package, place], check=True)


def arm_python() -> Path:
    """The unpacked interpreter."""
    return next(file for file in sorted((SYSTEM / "usr" / "bin").glob("python3.*")) if file.name[8:].isdigit())


def fetch_wheels() -> None:
    """Have pip find the wheels of the device side and of the tests for that Python."""
    version = arm_python().name.removeprefix("python")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *FOR_TESTS]
    for extra in EXTRAS:
        wanted += project["optional-dependencies"][extra]
    print(f"Fetching aarch64 wheels for Python {version}", flush=True)
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet", "--target",
        SITE, "--implementation", "cp", "--python-version", version, "--only-binary=:all:",
    ]  # fmt: skip
    for platform in PLATFORMS:
        command += ["--platform", platform]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["ERROR: no reason given"]
        raise NotHereError(f"pip does not find the wheels: {errors[-1]}")


def write_launcher() -> Path:
    """A script that is the ARM Python for whoever starts it, the children that tests start included."""
    own = HOST / "usr" / "bin" / "qemu-aarch64-static"
    qemu = os.environ.get("ESPMEDSAM_QEMU") or shutil.which("qemu-aarch64-static") or str(own)
    if shutil.which(qemu) is None:
        raise NotHereError(f"there is no {qemu}.")
    launcher = FOLDER / "python"
    write_cpuinfo()
    # QEMU starts no other program in itself, so children are started through this script, too.
    (SITE / "sitecustomize.py").write_text(f"import sys\n\nsys.executable = {str(launcher)!r}\n")
    launcher.write_text(
        "#!/bin/sh\n"
        f"export PYTHONPATH='{ROOT}:{ROOT / 'tests' / 'support'}:{SITE}' OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1\n"
        f"exec '{qemu}' -L '{SYSTEM}' '{arm_python()}' \"$@\"\n"
    )
    launcher.chmod(0o755)
    return launcher


def write_cpuinfo() -> None:
    """Describe ARM cores: QEMU's user mode (7.2) shows the host's, and ONNX Runtime 1.32 then crashes at import.

    Its library cpuinfo goes by the lines "CPU implementer" and "CPU part", which an x86 processor has not.
    """
    core = (
        "processor\t: {}\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32\n"
        "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd08\nCPU revision\t: 3\n\n"
    )
    file = SYSTEM / "proc" / "cpuinfo"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(core.format(number) for number in range(os.cpu_count() or 1)))


if __name__ == "__main__":
    sys.exit(main())
