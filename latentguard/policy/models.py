"""The policy itself: frozen, validated data, and the same as JSON-able data for `verdict`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)

from latentguard.deprecated import Former
from latentguard.policy.examples import ConceptFile, load_concept
from latentguard.policy.fields import (
    SETTINGS,
    WORD,
    Attempts,
    Band,
    Description,
    Every,
    Filled,
    Frozen,
    Iterations,
    Label,
    Margin,
    NoiseWindow,
    PicturePath,
    Probability,
    Prompt,
    Rate,
    Slug,
    Strength,
    Template,
    rule,
    tag_of,
)
from latentguard.policy.lock import Lock
from latentguard.policy.taxonomies import Taxonomy, schemes
from latentguard.yaml_nodes import show

Action = Literal["observe", "review", "steer", "block"]
ThresholdKind = Literal["probability", "margin", "fpr"]
Answer = Literal["blank", "raise", "callback", "blur", "placeholder", "retry"]
RETRIES = 3
"""How often `on_block: retry` generates a blocked image anew, where it gives no number."""


def _in_window(window: tuple[float, float | None], noise_level: float) -> bool:
    low, high = window
    return low <= noise_level and (high is None or noise_level <= high)


class Threshold(Frozen):
    """When a score counts as a match: at or above exactly one of probability, margin and fpr."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": [kind]} for kind in ("probability", "margin", "fpr")]
        }
    )

    probability: Probability | None = None
    """sigmoid(logit scale x margin), 0 to 1. 0.5 is where a concept draws level with its
    contrast prompts."""
    margin: Margin | None = None
    """Best cosine over the prompts minus best over the contrast prompts, -2 to 2."""
    fpr: Rate | None = None
    """Target false-positive rate, above 0 and below 1; its margin is looked up in
    NAME.lock.yaml, for the model, latent space and noise level in use."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [kind for kind in type(self).model_fields if getattr(self, kind) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none of them"
            raise rule(f"must have exactly one of probability, margin and fpr, got {got}")
        return self

    @property
    def kind(self) -> ThresholdKind:
        """Which of the three is given."""
        if self.probability is not None:
            return "probability"
        return "margin" if self.margin is not None else "fpr"

    @property
    def value(self) -> float:
        """Its value."""
        return float(getattr(self, self.kind))


class Steer(Frozen):
    """How strongly to steer away from a concept."""

    strength: Strength = 1.0
    """How strongly latents are moved away from the concept; 1 is the guard's own measure."""
    iterations: Iterations = 5
    """Gradient steps that a denoising step may take at most; fewer once the score is below the
    threshold."""


class Concept(Frozen):
    """One thing to look for."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": [key]} for key in ("prompts", "examples")]}
    )

    id: Slug
    """Short name, unique in the policy; it stands in verdicts, reports and lock files."""
    category: Slug
    """The group that reports put it in."""
    description: Description = ""
    """What is meant, for people."""
    prompts: Filled[tuple[Prompt, ...]] = ()
    """Texts that name the concept; the best match counts. Short noun phrases work best."""
    examples: Label | None = None
    """A file of `latentguard concept learn`, seen from the policy's folder: the concept as it was
    learned from examples. Beside prompts the better of both counts."""
    contrast: tuple[Prompt, ...] = ()
    """Harmless things that it could be taken for; the best of them is subtracted."""
    threshold: Threshold
    """From which score on it is a match."""
    action: Action
    """What a match leads to. `observe` only records it; `steer` blocks where nothing can be
    steered any more (files, final latents)."""
    severity: Literal["low", "medium", "high", "critical"] = "medium"
    """How bad it is, for reports; among matches of one action the most severe gives the reason."""
    steer: Steer | None = None
    """Settings of the action `steer`; not allowed with another one."""
    noise_window: NoiseWindow = (0.0, None)
    """[low, high] noise levels (noise-to-signal ratio, 0 is clean) at which it is judged during
    denoising; null is no upper end. Final latents are always judged."""
    taxonomy: Taxonomy = Field(default_factory=dict)
    """The categories of published hazard schemes that it falls under, by the scheme's name."""

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if not self.prompts and self.examples is None:
            raise rule("is missing, and there are no examples in its place", "prompts")
        return self

    @model_validator(mode="after")
    def _contrast_differs(self) -> Self:
        _check_contrast(self.prompts, self.contrast, "contrast")
        return self

    @model_validator(mode="after")
    def _steer_is_used(self) -> Self:
        if self.steer is not None and self.action != "steer":
            raise rule(
                f"has settings of the action steer, and this concept's action is {self.action}: "
                "write action: steer, or leave it out",
                "steer",
            )
        return self


