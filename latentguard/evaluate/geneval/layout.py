"""The folders that GenEval's own evaluator reads.

00000/metadata.jsonl    the prompt's line
00000/samples/0000.png  its images
00000/grid.png          all of them, for people
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from latentguard.atomic import replacing
from latentguard.evaluate.generate.asked import Asked
from latentguard.evaluate.geneval.prompts import Prompt

IMAGES = 4
SEED = 42


def asked_of(prompts: Sequence[Prompt], images: int = IMAGES, seed: int = SEED) -> list[Asked]:
    """`images` images of each prompt; the k-th of every prompt has the seed `seed` + k."""
    return [
        Asked(f"{number:05}/samples/{index:04}", number, index, prompt.text, seed + index)
        for number, prompt in enumerate(prompts)
        for index in range(images)
    ]


def write_metadata(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Each prompt's line in its folder of an arm's images."""
    for number, prompt in enumerate(prompts):
        target = folder / f"{number:05}" / "metadata.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as file:
            file.write(prompt.line.encode() + b"\n")


def write_grids(folder: Path, prompts: Sequence[Prompt], images: int) -> None:
    """The images of each prompt side by side, in rows of two."""
    from PIL import Image

    for number in range(len(prompts)):
        target = folder / f"{number:05}" / "grid.png"
        if target.exists():
            continue
        samples = [target.parent / "samples" / f"{index:04}.png" for index in range(images)]
        pictures = [Image.open(path).convert("RGB") for path in samples]
        width, height = (max(p.size[axis] for p in pictures) for axis in (0, 1))
        columns = min(2, len(pictures))
        grid = Image.new("RGB", (width * columns, height * -(-len(pictures) // columns)))
        for index, picture in enumerate(pictures):
            grid.paste(picture, (index % columns * width, index // columns * height))
        with replacing(target) as file:
            grid.save(file, "PNG")
