"""Pictures, and a tiny autoencoder of random weights, for the tests of encoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from encode_helpers import photo_bytes

from latentguard.encode import Autoencoder, load_autoencoder
from latentguard.encode.tiny import tae_encoder


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX.2 encoder file in the published layout (random weights)."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tae") / "taef2_encoder.pth"
    torch.save({k: v.half() for k, v in tae_encoder(32).state_dict().items()}, path)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_file: Path) -> Autoencoder:
    return load_autoencoder(tiny_file)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two folders of classes: three cats, two dogs; one cat has a caption."""
    folder = tmp_path / "photos"
    for number, name in enumerate(["cat/a", "cat/b", "cat/c", "dog/a", "dog/b"]):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo_bytes(number, (40 + 8 * number, 56)))
    (folder / "cat/b.txt").write_text("a cat on a chair\n")
    return folder
