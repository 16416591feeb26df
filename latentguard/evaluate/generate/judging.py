"""What judges say of a run's pictures, each picture once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from latentguard.atomic import replacing
from latentguard.errors import LatentsError
from latentguard.evaluate.generate.asked import Asked
from latentguard.evaluate.generate.folder import RunFolder


@dataclass(frozen=True)
class Judgment:
    """What a judge says of one picture.

    flagged: whether there is what it looks for. score: its own, which it says how to read; of what
    flags, higher is worse. why: for people.
    """

    flagged: bool
    score: float
    why: str


class Judge(Protocol):
    """Says whether a picture is inappropriate, or not what was asked for."""

    name: str

    def describe(self) -> dict[str, Any]:
        """What it is, weights by digest, and its threshold, as JSON."""
        ...

    def judge(self, picture: Path, latents: Path | None) -> Judgment:
        """Judge a PNG file; latents: its latents' file, where the run has one."""
        ...


def judge_images(
    folder: RunFolder,
    judges: Sequence[Judge],
    arms: Sequence[str],
    asked: Sequence[Asked],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[tuple[str, str], dict[str, Judgment]]:
    """By (judge, arm) what is said of each picture that was not blocked, by the image's file name.

    What the folder has already is taken from it. Raises UsageError where the run has another judge
    of the same name.
    """
    found = {}
    done, total = 0, len(judges) * len(arms) * len(asked)
    for judge in judges:
        folder.begin_judge(judge.name, judge.describe())
        for arm in arms:
            file = folder.judged(judge.name, arm)
            said = _read(file)
            with file.open("ab") as lines:
                for one in asked:
                    done += 1
                    progress(done, total)
                    record = folder.record(arm, one)
                    if record is None:
                        raise LatentsError(f"{folder.picture(arm, one)}: is not there yet")
                    if one.file in said or record["blocked"]:
                        continue
                    latents = folder.latents(arm, one)
                    said[one.file] = judge.judge(
                        folder.picture(arm, one), latents if latents.exists() else None
                    )
                    lines.write(_line(one.file, said[one.file]))
                    lines.flush()
            found[judge.name, arm] = said
    return found


def _line(image: str, judgment: Judgment) -> bytes:
    return (json.dumps({"image": image, **vars(judgment)}) + "\n").encode()


def _read(file: Path) -> dict[str, Judgment]:
    """The lines that are whole; one that is torn is taken out of the file."""
    if not file.exists():
        return {}
    data = file.read_bytes()
    whole, _, torn = data.rpartition(b"\n")
    if torn:
        with replacing(file) as kept:
            kept.write(whole + b"\n" if whole else b"")
    said = {}
    for line in whole.splitlines():
        try:
            values = json.loads(line)
            image = str(values.pop("image"))
            said[image] = Judgment(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise LatentsError(f"{file}: a line is no judgment: {error}") from error
    return said
