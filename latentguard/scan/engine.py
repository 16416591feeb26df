"""The scan itself, in this process: paths to records, batch after batch, nothing kept.

Whatever cannot be read or judged becomes a record with an error, and the rest is scanned; whatever
makes the scan as a whole meaningless (the policy, the model) raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from latentguard.errors import LatentGuardError, LatentsError, ModelError
from latentguard.files import ArrayRecord, Dtype, PassedOver, Reading, read_records
from latentguard.judge import Heatmaps, ModelId, PolicyId, Rules, Verdict, failed
from latentguard.policy import Policy, load_policy
from latentguard.scan.judges import Judges, SpaceJudge
from latentguard.scan.record import ScanRecord, rank
from latentguard.scan.summary import ModelInfo
from latentguard.text import first_line

if TYPE_CHECKING:
    import numpy as np
    import torch

    from latentguard.encoders import Encoder
    from latentguard.spaces import LatentArray, LatentSpace, Layout

Runtime = Literal["torch", "onnx"]
Views = Literal["whole", "crops"]

MAX_CELLS = 1 << 26
"""Numbers in the latents of one batch (256 MiB in float32): large images make smaller batches."""


def scan_files(
    paths: Iterable[str | Path] | str | Path,
    policy: Policy | str | Path | None = None,
    model: Encoder | str | Path = "auto",
    *,
    space: str | Path | LatentSpace | None = None,
    device: torch.device | str | None = None,
    scaled: bool | None = None,
    layout: Layout | None = None,
    height: int | None = None,
    width: int | None = None,
    pixels: bool = False,
    key: str | None = None,
    member: str | None = None,
    moments: bool = False,
    dequantize: str | tuple[float, float] | None = None,
    dtype: Dtype | None = None,
    strict: bool = False,
    batch_size: int = 16,
    previews: bool = False,
    heatmaps: bool = False,
    runtime: Runtime = "torch",
    sha256: str | None = None,
    views: Views | None = None,
) -> Iterator[ScanRecord]:
    """Moderate latents files: one record per image, in the order of the paths, as they come.

    Args:
        paths: files, folders, glob patterns and WebDataset shards, as in `files.read_latents`.
        policy: a Policy, the name of a shipped one, or a path; None is "default", or with the onnx
            runtime the policy that was exported.
        model: an Encoder, its name or path, or "auto": the policy's own `model`, else for
            each latent space that occurs the best model on this machine. With the onnx runtime
            the exported file.
        space, scaled: what files do not say of themselves; one that says otherwise is an error. A
            space is a name, a file of one's own, or a LatentSpace.
        layout, height, width: the same, for arrays whose shape leaves it open.
        pixels, key, member, moments, dequantize, dtype, strict: as in `files.Reading`.
        batch_size: images that are scored together, at least 1.
        device: where the model runs; None is CUDA where there is one, else the CPU.
        previews, heatmaps: whether records carry an RGB view and heat maps of margins.
        runtime: "torch", or "onnx" for a file that `latentguard export onnx` wrote, without torch.
        sha256: of that file, which must have it.
        views: "whole", or "crops" to read an image in overlapping crops besides, which finds small
            objects in large images; None is what the policy says.

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
            device=device,
            scaled=scaled,
            layout=layout,
            height=height,
            width=width,
            pixels=pixels,
            key=key,
            member=member,
            moments=moments,
            dequantize=dequantize,
            dtype=dtype,
            strict=strict,
            batch_size=batch_size,
            previews=previews,
            heatmaps=heatmaps,
            runtime=runtime,
            sha256=sha256,
            views=views,
        )
    )


