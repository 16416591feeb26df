"""The generating service on LitServe, run as a user would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("litserve", reason="the example needs litserve, which the dev extra leaves out")
for package in ("diffusers", "fastapi", "httpx2", "PIL"):
    pytest.importorskip(package, reason=f"the example needs {package}")

import httpx2  # noqa: E402

APP = Path(__file__).resolve().parents[2] / "examples" / "serve" / "litserve_app.py"
PATH = "/v1/generate"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """The whole server, in processes of its own, which have to end when they are told to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    said = tmp_path_factory.mktemp("litserve") / "said"
    command = [sys.executable, "-W", "ignore", str(APP), "--generator", "exact"]
    options = ["--policy", "family", "--port", str(port), "--device", "cpu", "--seconds", "300"]
    with said.open("wb") as out:
        process = subprocess.Popen(
            [*command, *options],
            cwd=said.parent,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            while not is_ready(client):
                assert process.poll() is None, said.read_text()
                time.sleep(0.2)
            yield client
        process.send_signal(signal.SIGTERM)
        process.wait(120)
        assert "Traceback" not in said.read_text()
        while lives(process.pid):  # as long as anything is left of its group
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def is_ready(client: httpx2.Client) -> bool:
    try:
        return client.get("/healthz").status_code == 200
    except httpx2.TransportError:
        return False


def lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_each_request_gets_its_own_verdict_and_errors_block(service: httpx2.Client) -> None:
    wanted = ["cat", "revolver", "dahlia", "wine-bottle"] * 2

    def ask(prompt: str) -> dict[str, Any]:
        answer = service.post(PATH, json={"prompt": prompt, "seed": 1, "steps": 4})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, wanted))
    assert [said["decision"] for said in answers] == ["allow", "block"] * 4
    assert len({said["request_id"] for said in answers}) == len(wanted)
    assert answers[1]["outcome"] == "blanked"
    assert "firearms" in answers[1]["reason"]
    assert answers[0]["image"] != answers[1]["image"]

    for body, status in (
        (b'{"prompt": "a submarine"}', 422),
        (b'{"prompt": "cat", "steps": 0}', 422),
        (b"no json", 422),
        (b'{"prompt": "' + b"a" * 70_000 + b'"}', 413),
    ):
        answer = service.post(PATH, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == status
        assert answer.json()["decision"] == "block"
    assert service.get("/other").json()["decision"] == "block"
