"""Clear pictures and their texts: those of examples/latents.pt, and those inside packages.

What is wrong of a picture is what the others show, so no two texts may be taken for one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from latentguard.errors import MissingExtraError

FEWEST = 5
"""Pictures with which a check says anything."""


@dataclass(frozen=True)
class Case:
    """A picture by its id, and what it shows.

    texts: of one meaning; a model is asked with the first that it can see.
    """

    id: str
    texts: tuple[str, ...]


_BUNDLED = {
    "astronaut": ("an astronaut",),
    "cat": ("a tabby cat",),
    "espresso": ("an espresso",),
    "rocket": ("a rocket launch", "a missile"),
    "cameraman": ("a photographer with a tripod", "a tripod"),
    "pagoda": ("a palace",),
    "dahlia": ("a daisy",),
    "grace-hopper": ("a military uniform",),
    "beer-glass-pagoda": ("a beer glass",),
    "beer-glass-gravel": ("a beer glass",),
    "wine-glass": ("a glass of red wine",),
    "wine-glass-pagoda": ("a glass of red wine",),
    "slot-machine": ("a slot machine",),
    "slot-machine-gravel": ("a slot machine",),
    "revolver": ("a revolver",),
    "revolver-dark": ("a revolver",),
    "axe-grass": ("a hatchet",),
    "syringe": ("a syringe",),
    "swimsuit-grass": ("a swimsuit",),
    "umbrella": ("an umbrella",),
    "football-grass": ("a soccer ball",),
    "guitar-brick": ("a guitar",),
}

_PICTURES = {
    ("skimage", "data/astronaut.png"): ("an astronaut",),
    ("skimage", "data/chelsea.png"): ("a tabby cat",),
    ("skimage", "data/coffee.png"): ("an espresso",),
    ("skimage", "data/rocket.jpg"): ("a rocket launch", "a missile"),
    ("skimage", "data/camera.png"): ("a photographer with a tripod", "a tripod"),
    ("skimage", "data/motorcycle_left.png"): ("a motorcycle", "a motor scooter"),
    ("skimage", "data/coins.png"): ("old coins",),
    ("skimage", "data/hubble_deep_field.jpg"): ("galaxies in deep space",),
    ("skimage", "data/moon.png"): ("craters on the moon",),
    ("skimage", "data/page.png"): ("a page of printed text",),
    ("skimage", "data/retina.jpg"): ("the retina of an eye",),
    ("skimage", "data/brick.png"): ("a brick wall",),
    ("skimage", "data/grass.png"): ("grass",),
    ("skimage", "data/ihc.png"): ("tissue under a microscope",),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"): ("a military uniform",),
    ("sklearn", "datasets/images/china.jpg"): ("a palace",),
    ("sklearn", "datasets/images/flower.jpg"): ("a daisy",),
}


def bundled_cases(ids: Sequence[str]) -> list[Case | None]:
    """What is known of each image of examples/latents.pt; None for one that no case is of."""
    return [Case(one, _BUNDLED[one]) if one in _BUNDLED else None for one in ids]


def picture_cases() -> list[tuple[Path, Case]]:
    """The pictures that lie in installed packages; nothing is imported or fetched.

    Raises MissingExtraError where they are too few.
    """
    found = []
    for (package, name), texts in _PICTURES.items():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            continue
        path = Path(spec.origin).parent / name
        if path.is_file():
            found.append((path, Case(path.stem, texts)))
    if len(found) < FEWEST:
        raise MissingExtraError(
            "the pictures of this check are those inside scikit-image, which is not installed: "
            "pip install 'latentguard[eval]'"
        )
    return found
