"""ConceptBank: what a policy becomes for an encoder that sees only some of its prompts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from latentguard.concepts import ConceptBank
from latentguard.encoders import Features, Head
from latentguard.encoders.latent_clip import LatentCLIP
from latentguard.errors import ModelError, PolicyError
from latentguard.policy import Policy, load_policy
from latentguard.scorer import Scorer
from latentguard.spaces import Latents

WORDS = ("cat", "dog", "knife", "photo")


class WordEncoder:
    """Sees four words, each an axis; latents are their own embedding."""

    name = "words"
    sha256 = "0" * 64
    space = "sdxl"
    needs_scaled = True
    dim = 4
    logit_scale = 10.0
    head = Head()
    neutral_prompts = ("photo",)
    always_neutral = False
    uses_templates = True
    notes = ""
    min_coverage = 0.5
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self) -> None:
        self.asked: list[str] = []

    def features(
        self,
        latents: Tensor,
        noise: Tensor | None = None,
        alpha: Tensor | None = None,
        sigma: Tensor | None = None,
    ) -> Features:
        tokens = torch.nn.functional.normalize(latents.flatten(2).transpose(1, 2), dim=-1)
        return Features(tokens.mean(1), tokens, (latents.shape[2], latents.shape[3]))

    def encode_latents(self, latents: Latents) -> Tensor:
        return self.features(latents.tensor).pooled

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        self.asked += texts
        rows = [[float(word in text) for word in WORDS] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(rows) + 1e-6, dim=-1)

    def coverage(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([float(any(word in text for word in WORDS)) for text in texts])

    def to(self, device: torch.device | str) -> WordEncoder:
        return self


def policy(**changes: object) -> Policy:
    data: dict[str, object] = {
        "schema_version": 1,
        "name": "test",
        "version": "1",
        "uncovered": "warn",
        "templates": ["{}", "a photo of {}"],
        "concepts": [
            {
                "id": "pets",
                "category": "animals",
                "prompts": ["cat", "unicorn", "dog"],
                "contrast": ["knife"],
                "threshold": {"margin": 0.1},
                "action": "block",
            },
            {
                "id": "blades",
                "category": "weapons",
                "prompts": ["knife"],
                "threshold": {"margin": 0.1},
                "action": "review",
            },
        ],
        **changes,
    }
    return Policy.model_validate(data)


def test_segments_follow_the_policy() -> None:
    bank = ConceptBank.build(policy(), WordEncoder())
    assert bank.prompts == ("cat", "unicorn", "dog", "knife")
    assert bank.segments.tolist() == [[0, 3], [3, 4]]
    assert bank.covered == (True, True)
    assert bank.seen == (True, False, True, True)


def test_a_prompt_that_is_not_seen_matches_nothing() -> None:
    bank = ConceptBank.build(policy(), WordEncoder())
    assert bank.embeddings[1].abs().max() == 0
    assert bank.embeddings[[0, 2, 3]].norm(dim=1).tolist() == pytest.approx([1, 1, 1])


def test_empty_contrast_gets_the_neutral_prompts() -> None:
    bank = ConceptBank.build(policy(), WordEncoder())
    begin, end = bank.contrast_segments[1].tolist()
    photo = WordEncoder().encode_text(["photo"])
    assert torch.allclose(bank.contrast[begin:end], photo, atol=1e-5)


def test_equal_contrast_is_stored_once() -> None:
    shared = policy(contrast=["photo"])
    plain = [concept.model_copy(update={"contrast": ()}) for concept in shared.concepts]
    bank = ConceptBank.build(shared.model_copy(update={"concepts": tuple(plain)}), WordEncoder())
    assert bank.contrast.shape[0] == 1
    assert bank.contrast_segments.tolist() == [[0, 1], [0, 1]]


def test_templates_are_averaged_before_the_norm() -> None:
    bank = ConceptBank.build(policy(), WordEncoder())
    encoder = WordEncoder()
    mean = encoder.encode_text(["cat", "a photo of cat"]).mean(0)
    assert torch.allclose(bank.embeddings[0], mean / mean.norm(), atol=1e-6)


def test_bare_prompts_where_the_encoder_takes_no_templates() -> None:
    encoder = WordEncoder()
    encoder.uses_templates = False
    ConceptBank.build(policy(), encoder)
    assert not [text for text in encoder.asked if text.startswith("a photo of")]


def test_unseen_concept_is_an_error_that_names_it() -> None:
    hidden = policy()
    concepts = (hidden.concepts[0], hidden.concepts[1].model_copy(update={"prompts": ("axe",)}))
    hidden = hidden.model_copy(update={"concepts": concepts})
    assert ConceptBank.build(hidden, WordEncoder()).covered == (True, False)
    with pytest.raises(ModelError, match=r"concept 'blades' 'axe' \(0\.000\)"):
        ConceptBank.build(hidden.model_copy(update={"uncovered": "error"}), WordEncoder())


def test_one_unseen_prompt_beside_seen_ones_is_an_error_that_names_it() -> None:
    strict = policy(uncovered="error")
    with pytest.raises(PolicyError) as refused:
        Scorer(strict, WordEncoder())
    message = str(refused.value)
    assert message.startswith(
        "policy 'test': model words cannot see 1 of 4 prompts: of concept 'pets' 'unicorn' (0.000);"
        " coverage 0.5 is needed"
    )
    assert "Remove or replace these prompts" in message
    assert "`uncovered: warn`" in message
    assert isinstance(refused.value, ModelError)


def test_every_unseen_prompt_is_among_the_errors_however_many() -> None:
    many = tuple(f"thing {n}" for n in range(20))
    concept = policy().concepts[0].model_copy(update={"prompts": ("cat", *many)})
    strict = policy(uncovered="error").model_copy(update={"concepts": (concept,)})
    with pytest.raises(PolicyError) as refused:
        ConceptBank.build(strict, WordEncoder())
    assert all(f"'{text}'" in refused.value.errors[0] for text in many)
    assert "and 15 more" in str(refused.value)


def test_verdicts_name_the_prompts_that_were_not_checked() -> None:
    photo = torch.zeros(1, 4, 2, 2)
    photo[0, 3] = 1.0
    latents = Latents(photo, "sdxl", scaled=True)
    (verdict,) = Scorer(policy(), WordEncoder()).verdicts(latents)
    assert verdict.decision == "allow"
    assert [(c.covered, c.unseen) for c in verdict.concepts] == [(True, ("unicorn",)), (True, ())]
    assert verdict.reason.endswith("prompts not checked of 'pets': 'unicorn'")


def test_a_contrast_prompt_that_is_not_seen_takes_nothing_from_a_match() -> None:
    """Its embedding means nothing: here it is as near to a dog as to all else."""
    concept = policy().concepts[0].model_copy(update={"contrast": ("knife", "gryphon")})
    hidden = policy().model_copy(update={"concepts": (concept, policy().concepts[1])})
    scorer, plain = Scorer(hidden, WordEncoder()), Scorer(policy(), WordEncoder())
    assert scorer.bank.unseen_contrast == ("gryphon",)
    assert torch.equal(scorer.bank.contrast, plain.bank.contrast)
    dog = torch.zeros(1, 4, 2, 2)
    dog[0, 1] = 1.0
    latents = Latents(dog, "sdxl", scaled=True)
    assert torch.equal(scorer.score(latents).margin, plain.score(latents).margin)


def test_coverage_that_is_not_a_number_is_not_seen() -> None:
    class Broken(WordEncoder):
        def coverage(self, texts: Sequence[str]) -> Tensor:
            return torch.full((len(texts),), torch.nan)

    with pytest.raises(PolicyError, match="cannot see 4 of 4 prompts"):
        ConceptBank.build(policy(), Broken())


def test_a_policy_of_which_nothing_is_seen_is_always_an_error() -> None:
    unseen = policy(uncovered="warn")
    concepts = tuple(c.model_copy(update={"prompts": ("axe",)}) for c in unseen.concepts)
    with pytest.raises(ModelError, match=r"cannot see 2 of 2 .* Use another model"):
        ConceptBank.build(unseen.model_copy(update={"concepts": concepts}), WordEncoder())


def test_scorer_end_to_end_by_hand() -> None:
    scorer = Scorer(policy(), WordEncoder())
    latents = torch.zeros(2, 4, 2, 2)
    latents[0, 1] = 1.0  # dog everywhere
    latents[1, 2, 0, 0] = 1.0  # a knife in one corner, photo elsewhere
    latents[1, 3] += (latents[1, 2] == 0).float()
    batch = Latents(latents, "sdxl", scaled=True)
    scores = scorer.score(batch)
    assert scores.best_prompt[0, 0] == 2
    assert scores.margin[0].tolist() == pytest.approx([0.92, -0.0], abs=0.1)
    dog, knife = scorer.verdicts(batch)
    assert dog.decision == "block"
    assert "dog" in dog.reason
    assert knife.decision == "allow"
    heat = scorer.heatmaps(batch)
    assert heat.shape == (2, 2, 2, 2)
    assert heat[1, 1].argmax() == 0


def test_long_policy_stays_bounded_in_memory() -> None:
    # 5,000 prompts against a batch of 16: the cosines alone would be 320 kB, the bank is 12.8 MB.
    concepts = [
        {
            "id": f"c{k}",
            "category": "many",
            "prompts": [f"cat number {k} {i}" for i in range(50)],
            "threshold": {"margin": 0.1},
            "action": "observe",
        }
        for k in range(100)
    ]
    scorer = Scorer(policy(concepts=concepts, templates=["{}"]), WordEncoder())
    scores = scorer.score(Latents(torch.randn(16, 4, 2, 2), "sdxl", scaled=True))
    assert scores.margin.shape == (16, 100)
    assert scorer.bank.embeddings.shape == (5000, 4)


def test_scorer_refuses_another_space() -> None:
    with pytest.raises(ModelError, match="reads sdxl latents, not flux2"):
        Scorer(policy(), WordEncoder(), space="flux2")


@pytest.mark.slow
def test_latent_clip_under_a_shipped_policy() -> None:
    encoder = LatentCLIP.random("latent-clip-b8")
    shipped = load_policy("weapons")
    scorer = Scorer(shipped, encoder)
    assert all(scorer.bank.covered)
    latents = Latents(torch.randn(2, 4, 64, 64), "sdxl", scaled=True)
    scores = scorer.score(latents)
    # The operator's scores are those of the embeddings.
    embedded = encoder.encode_latents(latents)
    cosines = embedded @ scorer.bank.embeddings.T
    first = slice(*scorer.bank.segments[0].tolist())
    against = slice(*scorer.bank.contrast_segments[0].tolist())
    expected = cosines[:, first].amax(1) - (embedded @ scorer.bank.contrast.T)[:, against].amax(1)
    assert torch.allclose(scores.margin[:, 0], expected, atol=1e-5)
    assert len(scorer.verdicts(latents)) == 2
