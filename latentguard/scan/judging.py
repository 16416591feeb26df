"""From batches of images to records: which images are scored together, and how errors are handled.

The record of an image depends only on its batch. So the same batches of a shard give the same
records, to the bit, in any process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from latentguard.errors import LatentGuardError, LatentsError
from latentguard.files import ArrayRecord
from latentguard.judge import Heatmaps, ModelId, Rules, Verdict, failed, with_taxonomies
from latentguard.scan.judges import Judges, SpaceJudge
from latentguard.scan.record import ScanRecord, rank
from latentguard.text import first_line

if TYPE_CHECKING:
    import numpy as np

    from latentguard.spaces import LatentArray

MAX_CELLS = 1 << 26
"""Numbers in the latents of one batch (256 MiB in float32): large images make smaller batches."""


class Judging:
    """Judges batches of images. An image that cannot be read or judged is a record with an error.

    Several threads may judge batches at once; `Judges.lanes` says how many are good.

    seconds: time that judging took so far, in all threads, without loading models.

    previews, heatmaps: whether records carry an RGB view and heat maps of margins; `late` is for
    views that are drawn when somebody asks a record (`ScanRecord.draw`).
    taxonomies: the published hazard schemes in whose words verdicts are told, too.
    """

    def __init__(
        self,
        judges: Judges,
        previews: bool | Literal["late"] = False,
        heatmaps: bool = False,
        taxonomies: Sequence[str] = (),
    ) -> None:
        self.judges, self.taxonomies = judges, tuple(taxonomies)
        self.previews, self._heated = previews, heatmaps
        self.seconds = 0.0
        self._lock = Lock()

    @property
    def rules(self) -> Rules:
        """The policy as the judge reads it."""
        return self.judges.rules

    def judge(self, batch: Sequence[ArrayRecord]) -> list[ScanRecord]:
        """The records of a batch in its order; images of one shape are scored together."""
        return self.timed(batch)[0]

    def timed(self, batch: Sequence[ArrayRecord]) -> tuple[list[ScanRecord], float]:
        """As `judge`, and the seconds that it took, without loading models."""
        spaces = {record.latents.space.name for record in batch if record.latents is not None}
        with self._lock:  # a model is loaded once
            of = {space: self.judges.of(space) for space in sorted(spaces)}
        begun = perf_counter()
        records = self._judged(batch, of)
        seconds = perf_counter() - begun
        with self._lock:
            self.seconds += seconds
        return records, seconds

    def _judged(
        self, batch: Sequence[ArrayRecord], of: Mapping[str, SpaceJudge | str]
    ) -> list[ScanRecord]:
        done: dict[int, ScanRecord] = {}
        groups: dict[tuple[Any, ...], list[int]] = {}
        judges: dict[tuple[Any, ...], SpaceJudge] = {}
        for place, record in enumerate(batch):
            latents = record.latents
            if latents is None:
                done[place] = self._unreadable(record, record.error or "cannot be read")
                continue
            judge = of[latents.space.name]
            if isinstance(judge, str):
                done[place] = self._unreadable(record, judge)
                continue
            array = latents.array
            key = (latents.space, latents.scaled, array.shape[2:], array.dtype)
            groups.setdefault(key, []).append(place)
            judges[key] = judge
        for key, places in groups.items():
            members = [batch[place] for place in places]
            done.update(zip(places, self._scored(members, judges[key]), strict=True))
        return [done[place] for place in range(len(batch))]

    def _scored(self, members: Sequence[ArrayRecord], judge: SpaceJudge) -> list[ScanRecord]:
        """Records of images of one shape; if they fail together they are tried one by one."""
        from latentguard.spaces import LatentArray

        identity = judge.info.id
        try:
            latents = LatentArray.cat([r.latents for r in members if r.latents is not None])
            judged = judge.judge(latents, self._heated)
            if len(judged.verdicts) != len(members):
                raise RuntimeError(f"{len(judged.verdicts)} verdicts for {len(members)} images")
        except Exception as error:  # fail closed, but only for the image that caused it
            if len(members) > 1:
                return [self._scored([record], judge)[0] for record in members]
            return [self._record(members[0], failed(_sentence(error), self.rules), identity)]
        side = judge.info.crop_side
        if side is not None and max(latents.height, latents.width) > side:
            self._note(
                f"images of more than {side}x{side} cells were read whole, and {identity.name} "
                "misses small objects in them: --views crops finds more, at several times the cost"
            )
        pictures = self._previews(latents) if self.previews is True else None
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
        """Block, whatever `on_error` says: there is no image that could pass."""
        return self._record(record, failed(error, "block"))

    def _record(
        self,
        record: ArrayRecord,
        verdict: Verdict,
        model: ModelId | None = None,
        preview: np.ndarray | None = None,
        heats: np.ndarray | None = None,
    ) -> ScanRecord:
        latents, late = record.latents, self.previews == "late"
        return ScanRecord(
            source=record.source,
            index=record.index,
            id=record.id,
            space=latents.space.name if latents is not None else None,
            verdict=with_taxonomies(verdict, self.rules, self.taxonomies),
            policy=self.rules.policy,
            model=model,
            size=(latents.height, latents.width) if latents is not None else None,
            preview=preview,
            heatmaps=None if heats is None else dict(zip(self.rules.ids, heats, strict=True)),
            draw=partial(self._drawn, latents) if late and latents is not None else None,
            ranked=tuple(rank(verdict.concepts, self.rules)),
        )

    def _drawn(self, latents: LatentArray) -> np.ndarray | None:
        pictures = self._previews(latents)
        return None if pictures is None else pictures[0]

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
        with self._lock:
            if note not in self.judges.notes:
                self.judges.notes.append(note)


def batches(records: Iterable[ArrayRecord], batch_size: int) -> Iterator[list[ArrayRecord]]:
    """Up to `batch_size` records, fewer where their latents are large."""
    batch: list[ArrayRecord] = []
    cells = 0
    for record in records:
        size = 0 if record.latents is None else record.latents.array.size
        if batch and cells + size > MAX_CELLS:
            yield batch
            batch, cells = [], 0
        batch.append(record)
        cells += size
        if len(batch) == batch_size:
            yield batch
            batch, cells = [], 0
    if batch:
        yield batch


def _sentence(error: Exception) -> str:
    """An error as a sentence; the kind is named where it is not one of ours."""
    if isinstance(error, LatentGuardError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error, 'no message')}"
