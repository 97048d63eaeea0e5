"""What gathering requests gives: the rate of Triton with a graph of batch 1 and with one of a batch.

    python benchmarks/triton_rate.py --name triton-rate-MACHINE ONE.bundle BATCH.bundle [--requests 400] [--clients 16]

Both bundles of one modality, from one checkpoint (`export --batch`). The servers are pytriton's (`make test-packages`);
requests come from this machine. On a processor a batch takes about as long as its pictures one by one: one picture
keeps all cores busy. What is left to gain there is what a request costs besides.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from espmedsam_edge.bundle import Bundle
from espmedsam_edge.deploy.triton import write_repository
from espmedsam_edge.files import atomic_write
from espmedsam_edge.imaging.encode import encode_image
from espmedsam_edge.machine.environment import collect_environment
from espmedsam_edge.phantoms import phantom

RESULTS = Path(__file__).parent / "results"
SERVER = Path(__file__).parents[1] / "tools" / "triton_server.py"
SIZE = (480, 640)


def measure(bundle: Bundle, modality: str, requests: int, clients: int) -> dict[str, Any]:
    """Requests a second, and how many the server took together."""
    import numpy as np
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

    pictures = [encode_image(phantom(modality, seed, SIZE)[0], ".jpg") for seed in range(8)]
    with socket.create_server(("127.0.0.1", 0)) as opened:
        port = int(opened.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        write_repository([bundle], Path(folder) / "models", modalities=[modality], engine="python")
        command = [sys.executable, str(SERVER), str(Path(folder) / "models"), "--http-port", str(port)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            place = f"127.0.0.1:{port}"

            def ready() -> bool:
                try:
                    return urllib.request.urlopen(f"http://{place}/v2/health/ready", timeout=5).status == 200
                except OSError:
                    return False

            def ask(client: int, count: int) -> None:
                server = InferenceServerClient(place, network_timeout=300)
                for number in range(client, count, clients):
                    picture = InferInput("image", [1, 1], "BYTES")
                    picture.set_data_from_numpy(np.array([[pictures[number % 8]]], np.object_))
                    server.infer(modality, [picture], outputs=[InferRequestedOutput("area")])
                server.close()

            try:
                while not ready():
                    if process.poll() is not None:
                        sys.exit("the server does not start")
                    time.sleep(0.2)
                with ThreadPoolExecutor(clients) as pool:
                    list(pool.map(lambda client: ask(client, 2 * clients), range(clients)))  # warm
                    begin = time.perf_counter()
                    list(pool.map(lambda client: ask(client, requests), range(clients)))
                    seconds = time.perf_counter() - begin
                with urllib.request.urlopen(f"http://{place}/v2/models/{modality}/stats") as answer:
                    counts = json.load(answer)["model_stats"][0]
            finally:
                process.terminate()
    return {
        "batch": bundle.graph(modality).batch,
        "requests_a_second": round(requests / seconds, 2),
        "requests_a_run": round(counts["inference_count"] / counts["execution_count"], 3),
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs=2, metavar="BUNDLE")
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results/, without its ending")
    parser.add_argument("--modality", default="fundus")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--clients", type=int, default=16)
    arguments = parser.parse_args()
    opened = [Bundle.open(path) for path in arguments.bundles]
    rounds = [
        [measure(bundle, arguments.modality, arguments.requests, arguments.clients) for bundle in opened]
        for _ in range(3)
    ]
    one, many = (sorted(pair[which]["requests_a_second"] for pair in rounds)[1] for which in (0, 1))
    result = {
        "schema": 1,
        "kind": "triton-rate",
        "environment": collect_environment(),
        "image_size": opened[0].graph(arguments.modality).image_size,
        "clients": arguments.clients,
        "ratio_of_medians": round(many / one, 3),
        "rounds": rounds,
    }
    atomic_write(RESULTS / f"{arguments.name}.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))


if __name__ == "__main__":
    main()
