"""Cascades: the second model judges just what the first is not sure of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from guard_helpers import ALWAYS, LinearEncoder, policy

from latentguard import Latents, Scorer, load_encoder, load_policy
from latentguard.errors import ModelError, PolicyError
from latentguard.evaluate.calibrate import entries, measure, merge
from latentguard.files import load_latents
from latentguard.judge import CascadeJudge, Heatmaps, Judged, ModelId, Rules, decide
from latentguard.policy import Policy, write_lock
from latentguard.policy.lock import lock_path

RATES = """
schema_version: 1
name: rates
version: "1"
contrast: [dog, house, landscape]
cascade: {first: nano-flux2, unsure: 0.1}
concepts:
  - {id: guns, category: weapons, prompts: [revolver], threshold: {fpr: 0.1}, action: block}
"""
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "latents.pt"


@pytest.fixture(scope="module")
def latents() -> Latents:
    return load_latents(EXAMPLES).to(dtype=__import__("torch").float32)


def cascade(unsure: float, first: str = "nano-flux2") -> Policy:
    return policy(0.5, extra=f"cascade: {{first: {first}, unsure: {unsure}}}")


@pytest.mark.parametrize("share", ["none", "some", "all"])
def test_the_second_model_sees_what_the_first_is_unsure_of(latents: Latents, share: str) -> None:
    first = Scorer(policy(0.5), load_encoder("nano-flux2", "cpu"))
    second = LinearEncoder("flux2", 32)
    alone = Scorer(policy(0.5), LinearEncoder("flux2", 32)).verdicts(latents)
    margins = [verdict.concepts[0].margin for verdict in first.verdicts(latents)]
    middle = sorted(abs(margin) for margin in margins)[len(margins) // 2]
    unsure = {"none": 0.0, "some": round(middle, 4) + 1e-3, "all": 2.0}[share]
    verdicts = Scorer(cascade(unsure), second).verdicts(latents)
    assert second.calls == (1 if any(abs(margin) <= unsure for margin in margins) else 0)
    for verdict, margin, other in zip(verdicts, margins, alone, strict=True):
        if abs(margin) <= unsure:
            assert verdict.concepts[0].margin == pytest.approx(other.concepts[0].margin, abs=1e-5)
            assert "cascade" not in verdict.reason
        else:
            assert verdict.concepts[0].margin == pytest.approx(margin, abs=1e-5)
            assert verdict.reason.endswith("(by nano-flux2, the first model of the cascade)")
    if share == "some":
        assert 0 < sum(abs(margin) <= unsure for margin in margins) < len(latents)


def test_what_the_first_cannot_judge_goes_to_the_second(latents: Latents) -> None:
    broken = Latents(latents.tensor.clone(), latents.space, True)
    broken.tensor[0] = float("nan")
    verdicts = Scorer(cascade(0.0), LinearEncoder("flux2", 32)).verdicts(broken)
    assert verdicts[0].decision == "block"
    assert "not finite" in (verdicts[0].error or "")


@pytest.mark.parametrize("asked", [[], [1]])
def test_a_second_model_that_fails_on_the_others_costs_heat_maps_alone(asked: list[int]) -> None:
    class One:
        def __init__(self, limit: int) -> None:
            rules = Rules.of(policy(0.5).to_dict())
            self.bound, self.limit = rules.bind(ModelId("one", "0" * 64), "flux2", 10.0), limit

        def judge(
            self, images: list[int], level: float = 0, final: bool = True, heatmaps: bool = False
        ) -> Judged:
            if len(images) > self.limit:
                raise RuntimeError("out of memory")
            margin = [[0.05 if image in asked else 0.9] for image in images]
            found = decide(np.full_like(margin, 0.9), margin, [[0]] * len(images), self.bound)
            return Judged(found, Heatmaps(np.zeros((len(images), 1, 2, 2), np.float32)))

    both = CascadeJudge(One(3), One(1), 0.1, lambda images, rows: [images[row] for row in rows])
    found, plain = both.judge([0, 1, 2], heatmaps=True), both.judge([0, 1, 2])
    assert found.verdicts == plain.verdicts
    assert found.escalated == plain.escalated == tuple(i in asked for i in range(3))
    assert found.heatmaps == Heatmaps(problem="out of memory")


def test_a_first_model_of_another_space_is_refused() -> None:
    with pytest.raises(ModelError, match="reads sdxl latents, the second model flux2"):
        Scorer(cascade(0.1, "nano-sdxl"), LinearEncoder("flux2", 32))


def test_a_first_model_that_cannot_see_everything_is_refused() -> None:
    text = policy(ALWAYS, extra="cascade: {first: nano-flux2}\nuncovered: warn").model_copy(
        update={
            "concepts": tuple(
                concept.model_copy(update={"id": name, "prompts": (prompt,)})
                for concept in policy().concepts
                for name, prompt in (("guns", "revolver"), ("hate", "a hateful gesture at a rally"))
            )
        }
    )
    with pytest.raises(ModelError, match="cannot see hate"):
        Scorer(text, LinearEncoder("flux2", 32))


def test_a_first_model_that_misses_one_prompt_of_a_concept_is_refused() -> None:
    """It would be sure that there is no knife, which only the second model can see."""
    text = policy(ALWAYS, extra="cascade: {first: nano-flux2}\nuncovered: warn")
    blades = text.concepts[0].model_copy(
        update={"id": "blades", "prompts": ("hatchet", "a kitchen knife")}
    )
    with pytest.raises(ModelError, match=r"cannot see blades \('a kitchen knife'\)"):
        Scorer(text.model_copy(update={"concepts": (blades,)}), LinearEncoder("flux2", 32))


def test_a_first_model_that_is_not_calibrated_is_refused(tmp_path: Path) -> None:
    """And once both models are, each image is judged by the thresholds of the one that decides."""
    path = tmp_path / "rates.yaml"
    path.write_text(RATES)
    second = LinearEncoder("flux2", 32)
    chosen = load_policy(path)
    with pytest.raises(ModelError, match=r"nano-flux2 has no calibrated threshold for guns.*, too"):
        Scorer(chosen, second)
    lock = None
    for model in ("nano-flux2", second):
        margins = measure([EXAMPLES], chosen, model)
        lock = merge(lock, chosen, entries(chosen, margins, [0.1]))
    assert lock is not None
    write_lock(lock_path(path), lock)
    verdicts = Scorer(load_policy(path), second).verdicts(load_latents(EXAMPLES))
    assert {verdict.error for verdict in verdicts} == {None}
    limits = {verdict.model: verdict.concepts[0].threshold["margin"] for verdict in verdicts}
    assert len(limits) == len(set(limits.values())) == 2


def test_unsure_is_a_margin() -> None:
    with pytest.raises(PolicyError, match=r"cascade.unsure must be between 0 and 2, got -1"):
        cascade(-1)


@pytest.mark.parametrize("first", ["nano-view", "nano-flux2"])
def test_a_small_object_is_found_in_crops_whatever_the_first_model_is_sure_of(
    latents: Latents, first: str
) -> None:
    names = list(latents.ids or ())
    large = latents.tensor[[names.index("pagoda")]].repeat(1, 1, 4, 4)
    large[0, :, 48:80, 48:80] = latents.tensor[names.index("revolver")]
    picture = Latents(large, "flux2", True)
    decisions = {}
    for extra in ("views: whole", "views: crops", f"views: crops\n{_FIRST.format(first)}"):
        rule = policy(0.5, extra=extra)
        (verdict,) = Scorer(rule, "nano-flux2", device="cpu").verdicts(picture)
        decisions[extra.partition("\n")[2] or extra] = verdict.decision
    assert decisions == {
        "views: whole": "allow",
        "views: crops": "block",
        _FIRST.format(first): "block",
    }


_FIRST = "cascade: {{first: {}, unsure: 0.1}}"