class Schedule(Frozen):
    """When latents are scored during denoising. The final latents always are."""

    noise: NoiseWindow = (0.0, None)
    """[low, high] noise levels (noise-to-signal ratio, 0 is clean) at which steps are scored;
    null is no upper end."""
    every: Every = 1
    """Score every n-th step of the generation, counted from its first, where it lies within that
    range; 1 is each."""

    def due(self, step: int, noise_level: float) -> bool:
        """Whether to score at `step` (counted from 0), where the noise level is `noise_level`."""
        return step % self.every == 0 and _in_window(self.noise, noise_level)


class Cascade(Frozen):
    """A cheap model judges first; the other judges the images of which it is not sure."""

    first: Label
    """The first model, a name or a path; it has to see every concept."""
    unsure: Band = 0.1
    """It is not sure of an image where a concept's margin is this close to its threshold."""


class BlockSettings(Frozen):
    """What a blocked generation returns, with settings: exactly one of retry and placeholder."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": [kind]} for kind in ("retry", "placeholder")]}
    )

    retry: Attempts | None = None
    """How often a blocked image is generated anew, each time with another seed; then it is
    black."""
    placeholder: PicturePath | None = None
    """A PNG, JPEG or WebP file in the folder of the policy's own file or below it."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.retry is None) == (self.placeholder is None):
            got = "neither" if self.retry is None else "both"
            raise rule(f"must have exactly one of retry and placeholder, got {got}")
        return self

    @property
    def answer(self) -> Answer:
        """The word that these are settings of."""
        return "placeholder" if self.retry is None else "retry"

    @model_serializer
    def _given(self) -> dict[str, int | str]:
        value = self.placeholder if self.retry is None else self.retry
        assert value is not None
        return {self.answer: value}

    def __str__(self) -> str:
        return f"{self.answer} {self._given()[self.answer]}"


OnBlock = Annotated[
    Annotated[Answer, Tag(WORD)] | Annotated[BlockSettings, Tag(SETTINGS)], Discriminator(tag_of)
]
"""A word, or the word with its settings."""


