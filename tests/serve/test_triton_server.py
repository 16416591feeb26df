"""The repository in a real Triton server: loaded, warmed up, asked over HTTP, overloaded.

The server is the one in the package nvidia-pytriton, which has the Python backend alone: the scores
step runs the exported file in it, by ONNX Runtime. Everything else is as it is exported: the three
configs, the decision step, the ensemble, the queues and batches.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentguard.export import TritonOptions, export_triton
from latentguard.runtime import Guard, Verdict

Array = Any
SCORES = Path(__file__).parent / "triton_stand_in" / "scores_model.py"
TYPES = {"FP32": "<f4", "INT64": "<i8"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(guard_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a Triton server that serves the export; two requests may wait."""
    found = importlib.util.find_spec("pytriton")
    if found is None or not found.submodule_search_locations:
        pytest.skip("a real Triton server needs the package nvidia-pytriton")
    site = Path(found.submodule_search_locations[0]).parent
    triton = site / "pytriton" / "tritonserver"
    stub = f"{sys.version_info.major}.{sys.version_info.minor}/triton_python_backend_stub"
    if not (triton / "python_backend_stubs" / stub).exists():
        pytest.skip("nvidia-pytriton has no stub of Triton's Python backend for this Python")
    if int(np.__version__.split(".")[0]) > 1:
        pytest.skip("the Python backend in nvidia-pytriton 0.7 needs NumPy 1")
    folder = tmp_path_factory.mktemp("server")
    shutil.copytree(triton / "backends" / "python", folder / "backends" / "python")
    shutil.copy(triton / "python_backend_stubs" / stub, folder / "backends" / "python")
    (folder / "backends" / "python" / "triton_python_backend_stub").chmod(0o755)

    repository = folder / "models"
    options = TritonOptions(threads=1, queue=2, max_delay_ms=50)
    export_triton(guard_file, repository, options)
    config = repository / "latentguard_scores" / "config.pbtxt"
    text = config.read_text()
    assert 'backend: "onnxruntime"' in text
    config.write_text(text.replace('backend: "onnxruntime"', 'backend: "python"'))
    shutil.copy(SCORES, repository / "latentguard_scores" / "1" / "model.py")

    port = free_port()
    command = [
        str(triton / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={folder / 'backends'}",
        f"--http-port={port}",
        "--http-address=127.0.0.1",
        "--allow-grpc=false",
        "--allow-metrics=false",
        "--disable-auto-complete-config",
    ]
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(site / "nvidia_pytriton.libs"),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        for _ in range(1200):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                if get(port, "/v2/health/ready") == 200:
                    break
            except OSError:
                pass
            time.sleep(0.1)
        else:
            pytest.fail(f"not ready: {log.read_text()[-4000:]}")
        yield port
    finally:
        process.terminate()
        process.wait()


def get(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("GET", path)
    return connection.getresponse().status


def infer(port: int, latents: Array, kind: str = "FP32") -> tuple[int, dict[str, Any]]:
    """Ask the ensemble: the status, and its outputs or {"error": ...}. Tensors travel as bytes."""
    head = {
        "inputs": [
            {
                "name": "latents",
                "datatype": kind,
                "shape": list(latents.shape),
                "parameters": {"binary_data_size": latents.nbytes},
            }
        ],
        "outputs": [
            {"name": "decision"},
            {"name": "verdict"},
            *(
                {"name": name, "parameters": {"binary_data": True}}
                for name in ("probability", "margin", "embedding")
            ),
        ],
    }
    text = json.dumps(head).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    headers = {"Inference-Header-Content-Length": str(len(text))}
    path = "/v2/models/latentguard/infer"
    connection.request("POST", path, text + latents.tobytes(), headers)
    answer = connection.getresponse()
    body = answer.read()
    length = int(answer.headers.get("Inference-Header-Content-Length", len(body)))
    said, position = json.loads(body[:length]), length
    if answer.status != 200:
        return answer.status, said
    found = {}
    for output in said["outputs"]:
        if "data" in output:
            found[output["name"]] = output["data"]
            continue
        end = position + output["parameters"]["binary_data_size"]
        numbers = np.frombuffer(body[position:end], TYPES[output["datatype"]])
        found[output["name"]] = numbers.reshape(output["shape"])
        position = end
    return answer.status, found


def read(found: dict[str, Any]) -> list[Verdict]:
    verdicts = [Verdict.from_dict(json.loads(text)) for text in found["verdict"]]
    assert [verdict.decision for verdict in verdicts] == found["decision"]
    return verdicts


def test_verdicts_are_those_of_the_runtime(server: int, guard_file: Path, latents: Array) -> None:
    with Guard(guard_file, threads=1) as guard:
        expected, scores = guard.scan(latents), guard.scores(latents)
    status, found = infer(server, latents)
    assert status == 200, found
    assert read(found) == expected
    for name in ("probability", "margin", "embedding"):
        np.testing.assert_array_equal(found[name], scores[name])


def test_an_image_that_is_not_finite_is_a_block(server: int, latents: Array) -> None:
    batch = latents[:3].copy()
    batch[1, 0, 0, 0] = np.nan
    status, found = infer(server, batch)
    assert status == 200, found
    assert [verdict.error is None for verdict in read(found)] == [True, False, True]
    assert found["decision"] == ["allow", "block", "allow"]
    assert np.isnan(found["probability"][1]).all()


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((1, 4, 32, 32), "FP32"), ((1, 32, 16, 32), "FP32"), ((1, 32, 32, 32), "INT64")],
)
def test_what_is_no_latent_of_this_guard_is_an_error(
    server: int, shape: tuple[int, ...], kind: str
) -> None:
    status, found = infer(server, np.zeros(shape, TYPES[kind]), kind)
    assert status >= 400
    assert found["error"]


def test_under_overload_each_request_has_its_verdict_or_an_error(
    server: int, guard_file: Path, latents: Array
) -> None:
    """48 clients, a queue of two: none waits in vain, none gets another's verdict."""
    with Guard(guard_file, threads=1) as guard:
        expected = guard.scan(latents)
    answers: dict[int, tuple[int, dict[str, Any]]] = {}

    def ask(index: int) -> None:
        place = index % len(latents)
        answers[index] = infer(server, latents[place : place + 1])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(48)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 48
    statuses = [status for status, _ in answers.values()]
    assert 200 in statuses
    assert max(statuses) >= 500
    for index, (status, found) in answers.items():
        if status == 200:
            (verdict,) = read(found)
            wanted = expected[index % len(latents)]
            assert verdict.decision == wanted.decision
            assert [c.id for c in verdict.matched] == [c.id for c in wanted.matched]
        else:
            assert "queue size" in found["error"]
