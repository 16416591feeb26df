"""Files of weights that are not what they seem: what was digested is what runs, and no number in a
file takes more memory than the file has bytes."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from clip_reference import SMALL_B8, Reference

from latentguard.encoders import checkpoint
from latentguard.encoders.catalog import LatentClipConfig
from latentguard.encoders.latent_clip import LatentCLIP, _random_tensors
from latentguard.encoders.nano import WEIGHTS, load_nano
from latentguard.errors import ModelError

TINY = LatentClipConfig(
    patch=8,
    embed_dim=64,
    text_width=64,
    grid=8,
    width=64,
    layers=1,
    text_layers=1,
    context_length=8,
    vocab_size=64,
)
MEGABYTE = 1024  # of the kibibytes that getrusage counts


def peak() -> int:
    """Mebibytes that this process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // MEGABYTE


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    """A converted file of a tiny Latent-CLIP."""
    tensors = _random_tensors(TINY, 0)
    digest = checkpoint.weights_sha256(tensors)
    path = tmp_path / "tiny.safetensors"
    checkpoint.write(path, checkpoint.Weights(tensors, TINY, "tiny", digest, ""))
    return path


def with_config(path: Path, config: LatentClipConfig, **changes: Any) -> None:
    """Exchange what a converted file says of its sizes."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    metadata["config"] = json.dumps({**asdict(config), **changes})
    tensors = {key: value.clone() for key, value in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(tensors, path, metadata)


# -- what was digested is what runs ----------------------------------------------------------


def test_a_file_that_is_written_to_after_it_was_loaded(converted: Path) -> None:
    encoder = LatentCLIP.load(converted)
    before = {key: value.clone() for key, value in encoder.vit.state_dict().items()}
    with converted.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(size // 2)
        file.write(b"\0" * (size // 2))
    for key, value in encoder.vit.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_checkpoint_that_is_written_to_after_it_was_read(
    reference_b8: Reference, official: Callable[..., Path]
) -> None:
    path = official(reference_b8.checkpoint())
    weights = checkpoint.read_official(path, SMALL_B8)
    assert weights.source_sha256 == checkpoint.file_sha256(path)
    before = {key: value.clone() for key, value in weights.tensors.items()}
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 4)
        file.write(b"\0" * (size // 2))
    for key, value in weights.tensors.items():
        assert torch.equal(value, before[key]), key


def test_a_checkpoint_that_is_exchanged_after_it_was_digested(
    reference_b8: Reference, official: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/fd").is_dir():
        pytest.skip("needs /dev/fd, through which torch maps a file that is open")
    path = official(reference_b8.checkpoint())
    expected = checkpoint.read_official(path, SMALL_B8)
    loaded = reference_b8.checkpoint()
    for value in loaded["state_dict"].values():
        value.zero_() if value.is_floating_point() else None
    other = official(loaded, "other.pt")
    load = torch.load

    def exchange_then_load(*args: Any, **kwargs: Any) -> Any:
        os.replace(other, path)
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", exchange_then_load)
    weights = checkpoint.read_official(path, SMALL_B8)
    assert weights.source_sha256 == expected.source_sha256
    assert torch.equal(weights.tensors["image.proj"], expected.tensors["image.proj"])


def test_a_nano_model_that_is_exchanged_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = WEIGHTS / "nano-flux2.safetensors"
    path, other = tmp_path / "nano.safetensors", tmp_path / "other.safetensors"
    path.write_bytes(source.read_bytes())
    with safetensors.safe_open(source, framework="pt") as file:
        metadata = dict(file.metadata()) | {"name": "exchanged"}
    safetensors.torch.save_file(safetensors.torch.load_file(source), other, metadata)
    read = Path.read_bytes
    exchanged = []

    def read_then_exchange(self: Path) -> bytes:
        data = read(self)
        if self == path:
            exchanged.append(os.replace(other, path))
        return data

    monkeypatch.setattr(Path, "read_bytes", read_then_exchange)
    assert load_nano(path).name == "nano-flux2"


def test_a_converted_file_of_another_checkpoint_in_the_cache(
    reference_b8: Reference, official: Callable[..., Path], own_cache: Path
) -> None:
    path = official(reference_b8.checkpoint())
    LatentCLIP.load(path, config=SMALL_B8)
    (kept,) = (own_cache / "converted").iterdir()
    checkpoint.write(kept, replace(checkpoint.read_converted(kept), source_sha256="0" * 64))
    with pytest.raises(ModelError, match="was not converted from"):
        LatentCLIP.load(path, config=SMALL_B8)


def test_a_checkpoint_with_another_digest(
    reference_b8: Reference, official: Callable[..., Path]
) -> None:
    path = official(reference_b8.checkpoint())
    with pytest.raises(ModelError, match=r"has SHA-256 [0-9a-f]{64}, not the expected 000"):
        checkpoint.read_official(path, SMALL_B8, "0" * 64)


def test_a_fifo_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    os.mkfifo(path)
    with pytest.raises(ModelError, match="is not a regular file"):
        checkpoint.read_converted(path)


# -- no number takes more memory than the file has bytes -------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"channels": 4096, "width": 4096, "hidden": 4096},
        {"channels": 32, "depth": 4000},
        {"channels": 10**9},
        {"channels": True},
    ],
)
def test_a_nano_model_that_says_it_is_large(tmp_path: Path, config: dict[str, Any]) -> None:
    with safetensors.safe_open(WEIGHTS / "nano-flux2.safetensors", framework="pt") as file:
        metadata = dict(file.metadata()) | {"config": json.dumps(config)}
    path = tmp_path / "large.safetensors"
    safetensors.torch.save_file({"net.x": torch.zeros(3)}, path, metadata)
    before = peak()
    with pytest.raises(ModelError, match="damaged nano model"):
        load_nano(path, space="sdxl")
    assert peak() - before < 300


def test_a_view_of_more_pixels_than_a_nano_model_may_have(tmp_path: Path) -> None:
    source = WEIGHTS / "nano-view.safetensors"
    with safetensors.safe_open(source, framework="pt") as file:
        metadata = dict(file.metadata())
    metadata["config"] = json.dumps({**json.loads(metadata["config"]), "size": 10**6})
    path = tmp_path / "large.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(source), path, metadata)
    with pytest.raises(ModelError, match="size must be a whole number from 1 to 4096"):
        load_nano(path, space="sdxl")


@pytest.mark.parametrize("key", ["layers", "text_layers"])
def test_more_layers_than_a_file_has_tensors(converted: Path, key: str) -> None:
    with_config(converted, TINY, **{key: 65536})
    before = peak()
    with pytest.raises(ModelError, match=r"layers in \d+ tensors"):
        LatentCLIP.load(converted)
    assert peak() - before < 100


def test_a_context_whose_mask_would_not_fit(converted: Path) -> None:
    with_config(converted, TINY, context_length=65536)
    with pytest.raises(ModelError, match="`context_length` must be at most 1024, got 65536"):
        LatentCLIP.load(converted)


def test_a_checkpoint_whose_tensors_repeat_their_numbers(
    reference_b8: Reference, official: Callable[..., Path]
) -> None:
    loaded = reference_b8.checkpoint()
    for key, value in loaded["state_dict"].items():
        if value.numel() > 1000:
            loaded["state_dict"][key] = torch.zeros(1).expand(value.shape)
    path = official(loaded)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(ModelError, match="states tensors that are larger than the file"):
        checkpoint.read_official(path, SMALL_B8)


def test_a_header_with_sizes_that_the_file_does_not_have(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": checkpoint.FORMAT, "schema_version": "1"},
        "x": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 4]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "large.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    with pytest.raises(ModelError, match="tensors that are larger than the file"):
        checkpoint.read_converted(path)
