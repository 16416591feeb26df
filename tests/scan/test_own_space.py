"""A space of one's own through every room that takes one: its file, its model, its latents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from latentguard import LatentGuard, Latents, LatentSpace, Scorer
from latentguard.cli import app, scan
from latentguard.encoders import load_encoder
from latentguard.encoders.nano import WEIGHTS
from latentguard.errors import LatentsError, ModelError
from latentguard.files import load_latents, read_arrays
from latentguard.policy import load_policy
from latentguard.scan import scan_files
from latentguard.spaces import SPACES

ROOT = Path(__file__).parents[2]

if not any(command.name == "scan" for command in app.registered_commands):
    scan.register(app)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Path]:
    """A file of a space that is FLUX.2's under another name, its scale and shift being known."""
    flux2 = SPACES["flux2"].with_batch_norm([0.1] * 128, [3.0] * 128)
    space = replace(flux2, name="own-flux", statistics_of_vae=None)
    path = tmp_path / "own-flux.json"
    path.write_text(json.dumps(space.to_dict()), encoding="utf-8")
    before = dict(SPACES)
    yield path
    for name in SPACES.keys() - before.keys():
        del SPACES[name]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """nano-flux2 as a model of that space."""
    bundled = WEIGHTS / "nano-flux2.safetensors"
    with safetensors.safe_open(bundled, "pt") as file:
        metadata = file.metadata()
    path = tmp_path / "own-model.safetensors"
    save_file(load_file(bundled), path, metadata | {"space": "own-flux", "name": "own-model"})
    return path


@pytest.fixture
def latents() -> Latents:
    return load_latents(ROOT / "examples" / "latents.pt")


def test_scan(own: Path, model: Path, latents: Latents, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"reads latents of space 'own-flux', which is not known"):
        load_encoder(model, "cpu")
    np.save(tmp_path / "a.npy", latents.tensor[:17].numpy())
    usual = scan_files(ROOT / "examples" / "latents.pt", "family", device="cpu")
    expected = [record.verdict.decision for record in usual][:17]
    found = list(
        scan_files(tmp_path / "a.npy", "family", model, space=own, scaled=True, device="cpu")
    )
    assert [record.verdict.decision for record in found] == expected
    assert {record.space for record in found} == {"own-flux"}
    # Its raw latents convert by the file's own numbers.
    raw = Latents(latents.tensor[:17].float(), LatentSpace.get("own-flux"), True).to_raw()
    np.save(tmp_path / "b.npy", raw.tensor.numpy())
    found = list(
        scan_files(tmp_path / "b.npy", "family", model, space=own, scaled=False, device="cpu")
    )
    assert [record.verdict.decision for record in found] == expected
    # A file may name the space from now on; a bare one of its shape is a question.
    (record, *_) = read_arrays(tmp_path / "a.npy")
    assert "space own-flux has the same shape" in (record.error or "")


def test_the_command_line(own: Path, model: Path, latents: Latents, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", latents.tensor[15:16].numpy())
    options = ["--space", str(own), "--scaled", "--model", str(model), "--format", "json"]
    said = CliRunner().invoke(app, ["scan", str(tmp_path / "a.npy"), *options])
    record = json.loads(said.output.splitlines()[0])
    assert (record["space"], record["decision"], said.exit_code) == ("own-flux", "block", 1)


def test_scorer_and_guard(own: Path, model: Path, latents: Latents) -> None:
    scorer = Scorer("family", model, space=own, device="cpu")
    space = LatentSpace.get("own-flux")
    mine = Latents(latents.tensor[:2], space, scaled=True)
    usual = Scorer("family", "nano-flux2", device="cpu").verdicts(latents[:2])
    for found, expected in zip(scorer.verdicts(mine), usual, strict=True):
        assert [c.margin for c in found.concepts] == [c.margin for c in expected.concepts]
    guard = LatentGuard("family", model, space=space, device="cpu")
    assert guard.session().scorer.space == "own-flux"
    with pytest.raises(LatentsError, match="another latent space called own-flux"):
        Scorer("family", model, space=replace(space, shift=0.0), device="cpu")


def test_a_policy_may_name_the_space(own: Path, model: Path) -> None:
    policy = load_policy("family").model_copy(update={"space": "own-flux"})
    LatentSpace.of(own)
    assert Scorer(policy, model, device="cpu").space == "own-flux"


def test_a_space_with_a_view_has_a_model(own: Path) -> None:
    scorer = Scorer("family", space=own, device="cpu")
    assert (scorer.encoder.name, scorer.space) == ("nano-view", "own-flux")


def test_a_space_without_a_model_names_the_way_to_one() -> None:
    with pytest.raises(ModelError, match=r"32x32 cells.*`latentguard adapt`"):
        Scorer("family", space="sana", device="cpu")
    zeros = Latents(torch.zeros(1, 32, 8, 8), "sana", scaled=True)
    with pytest.raises(ModelError, match="no encoder reads latents of space sana"):
        Scorer("family", device="cpu").score(zeros)
