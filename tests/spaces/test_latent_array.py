"""LatentArray: the same numbers as Latents, without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from latentguard.errors import LatentsError
from latentguard.files import read_arrays, read_latents, save_latents
from latentguard.spaces import SPACES, LatentArray, Latents, LatentSpace, array_preview, rgb_preview
from latentguard.spaces.arrays import BFLOAT16, unpack, widened

STATISTICS = ([0.1 * n for n in range(128)], [1.0 + 0.01 * n for n in range(128)])


def spaces() -> list[LatentSpace]:
    """Every space that converts, with one number, one per channel and one per packed channel."""
    playground = LatentSpace.from_vae_config(
        {
            "latent_channels": 4,
            "scaling_factor": 0.5,
            "latents_mean": list(SPACES["sdxl"].mean or ()),
            "latents_std": list(SPACES["sdxl"].std or ()),
        }
    )
    flux2 = SPACES["flux2"].with_batch_norm(*STATISTICS)
    return [SPACES["sdxl"], SPACES["sd1"], SPACES["sd3"], SPACES["flux1"], playground, flux2]


def random(space: LatentSpace, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, space.channels, 6, 4, generator=generator)


@pytest.mark.parametrize("space", spaces(), ids=lambda space: f"{space}-{space.scale!s:.8}")
def test_conversions_and_previews_are_those_of_torch(space: LatentSpace) -> None:
    for scaled in (True, False):
        tensor = random(space)
        latents, array = Latents(tensor, space, scaled), LatentArray(tensor.numpy(), space, scaled)
        for one, other in (
            (latents.to_scaled(), array.to_scaled()),
            (latents.to_raw(), array.to_raw()),
        ):
            assert one.scaled is other.scaled
            # One rounding more or less of float32.
            assert np.allclose(one.tensor.numpy(), other.array, rtol=1e-6, atol=1e-6)
        levels = array_preview(array).astype(int) - rgb_preview(latents)
        assert np.abs(levels).max() <= 1


def test_flux2_without_its_statistics() -> None:
    array = LatentArray(random(SPACES["flux2"]).numpy(), SPACES["flux2"], True)
    assert array.to_scaled() is array
    with pytest.raises(LatentsError, match="raw latents need the batch-norm statistics"):
        array.to_raw()


@pytest.mark.parametrize("name", ["flux1", "flux2"])
def test_unpacking(name: str) -> None:
    space, tensor = SPACES[name], random(SPACES[name])
    tokens = space.to_packed(tensor).numpy()
    assert np.array_equal(unpack(tokens, space, 6, 4), tensor.numpy())
    with pytest.raises(LatentsError, match="give height and width"):
        unpack(tokens, space, 6, None)
    with pytest.raises(LatentsError, match=r"must be \[B, 4, "):
        unpack(tokens, space, 4, 4)


def test_bfloat16(tmp_path: Path) -> None:
    tensor = random(SPACES["flux2"]).to(torch.bfloat16)
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"a{suffix}"
        save_latents(path, Latents(tensor, "flux2", True))
        for index, record in enumerate(read_arrays(path)):
            assert record.latents is not None
            assert record.latents.array.dtype == BFLOAT16
            assert np.array_equal(widened(record.latents.array)[0], tensor[index].float().numpy())
            back = record.latents.to_torch().tensor
            assert back.dtype == torch.bfloat16
            assert torch.equal(back[0], tensor[index])


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda t: t[:, :, ::2, 1:3], "slices"),
        (lambda t: t.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3), "permuted"),
        (lambda t: t.to(memory_format=torch.channels_last), "channels last"),
        (lambda t: t.flip(0)[1], "one image"),
        (lambda t: torch.nn.Parameter(t), "a parameter"),
        (lambda t: [t[0], t[1][:, :2]], "a list of sizes"),
    ],
)
def test_tensors_that_lie_in_their_storage_in_other_ways(
    tmp_path: Path, make: object, name: str
) -> None:
    value = make(random(SPACES["flux2"]))  # type: ignore[operator]
    torch.save({"latents": value, "space": "flux2", "scaled": True}, tmp_path / "a.pt")
    images = list(value) if isinstance(value, list) or value.ndim == 4 else [value]
    records = list(read_latents(tmp_path / "a.pt"))
    assert len(records) == len(images)
    for record, image in zip(records, images, strict=True):
        assert record.latents is not None
        assert torch.equal(record.latents.tensor[0], image.detach())


def test_a_tensor_whose_numbers_are_to_be_negated(tmp_path: Path) -> None:
    complex_latents = torch.complex(random(SPACES["flux2"]), random(SPACES["flux2"], 1))
    torch.save(
        {"latents": complex_latents.conj().imag, "space": "flux2", "scaled": True},
        tmp_path / "a.pt",
    )
    (record,) = read_arrays(tmp_path / "a.pt")
    assert record.latents is None


def test_what_is_no_batch_of_latents() -> None:
    for array, message in (
        (np.zeros((1, 4, 2, 2), np.float32), r"must be \[B, 32, H, W\]"),
        (np.zeros((1, 32, 2, 2), np.int64), "must be floating point, got int64"),
        (np.zeros((0, 32, 2, 2), np.float32), "must not be empty"),
        (np.zeros((32, 2, 2), np.float32), "must be"),
    ):
        with pytest.raises(LatentsError, match=message):
            LatentArray(array, SPACES["flux2"], True)
