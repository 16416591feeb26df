"""The scan in this process: it turns paths into records, batch after batch, and keeps nothing.

An image that cannot be read or judged becomes a record with an error, and the rest is scanned.
Errors that make the whole scan meaningless (in the policy or the model) raise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from latentguard.files import Dtype, PassedOver, Reading, read_records
from latentguard.files.addresses import Remote, found, shown
from latentguard.files.paths import Unreadable
from latentguard.files.reading import read_file
from latentguard.judge import PolicyId, Rules
from latentguard.policy import Policy
from latentguard.scan.judges import Runtime, Views, check_schemes, make_judges
from latentguard.scan.judging import Judging, batches
from latentguard.scan.record import ScanRecord
from latentguard.scan.sampled import Sampler
from latentguard.scan.sampling import SPREAD, ClusterSample, SamplePlan
from latentguard.scan.summary import ModelInfo

if TYPE_CHECKING:
    import torch

    from latentguard.encoders import Encoder
    from latentguard.spaces import LatentSpace, Layout


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
    runtime: Runtime = "auto",
    sha256: str | None = None,
    views: Views | None = None,
    taxonomies: Sequence[str] = (),
) -> Iterator[ScanRecord]:
    """Moderate latents files: one record per image, in the order of the paths, as they come.

    Args:
        paths: files, folders, glob patterns and WebDataset shards, as in `files.read_latents`.
        policy: a Policy, the name of a shipped one, or a path; None is "default", or with an
            exported file the policy that it holds.
        model: an Encoder, its name or path, or "auto": the policy's own `model`, or else the best
            model on this machine for each latent space that occurs. With the onnx runtime: the
            exported file, or a packaged model.
        space, scaled: what files do not state themselves. A file that contradicts them is an error.
            A space is a name, a file of your own, or a LatentSpace.
        layout, height, width: the same, for arrays whose shape leaves them open.
        pixels, key, member, moments, dequantize, dtype, strict: as in `files.Reading`.
        batch_size: images that are scored together, at least 1.
        device: where the model runs. None is CUDA if there is a GPU, and else the CPU.
        previews, heatmaps: whether records carry an RGB view and heat maps of margins.
        runtime: "torch"; "onnx" for a file that `latentguard export onnx` wrote, or a packaged
            model, without torch; "auto" is onnx for such a file and if torch is not installed.
        sha256: the SHA-256 that the exported file must have.
        views: "whole", or "crops" to read overlapping crops of an image too, which finds small
            objects in large images; None is what the policy says.
        taxonomies: published hazard schemes to which the policy's concepts are mapped; each verdict
            then has `taxonomies`, its categories in each scheme.

    Yields:
        ScanRecords. An image that cannot be read has the decision block and an error. An image
        that was read but could not be scored has the decision of the policy's `on_error`, and an
        error.

    Raises:
        PolicyError, ModelError, LatentsError: at once, if the policy, a named model or an option
            cannot be used; while iterating with "auto", if the model of a space cannot see the
            policy's concepts or lacks a calibrated threshold.
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
            taxonomies=taxonomies,
        )
    )


@dataclass
class Scan:
    """`scan_files` as an object that also has the models that took part, and notes about them.

    sample: look at about this many images, drawn at random from `sample_shards` files or more; None
        looks at all of them. seed: of the draw.
    seconds: reading and scoring so far, without loading models and without the caller's own time.
    phases: the same by phase; `read` is reading and decoding, which are not separated here.
    passed: counts the contents of folders and shards that were not read because they cannot be
        latents.
    reading: the options for reading the files.
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
    runtime: Runtime = "auto"
    sha256: str | None = None
    views: Views | None = None
    taxonomies: Sequence[str] = ()
    sample: int | None = None
    sample_shards: int = SPREAD
    seed: int = 0
    seconds: float = field(init=False, default=0.0)
    phases: dict[str, float] = field(init=False, default_factory=dict)
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
        self._sampler = None if self.sample is None else self._draw(self.sample)
        if self._sampler is None:
            self._records = read_records(self.paths, self.reading, self.passed)
        else:
            self._records = self._sampler.rows()
        self._judges = make_judges(
            self.policy,
            self.model,
            space=self.space,
            device=self.device,
            runtime=self.runtime,
            sha256=self.sha256,
            views=self.views,
        )
        self.taxonomies = tuple(dict.fromkeys(self.taxonomies))
        check_schemes(self.rules, self.taxonomies)
        self._judging = Judging(self._judges, self.previews, self.heatmaps, self.taxonomies)

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
        """The models that took part. Grows while iterating, by one for each latent space."""
        return self._judges.models

    @property
    def notes(self) -> list[str]:
        """Sentences for the user: which model was chosen, and what is missing."""
        return self._judges.notes

    @property
    def drawn(self) -> ClusterSample | None:
        """What was seen of a sample so far."""
        return None if self._sampler is None else self._sampler.sample

    def __iter__(self) -> Iterator[ScanRecord]:
        judged = self._judged()
        return judged if self._sampler is None else self._sampler.keep(judged)

    def _draw(self, images: int) -> Sampler:
        """A sample of the files. Lists all of them."""
        files = {_name(file): file for file in found(self.paths, self.passed, self.reading.strict)}
        plan = SamplePlan.of(files, images, self.seed, self.sample_shards)
        return Sampler(plan, lambda name: read_file(files[name], self.reading, self.passed))

    def _judged(self) -> Iterator[ScanRecord]:
        waiting = batches(self._records, self.batch_size)
        while True:
            begun = perf_counter()
            batch = next(waiting, None)
            self._spent("read", perf_counter() - begun)
            if batch is None:
                return
            records, seconds = self._judging.timed(batch)
            self._spent("score", seconds)
            yield from records

    def _spent(self, phase: str, seconds: float) -> None:
        self.seconds += seconds
        self.phases[phase] = self.phases.get(phase, 0.0) + seconds


def _name(file: Path | Remote | Unreadable) -> str:
    """What a file is called in its records."""
    if isinstance(file, Unreadable):
        return file.source
    return shown(file.address) if isinstance(file, Remote) else str(file)
