"""Serve a model repository with the Triton that pytriton's wheel carries: for trying and testing, without a GPU.

    make test-packages                               # once: makes .venv-triton
    python tools/triton_server.py models             # http://127.0.0.1:8000, gRPC at 8001; Ctrl-C ends it

It has Triton's Python backend alone, so networks must be written with ``deploy triton --engine python``.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

ENVIRONMENT = Path(__file__).parents[1] / ".venv-triton"


def packages() -> Path | None:
    """Where the wheel is installed; None: it is not."""
    found = next(iter(sorted(ENVIRONMENT.glob("lib/python*/site-packages"))), None)
    return found if found is not None and (found / "pytriton" / "tritonserver").is_dir() else None


def main() -> None:
    """Become the server."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("repository", type=Path, help="what deploy triton wrote")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    arguments, more = parser.parse_known_args()
    place = packages()
    if place is None:
        sys.exit(f"no Triton in {ENVIRONMENT}. Install it: make test-packages")
    server = place / "pytriton" / "tritonserver"
    # The backend wants the stub of this Python beside it, and the wheel has those of all.
    backends = Path(tempfile.mkdtemp(prefix="triton-"))
    (backends / "python").mkdir()
    stub = server / "python_backend_stubs" / place.parent.name.removeprefix("python") / "triton_python_backend_stub"
    for file in (*(server / "backends" / "python").glob("*triton*"), stub):
        (backends / "python" / file.name).symlink_to(file)
    command = [str(server / "bin" / "tritonserver"), f"--model-repository={arguments.repository.resolve()}"]
    command += [f"--backend-directory={backends}", "--disable-auto-complete-config", "--exit-timeout-secs=5"]
    command += ["--http-address=127.0.0.1", f"--http-port={arguments.http_port}"]
    command += ["--grpc-address=127.0.0.1", f"--grpc-port={arguments.grpc_port}", "--allow-metrics=false", *more]
    path = f"{ENVIRONMENT / 'bin'}:{os.environ.get('PATH', '')}"
    environment = os.environ | {"LD_LIBRARY_PATH": str(place / "nvidia_pytriton.libs"), "PATH": path}
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    main()
