"""What the Gradio demo shows: latents and a policy to pictures and tables. No torch, no Gradio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentguard.encoders.catalog import CATALOG
from latentguard.errors import LatentsError
from latentguard.policy import Policy, parse_policy
from latentguard.scan import Scan, ScanRecord
from latentguard.scan.image import LEVELS, ramp
from latentguard.scan.judges import Runtime
from latentguard.text import visible
from latentguard.yaml_nodes import compose, line_of, problems_error

Picture = NDArray[np.uint8]

SOURCE = "policy"
SIDE = 256
MAX_IMAGES = 16
COLUMNS = ("concept", "action", "score", "threshold", "unit", "best prompt", "")


@dataclass(frozen=True)
class Shown:
    """One image, ready to be looked at.

    name: its id. headline: the decision, and why. preview: uint8 [h, w, 3]; None where its space
    has no view. heats: a picture and a caption for each concept that the model sees, the one that
    decided first. rows: of the table, as `COLUMNS` names them.
    """

    name: str
    headline: str
    preview: Picture | None
    heats: tuple[tuple[Picture, str], ...]
    rows: tuple[tuple[str, ...], ...]


def policy_of(text: str) -> Policy:
    """A policy that somebody wrote into a page: it may name no files.

    Raises PolicyError: one sentence with its line for each thing that is wrong.
    """
    text = text.rstrip() + "\n"  # as files end, so that digests are theirs; editors trim it
    root = compose(text.encode("utf-8", "surrogatepass"), SOURCE)
    named = [
        (line_of(root, place), f"{what} is not read in this demo, which opens no files for a page")
        for place, what in _files(root.plain())
    ]
    if named:
        raise problems_error(SOURCE, named)
    return parse_policy(text, SOURCE)


def judged(
    path: str | Path,
    policy: Policy,
    *,
    only: str | None = None,
    space: str | None = None,
    scaled: bool | None = None,
    runtime: Runtime = "auto",
) -> list[Shown]:
    """The first images of a latents file.

    only: the id of the one to look at. space, scaled: what the file does not say. Raises
    LatentsError for a file without images, PolicyError and ModelError where the policy cannot be
    used.
    """
    scan = Scan(
        path,
        policy,
        space=space,
        scaled=scaled,
        previews=True,
        heatmaps=True,
        runtime=runtime,
    )
    wanted = (record for record in scan if only is None or record.id == only)
    records = list(islice(wanted, MAX_IMAGES))
    if not records:
        raise LatentsError("no latents are in this file")
    thresholds = {(one.id.name, one.id.sha256): one.thresholds for one in scan.models}
    return [_shown(record, thresholds) for record in records]


def _files(policy: Any) -> list[tuple[list[int | str], str]]:
    """The places in a policy's values that name a file, or a model that is not packaged."""
    found: list[tuple[list[int | str], str]] = []
    if not isinstance(policy, dict):
        return found
    model = policy.get("model")
    entry = CATALOG.get(model) if isinstance(model, str) else None
    if model is not None and (entry is None or not entry.bundled):
        found.append((["model"], "a model other than the packaged ones"))
    if policy.get("cascade") is not None:
        found.append((["cascade"], "a cascade"))
    answer = policy.get("on_block")
    if isinstance(answer, dict) and "placeholder" in answer:
        found.append((["on_block", "placeholder"], "a placeholder"))
    concepts = policy.get("concepts")
    for index, concept in enumerate(concepts if isinstance(concepts, list) else []):
        if isinstance(concept, dict) and "examples" in concept:
            found.append((["concepts", index, "examples"], "a file of examples"))
    return found


def _shown(record: ScanRecord, thresholds: Mapping[tuple[str, str], Mapping[str, float]]) -> Shown:
    model = record.judged_by
    judge = "no model" if model is None else f"{model.name} {model.sha256[:12]}"
    by = f"{judge}, policy {record.policy.name} {record.policy.sha256[:12]}"
    why = record.verdict.error or record.verdict.reason
    headline = f"{record.verdict.decision.upper()}\n{visible(why, 500)}\n{visible(by)}"
    preview = None if record.preview is None else _enlarged(record.preview)
    known = {} if model is None else thresholds.get((model.name, model.sha256), {})
    name = visible(record.id or f"image {record.index}", 60)
    return Shown(name, headline, preview, _heats(record, known), _rows(record))


def _rows(record: ScanRecord) -> tuple[tuple[str, ...], ...]:
    def said(one: Any) -> str:
        if not one.covered:
            return "not visible to this model"
        return "matched" if one.matched else ""

    return tuple(
        (
            one.id,
            one.action,
            f"{one.score:.3f}" if one.covered else "",
            f"{one.threshold_value:.3f}",
            one.unit,
            one.prompt if one.covered else "",
            said(one),
        )
        for one in record.ranked or record.verdict.concepts
    )


def _heats(record: ScanRecord, thresholds: Mapping[str, float]) -> tuple[tuple[Picture, str], ...]:
    """Over the preview: dark where a cell is under the threshold, yellow where it is over it."""
    preview, maps = record.preview, record.heatmaps or {}
    seen = [one for one in record.ranked if one.covered and one.id in maps]
    if preview is None or not seen:
        return ()
    gaps = {one.id: maps[one.id] - thresholds.get(one.id, 0.0) for one in seen}
    far = np.abs(np.concatenate([gap.ravel() for gap in gaps.values()]))
    far = far[np.isfinite(far)]
    # One scale for all concepts, so that their pictures compare; the most extreme cells saturate.
    span = max(float(np.percentile(far, 98)) if far.size else 0.0, 0.01)
    return tuple((_over(preview, gaps[one.id] / span), f"{one.id} {one.score:.3f}") for one in seen)


def _over(preview: Picture, gap: NDArray[Any]) -> Picture:
    """A heat map of -1 to 1 over a picture; NaN is lowest."""
    level = np.clip((np.nan_to_num(gap, nan=-1.0) + 1) / 2, 0, 1)
    colors = ramp()[(level * (LEVELS - 1)).round().astype(np.int64)].astype(np.float64)
    shown = _enlarged(preview)
    large = _resized(colors, *shown.shape[:2])
    opacity = large[..., 3:] / 255
    picture: Picture = (shown * (1 - opacity) + large[..., :3] * opacity).round().astype(np.uint8)
    return picture


def _enlarged(preview: Picture) -> Picture:
    """With a longer side of `SIDE`."""
    height, width = preview.shape[:2]
    rows, columns = (max(1, SIDE * n // max(height, width)) for n in (height, width))
    picture: Picture = _resized(preview, rows, columns)
    return picture


def _resized(cells: NDArray[Any], rows: int, columns: int) -> NDArray[Any]:
    """[h, w, c] to [rows, columns, c], each pixel from its nearest cell."""
    height, width = cells.shape[:2]
    return cells[np.arange(rows) * height // rows][:, np.arange(columns) * width // columns]
