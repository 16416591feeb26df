"""The FastAPI example: verdicts, limits, overload, timeouts; in this process and over a socket."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx2"):
    pytest.importorskip(package, reason=f"the example needs {package}")

import httpx2  # noqa: E402
from app import create_app  # noqa: E402
from checks import Limits  # noqa: E402
from http_helpers import listening, npy  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from latentguard.runtime import Guard, Verdict  # noqa: E402

Array = Any
APP = Path(__file__).resolve().parents[2] / "examples" / "serve" / "app.py"
VERDICTS = "/v1/verdicts"
SAID = {"space": "flux2", "scaled": "true"}


@pytest.fixture(scope="module")
def guard(guard_file: Path) -> Iterator[Guard]:
    with Guard(guard_file) as guard:
        yield guard


@pytest.fixture(scope="module")
def client(guard: Guard) -> Iterator[TestClient]:
    limits = Limits(max_images=8, max_bytes=4 << 20, max_cells=1024, seconds=300)
    with TestClient(create_app(guard, limits)) as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.01)
        yield client


def read(answer: Any) -> list[Verdict]:
    assert answer.status_code == 200, answer.text
    return [Verdict.from_dict(item) for item in answer.json()["verdicts"]]


def refused(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    said = answer.json()
    assert said["decision"] == "block"
    return str(said["error"])


# -- verdicts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [pytest.param("float16", marks=pytest.mark.slow), "float32", "float64"]
)
def test_verdicts_are_the_guards(
    client: TestClient, guard: Guard, latents: Array, dtype: str
) -> None:
    batch = latents[6:14].astype(dtype)
    answer = client.post(VERDICTS, params=SAID, content=npy(batch))
    assert read(answer) == guard.scan(batch)
    assert answer.json()["sha256"] == guard.sha256
    assert {verdict.decision for verdict in read(answer)} == {"allow", "block"}


def test_a_file_that_says_what_it_is_needs_no_query(
    client: TestClient, guard: Guard, latents: Array
) -> None:
    written = pytest.importorskip("safetensors.numpy", reason="writes the file")
    told = {"space": "flux2", "scaled": "true"}
    data = written.save({"latents": latents[:2]}, metadata=told)
    assert read(client.post(VERDICTS, content=data)) == guard.scan(latents[:2])


def test_one_image_and_packed_tokens(client: TestClient, guard: Guard, latents: Array) -> None:
    expected = guard.scan(latents[8:9])
    assert read(client.post(VERDICTS, params=SAID, content=npy(latents[8]))) == expected
    tokens = latents[8:9].reshape(1, 32, 16, 2, 16, 2).transpose(0, 2, 4, 1, 3, 5)
    packed = {**SAID, "height": "32", "width": "32"}
    answer = client.post(VERDICTS, params=packed, content=npy(tokens.reshape(1, 256, 128)))
    assert read(answer) == expected


def test_what_cannot_be_judged_is_a_block_with_an_error(client: TestClient, latents: Array) -> None:
    batch = latents[:3].copy()
    batch[1, 0, 0, 0] = np.nan
    found = read(client.post(VERDICTS, params=SAID, content=npy(batch)))
    assert [verdict.decision for verdict in found] == ["allow", "block", "allow"]
    assert found[1].error is not None


def test_noise_level_reaches_the_guard(client: TestClient, latents: Array) -> None:
    answer = client.post(VERDICTS, params={**SAID, "noise_level": "0.5"}, content=npy(latents[:1]))
    assert read(answer)[0].noise_level == 0.5


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({}, "say space"),
        ({"space": "flux2"}, "say scaled"),
        ({"space": "sdxl", "scaled": "true"}, "reads space=flux2"),
        ({"space": "flux2", "scaled": "false"}, "reads scaled=True"),
        ({**SAID, "noise_level": "nan"}, "noise_level"),
        ({**SAID, "noise_level": "-1"}, "noise_level"),
        ({**SAID, "scaled": "perhaps"}, "scaled"),
        ({**SAID, "height": "0"}, "height"),
        ({**SAID, "height": "16", "width": "16"}, "16x16"),
        ({**SAID, "layout": "packed"}, "height and width"),
        ({**SAID, "layout": "packed", "height": "16", "width": "16"}, "16x16"),
    ],
)
def test_conventions_are_never_guessed(
    client: TestClient, latents: Array, params: dict[str, str], says: str
) -> None:
    data = npy(latents[:1].reshape(1, 256, 128) if "layout" in params else latents[:1])
    assert says in refused(client.post(VERDICTS, params=params, content=data), 422)


def test_a_file_may_not_contradict_the_query(client: TestClient, latents: Array) -> None:
    written = pytest.importorskip("safetensors.numpy", reason="writes the file")
    data = written.save({"latents": latents[:1]}, metadata={"space": "sdxl", "scaled": "true"})
    assert "sdxl" in refused(client.post(VERDICTS, params=SAID, content=data), 422)


@pytest.mark.parametrize(
    "data",
    [b"", b"garbage", npy(np.zeros((1, 4, 32, 32), np.float32)), npy(np.zeros(5)), npy(1.0)],
    ids=["nothing", "garbage", "other channels", "one axis", "a number"],
)
def test_bodies_that_are_no_latents(client: TestClient, data: bytes) -> None:
    assert refused(client.post(VERDICTS, params=SAID, content=data), 422)


def test_limits(client: TestClient, latents: Array) -> None:
    many = client.post(VERDICTS, params=SAID, content=npy(latents[:9].astype("float16")))
    assert "more than 8 images" in refused(many, 413)
    wide = client.post(VERDICTS, params=SAID, content=npy(np.zeros((1, 32, 64, 64), "f2")))
    assert "at most 1024" in refused(wide, 413)
    long = client.post(VERDICTS, params=SAID, content=bytes((4 << 20) + 1))
    assert "larger than" in refused(long, 413)

    def chunks() -> Iterator[bytes]:  # without a Content-Length
        for _ in range(5):
            yield bytes(1 << 20)

    assert "larger than" in refused(client.post(VERDICTS, params=SAID, content=chunks()), 413)


def test_other_paths_and_methods_block_too(client: TestClient) -> None:
    refused(client.get(VERDICTS), 405)
    refused(client.post("/v1/nothing"), 404)


def test_no_answer_is_a_redirect(client: TestClient) -> None:
    for path in (f"{VERDICTS}/", "/readyz/"):
        elsewhere = {"host": "elsewhere.example"}
        refused(client.post(path, headers=elsewhere, follow_redirects=False), 404)


def test_a_fault_of_the_service_blocks(
    guard_file: Path, latents: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise MemoryError("injected")

    guard = Guard(guard_file, warm_up=False)
    with TestClient(create_app(guard), raise_server_exceptions=False) as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.01)
        monkeypatch.setattr(guard, "scan", broken)
        answer = client.post(VERDICTS, params=SAID, content=npy(latents[:1]))
    assert "not judged" in refused(answer, 500)


# -- load ------------------------------------------------------------------------------------


class Held(Guard):
    """Judges when it is told to: what others meet meanwhile is no question of speed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, warm_up=False)
        self.go_on = threading.Event()

    def scan(self, *arguments: Any, **options: Any) -> list[Verdict]:
        assert self.go_on.wait(300)
        return super().scan(*arguments, **options)


