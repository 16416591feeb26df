"""Concepts learned from examples beside prompts: one bank, one operator, everywhere the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import second, two_stages
from learned import NANO, entry, is_gun, photos, write_policy

from latentguard.concepts import ConceptBank, coverage_of
from latentguard.encoders import load_encoder, traits
from latentguard.encoders.examples import example_features, joint_embedding, whole, widened
from latentguard.errors import LatentsError, ModelError, PolicyError
from latentguard.policy import load_policy
from latentguard.policy.examples import load_concept, write_concept
from latentguard.scorer import Scorer
from latentguard.spaces import Latents

ARE_GUNS = is_gun(photos())


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return write_policy(tmp_path)


def test_margins_are_the_head_s_and_prompts_keep_theirs(policy: Path) -> None:
    scores = Scorer(policy, NANO).score(photos())
    (head,) = load_concept(policy.with_name("guns.safetensors")).entries
    rows = example_features(NANO, photos()).pooled.double()
    margin = rows @ torch.from_numpy(head.weight).double() + head.bias
    torch.testing.assert_close(scores.margin[:, 0].double(), margin, rtol=1e-5, atol=2e-6)
    probability = torch.sigmoid(NANO.logit_scale * margin)
    torch.testing.assert_close(scores.probability[:, 0].double(), probability, rtol=1e-4, atol=1e-5)
    loaded = load_policy(policy)
    plain = loaded.model_copy(update={"concepts": loaded.concepts[2:]})
    alone = Scorer(plain, NANO).score(photos())
    torch.testing.assert_close(scores.margin[:, 2], alone.margin[:, 0], rtol=1e-5, atol=1e-6)


def test_beside_prompts_the_better_of_both_counts_above_the_contrast(policy: Path) -> None:
    scorer, latents = Scorer(policy, NANO), photos()
    scores = scorer.score(latents)
    (head,) = load_concept(policy.with_name("guns.safetensors")).entries
    joint = joint_embedding(NANO, latents).double()
    against = NANO.encode_text(["umbrella", "dog", "house", "landscape", "anything else"]).double()
    contrast = (joint @ against.T).amax(1)
    prompts = (joint @ NANO.encode_text(["rifle", "assault rifle"]).double().T).amax(1)
    level = (against @ torch.from_numpy(head.joint).double()).max()
    learned = scores.margin[:, 0].double() + level
    expected = torch.maximum(prompts, learned) - contrast
    torch.testing.assert_close(scores.margin[:, 1].double(), expected, rtol=1e-4, atol=2e-6)
    labels = [scorer.bank.prompts[i] for i in scores.best_prompt[:, 1]]
    assert {"examples of handguns"} < set(labels)  # and prompts match some


def test_verdicts_name_the_examples(policy: Path) -> None:
    for gun, verdict in zip(ARE_GUNS, Scorer(policy, NANO).verdicts(photos()), strict=True):
        assert (verdict.decision == "block") is gun
        assert verdict.concepts[0].prompt == "examples of handguns"
        if gun:
            assert "'handguns' matched 'examples of handguns' with probability" in verdict.reason


def test_margins_of_a_head_may_be_larger_than_those_of_prompts(tmp_path: Path) -> None:
    policy = write_policy(tmp_path)
    steep = entry(NANO, photos(), ARE_GUNS, steepness=2000.0)
    write_concept(tmp_path / "guns.safetensors", "handguns", [steep])
    scorer = Scorer(policy, NANO)
    assert float(scorer.score(photos()).margin[:, 0].abs().max()) > 2.1
    for gun, verdict in zip(ARE_GUNS, scorer.verdicts(photos()), strict=True):
        assert verdict.error is None
        assert (verdict.decision == "block") is gun


def test_heat_maps_score_each_cell_by_the_head(policy: Path) -> None:
    scorer = Scorer(policy, NANO)
    (head,) = load_concept(policy.with_name("guns.safetensors")).entries
    cells = example_features(NANO, photos(), tokens=True)
    expected = cells.tokens @ torch.from_numpy(head.weight) + head.bias
    found = scorer.heatmaps(photos())[:, 0]
    np.testing.assert_allclose(
        found.reshape(len(found), -1), expected.numpy(), rtol=1e-4, atol=2e-6
    )


def test_the_gradient_goes_through_the_head(policy: Path) -> None:
    scorer, latents = Scorer(policy, NANO), photos()[:1]
    x = latents.tensor.clone().requires_grad_()
    margin = scorer.score(Latents(x, "flux2", scaled=True)).margin[0, 0]
    (grad,) = torch.autograd.grad(margin, x)
    step = 1e-2 * grad / grad.norm()
    moved = [
        scorer.score(Latents((x + sign * step).detach(), "flux2", scaled=True)).margin[0, 0]
        for sign in (1, -1)
    ]
    assert float(moved[0] - moved[1]) == pytest.approx(float(2e-2 * grad.norm()), rel=0.05)


def test_a_model_without_a_trunk_is_learned_on_its_embedding(tmp_path: Path) -> None:
    encoder = second()
    policy = write_policy(tmp_path, entry(encoder, photos(), ARE_GUNS))
    scorer = Scorer(policy, encoder)
    head = load_concept(tmp_path / "guns.safetensors").entries[1]
    assert head.features == "joint"
    margin = joint_embedding(encoder, photos()) @ torch.from_numpy(head.weight) + head.bias
    found = scorer.score(photos()).margin
    torch.testing.assert_close(found[:, 0], margin, rtol=1e-4, atol=1e-5)
    assert scorer.heatmaps(photos()).shape[:2] == (25, 3)


def test_both_models_of_a_cascade_need_an_entry(tmp_path: Path) -> None:
    encoder = second()
    cascade = "cascade: {first: nano-flux2, unsure: 0.05}"
    policy = write_policy(tmp_path, entry(encoder, photos(), ARE_GUNS), extra=cascade)
    verdicts = Scorer(policy, encoder).verdicts(photos())
    assert all(verdict.error is None for verdict in verdicts)
    write_policy(tmp_path, extra=cascade)
    with pytest.raises(ModelError, match="was learned for nano-flux2, not for"):
        Scorer(policy, encoder)


def test_crops_are_judged_by_the_same_head(tmp_path: Path) -> None:
    policy = write_policy(tmp_path, extra="views: crops")
    # Four photos side by side, one of them of a gun: a crop sees that alone.
    one, *others = (ARE_GUNS.index(True), *(i for i, gun in enumerate(ARE_GUNS) if not gun))
    parts = photos().tensor[[others[0], others[1], others[2], one]]
    rows = [torch.cat([*parts[:2]], -1), torch.cat([*parts[2:]], -1)]
    large = Latents(torch.cat(rows, -2)[None], "flux2", scaled=True)
    whole_only = Scorer(load_policy(policy).with_views("whole"), NANO)
    by_policy = Scorer(policy, NANO)
    named = Scorer(load_policy(policy).with_views("whole"), "nano-flux2+views=crops", device="cpu")
    assert by_policy.thorough.encoder.name == named.encoder.name == "nano-flux2+views=crops"
    crops = [[c.margin for c in v.concepts] for v in by_policy.verdicts(large)]
    assert crops == [[c.margin for c in v.concepts] for v in named.verdicts(large)]
    plain = [[c.margin for c in v.concepts] for v in whole_only.verdicts(large)]
    assert crops[0][0] > plain[0][0] + 0.1
    assert np.all(np.array(crops) >= np.array(plain) - 1e-6)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_half_precision_says_nearly_the_same(policy: Path, dtype: torch.dtype) -> None:
    exact = Scorer(policy, NANO).score(photos()).margin
    half = load_encoder("nano-flux2", "cpu").to(dtype=dtype)
    found = Scorer(policy, half).score(photos()[:4]).margin
    tolerance = 0.01 if dtype == torch.float16 else 0.05
    torch.testing.assert_close(found, exact[:4], rtol=0, atol=tolerance)


# -- what is refused -------------------------------------------------------------------------


def test_another_space_and_other_weights_are_refused(policy: Path) -> None:
    view = load_encoder("nano-view", "cpu", "sdxl")
    with pytest.raises(ModelError, match=r"was learned for nano-flux2, not for nano-view .* sdxl"):
        Scorer(policy, view)
    with pytest.raises(ModelError, match="was learned for nano-flux2"):
        coverage_of(load_policy(policy), view)
    with pytest.raises(LatentsError, match="reads flux2 latents, got sdxl"):
        example_features(NANO, Latents(torch.zeros(1, 4, 32, 32), "sdxl", scaled=True))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"weight": np.ones(7, np.float32)}, r"guns\.safetensors: the head must be \[1280\], got"),
        ({"joint": np.ones(7, np.float32)}, r"the mean embedding must be \[1008\], got \[7\]"),
    ],
)
def test_a_head_of_other_features_is_refused(
    policy: Path, change: dict[str, Any], sentence: str
) -> None:
    from dataclasses import replace

    file = policy.with_name("guns.safetensors")
    (head,) = load_concept(file).entries
    write_concept(file, "handguns", [replace(head, **change)])
    with pytest.raises(PolicyError, match=sentence):
        Scorer(policy, NANO)
    with pytest.raises(PolicyError, match=sentence):
        coverage_of(load_policy(policy), NANO)


def test_a_bank_needs_a_widened_encoder(policy: Path) -> None:
    with pytest.raises(ModelError, match="has no place for what was learned"):
        ConceptBank.build(load_policy(policy), NANO)
    wide = widened(NANO)
    assert widened(wide) is wide
    assert whole(wide) is wide
    crops = widened(load_encoder("nano-flux2+views=crops", "cpu"))
    assert (crops.dim, traits(crops).text_norm) == (wide.dim, traits(wide).text_norm)
    assert ConceptBank.build(load_policy(policy), wide).embeddings.shape == (6, wide.dim)


# -- the commands ----------------------------------------------------------------------------


def test_policy_check_and_show(policy: Path, command: Callable[..., Any], tmp_path: Path) -> None:
    ran = command("policy", "check", policy, "--model", "nano-flux2")
    assert ran.code == 0, ran.err
    ran = command("policy", "show", policy)
    assert "examples of handguns" in ran.out
    ran = command("policy", "show", policy, "--json")
    assert json.loads(ran.out)["concepts"][0]["examples"]["file"] == "guns.safetensors"
    ran = command("policy", "check", policy, "--model", "nano-sdxl")
    assert ran.code == 2
    assert "was learned for nano-flux2, not for nano-sdxl" in ran.err


def test_calibration_knows_the_head(policy: Path, command: Callable[..., Any]) -> None:
    text = policy.read_text().replace("{probability: 0.5}", "{fpr: 0.1}", 1)
    policy.write_text(text)
    examples = Path(__file__).parents[2] / "examples" / "latents.pt"
    ran = command(
        "calibrate", examples, "--policy", policy, "--model", "nano-flux2", "--device", "cpu"
    )
    assert ran.code == 0, ran.err
    before = load_policy(policy)
    assert before.lock is not None
    verdicts = Scorer(policy, NANO).verdicts(photos())
    assert all(verdict.error is None for verdict in verdicts)
    # Another head has other scores: the calibration is stale.
    file = policy.with_name("guns.safetensors")
    write_concept(file, "handguns", [entry(NANO, photos(), ARE_GUNS, steepness=10.0)])
    with pytest.raises(PolicyError, match="was calibrated with other prompts"):
        load_policy(policy)


def test_other_policies_are_as_before() -> None:
    scorer = Scorer(two_stages(None), NANO)
    assert scorer.encoder is NANO
