"""The counts of a scan that can be added: of shards, of workers, of runs.

Merging tallies in any order and grouping gives the same tally, to the last digit: counts are whole
numbers, time is in whole microseconds, scores are counted in fixed bins (bins.py), and what is
bounded (examples, kinds of errors) is chosen by an order that does not depend on the way there.
tally_json.py writes and reads them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from typing import Any, Self

from latentguard.judge import DECISIONS, ConceptScore, PolicyId
from latentguard.scan import tally_json as fields
from latentguard.scan.category_counts import CategoryCounts
from latentguard.scan.concept_tally import (
    MAX_EXAMPLES,
    MAX_ID,
    MAX_NOTES,
    MAX_SOURCE,
    ConceptTally,
    Example,
    Judge,
    JudgeTally,
    gravest_first,
)
from latentguard.scan.error_kinds import ErrorKinds, shortened
from latentguard.scan.image import rgb_png
from latentguard.scan.record import ScanRecord
from latentguard.scan.sampling import OUTCOMES, ClusterSample
from latentguard.scan.summary import ModelInfo

PHASES = ("read", "decode", "score")
"""What a scan spends time on: fetching bytes, decoding latents, scoring."""

SCHEMA_VERSION = 2
KIND = "latentguard-tally"

PREVIEW_SIDE = 32
"""Longest side of an example's preview in pixels: 3.2 kB of PNG at most."""
_KEYS = (
    "schema_version",
    "kind",
    "policy",
    "outcomes",
    "decisions",
    "errors",
    "judges",
    "images",
    "taxonomies",
    "microseconds",
    "bytes_read",
    "began",
    "ended",
    "sample",
)