def ask(app: Any, bodies: list[bytes], held: Held | None = None, refused: int = 0) -> list[Any]:
    """Requests at the same time, in one event loop.

    held: goes on once `refused` of them are answered.
    """

    async def run() -> list[Any]:
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            posts = [client.post(VERDICTS, params=SAID, content=body) for body in bodies]
            tasks = [asyncio.create_task(post) for post in posts]
            while held is not None and sum(task.done() for task in tasks) < refused:
                await asyncio.sleep(0.01)
            if held is not None:
                held.go_on.set()
            return await asyncio.gather(*tasks)

    return asyncio.run(run())


def test_overload_is_an_explicit_503(guard_file: Path, latents: Array) -> None:
    """Two places, and a guard that takes its time: the other requests are turned away."""
    guard = Held(guard_file)
    app = create_app(guard, Limits(max_requests=2, seconds=300))
    service = app.state.service
    service.ready = True
    found = ask(app, [npy(latents[i : i + 1]) for i in range(6)], guard, refused=4)
    assert sorted(answer.status_code for answer in found) == [200, 200, 503, 503, 503, 503]
    for answer in found:
        if answer.status_code == 503:
            assert "too many requests" in refused(answer, 503)
            assert answer.headers["retry-after"] == "1"
    text = service.measures.text()[0].decode()
    assert 'latentguard_answers_total{status="503"} 4.0' in text
    assert "latentguard_requests_inside 0.0" in text
    # And the places are free again.
    assert [a.status_code for a in ask(app, [npy(latents[:1])] * 2)] == [200, 200]
    service.close()


