"""`export_onnx`: a policy and a model become one checked file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch

from latentguard.atomic import replacing_all
from latentguard.deprecated import Former, former_keywords
from latentguard.encoders import Encoder, traits
from latentguard.errors import LatentsError, ModelError
from latentguard.export.graph import attach_bank, bank_arrays, build, not_open
from latentguard.export.metadata import describe, write_metadata
from latentguard.export.optimize import optimize
from latentguard.export.quantize import convert
from latentguard.export.samples import bundled, drawn, resized
from latentguard.judge import Verdict
from latentguard.policy import Policy
from latentguard.regular import open_regular, sha256_of
from latentguard.runtime import Guard
from latentguard.runtime.names import plain
from latentguard.scorer import Scorer
from latentguard.spaces import Latents, LatentSpace

Precision = Literal["fp32", "fp16", "int8", "int8-dynamic"]

LARGEST = {"fp32": 1e-4, "fp16": 1e-2}
"""The difference of a margin from PyTorch's above which an export is refused, by precision."""
LEAST_COSINE = 0.98
"""Of an embedding with PyTorch's, below which an 8-bit export is refused."""
EXTERNAL = 1_900_000_000
"""Bytes of weights above which they lie beside the file: protocol buffers end at 2 GiB."""
EXTERNAL_TENSOR = 1 << 20
"""Bytes below which a constant stays in the file all the same."""

OPEN_SIZES = ((32, 32), (64, 64), (96, 128), (50, 41))
"""Latent cells at which an export of open height and width is compared with PyTorch, too."""


@former_keywords(same="same_decisions", sent="escalated")
@dataclass(frozen=True)
class Checked:
    """How an export compares with PyTorch on `images` latents.

    margin, embedding: the largest absolute differences. cosine: the smallest of an embedding with
    PyTorch's. same_decisions: images with the same decision and matches. real: whether the latents
    were real ones, and not drawn with a space's statistics. escalated: images that the first model
    of a cascade passed on; decisions are those of the whole cascade, scores those of the second
    model.
    """

    images: int
    real: bool
    margin: float
    embedding: float
    cosine: float
    same_decisions: int
    escalated: int | None = None

    same, sent = Former("same_decisions"), Former("escalated")


@dataclass(frozen=True)
class Exported:
    """A written export: its path, the SHA-256 to pin, and the comparison.

    unmerged: the same with the model without token merging, where the export has it.
    first: of the first model of the policy's cascade. The file holds its SHA-256, and so pins it.
    """

    path: Path
    sha256: str
    bytes: int
    checked: Checked
    first: Exported | None = None
    unmerged: Checked | None = None


