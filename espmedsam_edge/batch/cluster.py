"""The Ray cluster: started on this machine, or reached by its address; what is wrong with it is one line."""

from __future__ import annotations

import logging
import os
import platform
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espmedsam_edge.errors import UserError
from espmedsam_edge.machine.cores import usable_cores
from espmedsam_edge.machine.installation import why_missing
from espmedsam_edge.version import __version__

log = logging.getLogger(__name__)

# Nothing is reported to Ray's makers, no GPU is hidden from who asked for none, and a busy machine may start slowly.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_NUM_REDIS_GET_RETRIES": "90",
}
_TOKEN = Path(".ray", "auth_token")  # where Ray keeps it, below the home folder
_LOCAL = "127.0.0.1"
_SHORT = Path("/tmp")  # noqa: S108  # nosec B108 (a private folder is made there; a socket's path has at most 107 bytes)
_CONNECT_SECONDS = 10
_STORE = 256 << 20  # bytes of a local object store: paths and rows go through it, no pictures


@dataclass(frozen=True)
class ClusterOptions:
    """Where workers run.

    Attributes:
        address: of a cluster, ``HOST:PORT`` or ``ray://HOST:PORT``; None: one is started on this machine.
        workers: processes; None: as many as have room.
        gpus: of each worker, a fraction where several share one.
    """

    address: str | None = None
    workers: int | None = None
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UserError(f"workers {self.workers} is less than 1.", "Leave it out for as many as have room.")
        if not 0 <= self.gpus <= 64 or (self.gpus > 1 and self.gpus % 1):
            raise UserError(f"gpus {self.gpus} is no share of a GPU.", "0.5 lets two workers share one.")


def check_installed() -> None:
    """See that Ray and pyarrow are there.

    Raises:
        UserError: one is missing.
    """
    for module in ("ray", "pyarrow"):
        if (reason := why_missing(module, "ray")) is not None:
            raise UserError(reason)


def _load_ray(*, local: bool) -> Any:
    if "ray" not in sys.modules:  # which reads it when it is imported, and its own processes when they start
        wanted = dict(_ENVIRONMENT)
        if local and not any(name.startswith("RAY_AUTH_") for name in os.environ):
            # Its ports are open to whoever reaches this machine, and the file where Ray keeps a token to all its users.
            wanted |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        elif (Path.home() / _TOKEN).is_file():  # else Ray 2.60 does not show it to a cluster that is named
            wanted["RAY_AUTH_MODE"] = "token"
        for name, value in wanted.items():
            os.environ.setdefault(name, value)
    import ray

    return ray


@contextmanager
def cluster(options: ClusterOptions, threads: int) -> Iterator[tuple[Any, int]]:
    """Ray, connected, and how many workers there are to be, of so many threads each; disconnected after the block.

    Who is connected already stays so, to that cluster.

    One logical CPU of the cluster is left free: where workers claim all, Ray's own tasks wait for ever.

    Raises:
        UserError: the cluster is not there, is of other versions, or has no room.
    """
    ray = _load_ray(local=options.address is None)
    if ray.is_initialized():
        yield ray, _room(ray.cluster_resources(), options, threads)
        return
    by_sigterm = signal.getsignal(signal.SIGTERM)
    with ExitStack() as stack:
        try:
            if options.address is None:
                workers = options.workers or max(1, usable_cores())
                ray.init(
                    address="local",  # else it would join what runs here already
                    num_cpus=workers + 1,
                    num_gpus=None if options.gpus else 0,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                    object_store_memory=_STORE,
                    _node_ip_address=_LOCAL,
                    _temp_dir=stack.enter_context(_private_folder()),
                )
            else:
                _check_there(options.address)
                ray.init(address=options.address, log_to_driver=False, logging_level=logging.CRITICAL)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 (Ray raises RuntimeError, ConnectionError, ValueError and others)
            raise _why(error, options) from None
        finally:  # Ray puts its own there, which ends the program at once, with the addresses of C++ functions
            if callable(by_sigterm):
                with suppress(ValueError):  # not the main thread, which alone has it
                    signal.signal(signal.SIGTERM, by_sigterm)
        stack.callback(ray.shutdown)
        yield ray, _room(ray.cluster_resources(), options, threads)


@contextmanager
def _private_folder() -> Iterator[str]:
    """A place for Ray's files, of which it lets everyone read and replace all: in a folder that is the user's alone."""
    place = os.environ.get("RAY_TMPDIR") or (_SHORT if _SHORT.is_dir() else None)
    with tempfile.TemporaryDirectory(prefix="espmedsam-", dir=place, ignore_cleanup_errors=True) as own:
        yield str(Path(own, "ray"))


def _check_there(address: str) -> None:
    """See that somebody answers at an address: Ray itself would wait for ever."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return  # "auto" and the like
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"no Ray cluster at {address}: {getattr(error, 'strerror', None) or 'nobody answers'}.",
            "Check the address, and that it runs.",
            exit_code=1,
        ) from None


def _why(error: Exception, options: ClusterOptions) -> UserError:
    where = "on this machine" if options.address is None else f"at {options.address}"
    text = " ".join(str(error).split())
    if "mismatch" in text.lower():
        python = platform.python_version()
        return UserError(
            f"the Ray cluster {where} is of another Python or Ray than this one (Python {python}).",
            "Install the same versions on all its machines.",
            exit_code=1,
        )
    remedy = "Give more memory to /dev/shm." if options.address is None else "Check the address, and that it runs."
    return UserError(f"no Ray cluster {where}: {text[:300]}.", remedy, exit_code=1)


def _room(resources: dict[str, float], options: ClusterOptions, threads: int) -> int:
    """How many workers a cluster takes, each with that many CPUs of it; on this machine they are counted by heads."""
    room = (int(resources.get("CPU", 0)) - 1) // (1 if options.address is None else threads)
    if options.gpus:
        room = min(room, int(resources.get("GPU", 0) / options.gpus + 1e-6))
    if room < 1:
        raise UserError(
            "the Ray cluster has no room for a worker.",
            f"It has {resources.get('CPU', 0):g} CPUs, of which one stays free, and {resources.get('GPU', 0):g} GPUs.",
            exit_code=1,
        )
    if options.workers is not None and options.workers > room:
        log.warning("There is room for %d workers, not %d.", room, options.workers)
    return min(room, options.workers or room)


def check_worker(about: dict[str, Any], out: str) -> None:
    """See that a worker's process fits to this one.

    Raises:
        UserError: it has other versions, or does not see the folder of the results.
    """
    for what, here in (("python", platform.python_version()), ("package", __version__)):
        if about[what] != here:
            name = "Python" if what == "python" else "espmedsam-edge"
            raise UserError(
                f"a worker of the Ray cluster has {name} {about[what]}, this machine {here}.",
                "Install the same versions on all its machines.",
                exit_code=1,
            )
    if not about["sees"]:
        raise UserError(
            f"a worker of the Ray cluster does not see {out}.",
            "Choose a folder that all its machines share.",
            exit_code=1,
        )
