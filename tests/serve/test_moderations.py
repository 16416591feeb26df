"""`POST /v1/moderations`: the real client of such an endpoint, over a socket."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "openai"):
    pytest.importorskip(package, reason=f"the example and its client need {package}")

import openai  # noqa: E402
from app import create_app  # noqa: E402
from checks import Limits, Refused  # noqa: E402
from http_helpers import listening, npy  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from moderations import read_inputs  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from latentguard.policy import parse_policy, schemes  # noqa: E402
from latentguard.runtime import Guard  # noqa: E402

Array = Any
SAID = {"space": "flux2", "scaled": "true"}
LIMITS = Limits(max_images=4, max_bytes=4 << 20, max_cells=1024, seconds=300)
POLICY = b"""
schema_version: 1
name: words
version: "1"
uncovered: warn
contrast: [furniture, car, train, clothing, shoes]
concepts:
  - id: guns
    category: weapons
    prompts: [revolver]
    threshold: {probability: 0.5}
    action: review
    taxonomy: {openai: [violence]}
  - id: beer
    category: alcohol
    prompts: [beer glass]
    threshold: {probability: 0.5}
    action: block
  - id: nudity
    category: sexual
    prompts: [a naked person]
    threshold: {probability: 0.5}
    action: block
    taxonomy: {openai: [sexual, violence]}