class Policy(Frozen):
    """A moderation policy, complete and frozen. Read one with `load_policy`."""

    schema_version: Literal[1]
    """The version of the policy language."""
    name: Slug
    """The policy's name, in verdicts and reports."""
    version: Label
    """The policy's own version, as text."""
    description: Description = ""
    """What it is for, and what it does not see."""
    model: Label | None = None
    """The encoder that it was written for."""
    space: Slug | None = None
    """The latent space that it was written for, by its name."""
    templates: Filled[tuple[Template, ...]] = ("{}",)
    """Sentences that each prompt is set into, in place of "{}"; their mean is the prompt."""
    contrast: tuple[Prompt, ...] = ()
    """Harmless things that every concept is compared with, besides its own contrast prompts.
    Where a concept has neither, the model's neutral prompts are used."""
    concepts: Filled[tuple[Concept, ...]]
    """What to look for."""
    cascade: Cascade | None = None
    """A cheap model that judges first, where the other one need not see every image."""
    views: Literal["whole", "crops"] = "whole"
    """How final latents and files are read: as a whole, or in overlapping crops besides, which
    finds small objects in large images and costs several times as much."""
    schedule: Schedule = Schedule()
    """When latents are scored during denoising."""
    on_error: Literal["block", "review", "allow"] = "block"
    """The decision where latents cannot be judged (NaN, a wrong shape, an exception)."""
    on_block: OnBlock = "blank"
    """What a blocked generation gives: a blank image, an exception, what a callback returns, a
    blur of its colors, a picture of your own, or another generation."""
    uncovered: Literal["error", "warn"] = "error"
    """A prompt that the model cannot see: refuse the pair of policy and model, or mark it in
    every verdict and report."""

    _file_sha256: str | None = PrivateAttr(None)
    _lock: Lock | None = PrivateAttr(None)
    _picture: bytes | None = PrivateAttr(None)
    _folder: Path = PrivateAttr(Path())
    _learned: dict[str, ConceptFile] = PrivateAttr(default_factory=dict)

    @field_validator("concepts")
    @classmethod
    def _unique_ids(cls, concepts: tuple[Concept, ...]) -> tuple[Concept, ...]:
        seen: dict[str, int] = {}
        for index, concept in enumerate(concepts):
            first = seen.setdefault(concept.id, index)
            if first != index:
                raise rule(
                    f"must be unique, but '{concept.id}' is also the id of concepts[{first}]",
                    index,
                    "id",
                )
        return concepts

    @model_validator(mode="after")
    def _shared_contrast_differs(self) -> Self:
        for concept in self.concepts:
            _check_contrast(concept.prompts, self.contrast, "contrast")
        return self

    @property
    def sha256(self) -> str:
        """Hex digest of the policy.

        Without other files it is that of the YAML file's bytes. A lock file next to it is added to
        the digest after a zero byte. The digests of the concepts' example files follow in the same
        way, and then that of a placeholder that `on_block` names. The digest of a policy made in
        Python is that of its canonical JSON.
        """
        if self._file_sha256 is not None:
            return self._file_sha256
        files = (self.examples_of(concept) for concept in self.concepts)
        digests = [file.sha256 for file in files if file is not None]
        # What was there before there were examples keeps its digest.
        plain = self.model_dump(mode="json", exclude={"concepts": {"__all__": {"examples"}}})
        data = [plain, digests] if digests else plain
        return hashlib.sha256(_canonical(data)).hexdigest()

    @property
    def lock(self) -> Lock | None:
        """Calibrated thresholds, if NAME.lock.yaml lies next to the policy."""
        return self._lock

    @property
    def answer(self) -> Answer:
        """What a blocked generation returns, as a word."""
        on_block = self.on_block
        return on_block.answer if isinstance(on_block, BlockSettings) else on_block

    @property
    def retries(self) -> int:
        """How often a blocked image is generated again; 0 if `on_block` is not `retry`."""
        if isinstance(self.on_block, BlockSettings):
            return self.on_block.retry or 0
        return RETRIES if self.on_block == "retry" else 0

    @property
    def picture(self) -> bytes | None:
        """The bytes of the placeholder, if the policy names one and was read from its file."""
        return self._picture

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As in pydantic. A copy that differs no longer has the file's digest."""
        copy = super().model_copy(update=update, deep=deep)
        if update:
            copy._file_sha256 = None
        if copy.on_block != self.on_block:
            copy._picture = None
        return copy

    def with_views(self, views: Literal["whole", "crops"]) -> Self:
        """The same policy with other `views`, under the same digest: the model's name states its
        views.
        """
        copy = self.model_copy(update={"views": views})
        copy._file_sha256 = self.sha256
        return copy

    def texts(self, prompt: str) -> tuple[str, ...]:
        """`prompt` inserted into each template."""
        return tuple(template.replace("{}", prompt) for template in self.templates)

    def contrast_of(self, concept: Concept) -> tuple[str, ...]:
        """The concept's own contrast prompts, then the policy's; each once. May be empty."""
        return tuple(dict.fromkeys(concept.contrast + self.contrast))

    def examples_of(self, concept: Concept) -> ConceptFile | None:
        """What a concept was learned from; None if it has only prompts.

        Raises PolicyError if its file cannot be read. The file is read once.
        """
        if concept.examples is None:
            return None
        if concept.examples not in self._learned:
            self._learned[concept.examples] = load_concept(self._folder / concept.examples)
        return self._learned[concept.examples]

    def labels_of(self, concept: Concept) -> tuple[str, ...]:
        """What verdicts may name as the best match: the prompts, then the examples."""
        file = self.examples_of(concept)
        return concept.prompts if file is None else (*concept.prompts, file.label)

    def prompts_sha256(self, concept: Concept) -> str:
        """Hex digest of what makes the concept's scores: templates, prompts, contrast, and the
        file of its examples."""
        file = self.examples_of(concept)
        learned = [] if file is None else [file.sha256]
        return hashlib.sha256(
            _canonical([self.templates, concept.prompts, self.contrast_of(concept), *learned])
        ).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The policy as JSON-able data, complete with `sha256`, `lock` and `taxonomies`.

        Each concept's `threshold` is {"kind", "value"}, and `steer` is {"strength", "iterations"}
        exactly where the action is steer, else None. `examples` is {"file", "sha256", "label",
        "reach"} or None: the label stands in verdicts, and margins go beyond those of prompts by
        up to the reach. `taxonomies` has the schemes that a concept is mapped to, with all of their
        categories.
        """
        data = self.model_dump(mode="json")
        for concept, model in zip(data["concepts"], self.concepts, strict=True):
            concept["threshold"] = {"kind": model.threshold.kind, "value": model.threshold.value}
            concept["examples"] = self._examples(model)
            steered = model.action == "steer"
            concept["steer"] = (model.steer or Steer()).model_dump() if steered else None
        data["sha256"] = self.sha256
        data["lock"] = self._lock.model_dump(mode="json") if self._lock else None
        used = {name for concept in self.concepts for name in concept.taxonomy}
        data["taxonomies"] = {name: schemes()[name].to_dict() for name in sorted(used)}
        return data

    def _examples(self, concept: Concept) -> dict[str, Any] | None:
        file = self.examples_of(concept)
        if file is None:
            return None
        about = {"file": concept.examples, "sha256": file.sha256}
        return about | {"label": file.label, "reach": file.reach}

    plain = Former("to_dict")


def _check_contrast(prompts: Sequence[str], contrast: Sequence[str], field: str) -> None:
    own = {prompt.casefold() for prompt in prompts}
    for index, text in enumerate(contrast):
        if text.casefold() in own:
            raise rule(
                f"is also a prompt ({show(text)}), which could then never win",
                field,
                index,
            )


def _canonical(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
