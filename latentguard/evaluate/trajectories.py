"""Margins from a guard's own records: what real generations scored, step by step.

Two forms are read: JSON lines, an object for each image and step, as a guard's audit log has them
and `Verdict.to_dict` gives them ({"noise_level": ..., "concepts": [{"id": ..., "margin": ...}]},
with `request_id`, `image`, `model`, `model_sha256` and `space` where they are known, and `model` as
an object with `name` and `sha256` in verdicts); and the JSON
of whole sessions (`guard.to_json()`), one or a list. One harmless generation is one sample.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentguard.errors import LatentsError
from latentguard.evaluate.calibrate import Margins
from latentguard.judge import PURE_NOISE
from latentguard.policy import Policy

SAME_LEVEL = 1e-4
"""Noise levels that differ by less, relatively, are one: the verdicts' own tolerance."""

IDENTITY = ("model", "model_sha256", "space")


@dataclass(frozen=True)
class Scored:
    """What one image scored at one step.

    image: names the generation. identity: model, model_sha256, space, as far as they are said.
    margins: concept id -> margin. prompts: concept id -> the prompt that matched best.
    """

    image: tuple[Any, ...]
    noise_level: float
    identity: dict[str, str]
    margins: dict[str, float]
    prompts: dict[str, str]


def read_trajectories(
    paths: Sequence[str | Path],
    policy: Policy,
    model: tuple[str, str] | None = None,
    space: str | None = None,
) -> Margins:
    """Margins by concept and noise level from records of harmless generations.

    Args:
        paths: files of the forms above.
        policy: the one that the generations were scored under: its prompts are compared.
        model: (name, sha256) and `space` of the encoder, where the records do not say.

    An infinite noise level, where flow matching begins, is the level PURE_NOISE. Where one image
    was scored twice at a level, as second-order schedulers do, the higher margin counts.

    Raises:
        LatentsError: an unreadable line, an error in place of scores, an image that was steered or
            blocked, a missing model, records of several models, or of other prompts.
    """
    found: dict[str, dict[float, dict[tuple[Any, ...], float]]] = {}
    identity: dict[str, str] = {}
    levels: list[float] = []
    prompts = {concept.id: policy.labels_of(concept) for concept in policy.concepts}
    images = set()
    for where, scored in _all(paths):
        for key, value in scored.identity.items():
            if identity.setdefault(key, value) != value:
                raise LatentsError(
                    f"{where}: {key} is {value!r}, in the records before {identity[key]!r}: "
                    "calibrate one model at a time"
                )
        images.add(scored.image)
        level = _known(levels, scored.noise_level)
        for concept, margin in scored.margins.items():
            if concept not in prompts:
                raise LatentsError(
                    f"{where}: policy '{policy.name}' has no concept {concept!r}: it has "
                    f"{', '.join(prompts)}"
                )
            if concept in scored.prompts and scored.prompts[concept] not in prompts[concept]:
                raise LatentsError(
                    f"{where}: concept '{concept}' matched {scored.prompts[concept]!r}, which is "
                    f"no prompt of it in policy '{policy.name}': score with this policy"
                )
            values = found.setdefault(concept, {}).setdefault(level, {})
            values[scored.image] = max(margin, values.get(scored.image, -math.inf))
    if not found:
        raise LatentsError(f"no scores in {', '.join(map(str, paths))}")
    return Margins(
        *_identity(identity, model, space),
        {
            concept: {level: np.array(list(by.values())) for level, by in sorted(at.items())}
            for concept, at in found.items()
        },
        f"trajectories of {len(images):,} images",
    )


def _identity(
    found: Mapping[str, str], model: tuple[str, str] | None, space: str | None
) -> tuple[tuple[str, str], str]:
    given = dict(zip(IDENTITY, (*(model or (None, None)), space), strict=True))
    for key, value in given.items():
        if value is not None and found.get(key, value) != value:
            raise LatentsError(f"the records are of {key} {found[key]!r}, not {value!r}")
    whole = {key: found.get(key) or given[key] for key in IDENTITY}
    missing = [key for key, value in whole.items() if value is None]
    if missing:
        raise LatentsError(f"the records do not say {', '.join(missing)}: name the model")
    return (str(whole["model"]), str(whole["model_sha256"])), str(whole["space"])


def _known(levels: list[float], level: float) -> float:
    for known in levels:
        if math.isclose(known, level, rel_tol=SAME_LEVEL, abs_tol=SAME_LEVEL):
            return known
    levels.append(level)
    return level


def _all(paths: Iterable[str | Path]) -> Iterator[tuple[str, Scored]]:
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise LatentsError(f"{path}: cannot be read: {error}") from error
        for where, item in _objects(str(path), text):
            if not isinstance(item, Mapping):
                raise LatentsError(f"{where}: must be a JSON object, got {type(item).__name__}")
            try:
                for scored in _scored(item, where):
                    yield where, scored
            except (KeyError, TypeError, ValueError) as error:
                raise LatentsError(
                    f"{where}: must have noise_level and concepts with id and margin, or history "
                    f"({type(error).__name__}: {error})"
                ) from error


def _objects(path: str, text: str) -> Iterator[tuple[str, Any]]:
    """The JSON objects of a file: one document, or one a line."""
    try:
        whole = json.loads(text)
    except ValueError:
        pass
    else:
        if isinstance(whole, list):
            yield from ((f"{path}[{index}]", item) for index, item in enumerate(whole))
        else:
            yield path, whole
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:
                raise LatentsError(f"{path}:{number}: is not JSON: {error}") from error


def _scored(item: Mapping[str, Any], where: str) -> Iterator[Scored]:
    if "history" not in item:
        yield _one(item, item, where, item.get("image", 0))
        return
    for record in item["history"]:
        for index, image in enumerate(record["images"]):
            if image["verdict"] is None:
                _refuse_action(image, where)
                continue
            yield _one(item, {**image, **image["verdict"]}, where, index)


def _one(session: Mapping[str, Any], item: Mapping[str, Any], where: str, index: Any) -> Scored:
    if item.get("error"):
        raise LatentsError(f"{where}: has no scores but an error: {item['error']}")
    _refuse_action(item, where)
    level = item["noise_level"]
    # Without a name for the generation every line, or item of a list, is an image of its own.
    name = session.get("request_id", where)
    concepts = [concept for concept in item["concepts"] if concept.get("covered", True)]
    margins = {str(concept["id"]): float(concept["margin"]) for concept in concepts}
    if not all(map(math.isfinite, margins.values())):
        raise ValueError("margins must be finite")
    identity = {key: session[key] for key in IDENTITY if isinstance(session.get(key), str)}
    if isinstance(item.get("model"), Mapping):  # of a cascade, the model that this verdict is of
        identity |= {"model": item["model"]["name"], "model_sha256": item["model"]["sha256"]}
    return Scored(
        (name, index),
        PURE_NOISE if level is None else min(float(level), PURE_NOISE),
        identity,
        margins,
        {str(c["id"]): c["prompt"] for c in concepts if isinstance(c.get("prompt"), str)},
    )


def _refuse_action(item: Mapping[str, Any], where: str) -> None:
    done = item.get("action", item.get("outcome", "none"))
    if done != "none":
        raise LatentsError(
            f"{where}: an image was {done}, so it is no longer what the model would have "
            "made: record harmless generations under a policy whose actions are `observe`"
        )