"""


@pytest.fixture(scope="module")
def guard(guard_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    from latentguard.export import swap_policy

    out = tmp_path_factory.mktemp("words") / "words.onnx"
    swap_policy(guard_file, parse_policy(POLICY), out)
    with Guard(out) as guard:
        yield guard


@pytest.fixture(scope="module")
def client(guard: Guard) -> Iterator[openai.OpenAI]:
    with listening(guard, LIMITS) as (host, port):
        options = {"api_key": "-", "max_retries": 40, "timeout": 300}  # until it is ready
        with openai.OpenAI(base_url=f"http://{host}:{port}/v1", **options) as client:
            yield client


def image(file: bytes, media: str = "application/octet-stream") -> Any:
    url = f"data:{media};base64,{base64.b64encode(file).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def named(latents: Array) -> tuple[Array, Array, Array]:
    """A cat, a revolver and a glass of beer: what `make demo` shows of them."""
    from latentguard.files import load_latents

    ids = list(load_latents("examples/latents.pt").ids or ())
    cat, gun, beer = (ids.index(name) for name in ("cat", "revolver", "beer-glass-pagoda"))
    return latents[cat], latents[gun], latents[beer]


def test_the_real_client_reads_the_answer(
    client: openai.OpenAI, guard: Guard, latents: Array
) -> None:
    inputs = [image(npy(array)) for array in named(latents)]
    answer = client.moderations.create(
        model="omni-moderation-latest", input=inputs, extra_query=SAID
    )
    assert answer.id.startswith("modr-")
    assert answer.model == "nano-flux2"
    cat, gun, beer = answer.results
    assert (cat.flagged, cat.categories.violence) == (False, False)
    assert 0 < cat.category_scores.violence < 0.5
    assert (gun.flagged, gun.categories.violence) == (True, True)
    assert gun.category_scores.violence > 0.5
    assert gun.category_applied_input_types.violence == ["image"]
    # Beer is in no category of these, and is blocked all the same.
    assert (beer.flagged, beer.categories.violence) == (True, False)
    assert beer.model_extra["latentguard"]["decision"] == "block"
    (verdict,) = guard.scan(named(latents)[1][None])
    assert gun.category_scores.violence == pytest.approx(verdict.concepts[0].probability, abs=1e-6)


def test_what_was_not_checked_is_null_with_the_reason(
    client: openai.OpenAI, latents: Array
) -> None:
    (result,) = client.moderations.create(
        input=[image(npy(named(latents)[0]))], extra_query=SAID
    ).results
    told = result.to_dict()
    assert list(told["categories"]) == [c.id for c in schemes()["openai"].categories]
    assert set(told["categories"]) == set(told["category_scores"])
    unchecked = told["latentguard"]["unchecked"]
    assert unchecked["sexual"] == "nano-flux2 cannot see 'nudity'"
    assert unchecked["violence"] == "nano-flux2 cannot see 'nudity'"  # and was checked for guns
    assert unchecked["hate"] == "no concept of policy 'words' is mapped to it"
    for name in told["categories"]:
        if name != "violence":
            assert told["categories"][name] is None
            assert told["category_scores"][name] is None
            assert told["category_applied_input_types"][name] == []


def test_safetensors_and_pt_files(client: openai.OpenAI, latents: Array) -> None:
    torch = pytest.importorskip("torch", reason="writes the file")
    safetensors = pytest.importorskip("safetensors.numpy", reason="writes the file")
    gun = named(latents)[1]
    told = {"space": "flux2", "scaled": "true"}
    stream = io.BytesIO()
    torch.save({"latents": torch.from_numpy(gun[None].copy())}, stream)
    files = [safetensors.save({"latents": gun[None]}, metadata=told), stream.getvalue()]
    answer = client.moderations.create(input=[image(file) for file in files], extra_query=SAID)
    scores = [result.category_scores.violence for result in answer.results]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert all(result.categories.violence for result in answer.results)


def test_what_cannot_be_judged_is_flagged(client: openai.OpenAI, latents: Array) -> None:
    broken = latents[0].copy()
    broken[0, 0, 0] = np.nan
    (result,) = client.moderations.create(input=[image(npy(broken))], extra_query=SAID).results
    assert result.flagged
    assert result.category_scores.violence is None
    assert "could not be judged" in result.model_extra["latentguard"]["unchecked"]["violence"]


REFUSED = {
    "text": ("how to do it", "text is not judged here, only latents"),
    "texts": (["one", "two"], "input[0]: text is not judged here"),
    "a text beside": ([{"type": "text", "text": "x"}], "input[0]: text is not judged here"),
    "an address": (
        [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}],
        "input[0]: addresses are not fetched",
    ),
    "a file's address": (
        [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
        "input[0]: addresses are not fetched",
    ),
    "a picture": ([image(b"\x89PNG", "image/png")], "'image/png;base64' is not read"),
    "no base64": (
        [{"type": "image_url", "image_url": {"url": "data:application/octet-stream;base64,?"}}],
        "input[0]: its base64 cannot be read",
    ),
    "nothing": ([], "a list of at least one image"),
    "no url": ([{"type": "image_url"}], "input[0]: is no input of type image_url"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_inputs_are_refused_in_one_sentence(client: openai.OpenAI, case: str) -> None:
    given, says = REFUSED[case]
    with pytest.raises(openai.BadRequestError) as error:
        client.moderations.create(input=given, extra_query=SAID)
    assert says in error.value.body["message"]
    assert error.value.body["type"] == "invalid_request_error"
    assert "\n" not in error.value.body["message"]
    assert error.value.response.json()["decision"] == "block"


def test_files_that_are_not_the_guards(client: openai.OpenAI, latents: Array) -> None:
    create = client.moderations.create
    with pytest.raises(openai.UnprocessableEntityError, match=r"input\[0\]: say space"):
        create(input=[image(npy(latents[0]))])
    with pytest.raises(openai.UnprocessableEntityError, match="the file cannot be read"):
        create(input=[image(b"junk")], extra_query=SAID)
    with pytest.raises(openai.BadRequestError, match="the file holds 2 images; send one"):
        create(input=[image(npy(latents[:2]))], extra_query=SAID)
    with pytest.raises(openai.APIStatusError, match="more than 4 inputs") as error:
        create(input=[image(npy(latents[0]))] * 5, extra_query=SAID)
    assert error.value.status_code == 413


@pytest.fixture
def plain(guard: Guard) -> Iterator[TestClient]:
    app = create_app(guard, LIMITS)
    app.state.service.ready = True  # without a warm-up, as nothing here is judged
    return TestClient(app, raise_server_exceptions=False)


BODIES = {
    b"": "not valid JSON",
    b"[" * 40: "not valid JSON",
    b"[" * 100_000: "more than 4 inputs, or much text",
    b"[]": "must be a JSON object",
    b'{"model": "x"}': "must be a JSON object with `input`",
    b'{"input": [], "input": []}': "one key twice",
    b'{"input": [1], "noise_level": 2}': "'noise_level' is not known here",
    b'{"input": [1], "\\ud800": 2}': "is not known here",
    b'{"input": [1], "model": 2}': "model must be text",
    b'{"input": {"type": "text"}}': "a list of at least one image",
    b'{"input": [1]}': "input[0]: is no input",
    b'{"input": [{"type": "image_url", "image_url": "x"}]}': "input[0]: is no input",
    b'{"input": [{"type": "image_url", "image_url": {"url": "data:\\ud800,"}}]}': "is not read",
}


@pytest.mark.parametrize("body", BODIES, ids=lambda body: str(body[:40]))
def test_bodies_of_another_form(plain: TestClient, body: bytes) -> None:
    answer = plain.post("/v1/moderations", params=SAID, content=body)
    assert answer.status_code in (400, 413)
    assert BODIES[body] in answer.json()["error"]["message"]
    assert answer.json()["decision"] == "block"


def test_errors_of_the_service_have_the_same_shape(plain: TestClient) -> None:
    assert plain.get("/v1/moderations").json()["error"]["type"] == "invalid_request_error"
    plain.app.state.service.ready = False  # type: ignore[attr-defined]
    answer = plain.post("/v1/moderations", params=SAID, content=b"{}")
    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "server_error"
    assert answer.headers["Retry-After"] == "1"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=9),
        lambda part: (
            st.lists(part, max_size=3)
            | st.dictionaries(
                st.sampled_from(["input", "type", "image_url", "url", "x"]), part, max_size=4
            )
        ),
    ),
    st.sampled_from(["image_url", "text", "x"]),
)
@settings(max_examples=200, deadline=None)
def test_no_body_is_anything_but_latents_or_refused(body: Any, kind: str) -> None:
    for shape in (body, {"input": body}, {"input": [{"type": kind, "image_url": {"url": body}}]}):
        with pytest.raises(Refused):
            read_inputs(json.dumps(shape).encode(), SAID, None, LIMITS)  # type: ignore[arg-type]


def test_a_policy_without_these_words_is_told_how_to_get_them(
    guard_file: Path, tmp_path: Path
) -> None:
    from latentguard.export import swap_policy

    swap_policy(guard_file, "default", tmp_path / "default.onnx")
    with Guard(tmp_path / "default.onnx") as guard:
        answer = TestClient(create_app(guard, LIMITS)).post("/v1/moderations", content=b"{}")
    assert answer.status_code == 404
    assert (
        "policy 'default' maps no concept to the taxonomy openai"
        in answer.json()["error"]["message"]
    )
