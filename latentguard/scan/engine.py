"""The scan itself, in this process: paths to records, batch after batch, nothing kept.

Whatever cannot be read or judged becomes a record with an error, and the rest is scanned; whatever
makes the scan as a whole meaningless (the policy, the model) raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from latentguard.errors import LatentGuardError, LatentsError, ModelError, PolicyError
from latentguard.files import Record, read_latents
from latentguard.policy import Policy, load_policy
from latentguard.scan.record import ModelId, PolicyId, ScanRecord, rank
from latentguard.scan.summary import ModelInfo
from latentguard.verdict import Verdict, failed, resolve_threshold

if TYPE_CHECKING:
    import numpy as np
    import torch

    from latentguard.encoders import Encoder
    from latentguard.scorer import Scorer
    from latentguard.spaces import Latents, LatentSpace

MAX_CELLS = 1 << 26
"""Numbers in the latents of one batch (256 MiB in float32): large images make smaller batches."""


def scan_files(
    paths: Iterable[str | Path] | str | Path,
    policy: Policy | str | Path = "default",
    model: Encoder | str | Path = "auto",
    *,
    space: str | LatentSpace | None = None,
    scaled: bool | None = None,
    batch_size: int = 16,
    device: torch.device | str | None = None,
    previews: bool = False,
    heatmaps: bool = False,
) -> Iterator[ScanRecord]:
    """Moderate latents files: one record per image, in the order of the paths, as they come.

    Args:
        paths: files, folders, glob patterns and WebDataset shards, as in `files.read_latents`.
        policy: a Policy, the name of a shipped one, or a path.
        model: an Encoder, its name or path, or "auto": for each latent space that occurs, the
            best model on this machine.
        space, scaled: what files do not say of themselves; one that says otherwise is an error.
        batch_size: images that are scored together, at least 1.
        device: where the model runs; None is CUDA where there is one, else the CPU.
        previews, heatmaps: whether records carry an RGB view and heat maps of margins.

    Yields:
        ScanRecords. An image that cannot be read has decision block and an error; one that was
        read but could not be scored has the decision of the policy's `on_error`, and an error.

    Raises:
        PolicyError, ModelError, LatentsError: at once for the policy, a named model or an option
            that cannot be used; while iterating, where with "auto" the model of a space cannot see
            the policy's concepts or lacks a calibrated threshold.
        ValueError: batch_size is below 1.
    """
    return iter(
        Scan(
            paths,
            policy,
            model,
            space=space,
            scaled=scaled,
            batch_size=batch_size,
            device=device,
            previews=previews,
            heatmaps=heatmaps,
        )
    )


@dataclass
class _Bound:
    """A policy bound to one model."""

    scorer: Scorer
    info: ModelInfo


@dataclass
class Scan:
    """`scan_files` as an object that also says which models took part, and what to note of them.

    models: grows while iterating, one for each latent space met.
    notes: sentences for people: which model was chosen, what is missing.
    seconds: reading and scoring so far, without loading models and without the caller's own time.
    """

    paths: Iterable[str | Path] | str | Path
    policy: Policy | str | Path = "default"
    model: Encoder | str | Path = "auto"
    space: str | LatentSpace | None = None
    scaled: bool | None = None
    batch_size: int = 16
    device: torch.device | str | None = None
    previews: bool = False
    heatmaps: bool = False
    models: list[ModelInfo] = field(init=False, default_factory=list)
    notes: list[str] = field(init=False, default_factory=list)
    seconds: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        self._binding = 0.0
        self.rules = load_policy(self.policy)
        self.plain = self.rules.plain()
        self.policy_id = PolicyId(self.rules.name, self.rules.version, self.rules.sha256)
        self._severity = {c.id: c.severity for c in self.rules.concepts}
        self._records = read_latents(self.paths, self.space, self.scaled)
        _check_device(self.device)
        self._bound: dict[str, _Bound | str] = {}
        self._fixed: _Bound | None = None
        if not isinstance(self.model, str) or self.model != "auto":
            self._fixed = self._bind(self.model, self.space)

    def __iter__(self) -> Iterator[ScanRecord]:
        chunks = _chunks(self._records, self.batch_size)
        while True:
            begun, bound = perf_counter(), self._binding
            chunk = next(chunks, None)
            if chunk is None:
                return
            records = self._judge(chunk)
            self.seconds += perf_counter() - begun - (self._binding - bound)
            yield from records

    # -- models ------------------------------------------------------------------------------

    def _bind(self, model: Encoder | str | Path, space: str | LatentSpace | None) -> _Bound:
        from latentguard.scorer import Scorer

        begun = perf_counter()
        scorer = Scorer(self.rules, model, self.device, space)
        encoder = scorer.encoder
        identity = ModelId(encoder.name, encoder.sha256)
        covered = dict(
            zip((c["id"] for c in self.plain["concepts"]), scorer.bank.covered, strict=True)
        )
        info = ModelInfo(
            identity,
            encoder.space,
            str(getattr(encoder, "notes", "") or ""),
            tuple(name for name, seen in covered.items() if not seen),
            self._limits(encoder, covered),
        )
        self.models.append(info)
        self._binding += perf_counter() - begun
        return _Bound(scorer, info)

    def _limits(self, encoder: Encoder, covered: dict[str, bool]) -> dict[str, float]:
        """Thresholds as margins; one that this model lacks would make every image an error."""
        limits = {}
        for concept in self.plain["concepts"]:
            if not covered[concept["id"]]:
                continue
            try:
                limit = resolve_threshold(
                    concept,
                    self.plain,
                    (encoder.name, encoder.sha256),
                    encoder.space,
                    logit_scale=encoder.logit_scale,
                )
            except ValueError as error:
                raise PolicyError(f"policy '{self.rules.name}': {error}") from error
            limits[concept["id"]] = limit
        return limits

    def _model_of(self, space: str) -> _Bound | str:
        """The model that judges latents of a space, or why none does."""
        if self._fixed is not None:
            reads = self._fixed.info.space
            if reads == space:
                return self._fixed
            return f"model {self._fixed.info.id.name} reads {reads} latents, not {space}"
        if space not in self._bound:
            self._bound[space] = self._choose(space)
        return self._bound[space]

    def _choose(self, space: str) -> _Bound | str:
        from latentguard.encoders import best_encoder

        if self.rules.space not in (None, space):
            return f"policy '{self.rules.name}' is written for {self.rules.space}, not {space}"
        try:
            name = best_encoder(space)
        except ModelError as error:
            return str(error)
        self._note_bundled(name, space)
        return self._bind(name, space)

    def _note_bundled(self, name: str, space: str) -> None:
        from latentguard.encoders.catalog import CATALOG

        if not CATALOG[name].bundled:
            return
        better = next((e.name for e in CATALOG.values() if e.space == space and not e.bundled), "")
        hint = f"; for a stronger one: latentguard models get {better}" if better else ""
        self.notes.append(f"{space} latents are judged by the bundled model {name}{hint}")

    # -- images ------------------------------------------------------------------------------

    def _judge(self, chunk: Sequence[Record]) -> list[ScanRecord]:
        """The chunk's records in its order; images of one shape are scored together."""
        done: dict[int, ScanRecord] = {}
        groups: dict[tuple[Any, ...], list[int]] = {}
        for place, record in enumerate(chunk):
            latents = record.latents
            if latents is None:
                done[place] = self._unreadable(record, record.error or "cannot be read")
                continue
            bound = self._model_of(latents.space.name)
            if isinstance(bound, str):
                done[place] = self._unreadable(record, bound)
                continue
            size = (latents.height, latents.width)
            key = (latents.space, latents.scaled, size, latents.tensor.dtype)
            groups.setdefault(key, []).append(place)
        for places in groups.values():
            members = [chunk[place] for place in places]
            done.update(zip(places, self._score(members), strict=True))
        return [done[place] for place in range(len(chunk))]

    def _score(self, members: Sequence[Record]) -> list[ScanRecord]:
        """Records of images of one shape; if they fail together they are tried one by one."""
        from latentguard.spaces import Latents

        batch = [record.latents for record in members if record.latents is not None]
        bound = self._model_of(batch[0].space.name)
        assert not isinstance(bound, str)  # _judge has set those aside
        try:
            latents = Latents.cat(batch)
            verdicts = bound.scorer.verdicts(latents)
            if len(verdicts) != len(members):
                raise RuntimeError(f"{len(verdicts)} verdicts for {len(members)} images")
        except Exception as error:  # fail closed, but for no image but the one that caused it
            if len(members) > 1:
                return [self._score([record])[0] for record in members]
            verdict = failed(_sentence(error), self.plain)
            return [self._record(members[0], verdict, bound.info.id)]
        pictures = self._previews(latents) if self.previews else None
        heats = self._heats(bound.scorer, latents) if self.heatmaps else None
        return [
            self._record(
                record,
                verdict,
                bound.info.id,
                None if pictures is None else pictures[i],
                None if heats is None else heats[i],
            )
            for i, (record, verdict) in enumerate(zip(members, verdicts, strict=True))
        ]

    def _unreadable(self, record: Record, error: str) -> ScanRecord:
        """Block, whatever `on_error` says: there is no image that could be let pass."""
        return self._record(record, failed(error, {**self.plain, "on_error": "block"}))

    def _record(
        self,
        record: Record,
        verdict: Verdict,
        model: ModelId | None = None,
        preview: np.ndarray | None = None,
        heats: np.ndarray | None = None,
    ) -> ScanRecord:
        latents = record.latents
        ids = [concept.id for concept in self.rules.concepts]
        return ScanRecord(
            source=record.source,
            index=record.index,
            id=record.id,
            space=latents.space.name if latents is not None else None,
            verdict=verdict,
            policy=self.policy_id,
            model=model,
            size=(latents.height, latents.width) if latents is not None else None,
            preview=preview,
            heatmaps=None if heats is None else dict(zip(ids, heats, strict=True)),
            ranked=tuple(rank(verdict.concepts, self._severity)),
        )

    def _previews(self, latents: Latents) -> np.ndarray | None:
        from latentguard.spaces import rgb_preview

        try:
            return rgb_preview(latents)
        except LatentsError as error:  # raw flux2 without its statistics; the verdict stands
            self._note(f"no pictures of some images: {error}")
            return None

    def _heats(self, scorer: Scorer, latents: Latents) -> np.ndarray | None:
        try:
            return scorer.heatmaps(latents)
        except LatentsError as error:
            self._note(f"no heat maps of some images: {error}")
            return None

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _chunks(records: Iterable[Record], batch_size: int) -> Iterator[list[Record]]:
    """Up to `batch_size` records, fewer where their latents are large."""
    chunk: list[Record] = []
    cells = 0
    for record in records:
        size = 0 if record.latents is None else record.latents.tensor.numel()
        if chunk and cells + size > MAX_CELLS:
            yield chunk
            chunk, cells = [], 0
        chunk.append(record)
        cells += size
        if len(chunk) == batch_size:
            yield chunk
            chunk, cells = [], 0
    if chunk:
        yield chunk


def _check_device(device: torch.device | str | None) -> None:
    """Raises ModelError for a device that this machine does not have."""
    if device is None:
        return
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"device {str(device)!r} cannot be used: {_first_line(error)}") from error


def _sentence(error: Exception) -> str:
    """An error as a sentence; the kind is named where it is not one of ours."""
    if isinstance(error, LatentGuardError):
        return str(error)
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else "no message"
