"""The bundled latents: what they are, what they show, what the shipped policies make of them."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="reading latents needs torch")

from latentguard.files import load_latents  # noqa: E402
from latentguard.scan import scan_files  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LATENTS = EXAMPLES / "latents.pt"

# The weapons policy calls them otherwise, and lets the rest pass.
WEAPONS = {"firearms": "handguns", "blades": "blades"}


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location(
            "make_examples", EXAMPLES / "make_examples.py"
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules["make_examples"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(EXAMPLES))


def test_the_file_says_what_it_is(recipe):
    latents = load_latents(LATENTS)
    assert latents.space.name == "flux2"
    assert latents.scaled is True
    assert latents.tensor.shape == (25, 32, 32, 32)
    assert latents.tensor.dtype == torch.float16
    assert list(latents.ids) == [*recipe.PHOTOS, *recipe.DRAWN]
    assert LATENTS.stat().st_size < 2 << 20


def test_readme_names_every_picture_and_what_it_shows(recipe):
    rows = re.findall(
        r"^\| `([\w-]+)` \|.*\| ([^|]+) \|$", (EXAMPLES / "README.md").read_text(), re.M
    )
    stated = dict(rows)
    assert list(stated) == [*recipe.PHOTOS, *recipe.DRAWN]
    for name, drawn in recipe.DRAWN.items():
        assert stated[name] == (drawn.concept or "harmless")
    for name in recipe.PHOTOS:
        assert re.search(r"CC0|CC BY 2\.0|public domain", stated[name])


@pytest.mark.parametrize("policy", ["family", "weapons"])
def test_the_policy_catches_the_right_ones_and_lets_the_rest_pass(recipe, policy):
    """Through the real scan, with the bundled model."""
    wrong = []
    records = list(scan_files(LATENTS, policy, "nano-flux2"))
    assert [r.id for r in records] == [*recipe.PHOTOS, *recipe.DRAWN]
    for record in records:
        drawn = recipe.DRAWN.get(record.id)
        concept = drawn.concept if drawn else None
        if policy == "weapons":
            concept = WEAPONS.get(concept)
        matched = [c.id for c in record.verdict.concepts if c.matched]
        caught = record.verdict.decision in ("review", "block") and concept in matched
        passed = record.verdict.decision == "allow"
        if not (caught if concept else passed):
            wrong.append((record.id, concept, record.verdict.decision, record.verdict.reason))
    assert not wrong


@pytest.mark.parametrize("body", ["beer-glass", "beer-bottle", "wine-bottle"])
def test_turned_bodies(recipe, body):
    import artwork
    import numpy as np

    picture = artwork.lathe(body, 120)
    assert picture.mode == "RGBA"
    assert abs(picture.height - 120) <= 1
    alpha = np.asarray(picture)[..., 3] > 127
    assert (alpha == alpha[:, ::-1]).mean() > 0.98  # turned on a lathe: left is right
    assert 0.5 < alpha.mean() < 1


def test_paste_and_square(recipe):
    import artwork
    import numpy as np
    from PIL import Image

    wide = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (100, 1)))
    background = artwork.square(wide)
    assert background.size == (256, 256)
    assert np.asarray(background)[:, 0].mean() == pytest.approx(50, abs=1)
    red = Image.new("RGBA", (40, 20), (255, 0, 0, 255))
    drawn = np.asarray(artwork.paste(background, red, center=(0.25, 0.5)))
    y, x = np.nonzero((drawn == (255, 0, 0)).all(-1))
    assert (x.min(), x.max() + 1, y.min(), y.max() + 1) == (44, 84, 118, 138)
