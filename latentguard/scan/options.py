"""How a run scans: the options that affect its records, in one object that can be pickled."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from latentguard.errors import UsageError
from latentguard.files import Reading
from latentguard.policy import Policy
from latentguard.scan.judges import Judges, Runtime, Views, check_schemes, make_judges, resolved
from latentguard.scan.judging import Judging
from latentguard.scan.sampling import Draw

SinkName = Literal["parquet", "json"]
Keep = Literal["allow", "review", "block"]


@dataclass(frozen=True)
class RunOptions:
    """What every process of a run must know. It is frozen and can be pickled.

    policy: as it was loaded, so that each process judges by the same bytes; None is what an
        exported file brings.
    model: a name, a path, or "auto". runtime, sha256, views, device, batch_size: of `scan_files`.
    reading: how files are read.
    sink: how records are written. keep: copy the samples of this decision, too, or None.
    taxonomies: published hazard schemes in whose words records tell verdicts, too.
    sample: look at so many images, drawn at random; None is all of them.

    Raises UsageError for invalid values.
    """

    policy: Policy | None = None
    model: str = "auto"
    runtime: Runtime = "auto"
    sha256: str | None = None
    views: Views | None = None
    device: str | None = None
    batch_size: int = 16
    reading: Reading = field(default_factory=Reading)
    sink: SinkName = "parquet"
    keep: Keep | None = None
    taxonomies: tuple[str, ...] = ()
    sample: Draw | None = None

    def __post_init__(self) -> None:
        # Every process of a run does the same, whatever is installed where it is.
        object.__setattr__(self, "runtime", resolved(self.runtime, self.model))
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.sink not in get_args(SinkName):
            raise UsageError(f"sink must be parquet or json, got {self.sink!r}")
        if self.keep is not None and self.keep not in get_args(Keep):
            raise UsageError(f"keep must be allow, review or block, got {self.keep!r}")
        if self.sample is not None and min(self.sample.images, self.sample.spread) < 1:
            raise UsageError("a sample must have at least one image and one shard")
        if self.sample is not None and self.keep is not None:
            raise UsageError(
                "--keep needs whole shards, but a sample has only parts: leave out --keep, or "
                "--sample"
            )

    def judges(self, lanes: int = 1) -> Judges:
        """Load what judges. Raises as `scan_files` does.

        lanes: how many batches are judged at once without torch; `judges.default_lanes()` for
        `run_local` with workers.
        """
        judges = make_judges(
            self.policy,
            self.model,
            space=self.reading.space,
            device=self.device,
            runtime=self.runtime,
            sha256=self.sha256,
            views=self.views,
            lanes=lanes,
        )
        check_schemes(judges.rules, self.taxonomies)
        return judges

    def judging(self, judges: Judges, previews: bool | Literal["late"] = False) -> Judging:
        """The `Judging` that these options ask for. previews: as for `Judging`."""
        return Judging(judges, previews, taxonomies=self.taxonomies)

    def identity(self, judges: Judges) -> dict[str, Any]:
        """Everything that bears on verdicts, as JSON: what must be the same where a run goes on.

        A model is named by its weights; where each space has its own, `Entry.models` does.
        Device, batch size and workers are not part of it: they change the last digits of scores.
        """
        reading = asdict(self.reading)
        space = self.reading.space
        reading["space"] = None if space is None else {"name": space.name, "says": repr(space)}
        named = [model.id.to_dict() for model in judges.models]
        return {
            "policy": judges.rules.policy.to_dict(),
            "model": named or self.model,
            "runtime": self.runtime,
            "views": self.views,
            "reading": reading,
            "sink": self.sink,
            "keep": self.keep,
            "taxonomies": list(self.taxonomies),
            "sample": None if self.sample is None else asdict(self.sample),
        }