def export_onnx(
    policy: Policy | str | Path,
    model: Encoder | str | Path,
    out: str | Path,
    *,
    precision: Precision = "fp32",
    first_precision: Precision | None = None,
    size: tuple[int, int] | None = None,
    scaled: bool = True,
    space: LatentSpace | str | Path | None = None,
    heatmaps: bool = False,
    check: Latents | None = None,
    calibrate: Latents | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write a policy and a model as an .onnx file of standard operators.

    The first model of a policy's `cascade` is written next to it, as NAME.first.onnx.

    Args:
        policy, model: as for `Scorer`.
        out: the file; nothing is written there before the check has passed.
        precision: fp32, fp16, int8 (calibrated) or int8-dynamic.
        first_precision: of the first model of a cascade; None is that of the second.
        size: height and width in latent cells; None leaves them open.
        scaled: whether the file reads latents as a pipeline denoises them, or raw ones.
        space: the model's latent space, if it is one of your own: a LatentSpace or its file.
        heatmaps: also give heat maps.
        check: latents on which to compare with PyTorch; None takes the bundled ones if they are of
            the model's space, and otherwise draws some with the space's statistics.
        calibrate: latents on which int8 finds its ranges and rounds weights.
        progress: called with a line before each step.

    Raises:
        ModelError: the model cannot be exported like this; int8 has no latents to calibrate on; the
            export differs too much from PyTorch (see `LARGEST` and `LEAST_COSINE`); a model needs a
            size and is given none; or a `first_precision` is given without a cascade.
        LatentsError: latents of another space or size, or a space whose statistics are unknown.
    """
    if space is not None:
        LatentSpace.of(space).check_standard("an exported file")
    scorer, out = Scorer(policy, model, space=space, device="cpu").thorough, Path(out)
    if scorer.first is not None and scorer.policy.views == "crops":
        raise ModelError(
            f"policy '{scorer.policy.name}' has views: crops and a cascade, whose first model "
            "reads images whole: export it with one of the two"
        )
    if first_precision is not None and scorer.first is None:
        raise ModelError(f"policy '{scorer.policy.name}' has no cascade, and so no first model")
    first_precision = first_precision or precision
    if "int8" in (precision, first_precision) and calibrate is None:
        raise ModelError("int8 needs latents to calibrate on (--calibrate); or use int8-dynamic")
    if size is None:
        for one in (scorer.first, scorer):
            if one is not None:
                _check_open(one.encoder)
    given, real = _to_check(check, scorer, scaled, size)
    job = ExportJob(out.parent, size, scaled, given, real, calibrate, progress)
    first: Exported | None = None
    with replacing_all(out.parent) as (folder, files):
        if scorer.first is not None:
            beside = folder / first_name(out)
            of_first, first = job.make(scorer.first, beside, first_precision)
            files += of_first
        written, made = job.make(scorer, folder / out.name, precision, heatmaps, first)
        files[:0] = written
    return made


def first_name(out: Path) -> str:
    """The name of the first model's file beside that of a cascade. Raises ModelError without one.

    An export names the files beside it, and a Guard opens plain names only.
    """
    name = out.with_suffix(".first.onnx").name
    if not plain(name):
        raise ModelError(
            f"{out}: the file of a cascade must have a name of letters, digits, '_', '.' and '-', "
            "so that it can name its first model's"
        )
    return name


@dataclass(frozen=True)
class ExportJob:
    """What the exports of one call have in common; see `export_onnx`.

    folder: where the files will be.
    """

    folder: Path
    size: tuple[int, int] | None
    scaled: bool
    given: Latents
    real: bool
    calibrate: Latents | None
    progress: Callable[[str], None]

    def make(
        self,
        scorer: Scorer,
        path: Path,
        precision: Precision,
        heatmaps: bool = False,
        first: Exported | None = None,
    ) -> tuple[list[Path], Exported]:
        """The files of one model at `path`, which comes first, and what will be where they belong.

        first: of the cascade's first model, which lies beside `path`.
        """
        given, size, name = self.given, self.size, scorer.encoder.name
        out = self.folder / path.name
        self.progress(f"tracing {name}")
        graph = trace(scorer, given.height, given.width, self.scaled, heatmaps, size is None)
        graph, calibration = self._converted(graph, scorer, precision, path.parent)
        attach_bank(graph, scorer)
        metadata = describe(
            scorer,
            scaled=self.scaled,
            precision=precision,
            size=size,
            calibration=calibration,
            first=None if first is None else (first.path.name, first.sha256),
        )
        written = write(graph, metadata, path)
        self.progress(f"comparing it with PyTorch on {len(given)} latents")
        if size is None:
            _accept_sizes(path, scorer, given, precision)
        try:
            checked = compare(path, scorer, given, real=self.real)
        except ModelError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise ModelError(f"{out}: not written, as the file {reason}") from error
        _accept(out, checked, precision)
        unmerged = None
        if traits(scorer.encoder).variant:
            self.progress(f"comparing it with the model without merging on {len(given)} latents")
            unmerged = compare(path, scorer, given, real=self.real, merging=False)
        bytes_ = sum(file.stat().st_size for file in written)
        return written, Exported(out, digest_of(path), bytes_, checked, first, unmerged)

    def _converted(
        self, graph: onnx.ModelProto, scorer: Scorer, precision: Precision, folder: Path
    ) -> tuple[onnx.ModelProto, str | None]:
        """The graph in a precision, and what it was calibrated on."""
        if precision == "fp32":
            return graph, None
        batches = calibration = None
        if self.calibrate is not None and precision != "fp16":
            chosen = _as(self.calibrate, scorer, self.scaled, self.size)
            batches = _batches(chosen, scorer)
            calibration = f"{len(chosen)} latents of {scorer.encoder.space}"
        self.progress(f"making it {precision}" + (f" with {calibration}" if calibration else ""))
        source, target = folder / "source.onnx", folder / "target.onnx"
        onnx.save(graph, source)
        convert(source, target, precision, batches, keep=list(bank_arrays(scorer)))
        return onnx.load(target), calibration


def _check_open(encoder: Encoder) -> None:
    """Raise ModelError for a model that is known to need a fixed height and width."""
    if traits(encoder).fixed_size:
        raise ModelError(not_open(encoder.name))
    if traits(encoder).variant:
        raise ModelError(
            f"{encoder.name} merges a share of its tokens, and how many that are is part of the "
            "file: give height and width in latent cells (--height 64 --width 64 for 512 pixels)"
        )


def trace(
    scorer: Scorer, height: int, width: int, scaled: bool, heatmaps: bool, dynamic: bool
) -> onnx.ModelProto:
    """The simplified float32 graph, whatever the policy; see `build`."""
    return optimize(build(scorer, height, width, scaled=scaled, heatmaps=heatmaps, dynamic=dynamic))


def _accept(out: Path, checked: Checked, precision: Precision) -> None:
    """Raise ModelError where an export is not what was exported. NaN never passes."""
    largest = LARGEST.get(precision)
    if largest is not None and not checked.margin <= largest:
        raise ModelError(
            f"{out}: not written, as its margins differ from PyTorch's by up to "
            f"{checked.margin:.2g}, more than {largest:g}"
        )
    if largest is None and not checked.cosine >= LEAST_COSINE:
        raise ModelError(
            f"{out}: not written, as an embedding has cosine {checked.cosine:.4f} with PyTorch's, "
            f"less than {LEAST_COSINE:g}: calibrate on latents like those it will judge"
        )


def _accept_sizes(path: Path, scorer: Scorer, latents: Latents, precision: Precision) -> None:
    """Raise ModelError where a file of open height and width is right for some sizes only.

    A tracer that meets a choice by size takes one side of it, and does not always say so.
    """
    for cells in ((latents.height, latents.width), *OPEN_SIZES):
        try:
            checked = compare(path, scorer, resized(latents[:2], cells), real=False)
            if cells in OPEN_SIZES:
                _accept(path, checked, precision)
        # ONNX Runtime's errors have no common class.
        except Exception as error:
            raise ModelError(not_open(scorer.encoder.name)) from error


def write(model: onnx.ModelProto, metadata: dict[str, Any], path: Path) -> list[Path]:
    """Write a model; weights of more than 2 GB go to NAME.data beside it. The files written."""
    files = [path]
    if model.ByteSize() > EXTERNAL:
        beside = path.with_suffix(".data")
        onnx.save(
            model,
            path,
            save_as_external_data=True,
            location=beside.name,
            size_threshold=EXTERNAL_TENSOR,
        )
        model = onnx.load(path, load_external_data=False)
        metadata = {**metadata, "files": {beside.name: digest_of(beside)}}
        files.append(beside)
    path.write_bytes(write_metadata(model, metadata))
    return files


def compare(
    path: Path, scorer: Scorer, latents: Latents, *, real: bool, merging: bool = True
) -> Checked:
    """An export against PyTorch, in batches of 16; of a cascade the verdicts of both models.

    merging: whether tokens merge in PyTorch's second model, where they do in the file.
    """
    margin = embedding = 0.0
    cosine, same, escalated = 1.0, 0, 0
    with Guard(path, providers=["CPUExecutionProvider"]) as guard:
        for begin in range(0, len(latents), 16):
            batch = latents[begin : begin + 16]
            model = nullcontext() if merging else traits(scorer.encoder).published()
            with torch.no_grad(), model:
                scores = scorer.score(batch)
                embedded = scorer.encoder.encode_latents(batch)
                decided = scorer.decide(scores) if scorer.first is None else scorer.verdicts(batch)
            outputs = guard.scores(batch.tensor.numpy())
            # NumPy's extremes keep a NaN.
            margin = float(np.maximum(margin, _largest(outputs["margin"], scores.margin)))
            embedding = float(np.maximum(embedding, _largest(outputs["embedding"], embedded)))
            cosines = (outputs["embedding"] * embedded.numpy()).sum(1)
            cosine = float(np.minimum(cosine, cosines.min()))
            judged = guard.judge(batch.tensor.numpy())
            pairs = zip(judged.verdicts, decided, strict=True)
            same += sum(_outcome(a) == _outcome(b) for a, b in pairs)
            escalated += sum(judged.escalated or ())
    sent = None if scorer.first is None else escalated
    return Checked(len(latents), real, margin, embedding, cosine, same, sent)


def _to_check(
    check: Latents | None, scorer: Scorer, scaled: bool, size: tuple[int, int] | None
) -> tuple[Latents, bool]:
    """Latents for the comparison, and whether they are real ones."""
    space = scorer.encoder.space
    if check is not None:
        return _as(check, scorer, scaled, size), True
    found = bundled(space)
    real = found is not None
    chosen = found if found is not None else drawn(space, size or (64, 64))
    return _as(resized(chosen, size or (chosen.height, chosen.width)), scorer, scaled, size), real


def _as(latents: Latents, scorer: Scorer, scaled: bool, size: tuple[int, int] | None) -> Latents:
    """Latents in the convention that the export reads."""
    encoder = scorer.encoder
    if latents.space.name != encoder.space:
        raise LatentsError(
            f"model {encoder.name} reads {encoder.space} latents, got {latents.space.name}"
        )
    spatial = latents.to_spatial().to("cpu", torch.float32)
    converted = spatial.to_standard(scaled)
    if size is not None and (converted.height, converted.width) != size:
        raise LatentsError(
            f"the export reads {size[0]}x{size[1]} latent cells, the latents given for it have "
            f"{converted.height}x{converted.width}"
        )
    return converted


def _batches(latents: Latents, scorer: Scorer) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    bank = bank_arrays(scorer)
    for begin in range(0, len(latents), 8):
        yield {"latents": latents[begin : begin + 8].tensor.numpy(), **bank}


def _largest(found: Any, expected: torch.Tensor) -> float:
    return float(np.abs(np.asarray(found, np.float64) - expected.double().numpy()).max())


def _outcome(verdict: Verdict) -> tuple[str, tuple[str, ...]]:
    return verdict.decision, tuple(score.id for score in verdict.matched)


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with open_regular(path) as file:
        return sha256_of(file)