class Tally:
    """Counts of a scan by one policy.

    policy: None as long as nothing was counted; from then on records of another are a ValueError.
    outcomes: allow, review, steer, block or error, each image once. decisions: those of the errors
    too. errors: by kind. judges: scores, apart by model and latent space. taxonomies: the same in
    categories of published schemes, where records tell them. microseconds: by phase, added over all
    processes. began, ended: Unix time in milliseconds of the earliest and the latest
    moment, None where nobody said. sample: where not all images were looked at, which were.
    """

    def __init__(self, policy: PolicyId | None = None, examples: int = 4) -> None:
        """examples: the gravest of each concept that `add` keeps, at most `MAX_EXAMPLES`; 0 keeps
        none, and records' previews are looked at for these alone."""
        if not 0 <= examples <= MAX_EXAMPLES:
            raise ValueError(f"examples must be 0 to {MAX_EXAMPLES}, got {examples}")
        self.policy = policy
        self.outcomes: Counter[str] = Counter()
        self.decisions: Counter[str] = Counter()
        self.errors = ErrorKinds()
        self.judges: dict[Judge, JudgeTally] = {}
        self.taxonomies = CategoryCounts()
        self.microseconds: Counter[str] = Counter()
        self.bytes_read = 0
        self.began: int | None = None
        self.ended: int | None = None
        self.sample: ClusterSample | None = None
        self._examples = examples

    @property
    def images(self) -> int:
        """How many images there were, including those that could not be read."""
        return self.outcomes.total()

    def seconds(self, phase: str) -> float:
        """Seconds of one of `PHASES`, added over all processes."""
        return self.microseconds[phase] / 1e6

    # -- adding ------------------------------------------------------------------------------

    def add(self, record: ScanRecord) -> None:
        """Count one image.

        Raises ValueError for a record of another policy, or of the same with another threshold.
        """
        self._check_policy(record.policy)
        self.policy = record.policy
        self.outcomes[record.outcome] += 1
        self.decisions[record.verdict.decision] += 1
        if record.verdict.error is not None:
            source = shortened(record.source, MAX_SOURCE)
            self.errors.add(record.verdict.error, source, record.index)
        self.taxonomies.add(record)
        model = record.judged_by
        if model is None and not record.verdict.concepts:
            return
        name, digest = model or ("", "")
        judge = self.judges.setdefault(Judge(name, digest, record.space or ""), JudgeTally())
        judge.images += 1
        preview = _Preview(record)
        for concept in record.verdict.concepts:
            self._add_score(judge, concept, record, preview)

    def add_seconds(self, read: float = 0.0, decode: float = 0.0, score: float = 0.0) -> None:
        """Count time."""
        for phase, seconds in zip(PHASES, (read, decode, score), strict=True):
            self.microseconds[phase] += round(seconds * 1e6)

    def add_span(self, began: float, ended: float) -> None:
        """Count a stretch of the clock, in Unix seconds."""
        self._stretch(round(began * 1000), round(ended * 1000))

    def note_model(self, info: ModelInfo) -> None:
        """What records do not say about a model: its notes and what it was not compared with."""
        judge = self.judges.setdefault(Judge(*info.id, info.space), JudgeTally())
        judge.notes = max(judge.notes, shortened(info.notes, MAX_NOTES))
        judge.unseen_contrast |= frozenset(info.unseen_contrast)

    def _add_score(
        self, judge: JudgeTally, concept: ConceptScore, record: ScanRecord, preview: _Preview
    ) -> None:
        tally = judge.concepts.get(concept.id)
        if tally is None:
            tally = ConceptTally(concept.category, concept.action, dict(concept.threshold))
            judge.concepts[concept.id] = tally
        elif tally.threshold != concept.threshold:
            raise ValueError(
                f"concept '{concept.id}' has two thresholds by one policy and model: "
                f"{tally.threshold} and {concept.threshold}"
            )
        if concept.unseen and not tally.unseen.issuperset(concept.unseen):
            tally.unseen |= frozenset(concept.unseen)
        if not (concept.covered and concept.judged):
            tally.unchecked += 1
            return
        margin = concept.margin + 0.0  # of the two zeros, the same one in any order
        tally.judged += 1
        tally.matched += concept.matched
        tally.margins.add(margin)
        tally.probabilities.add(concept.probability)
        if margin > tally.highest:
            tally.highest = margin
        if margin < tally.lowest:
            tally.lowest = margin
        gravest = tally.gravest
        if len(gravest) < self._examples or (gravest and margin >= gravest[-1].margin):
            self._add_example(gravest, margin, concept.probability, record, preview)

    def _add_example(
        self,
        gravest: list[Example],
        margin: float,
        probability: float,
        record: ScanRecord,
        preview: _Preview,
    ) -> None:
        made = Example(
            margin,
            probability,
            shortened(record.source, MAX_SOURCE),
            record.index,
            None if record.id is None else shortened(record.id, MAX_ID),
            preview.png,
        )
        room = max(len(gravest), self._examples)
        gravest.append(made)
        gravest.sort(key=gravest_first)
        del gravest[room:]

    # -- merging -----------------------------------------------------------------------------

    def merge(self, other: Tally) -> None:
        """Add another's counts. Raises ValueError, and changes nothing, where the two are not of
        the same policy and thresholds, or one is of a sample that the other is no part of."""
        self._check(other)
        self.policy = self.policy or other.policy
        self.outcomes.update(other.outcomes)
        self.decisions.update(other.decisions)
        self.errors.merge(other.errors)
        self.taxonomies.merge(other.taxonomies)
        self.microseconds.update(other.microseconds)
        self.bytes_read += other.bytes_read
        if other.began is not None and other.ended is not None:
            self._stretch(other.began, other.ended)
        for key, theirs in other.judges.items():
            ours = self.judges.setdefault(key, JudgeTally())
            ours.images += theirs.images
            ours.notes = max(ours.notes, theirs.notes)
            ours.unseen_contrast |= theirs.unseen_contrast
            for name, concept in theirs.concepts.items():
                known = ours.concepts.get(name)
                if known is None:
                    known = ConceptTally(concept.category, concept.action, dict(concept.threshold))
                    ours.concepts[name] = known
                known.merge(concept)
        if other.sample is not None:
            self.sample = other.sample if self.sample is None else self.sample.merged(other.sample)

    @classmethod
    def merged(cls, tallies: Iterable[Tally]) -> Self:
        """The sum of tallies. Raises ValueError as `merge` does."""
        made = cls()
        for tally in tallies:
            made.merge(tally)
        return made

    def _check(self, other: Tally) -> None:
        if other.policy is not None:
            self._check_policy(other.policy)
        for key, theirs in other.judges.items():
            ours = self.judges.get(key)
            for name, concept in theirs.concepts.items() if ours is not None else ():
                known = ours.concepts.get(name) if ours is not None else None
                if known is not None and not known.same_rule(concept):
                    raise ValueError(
                        f"concept '{name}' was judged by two rules of one policy and model: "
                        f"{known.action} at {known.threshold} and {concept.action} at "
                        f"{concept.threshold}"
                    )
        for one, another in ((self, other), (other, self)):
            if one.sample is not None and another.sample is None and another.images:
                raise ValueError(
                    "one is of a sample, the other of all images: report them separately"
                )
        if self.sample is not None and other.sample is not None:
            self.sample.check(other.sample)

    def _check_policy(self, policy: PolicyId) -> None:
        if self.policy is not None and policy != self.policy:
            ours, theirs = self.policy, policy
            raise ValueError(
                f"two policies cannot be counted as one: {ours.name} {ours.version} "
                f"({ours.sha256[:12]}) and {theirs.name} {theirs.version} ({theirs.sha256[:12]})"
            )

    def _stretch(self, began: int, ended: int) -> None:
        self.began = began if self.began is None else min(self.began, began)
        self.ended = ended if self.ended is None else max(self.ended, ended)

    # -- as JSON -----------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The tally as JSON-able data. Equal tallies give equal data."""
        judges, images = fields.judges_to_json(self.judges)
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "policy": None if self.policy is None else self.policy.to_dict(),
            "outcomes": fields.counts_to_json(self.outcomes),
            "decisions": fields.counts_to_json(self.decisions),
            "errors": fields.errors_to_json(self.errors),
            "judges": judges,
            "images": images,
            "taxonomies": fields.categories_to_json(self.taxonomies),
            "microseconds": fields.counts_to_json(self.microseconds),
            "bytes_read": self.bytes_read,
            "began": self.began,
            "ended": self.ended,
            "sample": None if self.sample is None else self.sample.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """What `to_dict` gave. Raises ValueError for anything else, and for other versions."""
        if not isinstance(data, Mapping) or data.get("kind") != KIND:
            raise ValueError(f"tally: must be an object of the kind {KIND}")
        version = data.get("schema_version")
        if type(version) is not int or version != SCHEMA_VERSION:
            raise ValueError(f"tally: schema_version must be {SCHEMA_VERSION}, got {version!r}")
        read = fields.Reader(data, "tally", _KEYS)
        tally = cls(read.optional("policy", fields.policy_of))
        tally.outcomes = read.value("outcomes", partial(fields.counts_of, OUTCOMES))
        tally.decisions = read.value("decisions", partial(fields.counts_of, DECISIONS))
        tally.errors = read.value("errors", fields.errors_of)
        images = read.value("images", fields.images_of)
        tally.judges = read.value("judges", partial(fields.judges_of, images))
        tally.taxonomies = read.value("taxonomies", fields.categories_of)
        tally.microseconds = read.value("microseconds", partial(fields.counts_of, PHASES))
        tally.bytes_read = read.value("bytes_read", fields.whole)
        tally.began = read.optional("began", fields.whole)
        tally.ended = read.optional("ended", fields.whole)
        tally.sample = read.optional("sample", ClusterSample.from_dict)
        tally._check_sums()
        return tally

    def _check_sums(self) -> None:
        if self.outcomes.total() != self.decisions.total():
            raise ValueError("tally: outcomes and decisions must have the same number of images")
        if self.errors.total != self.outcomes["error"]:
            raise ValueError("tally: the kinds of errors must add up to the errors")
        if (self.began is None) != (self.ended is None):
            raise ValueError("tally: give both began and ended, or neither")
        if self.policy is None and self.images:
            raise ValueError("tally: images must be counted by a policy")


class _Preview:
    """The preview of a record, drawn when the first concept asks for it."""

    def __init__(self, record: ScanRecord) -> None:
        self._record = record

    @cached_property
    def png(self) -> bytes | None:
        pixels, draw = self._record.preview, self._record.draw
        if pixels is None and draw is not None:
            pixels = draw()
        return None if pixels is None else rgb_png(pixels, PREVIEW_SIDE)
