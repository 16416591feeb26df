"""Reading trajectories: a guard's audit log, its sessions as JSON, and plain verdicts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from judging import decided

from latentguard.errors import LatentsError
from latentguard.evaluate.trajectories import read_trajectories
from latentguard.policy import parse_policy

POLICY = parse_policy(
    """
schema_version: 1
name: shop
version: "1"
concepts:
  - id: guns
    category: weapons
    prompts: [a revolver, a pistol]
    threshold: {probability: 0.5}
    action: observe
"""
)
WHO = {"model": "test-model", "model_sha256": "a" * 64, "space": "flux2"}


def _verdict(margin, level, prompt=0):
    found = decided(
        [[0.4]], [[margin]], [[prompt]], POLICY.to_dict(), noise_level=level, final=level == 0
    )
    assert found[0].error is None
    return found[0].to_dict()


def _log(tmp_path, lines, name="audit.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [path]


def _audit(request, image, level, margin, **more):
    return {**_verdict(margin, level), **WHO, "request_id": request, "image": image, **more}


def test_audit_log(tmp_path):
    lines = [
        _audit(request, image, level, request / 10 + image / 100 - level / 1000)
        for request in range(3)
        for level in (14.0, 1.0, 0.0)
        for image in range(2)
    ]
    found = read_trajectories(_log(tmp_path, lines), POLICY)
    assert found.model == ("test-model", "a" * 64)
    assert found.space == "flux2"
    assert found.source == "trajectories of 6 images"
    assert sorted(found.values["guns"]) == [0.0, 1.0, 14.0]
    np.testing.assert_allclose(
        sorted(found.values["guns"][14.0] + 0.014), [0, 0.01, 0.1, 0.11, 0.2, 0.21], atol=1e-12
    )


def test_an_image_counts_once_at_a_level_with_its_highest_margin(tmp_path):
    lines = [_audit("r", 0, 1.0, 0.1), _audit("r", 0, 1.00001, 0.3), _audit("r", 1, 1.0, 0.2)]
    found = read_trajectories(_log(tmp_path, lines), POLICY)
    assert sorted(found.values["guns"][1.0]) == [0.2, 0.3]
    assert list(found.values["guns"]) == [1.0]


def test_pure_noise_is_a_level(tmp_path):
    lines = [_audit("r", 0, float("inf"), 0.1), _audit("r", 0, 2e7, 0.3), _audit("r", 0, 0.0, 0.2)]
    assert lines[0]["noise_level"] is None
    found = read_trajectories(_log(tmp_path, lines), POLICY)
    assert {level: list(v) for level, v in found.values["guns"].items()} == {0: [0.2], 1e6: [0.3]}


def test_a_byte_order_mark_is_no_part_of_a_record(tmp_path):
    (path,) = _log(tmp_path, [_verdict(0.1, 1.0), _verdict(0.2, 1.0)])
    path.write_text(path.read_text(), encoding="utf-8-sig")
    found = read_trajectories([path], POLICY, ("m", "b" * 64), "sdxl")
    assert sorted(found.values["guns"][1.0]) == [0.1, 0.2]


def test_plain_verdicts_are_images_of_their_own(tmp_path):
    lines = [_verdict(0.1, 1.0), _verdict(0.2, 1.0)]
    model = ("m", "b" * 64)
    found = read_trajectories(_log(tmp_path, lines), POLICY, model, "sdxl")
    assert sorted(found.values["guns"][1.0]) == [0.1, 0.2]
    assert (found.model, found.space) == (model, "sdxl")
    listed = tmp_path / "verdicts.json"
    listed.write_text(json.dumps(lines))
    again = read_trajectories([listed], POLICY, model, "sdxl")
    assert sorted(again.values["guns"][1.0]) == [0.1, 0.2]


def test_sessions_as_json(tmp_path):
    def image(margin, level):
        return {"action": "none", "steering": None, "verdict": _verdict(margin, level)}

    session = {
        "schema_version": 1, "request_id": "r", **WHO, "verdicts": [],
        "history": [
            {"step": 0, "noise_level": 2.0, "images": [image(0.1, 2.0), image(0.2, 2.0)]},
            {"step": 1, "noise_level": 0.0, "images": [image(0.3, 0.0), image(0.4, 0.0)]},
        ],
    }  # fmt: skip
    path = tmp_path / "session.json"
    path.write_text(json.dumps(session, indent=1))
    other = tmp_path / "sessions.json"
    other.write_text(json.dumps([{**session, "request_id": "s"}]))
    found = read_trajectories([path, other], POLICY)
    assert sorted(found.values["guns"][2.0]) == [0.1, 0.1, 0.2, 0.2]
    assert sorted(found.values["guns"][0.0]) == [0.3, 0.3, 0.4, 0.4]


def test_records_of_a_cascade_are_told_apart(tmp_path):
    """The verdict says which of two models scored an image; their margins do not mix."""
    first = _verdict(0.1, 2.0) | {"model": {"name": "first", "sha256": "b" * 64}}
    history = [
        {"step": i, "noise_level": 2.0, "images": [{"action": "none", "verdict": verdict}]}
        for i, verdict in enumerate((first, _verdict(0.2, 2.0)))
    ]
    path = tmp_path / "session.json"
    path.write_text(json.dumps({**WHO, "request_id": "r", "history": history}))
    with pytest.raises(LatentsError, match="model is 'test-model', in the records before 'first'"):
        read_trajectories([path], POLICY)


def test_a_real_guard_writes_what_is_read(tmp_path):
    """The audit log of real sessions, step by step."""
    torch = pytest.importorskip("torch", reason="sessions need torch")
    guard = pytest.importorskip("latentguard.guard", reason="needs the guard")
    from latentguard.encoders.catalog import bundled_path
    from latentguard.spaces import Latents

    if not bundled_path("nano-flux2").is_file():
        pytest.skip("needs the bundled nano-flux2")
    path = tmp_path / "audit.jsonl"
    log = guard.AuditLog(path)
    for seed in range(2):
        running = guard.session("observe", "nano-flux2")
        noise = torch.randn(2, 32, 32, 32, generator=torch.Generator().manual_seed(seed))
        for level in (3.0, 0.0):
            latents = Latents(0.85 * noise, "flux2", scaled=True)
            running.step(latents, noise_level=level, final=level == 0)
        for record in running.history:
            log.write(running, record)
    from latentguard.policy import load_policy

    found = read_trajectories([path], load_policy("observe"))
    assert found.model[0] == "nano-flux2"
    assert {len(v) for by in found.values.values() for v in by.values()} == {4}
    assert all(sorted(by) == [0.0, 3.0] for by in found.values.values())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no scores in "),
        ([{"noise_level": 1.0}], r"audit.jsonl:?1?: must have noise_level and concepts"),
        ([_audit("r", 0, 1.0, 0.1), {**_audit("r", 1, 1.0, 0.1), "model": "x"}], "one model at a"),
        ([_audit("r", 0, 1.0, 0.1, error="NaN")], "no scores but an error: NaN"),
        ([_audit("r", 0, 1.0, 0.1, action="steered")], "was steered, so it is no longer"),
        ([_verdict(0.1, 1.0)], "do not say model, model_sha256, space: name the model"),
        ([[1]], "must be a JSON object"),
        (
            [{**WHO, "noise_level": 1.0, "concepts": [{"id": "swords", "margin": 0.1}]}],
            "no concept 'swords': it has guns",
        ),
        (
            [
                {
                    **WHO,
                    "noise_level": 1,
                    "concepts": [{"id": "guns", "margin": 0, "prompt": "a gun"}],
                }
            ],
            "'a gun', which is no prompt",
        ),
    ],
)
def test_records_that_cannot_be_used(tmp_path, lines, message):
    with pytest.raises(LatentsError, match=message):
        read_trajectories(_log(tmp_path, lines), POLICY)


def test_broken_lines_and_missing_files(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(_audit("r", 0, 1.0, 0.1)) + "\n{oops\n")
    with pytest.raises(LatentsError, match=r"broken\.jsonl:2: is not JSON"):
        read_trajectories([path], POLICY)
    with pytest.raises(LatentsError, match="cannot be read"):
        read_trajectories([tmp_path / "none.jsonl"], POLICY)