@dataclass
class Scan:
    """`scan_files` as an object that also says which models took part, and what to note of them.

    seconds: reading and scoring so far, without loading models and without the caller's own time.
    passed: what folders and shards held so far that was not read, as it cannot be latents.
    reading: everything that is said of the files.
    """

    paths: Iterable[str | Path] | str | Path
    policy: Policy | str | Path | None = None
    model: Encoder | str | Path = "auto"
    space: str | Path | LatentSpace | None = None
    scaled: bool | None = None
    layout: Layout | None = None
    height: int | None = None
    width: int | None = None
    pixels: bool = False
    key: str | None = None
    member: str | None = None
    moments: bool = False
    dequantize: str | tuple[float, float] | None = None
    dtype: Dtype | None = None
    strict: bool = False
    batch_size: int = 16
    device: torch.device | str | None = None
    previews: bool = False
    heatmaps: bool = False
    runtime: Runtime = "torch"
    sha256: str | None = None
    views: Views | None = None
    seconds: float = field(init=False, default=0.0)
    passed: PassedOver = field(init=False, default_factory=PassedOver)
    reading: Reading = field(init=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        self.reading = Reading.of(
            self.space,
            self.scaled,
            layout=self.layout,
            height=self.height,
            width=self.width,
            pixels=self.pixels,
            key=self.key,
            member=self.member,
            moments=self.moments,
            dequantize=self.dequantize,
            dtype=self.dtype,
            strict=self.strict,
        )
        self._records = read_records(self.paths, self.reading, self.passed)
        self._judges = self._make_judges()

    def _make_judges(self) -> Judges:
        if self.runtime == "onnx":
            from latentguard.scan.judges import OnnxJudges

            if self.views is not None:
                raise ModelError("an exported file has its own views: leave --views out")
            if not isinstance(self.model, (str, Path)) or str(self.model) == "auto":
                raise ModelError("the onnx runtime needs --model FILE.onnx, an exported file")
            device = None if self.device is None else str(self.device)
            return OnnxJudges(self.model, self.policy, device, self.space, self.sha256)
        from latentguard.scan.judges import TorchJudges

        if self.sha256 is not None:
            raise ModelError("--sha256 pins an exported file: give --runtime onnx, too")
        if isinstance(self.model, (str, Path)) and str(self.model).endswith(".onnx"):
            raise ModelError(f"{self.model} is an exported file: give --runtime onnx, too")
        policy = load_policy("default" if self.policy is None else self.policy)
        if self.views is not None:
            policy = policy.with_views(self.views)
        return TorchJudges(policy, self.model, self.device, self.space)

    @property
    def rules(self) -> Rules:
        """The policy as the judge reads it."""
        return self._judges.rules

    @property
    def policy_id(self) -> PolicyId:
        """Name, version and SHA-256 of the policy."""
        return self.rules.policy

    @property
    def models(self) -> list[ModelInfo]:
        """Which models took part; grows while iterating, one for each latent space met."""
        return self._judges.models

    @property
    def notes(self) -> list[str]:
        """Sentences for people: which model was chosen, what is missing."""
        return self._judges.notes

    def __iter__(self) -> Iterator[ScanRecord]:
        chunks = _chunks(self._records, self.batch_size)
        while True:
            begun, loading = perf_counter(), self._judges.loading
            chunk = next(chunks, None)
            if chunk is None:
                return
            records = self._judged(chunk)
            self.seconds += perf_counter() - begun - (self._judges.loading - loading)
            yield from records

    # -- images ------------------------------------------------------------------------------

    def _judged(self, chunk: Sequence[ArrayRecord]) -> list[ScanRecord]:
        """The chunk's records in its order; images of one shape are scored together."""
        done: dict[int, ScanRecord] = {}
        groups: dict[tuple[Any, ...], list[int]] = {}
        judges: dict[tuple[Any, ...], SpaceJudge] = {}
        for place, record in enumerate(chunk):
            latents = record.latents
            if latents is None:
                done[place] = self._unreadable(record, record.error or "cannot be read")
                continue
            judge = self._judges.of(latents.space.name)
            if isinstance(judge, str):
                done[place] = self._unreadable(record, judge)
                continue
            array = latents.array
            key = (latents.space, latents.scaled, array.shape[2:], array.dtype)
            groups.setdefault(key, []).append(place)
            judges[key] = judge
        for key, places in groups.items():
            members = [chunk[place] for place in places]
            done.update(zip(places, self._scored(members, judges[key]), strict=True))
        return [done[place] for place in range(len(chunk))]

    def _scored(self, members: Sequence[ArrayRecord], judge: SpaceJudge) -> list[ScanRecord]:
        """Records of images of one shape; if they fail together they are tried one by one."""
        from latentguard.spaces import LatentArray

        identity = judge.info.id
        try:
            latents = LatentArray.cat([r.latents for r in members if r.latents is not None])
            judged = judge.judge(latents, self.heatmaps)
            if len(judged.verdicts) != len(members):
                raise RuntimeError(f"{len(judged.verdicts)} verdicts for {len(members)} images")
        except Exception as error:  # fail closed, but for no image but the one that caused it
            if len(members) > 1:
                return [self._scored([record], judge)[0] for record in members]
            return [self._record(members[0], failed(_sentence(error), self.rules), identity)]
        pictures = self._previews(latents) if self.previews else None
        heats = self._heats(judged.heatmaps)
        return [
            self._record(
                record,
                verdict,
                identity,
                None if pictures is None else pictures[i],
                None if heats is None else heats[i],
            )
            for i, (record, verdict) in enumerate(zip(members, judged.verdicts, strict=True))
        ]

    def _unreadable(self, record: ArrayRecord, error: str) -> ScanRecord:
        """Block, whatever `on_error` says: there is no image that could be let pass."""
        return self._record(record, failed(error, "block"))

    def _record(
        self,
        record: ArrayRecord,
        verdict: Verdict,
        model: ModelId | None = None,
        preview: np.ndarray | None = None,
        heats: np.ndarray | None = None,
    ) -> ScanRecord:
        latents = record.latents
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
            heatmaps=None if heats is None else dict(zip(self.rules.ids, heats, strict=True)),
            ranked=tuple(rank(verdict.concepts, self.rules)),
        )

    def _previews(self, latents: LatentArray) -> np.ndarray | None:
        from latentguard.spaces import array_preview

        try:
            return array_preview(latents)
        except LatentsError as error:  # raw flux2 without its statistics; the verdict stands
            self._note(f"no pictures of some images: {error}")
            return None

    def _heats(self, heatmaps: Heatmaps | None) -> np.ndarray | None:
        if heatmaps is None:
            return None
        if heatmaps.problem is not None:
            self._note(f"no heat maps of some images: {heatmaps.problem}")
        return heatmaps.margins

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _chunks(records: Iterable[ArrayRecord], batch_size: int) -> Iterator[list[ArrayRecord]]:
    """Up to `batch_size` records, fewer where their latents are large."""
    chunk: list[ArrayRecord] = []
    cells = 0
    for record in records:
        size = 0 if record.latents is None else record.latents.array.size
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


def _sentence(error: Exception) -> str:
    """An error as a sentence; the kind is named where it is not one of ours."""
    if isinstance(error, LatentGuardError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error, 'no message')}"
