"""The files of a run: what was asked for, the images, a record of each, what judges said.

    manifest.json                       the benchmark, its images by digest, the generator, versions
    arms/ARM.json                       each arm: policy and model by digest
    images/ARM/FILE.png                 the pictures, and nothing that a benchmark does not expect
    latents/ARM/FILE.safetensors        their latents, where the generator gives them
    records/ARM/FILE.json               what the arm did about it; it is written last
    judged/JUDGE/judge.json, ARM.jsonl  what a judge said of each picture, one line each
    results.json, .md, .png, cost.json  the figures; seconds alone stand in cost.json

Every file appears whole or not at all, but for the lines of a judge, the last of which is left
out where it is torn. One process at a time may work on a run.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentguard.atomic import replacing
from latentguard.errors import LatentsError, UsageError
from latentguard.evaluate.generate.arms import Made
from latentguard.evaluate.generate.asked import Asked
from latentguard.files import save_latents

SCHEMA_VERSION = 1


class RunFolder:
    """A run's folder, new or gone on with.

    path: the folder. manifest: what the run is of, JSON-able.
    resume: go on with the run that is there; without one, begin.

    Raises:
        UsageError: there is a run, and `resume` is not said; or it is of something else.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], resume: bool = False) -> None:
        self.path = path
        file = path / "manifest.json"
        wanted = {"schema_version": SCHEMA_VERSION, **manifest}
        if file.exists():
            if not resume:
                raise UsageError(f"{path}: there is already a run; --resume continues it")
            _check_same(file, wanted)
            return
        if path.is_dir() and any(path.iterdir()):
            raise UsageError(f"{path}: the folder is not empty, and holds no run")
        path.mkdir(parents=True, exist_ok=True)
        write_json(file, wanted)

    @property
    def sha256(self) -> str:
        """Hex digest of the manifest."""
        return hashlib.sha256((self.path / "manifest.json").read_bytes()).hexdigest()

    def begin_arm(self, description: Mapping[str, Any]) -> None:
        """Note an arm. Raises UsageError where the run has it with another policy or model."""
        self._note(self.path / "arms" / f"{description['arm']}.json", description)

    def begin_judge(self, name: str, description: Mapping[str, Any]) -> None:
        """Note a judge. Raises UsageError where the run has another one of its name."""
        self._note(self.path / "judged" / name / "judge.json", description)

    def picture(self, arm: str, asked: Asked) -> Path:
        """Where a picture is, or goes."""
        return self.path / "images" / arm / f"{asked.file}.png"

    def latents(self, arm: str, asked: Asked) -> Path:
        """Where its latents are, or go."""
        return self.path / "latents" / arm / f"{asked.file}.safetensors"

    def judged(self, judge: str, arm: str) -> Path:
        """What a judge said of an arm's pictures."""
        return self.path / "judged" / judge / f"{arm}.jsonl"

    def keep(self, arm: str, asked: Asked, made: Made, seconds: float) -> None:
        """Write what was made; the record comes last, so that it stands for all of it."""
        picture = self.picture(arm, asked)
        picture.parent.mkdir(parents=True, exist_ok=True)
        encoded = io.BytesIO()
        made.picture.save(encoded, "PNG")
        with replacing(picture) as file:
            file.write(encoded.getvalue())
        if made.latents is not None:
            latents = self.latents(arm, asked)
            latents.parent.mkdir(parents=True, exist_ok=True)
            save_latents(latents, made.latents)
        record = {
            "row": asked.row,
            "index": asked.index,
            "seed": asked.seed,
            "png_sha256": hashlib.sha256(encoded.getvalue()).hexdigest(),
            "blocked": made.blocked,
            "reason": made.reason,
            "steps": made.steps,
            "steps_asked": made.steps_asked,
            "facts": dict(made.facts),
            "seconds": round(seconds, 4),
        }
        target = self._record(arm, asked)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, record)

    def record(self, arm: str, asked: Asked) -> dict[str, Any] | None:
        """The record of a finished image; None for one that is still to be made.

        Raises LatentsError where picture and record do not belong together.
        """
        file = self._record(arm, asked)
        if not file.exists():
            return None
        record: dict[str, Any] = read_json(file)
        picture = self.picture(arm, asked)
        found = None
        with suppress(FileNotFoundError):
            found = hashlib.sha256(picture.read_bytes()).hexdigest()
        if found != record.get("png_sha256") or record.get("seed") != asked.seed:
            raise LatentsError(
                f"{picture}: is not the picture that its record tells of; remove {file}, and it "
                "is made again"
            )
        return record

    def _record(self, arm: str, asked: Asked) -> Path:
        return self.path / "records" / arm / f"{asked.file}.json"

    def _note(self, file: Path, description: Mapping[str, Any]) -> None:
        if file.exists():
            _check_same(file, description)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, description)


def write_json(path: Path, value: Any) -> None:
    """JSON for people, keys in their order, the file whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """A JSON file of a run. Raises LatentsError where it is none."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise LatentsError(f"{path}: cannot be read as JSON: {error}") from error


def _check_same(file: Path, wanted: Mapping[str, Any]) -> None:
    found, asked = read_json(file), json.loads(json.dumps(wanted))
    if found == asked:
        return
    where, before, now = _difference(found, asked)
    raise UsageError(
        f"{file}: the run there is of something else: {where} was {json.dumps(before)[:200]}, and "
        f"is {json.dumps(now)[:200]} now; begin a run in another folder"
    )


def _difference(before: Any, now: Any, where: str = "") -> tuple[str, Any, Any]:
    """The first place where two JSON values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *now]:
            if before.get(key) != now.get(key):
                name = f"{where}.{key}" if where else str(key)
                return _difference(before.get(key), now.get(key), name)
    return where or "its content", before, now
