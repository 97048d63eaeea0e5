"""What gathering requests gives: the rate of Triton with a graph of batch 1 and with one of a batch.

    python benchmarks/triton_rate.py --name triton-rate-MACHINE ONE.bundle BATCH.bundle [--rounds 12]

Both bundles of one modality, from one checkpoint (`export --batch`). The servers are pytriton's (`make test-packages`);
requests come from this machine, to one and to the other in turn, in short rounds. Where other programs have the cores,
rates say little: the processor time of server and clients together is told as well. On a processor a batch takes about
as long as its pictures one by one: one picture keeps all cores busy. What is left to gain there is what a request costs
besides.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.deploy.triton import write_repository
from espmedsam_edge.files import atomic_write
from espmedsam_edge.imaging.encode import encode_image
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.phantoms import phantom

RESULTS = Path(__file__).parent / "results"
SERVER = Path(__file__).parents[1] / "tools" / "triton_server.py"
SIZE = (480, 640)


class Server:
    """Triton with a modality of one bundle."""

    def __init__(self, bundle: Bundle, modality: str, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as opened:
            port = int(opened.getsockname()[1])
        self.batch, self._place, self._modality = bundle.graph(modality).batch, f"127.0.0.1:{port}", modality
        self._pictures = [encode_image(phantom(modality, seed, SIZE)[0], ".jpg") for seed in range(8)]
        write_repository([bundle], folder / "models", modalities=[modality], engine="python")
        command = [sys.executable, str(SERVER), str(folder / "models"), "--http-port", str(port)]
        with socket.create_server(("127.0.0.1", 0)) as opened:
            command += ["--grpc-port", str(opened.getsockname()[1])]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self) -> Server:
        while True:
            try:
                with urllib.request.urlopen(f"http://{self._place}/v2/health/ready", timeout=5):
                    return self
            except OSError:
                if self._process.poll() is not None:
                    sys.exit("the server does not start")
                time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def ask(self, requests: int, clients: int) -> tuple[float, float]:
        """Seconds, and seconds of processor time, in which so many clients have so many requests answered."""
        import numpy as np
        from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

        def ask(client: int) -> None:
            server = InferenceServerClient(self._place, network_timeout=300)
            for number in range(client, requests, clients):
                picture = InferInput("image", [1, 1], "BYTES")
                picture.set_data_from_numpy(np.array([[self._pictures[number % 8]]], np.object_))
                server.infer(self._modality, [picture], outputs=[InferRequestedOutput("area")])
            server.close()

        with ThreadPoolExecutor(clients) as pool:
            begin, cpu = time.perf_counter(), self._cpu_seconds()
            list(pool.map(ask, range(clients)))
            return time.perf_counter() - begin, self._cpu_seconds() - cpu

    def _cpu_seconds(self) -> float:
        server = psutil.Process(self._process.pid)
        of_each = [process.cpu_times() for process in (server, *server.children(recursive=True), psutil.Process())]
        return float(sum(times.user + times.system for times in of_each))

    def requests_a_run(self) -> float:
        """How many the server took together, of all so far."""
        with urllib.request.urlopen(f"http://{self._place}/v2/models/{self._modality}/stats") as answer:
            counts = json.load(answer)["model_stats"][0]
        return float(counts["inference_count"] / counts["execution_count"])


def _ratio(pairs: list[list[float]]) -> float:
    """Of the medians, the second to the first."""
    one, many = (statistics.median(pair[which] for pair in pairs) for which in (0, 1))
    return round(many / one, 3)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs=2, metavar="BUNDLE")
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results/, without its ending")
    parser.add_argument("--modality", default="fundus")
    parser.add_argument("--requests", type=int, default=200, help="of a round")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--clients", type=int, default=16)
    arguments = parser.parse_args()
    opened = [Bundle.open(path) for path in arguments.bundles]
    with ExitStack() as stack:
        servers = []
        for bundle in opened:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            servers.append(stack.enter_context(Server(bundle, arguments.modality, folder)))
        for server in servers:
            server.ask(2 * arguments.clients, arguments.clients)  # warm
        rounds = [
            [server.ask(arguments.requests, arguments.clients) for server in servers] for _ in range(arguments.rounds)
        ]
        runs = [round(server.requests_a_run(), 3) for server in servers]
    by_the_clock, by_the_processor = (
        [[round(arguments.requests / seconds[kind], 2) for seconds in pair] for pair in rounds] for kind in (0, 1)
    )
    result = {
        "schema": 1,
        "kind": "triton-rate",
        "environment": collect_environment(),
        "image_size": opened[0].graph(arguments.modality).image_size,
        "clients": arguments.clients,
        "batches": [server.batch for server in servers],
        "requests_a_run": runs,
        "ratio_by_the_clock": _ratio(by_the_clock),
        "ratio_by_processor_time": _ratio(by_the_processor),
        "requests_a_second": by_the_clock,
        "requests_a_second_of_processor_time": by_the_processor,
    }
    atomic_write(RESULTS / f"{arguments.name}.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))


if __name__ == "__main__":
    main()