def test_a_verdict_that_is_late_is_a_503_and_keeps_its_place(
    guard_file: Path, latents: Array
) -> None:
    guard = Held(guard_file)
    app = create_app(guard, Limits(max_requests=1, seconds=0.05))
    service = app.state.service
    service.ready = True

    async def run() -> list[str]:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            said = []
            for _ in range(2):
                answer = await client.post(VERDICTS, params=SAID, content=npy(latents[:1]))
                said.append(refused(answer, 503))
            guard.go_on.set()
            while service._inside:
                await asyncio.sleep(0.05)
            return said

    assert asyncio.run(run()) == ["no verdict within 0.05 s", "too many requests"]
    service.close()


def test_before_the_warm_up_nothing_is_judged(guard_file: Path, latents: Array) -> None:
    app = create_app(Guard(guard_file, warm_up=False))
    (answer,) = ask(app, [npy(latents[:1])])
    assert "not ready" in refused(answer, 503)
    app.state.service.close()


def test_a_form_is_told_how_to_send_a_file(client: TestClient, latents: Array) -> None:
    answer = client.post(VERDICTS, params=SAID, files={"file": npy(latents[:1])})
    assert "the body is a form (multipart/form-data)" in refused(answer, 415)
    assert "--data-binary" in answer.json()["error"]
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # what curl says of any file
    assert read(client.post(VERDICTS, params=SAID, content=npy(latents[:1]), headers=form))


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "br", "deflate, gzip"])
def test_an_encoded_body_is_told_to_come_as_it_is(
    client: TestClient, latents: Array, encoding: str
) -> None:
    body, headers = gzip.compress(npy(latents[:1])), {"Content-Encoding": encoding}
    said = refused(client.post(VERDICTS, params=SAID, content=body, headers=headers), 415)
    assert f"Content-Encoding '{encoding.lower()}'" in said
    assert "as they are" in said


def test_other_files_are_told_by_their_names(client: TestClient, latents: Array) -> None:
    body = gzip.compress(npy(latents[:1]))
    assert "compressed by gzip" in refused(client.post(VERDICTS, params=SAID, content=body), 422)
    stream = io.BytesIO()
    np.savez(stream, latents=latents[:1])
    said = refused(client.post(VERDICTS, params=SAID, content=stream.getvalue()), 422)
    assert "a zip archive, as .pt and .npz files are" in said


def test_metrics(client: TestClient, latents: Array) -> None:
    read(client.post(VERDICTS, params=SAID, content=npy(latents[14:18])))
    refused(client.post(VERDICTS, params=SAID, content=b"garbage"), 422)
    text = client.get("/metrics").text
    assert 'latentguard_images_total{decision="block"}' in text
    assert 'latentguard_answers_total{status="422"}' in text
    assert 'latentguard_guard{model="nano-flux2",policy="family 1.0"' in text


# -- over a socket ---------------------------------------------------------------------------


def test_the_service_needs_no_torch() -> None:
    code = "import app, sys; assert 'torch' not in sys.modules and 'pydantic_core' in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=APP.parent, check=True, timeout=600)


