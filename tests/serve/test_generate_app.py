"""The generating example: whose verdicts, what a blocked image becomes, what is refused."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

for package in ("diffusers", "fastapi", "uvicorn", "prometheus_client", "httpx2", "PIL"):
    pytest.importorskip(package, reason=f"the example needs {package}")

from checks import Limits  # noqa: E402
from generate_app import LIMITS, create_app  # noqa: E402
from generation import Generation  # noqa: E402
from painters import Choice, ExactPainter, painter  # noqa: E402
from PIL import Image  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from latentguard.errors import ModelError  # noqa: E402
from latentguard.judge import Verdict  # noqa: E402
from latentguard.policy import load_policy, shipped_policies  # noqa: E402

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "serve"
PATH = "/v1/generate"


def generation(policy: Any = "family", **options: Any) -> Generation:
    return Generation(painter(Choice("exact")), policy, **options)


@pytest.fixture(scope="module")
def served() -> Generation:
    return generation()


@pytest.fixture(scope="module")
def client(served: Generation) -> Iterator[TestClient]:
    with TestClient(create_app(served, Limits(LIMITS.max_bytes, seconds=300))) as client:
        yield client


def ask(client: TestClient, prompt: str, **options: Any) -> dict[str, Any]:
    answer = client.post(PATH, json={"prompt": prompt, "seed": 1, "steps": 4, **options})
    assert answer.status_code == 200, answer.text
    said: dict[str, Any] = answer.json()
    assert answer.headers["x-request-id"] == said["request_id"]
    return said


def picture(said: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(said["image"]))).convert("RGB")


def refused(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    said = answer.json()
    assert said["decision"] == "block"
    return str(said["error"])


# -- verdicts --------------------------------------------------------------------------------


def test_an_allowed_image_and_its_verdict(client: TestClient, served: Generation) -> None:
    said = ask(client, "a photo of a cat")
    assert (said["decision"], said["outcome"], said["seed"]) == ("allow", "allowed", 1)
    assert picture(said).size == (256, 256)
    assert picture(said).getextrema() != ((0, 0),) * 3
    (verdict,) = map(Verdict.from_dict, said["verdicts"])
    assert verdict.decision == "allow"
    assert verdict.model == served.model
    assert said["model"] == served.model.to_dict()
    assert said["policy"]["sha256"] == load_policy("family").sha256


def test_a_blocked_image_is_black_and_says_why(client: TestClient) -> None:
    said = ask(client, "a revolver on a table")
    assert (said["decision"], said["outcome"]) == ("block", "blanked")
    assert picture(said).getextrema() == ((0, 0),) * 3
    assert "firearms" in said["reason"]
    (matched,) = [one for one in said["verdicts"][0]["concepts"] if one["matched"]]
    assert matched["id"] == "firearms"
    assert matched["probability"] > matched["threshold"]["value"]
    assert matched["prompt"] == "revolver"


def test_a_seed_gives_the_same_image_and_none_draws_one(client: TestClient) -> None:
    first = ask(client, "cat", seed=None)
    assert ask(client, "cat", seed=first["seed"])["image"] == first["image"]
    assert ask(client, "cat", seed=None)["seed"] != first["seed"]


def test_each_of_many_requests_at_once_gets_its_own_verdict(client: TestClient) -> None:
    wanted = ["cat", "revolver", "dahlia", "wine-bottle", "pagoda", "slot-machine"] * 3
    alone = {prompt: ask(client, prompt)["decision"] for prompt in set(wanted)}
    assert set(alone.values()) == {"allow", "block"}
    with ThreadPoolExecutor(len(wanted)) as pool:
        answers = list(pool.map(lambda prompt: ask(client, prompt), wanted))
    assert [said["decision"] for said in answers] == [alone[prompt] for prompt in wanted]
    assert len({said["request_id"] for said in answers}) == len(wanted)
    for prompt, said in zip(wanted, answers, strict=True):
        black = picture(said).getextrema() == ((0, 0),) * 3
        assert black == (alone[prompt] == "block")


# -- what a blocked image becomes ------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "outcome", "attempts"),
    [("blur", "blurred", 0), ("raise", "raised", 0), ("{retry: 2}", "blanked", 2)],
)
def test_what_the_policy_says_of_blocked_images(
    tmp_path: Path, word: str, outcome: str, attempts: int
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(shipped_policies()["family"].read_text() + f"\non_block: {word}\n")
    with TestClient(create_app(generation(path))) as client:
        said = ask(client, "revolver")
        assert (said["decision"], said["outcome"]) == ("block", outcome)
        assert said["verdicts"][0]["decision"] == "block"
        assert len(said["attempts"]) == attempts
        assert (said["image"] is None) == (word == "raise")
        assert ask(client, "cat")["outcome"] == "allowed"


def test_a_call_that_takes_too_long_is_blocked() -> None:
    with TestClient(create_app(generation(seconds=0.0))) as client:
        said = ask(client, "cat")
    assert said["decision"] == "block"
    assert "timeout" in said["reason"]


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"no json", "JSON"),
        (b"{}", "body.prompt"),
        (b'{"prompt": ""}', "body.prompt"),
        (b'{"prompt": "cat", "steps": 100000}', "body.steps"),
        (b'{"prompt": "cat", "seed": "1"}', "body.seed"),
        (b'{"prompt": "cat", "guidance": 1e400}', "body.guidance"),
        (b'{"prompt": "cat", "output_type": "latent"}', "body.output_type"),
        (b'{"prompt": "a submarine"}', "names no class"),
    ],
)
def test_what_cannot_be_asked(client: TestClient, body: bytes, named: str) -> None:
    assert named in refused(client.post(PATH, content=body), 422)


def test_large_bodies_and_other_paths(client: TestClient) -> None:
    refused(client.post(PATH, content=b" " * (LIMITS.max_bytes + 1)), 413)
    refused(client.post("/v1/other"), 404)
    refused(client.get(PATH), 405)


def test_more_than_may_wait_is_refused_and_late_ones_too() -> None:
    busy, go = threading.Event(), threading.Event()

    class Slow(ExactPainter):
        """Holds the pipeline until it may go on."""

        held = False

        def arguments(self, *asked: Any) -> dict[str, Any]:
            found = super().arguments(*asked)
            if threading.current_thread().name.startswith("generate"):
                busy.set()
                go.wait(60)
            return found

    slow = Generation(Slow(Choice().latents), "family")
    roomy = create_app(slow, Limits(max_requests=2, seconds=300))
    with TestClient(roomy) as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, client, "cat")
        assert busy.wait(60)
        second = pool.submit(ask, client, "revolver")
        while "latentguard_requests_inside 2.0" not in client.get("/metrics").text:
            time.sleep(0.01)
        answer = client.post(PATH, json={"prompt": "cat"})
        assert "too many" in refused(answer, 503)
        assert answer.headers["retry-after"] == "1"
        assert client.get("/healthz").status_code == 200
        go.set()
        assert first.result()["decision"] == "allow"
        assert second.result()["decision"] == "block"
    go.clear()
    with TestClient(create_app(slow, Limits(max_requests=2, seconds=0.1))) as client:
        assert "no image within" in refused(client.post(PATH, json={"prompt": "cat"}), 503)
        go.set()


def test_metrics_and_the_guard(client: TestClient, served: Generation) -> None:
    ask(client, "revolver")
    text = client.get("/metrics").text
    assert 'latentguard_matches_total{action="block",concept="firearms"}' in text
    assert 'latentguard_images_total{decision="block"}' in text
    about = client.get("/v1/guard").json()
    assert about["space"] == "flux2"
    assert about["model"]["sha256"] == served.model.sha256


def test_an_image_that_was_not_judged_is_not_given_out(served: Generation) -> None:
    other = generation()
    other._by.pipe.callback_on_step_end = None  # as if the guard had been lost
    with TestClient(create_app(other), raise_server_exceptions=False) as client:
        refused(client.post(PATH, json={"prompt": "cat", "steps": 2}), 500)


# -- pipelines -------------------------------------------------------------------------------


def test_pipelines_that_cannot_be_had() -> None:
    with pytest.raises(ModelError, match="--pipeline"):
        painter(Choice())
    with pytest.raises(ModelError, match="cannot load"):
        painter(Choice(pipeline="/nowhere/at/all"))
    with pytest.raises(ModelError, match="dtype"):
        painter(Choice(pipeline="any", dtype="load"))
    with pytest.raises(ModelError, match="JSON object"):
        painter(Choice(pipeline="any", call="[]"))


@pytest.mark.slow
def test_the_command_says_in_one_sentence_what_is_wrong() -> None:
    for arguments, named in (
        (["--pipeline", "/nowhere/at/all"], "cannot load"),
        (["--generator", "exact", "--policy", "famly"], "did you mean 'family'"),
    ):
        command = [sys.executable, str(EXAMPLE / "generate_app.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 2
        assert named in done.stderr.splitlines()[-1]


def test_a_pipeline_of_diffusers_by_its_path(tmp_path: Path) -> None:
    from painters import paint_latents
    from small_pipeline import small_stable_diffusion

    small_stable_diffusion().save_pretrained(tmp_path / "small")
    by = painter(Choice(pipeline=str(tmp_path / "small"), dtype="float32", device="cpu"))
    with TestClient(create_app(Generation(by, "family"))) as client:
        said = ask(client, "a lighthouse", guidance=2.0)
        assert said["verdicts"][0]["error"] is None
        assert picture(said).size == (64, 64)
        about = client.get("/v1/guard").json()
        assert (about["space"], about["model"]["name"]) == ("sd1", said["model"]["name"])
    by.pipe.callback_on_step_end = None
    latents = paint_latents(by, "a lighthouse", seed=1, steps=2)
    assert latents.tensor.shape == (1, 4, 8, 8)
    assert (latents.space.name, latents.scaled) == ("sd1", True)
    by._takes = {}  # as a pipeline without steps
    with pytest.raises(ModelError, match="takes no"):
        by.arguments("a lighthouse", 4, None)
