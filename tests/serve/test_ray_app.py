"""The Ray Serve example, on a local Ray: verdicts, what is refused, overload."""

from __future__ import annotations

import io
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray", reason="the example needs ray[serve], which the dev extra leaves out")
pytest.importorskip("ray.serve", reason="the example needs ray[serve], not ray alone")
httpx2 = pytest.importorskip("httpx2", reason="asks the service")

import ray  # noqa: E402
from checks import Limits  # noqa: E402
from ray import serve  # noqa: E402
from ray_app import application  # noqa: E402

from latentguard.runtime import Guard, Verdict  # noqa: E402

Array = Any
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "serve"
SAID = {"space": "flux2", "scaled": "true"}


def npy(array: Array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.fixture(scope="module")
def url(guard_file: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Its workers import the example, and latentguard from where this test has it.
    paths = os.pathsep.join([str(EXAMPLE), *sys.path])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 60})
    serve.run(application(str(guard_file), limits=Limits(max_requests=8, max_images=8)))
    yield f"http://127.0.0.1:{port}/"
    serve.shutdown()
    ray.shutdown()


def test_verdicts_are_the_guards(url: str, guard_file: Path, latents: Array) -> None:
    answer = httpx2.post(url, params=SAID, content=npy(latents[6:14]), timeout=600)
    assert answer.status_code == 200, answer.text
    found = [Verdict.from_dict(item) for item in answer.json()["verdicts"]]
    with Guard(guard_file) as guard:
        assert found == guard.scan(latents[6:14])
        assert answer.json()["sha256"] == guard.sha256


@pytest.mark.parametrize(
    ("params", "count", "status"),
    [
        ({}, 1, 422),
        ({"space": "sdxl", "scaled": "true"}, 1, 422),
        ({**SAID, "scaled": "maybe"}, 1, 422),
        ({**SAID, "noise_level": "nan"}, 1, 422),
        (SAID, 9, 413),
    ],
)
def test_what_is_refused(
    url: str, latents: Array, params: dict[str, str], count: int, status: int
) -> None:
    answer = httpx2.post(url, params=params, content=npy(latents[:count]), timeout=600)
    assert (answer.status_code, answer.json()["decision"]) == (status, "block")


def test_a_bad_request_in_a_batch_does_not_harm_the_others(
    url: str, guard_file: Path, latents: Array
) -> None:
    """And under more requests than may wait each has one answer: its own verdicts, or a 503."""
    with Guard(guard_file) as guard:
        expected = guard.scan(latents)
    answers: dict[int, Any] = {}

    def post(index: int) -> None:
        body = b"garbage" if index % 5 == 4 else npy(latents[index : index + 1])
        answers[index] = httpx2.post(url, params=SAID, content=body, timeout=600)

    threads = [threading.Thread(target=post, args=(index,)) for index in range(25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 25
    for index, answer in answers.items():
        allowed = {422, 503} if index % 5 == 4 else {200, 503}
        assert answer.status_code in allowed, answer.text
        if answer.status_code == 200:
            (found,) = answer.json()["verdicts"]
            assert found["decision"] == expected[index].decision
            matched = [c["id"] for c in found["concepts"] if c["matched"]]
            assert matched == [c.id for c in expected[index].matched]
    assert any(answer.status_code == 200 for answer in answers.values())