@contextmanager
def service_of(guard_file: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`python app.py guard.onnx`, as a user starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(APP), str(guard_file), "--port", str(port)]
    # On a machine with other work, all that happens within these seconds must have the time to.
    options = ["--read-seconds", "3", "--seconds", "300", "--max-delay-ms", "2000"]
    process = subprocess.Popen([*command, *options])
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(3000):
            assert process.poll() is None
            try:
                if httpx2.get(f"{url}/readyz").status_code == 200:
                    break
            except httpx2.TransportError:
                pass
            time.sleep(0.1)
        yield url, process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def served(guard_file: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with service_of(guard_file) as service:
        yield service


def test_over_a_socket(served: Any, guard: Guard, latents: Array) -> None:
    url, _ = served
    answer = httpx2.post(url + VERDICTS, params=SAID, content=npy(latents[:8]), timeout=300)
    assert read(answer) == guard.scan(latents[:8])
    about = httpx2.get(f"{url}/v1/guard").json()
    assert about["sha256"] == guard.sha256
    assert (about["space"], about["scaled"]) == ("flux2", True)


def test_a_body_that_does_not_arrive_is_not_waited_for(served: Any) -> None:
    host, port = served[0].removeprefix("http://").split(":")
    head = f"POST {VERDICTS}?space=flux2&scaled=true HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n"
    with socket.create_connection((host, int(port)), timeout=300) as slow:
        slow.sendall(head.encode() + b"\r\nonly this")
        answer = http.client.HTTPResponse(slow)
        answer.begin()
        assert answer.status == 408
        assert json.loads(answer.read())["decision"] == "block"


@pytest.fixture
def ending(guard_file: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with service_of(guard_file) as service:
        yield service


def test_a_request_under_way_is_answered_before_the_end(
    ending: Any, guard: Guard, latents: Array
) -> None:
    """SIGTERM while a batch waits for company."""
    url, process = ending
    answers: list[Any] = []

    def post() -> None:
        body = npy(latents[8:9])
        answers.append(httpx2.post(url + VERDICTS, params=SAID, content=body, timeout=300))

    thread = threading.Thread(target=post)
    thread.start()
    while "latentguard_requests_inside 1.0" not in httpx2.get(f"{url}/metrics").text:
        assert thread.is_alive()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    thread.join()
    assert read(answers[0]) == guard.scan(latents[8:9])
    assert process.wait(timeout=300) in (0, -signal.SIGTERM)
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"{url}/healthz")


@pytest.fixture
def short_lived(guard_file: Path) -> Iterator[Guard]:
    """One that its service may close."""
    with Guard(guard_file, threads=1) as guard:
        yield guard


@pytest.mark.parametrize("begun", [b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n"])
def test_idle_connections_keep_nobody_out(short_lived: Guard, latents: Array, begun: bytes) -> None:
    """Three times as many as are held open, silent or in the middle of their request."""
    with listening(short_lived, Limits(max_requests=1)) as place, contextlib.ExitStack() as idle:
        for _ in range(48):
            one = idle.enter_context(socket.create_connection(place, timeout=60))
            with contextlib.suppress(ConnectionError):
                one.sendall(begun)
        url = f"http://{place[0]}:{place[1]}"
        assert httpx2.get(f"{url}/healthz", timeout=60).text == "alive\n"
        while httpx2.get(f"{url}/readyz", timeout=60).status_code != 200:
            time.sleep(0.01)
        answer = httpx2.post(url + VERDICTS, params=SAID, content=npy(latents[:1]), timeout=60)
        assert len(read(answer)) == 1


def test_a_client_that_asks_nothing_is_not_waited_for(short_lived: Guard) -> None:
    limits = Limits(read_seconds=0.3)
    with listening(short_lived, limits) as place:
        with socket.create_connection(place, timeout=60) as slow:
            began = time.monotonic()
            for byte in b"GET /healthz HTTP":  # each byte is no new beginning
                with contextlib.suppress(ConnectionError):
                    slow.sendall(bytes([byte]))
                time.sleep(0.05)
            with contextlib.suppress(ConnectionError):
                assert slow.recv(100) == b""
            assert time.monotonic() - began < 30
        assert httpx2.get(f"http://{place[0]}:{place[1]}/healthz", timeout=60).status_code == 200


def test_a_file_that_is_not_the_pinned_one_is_not_served(guard_file: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(APP), str(guard_file), "--sha256", "0" * 64],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 2
    assert "not the pinned" in ran.stderr
