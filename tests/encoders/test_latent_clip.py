"""Latent-CLIP against open_clip's own towers on the same weights, and its files."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clip_reference import SMALL_B4, SMALL_B8, Reference, make_reference
from torch import Tensor

from latentguard import ops
from latentguard.encoders import Encoder, load_encoder, strongest_view
from latentguard.encoders import checkpoint as files
from latentguard.encoders.catalog import CATALOG, LatentClipConfig
from latentguard.encoders.header import read_metadata
from latentguard.encoders.latent_clip import LatentCLIP
from latentguard.encoders.resize import Tile
from latentguard.errors import LatentsError, ModelError
from latentguard.scorer import Scorer
from latentguard.spaces import SCALINGS, Latents, Prediction

Write = Callable[..., Path]

# Two fp32 implementations of the same network differ by rounding alone; the project promises 1e-5.
# Worst seen on unit vectors: 1.3e-6 here, 2.3e-7 at the published sizes.
CLOSE = 1e-5
SCALE = 0.13025  # sdxl's
SIZES = [(64, 64), (128, 128), (96, 64), (48, 72)]
TEXTS = ["a photo of a revolver", "beer", "a slot machine in a casino, neon light, at night", "x"]


def raw_latents(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Noise of the size of unscaled SDXL latents."""
    generator = torch.Generator().manual_seed(seed)
    return 6 * torch.randn(batch, 4, height, width, generator=generator)


def load(reference: Reference, official: Write, **options: Any) -> LatentCLIP:
    return LatentCLIP.load(official(reference.checkpoint()), config=reference.config, **options)


@pytest.fixture
def encoder(reference_b8: Reference, official: Write) -> LatentCLIP:
    return load(reference_b8, official)


# --- the same numbers as open_clip -----------------------------------------------------------


@pytest.mark.parametrize("which", ["reference_b8", "reference_b4"])
@pytest.mark.parametrize("size", SIZES)
def test_images_equal_open_clip(
    which: str, size: tuple[int, int], official: Write, request: pytest.FixtureRequest
) -> None:
    reference: Reference = request.getfixturevalue(which)
    encoder = load(reference, official)
    raw = raw_latents(2, *size)
    got = encoder.encode_latents(Latents(raw, "sdxl", scaled=False))
    torch.testing.assert_close(got, reference.encode_latents(raw), atol=CLOSE, rtol=0)
    # Other latents give another embedding, or agreement would say little.
    assert (got[0] - got[1]).norm() > 0.1


@pytest.mark.parametrize("which", ["reference_b8", "reference_b4"])
def test_texts_equal_open_clip(which: str, official: Write, request: pytest.FixtureRequest) -> None:
    reference: Reference = request.getfixturevalue(which)
    encoder = load(reference, official)
    got = encoder.encode_text(TEXTS)
    torch.testing.assert_close(got, reference.encode_text(TEXTS), atol=CLOSE, rtol=0)


def test_texts_in_chunks_keep_their_order(
    encoder: LatentCLIP, reference_b8: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentguard.encoders.clip_text.CHUNK", 3)
    texts = [f"{'very ' * (index % 5)}odd number {index}" for index in range(11)]
    got = encoder.encode_text(texts)
    torch.testing.assert_close(got, reference_b8.encode_text(texts), atol=CLOSE, rtol=0)


def test_gradient_equals_open_clip(encoder: LatentCLIP, reference_b8: Reference) -> None:
    direction = torch.randn(2, encoder.dim, generator=torch.Generator().manual_seed(1))
    gradients = []
    for encode in (
        lambda x: encoder.encode_latents(Latents(x, "sdxl", scaled=False)),
        reference_b8.encode_latents,
    ):
        raw = raw_latents(2, 64, 64).requires_grad_()
        (encode(raw) * direction).sum().backward()
        assert raw.grad is not None
        gradients.append(raw.grad)
    # Relative to the largest gradient; worst seen 7e-6.
    scale = gradients[1].abs().max().item()
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4 * scale, rtol=0)


@pytest.mark.slow
def test_full_size(official: Write) -> None:
    """One published configuration as it is, from an official checkpoint in half precision."""
    config = CATALOG["latent-clip-b8"].config
    assert config is not None
    reference = make_reference(config, attention=1.0)
    for tower in (reference.image, reference.text):
        tower.half().float()
    encoder = LatentCLIP.load(official(reference.checkpoint(torch.float16)))
    assert (encoder.name, encoder.dim, encoder.dtype) == ("latent-clip-b8", 512, torch.float32)
    raw = raw_latents(1, 64, 64)
    got = encoder.encode_latents(Latents(raw, "sdxl", scaled=False))
    torch.testing.assert_close(got, reference.encode_latents(raw), atol=CLOSE, rtol=0)
    got = encoder.encode_text(TEXTS[:2])
    torch.testing.assert_close(got, reference.encode_text(TEXTS[:2]), atol=CLOSE, rtol=0)


# --- what an encoder promises ----------------------------------------------------------------


def test_follows_the_protocol(encoder: LatentCLIP) -> None:
    assert isinstance(encoder, Encoder)
    assert (encoder.space, encoder.needs_scaled, encoder.dim) == ("sdxl", False, 512)
    assert encoder.logit_scale == pytest.approx(50.0)
    assert len(encoder.sha256) == 64
    assert encoder.coverage(TEXTS).tolist() == [1.0] * len(TEXTS)
    embedded = encoder.encode_text(encoder.neutral_prompts)
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(len(encoder.neutral_prompts)))
    assert encoder.encode_text([]).shape == (0, 512)


def test_scaled_latents_are_converted(encoder: LatentCLIP) -> None:
    raw = raw_latents(2, 64, 64)
    want = encoder.encode_latents(Latents(raw, "sdxl", scaled=False))
    got = encoder.encode_latents(Latents(raw * SCALE, "sdxl", scaled=True))
    torch.testing.assert_close(got, want, atol=CLOSE, rtol=0)
    misread = encoder.encode_latents(Latents(raw * SCALE, "sdxl", scaled=False))
    assert (misread - want).norm(dim=-1).min() > 0.05


def test_a_model_may_read_scaled_latents() -> None:
    encoder = LatentCLIP.random(replace(SMALL_B8, needs_scaled=True))
    scaled = raw_latents(1, 64, 64) * SCALE
    want = encoder.head.embed(encoder.features(scaled).pooled)
    got = encoder.encode_latents(Latents(scaled / SCALE, "sdxl", scaled=False))
    torch.testing.assert_close(got, want, atol=CLOSE, rtol=0)


def test_other_spaces_and_shapes_are_refused(encoder: LatentCLIP) -> None:
    with pytest.raises(LatentsError, match="reads latents of space sdxl, got sd1"):
        encoder.encode_latents(Latents(torch.randn(1, 4, 64, 64), "sd1", scaled=False))
    with pytest.raises(LatentsError, match=r"shape \[B, 4, H, W\], got \[1, 16, 64, 64\]"):
        encoder.features(torch.randn(1, 16, 64, 64))
    one = torch.ones(1)
    with pytest.raises(LatentsError, match="predicted noise must have the shape"):
        encoder.features(torch.randn(1, 4, 64, 64), torch.randn(1, 4, 32, 64), one, one)


def test_prompts_that_would_be_cut_are_refused(encoder: LatentCLIP) -> None:
    encoder.encode_text(["knife " * 75])
    with pytest.raises(ModelError, match=r"knife.* has 78 tokens, the model reads 77"):
        encoder.encode_text(["gun", "knife " * 76])


def test_the_head_gives_the_embedding_to_the_operators(encoder: LatentCLIP) -> None:
    raw = raw_latents(2, 64, 64)
    bank = encoder.encode_text(TEXTS)
    segments = torch.tensor([[0, 1], [1, 3]], dtype=torch.int32)
    against = torch.tensor([[3, 4], [3, 4]], dtype=torch.int32)
    head = encoder.head
    features = encoder.features(raw)
    _, margin, _ = ops.concept_similarity(
        features.pooled.contiguous(),
        head.ln_weight,
        head.ln_bias,
        head.eps,
        head.projection,
        bank,
        segments,
        bank,
        against,
        encoder.logit_scale,
    )
    cosine = encoder.encode_latents(Latents(raw, "sdxl", scaled=False)) @ bank.t()
    want = torch.stack((cosine[:, 0], cosine[:, 1:3].amax(1)), dim=1) - cosine[:, 3:]
    torch.testing.assert_close(margin, want, atol=CLOSE, rtol=0)


# Half precision rounds to 8 (bfloat16) or 11 (float16) bits in each of a few dozen layers: worst
# cosine seen 0.99990 and 0.999998.
@pytest.mark.parametrize(("dtype", "least"), [(torch.float16, 0.9999), (torch.bfloat16, 0.999)])
@pytest.mark.parametrize("resize", ["interpolate", "pool"])
def test_half_precision_weights(dtype: torch.dtype, least: float, resize: Any) -> None:
    raw = Latents(raw_latents(2, 52, 76), "sdxl", scaled=False)
    full = LatentCLIP.random(SMALL_B8, resize=resize)
    images, texts = full.encode_latents(raw), full.encode_text(TEXTS)
    half = full.to(dtype=dtype)
    assert half.features(raw.tensor).pooled.dtype == dtype
    for got, want in ((half.encode_latents(raw), images), (half.encode_text(TEXTS), texts)):
        assert got.dtype == torch.float32
        assert (got * want).sum(-1).min() > least


# --- sizes -----------------------------------------------------------------------------------


def test_a_side_that_is_no_multiple_is_continued_by_its_edge(
    encoder: LatentCLIP, reference_b8: Reference
) -> None:
    raw = raw_latents(2, 52, 76)
    padded = F.pad(raw, (0, 4, 0, 4), mode="replicate")
    got = encoder.encode_latents(Latents(raw, "sdxl", scaled=False))
    torch.testing.assert_close(got, reference_b8.encode_latents(padded), atol=CLOSE, rtol=0)
    features = encoder.features(raw)
    assert (features.grid, features.tiles) == ((7, 10), 1)
    assert features.tokens.shape == (2, 70, 128)


@pytest.mark.parametrize("corner", [(51, 75), (51, 0), (0, 75)])
def test_nothing_is_cropped(encoder: LatentCLIP, corner: tuple[int, int]) -> None:
    for resize in ("interpolate", "pool", "tile"):
        encoder.resize = resize  # type: ignore[assignment]
        raw = raw_latents(1, 52, 76).requires_grad_()
        encoder.features(raw).pooled.sum().backward()
        assert raw.grad is not None
        assert raw.grad[0, :, corner[0], corner[1]].abs().max() > 0, resize


@pytest.mark.parametrize("size", [(128, 128), (96, 64), (52, 76), (20, 40)])
def test_pooling_to_the_trained_grid(encoder: LatentCLIP, size: tuple[int, int]) -> None:
    raw = raw_latents(2, *size)
    encoder.resize = "pool"
    features = encoder.features(raw)
    pooled = F.interpolate(raw, (64, 64), mode="area")
    torch.testing.assert_close(features.pooled, encoder.features(pooled).pooled)
    assert features.grid == (8, 8)


def test_tiles_are_the_whole_and_its_parts(encoder: LatentCLIP) -> None:
    raw = raw_latents(2, 96, 128)
    encoder.resize = "tile"
    features = encoder.features(raw)
    assert (features.tiles, features.grid) == (5, (12, 16))
    views = features.pooled.reshape(2, 5, -1)
    whole = F.interpolate(raw, (64, 64), mode="area")
    torch.testing.assert_close(views[:, 0], encoder.features(whole).pooled)
    corners = [(0, 0), (0, 64), (32, 0), (32, 64)]
    for index, (y, x) in enumerate(corners, start=1):
        part = encoder.features(raw[:, :, y : y + 64, x : x + 64])
        torch.testing.assert_close(views[:, index], part.pooled)
    # Row 6 of the grid is nearer to the center of the lower views, whose rows start at 4.
    lower = encoder.features(raw[:, :, 32:96, 64:128]).tokens.reshape(2, 8, 8, -1)
    tokens = features.tokens.reshape(2, 12, 16, -1)
    torch.testing.assert_close(tokens[:, 6:, 8:], lower[:, 2:])


def test_the_trained_size_is_a_single_tile(encoder: LatentCLIP) -> None:
    raw = raw_latents(2, 64, 64)
    want = encoder.features(raw)
    encoder.resize = "tile"
    got = encoder.features(raw)
    assert got.tiles == 1
    torch.testing.assert_close(got.pooled, want.pooled)
    torch.testing.assert_close(got.tokens, want.tokens)


def test_tiles_have_no_single_embedding(encoder: LatentCLIP) -> None:
    encoder.resize = "tile"
    with pytest.raises(ModelError, match="reads 5 views of an image of 128x128 cells"):
        encoder.encode_latents(Latents(raw_latents(1, 128, 128), "sdxl", scaled=False))
    with pytest.raises(ModelError, match="interpolate, pool, tile, got 'crop'"):
        encoder.resize = "crop"  # type: ignore[assignment]


@pytest.mark.parametrize("patch", [4, 8])
def test_tiles_cover_every_size(patch: int) -> None:
    for height in range(1, 300, 7):
        tile = Tile(height, 64, 64, patch)
        seen = {row * patch + offset for row in tile.rows for offset in range(64)}
        assert seen == set(range(tile.extent[0]))
        assert tile.extent[0] >= height


def test_the_strongest_view_decides() -> None:
    margin = torch.tensor([[0.1, 0.5], [0.3, 0.2], [-0.1, torch.nan], [-0.2, 0.9]])
    best = torch.arange(8).reshape(4, 2)
    probability, strongest, prompt = strongest_view(2, margin * 2, margin, best)
    assert prompt.tolist() == [[2, 1], [4, 5]]
    torch.testing.assert_close(strongest[0], torch.tensor([0.3, 0.5]))
    assert strongest[1, 1].isnan()
    assert probability[1, 1].isnan()


@pytest.mark.parametrize("resize", ["interpolate", "pool", "tile"])
@pytest.mark.parametrize("size", [(64, 64), (52, 76)])
def test_noise_is_taken_off(resize: Any, size: tuple[int, int]) -> None:
    # In float64, where the rounding of the subtraction is far below the tolerance.
    encoder = LatentCLIP.random(SMALL_B8, resize=resize).to(dtype=torch.float64)
    clean, noise = raw_latents(2, *size).double(), raw_latents(2, *size, seed=1).double()
    alpha, sigma = torch.tensor([0.75, 0.5]), torch.tensor([0.5, 0.875])
    noisy = alpha.view(-1, 1, 1, 1) * clean + sigma.view(-1, 1, 1, 1) * noise
    got = encoder.features(noisy, noise, alpha, sigma)
    want = encoder.features(clean)
    torch.testing.assert_close(got.pooled, want.pooled, atol=1e-9, rtol=0)
    torch.testing.assert_close(got.tokens, want.tokens, atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_scored(dtype: torch.dtype) -> None:
    encoder = LatentCLIP.random(SMALL_B8)
    latents = Latents(raw_latents(3, 64, 64), "sdxl", scaled=False)
    want = Scorer("weapons", encoder).score(latents)
    got = Scorer("weapons", encoder.to(dtype=dtype)).score(latents)
    # Cosines of vectors rounded to 11 or 8 bits: worst seen 1e-4 and 1.2e-3.
    torch.testing.assert_close(got.margin.float(), want.margin, atol=5e-3, rtol=0)


@pytest.mark.parametrize("resize", ["interpolate", "pool", "tile"])
def test_every_way_of_resizing_gives_one_verdict_an_image(resize: Any) -> None:
    scorer = Scorer("weapons", LatentCLIP.random(SMALL_B8, resize=resize))
    latents = Latents(raw_latents(3, 128, 96), "sdxl", scaled=False)
    scores = scorer.score(latents)
    verdicts = scorer.verdicts(latents)
    assert scores.margin.shape == (3, len(scorer.policy.concepts))
    assert [verdict.error for verdict in verdicts] == [None] * 3
    alone = scorer.score(latents[1])
    torch.testing.assert_close(alone.margin[0], scores.margin[1], atol=CLOSE, rtol=0)


# --- random weights --------------------------------------------------------------------------


def test_random_weights_come_from_the_seed_and_say_so() -> None:
    first, again = LatentCLIP.random(SMALL_B8), LatentCLIP.random(SMALL_B8)
    other = LatentCLIP.random(SMALL_B8, seed=1)
    assert first.sha256 == again.sha256 != other.sha256
    assert "random" in first.name
    with pytest.raises(ModelError, match="choose from latent-clip-b4-plus, latent-clip-b8"):
        LatentCLIP.random("nano-sdxl")


# --- official checkpoints --------------------------------------------------------------------


class Evil:
    """Runs a command when it is unpickled carelessly."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("place", ["top", "state_dict", "optimizer"])
def test_a_malicious_checkpoint_is_refused(
    reference_b8: Reference, official: Write, tmp_path: Path, place: str
) -> None:
    proof = tmp_path / "executed"
    loaded = reference_b8.checkpoint()
    (loaded if place == "top" else loaded[place])["evil"] = Evil(proof)
    path = official(loaded)
    with pytest.raises(ModelError, match="refused, it holds more than tensors"):
        LatentCLIP.load(path, config=SMALL_B8)
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists(), "the attack itself does not work, so nothing was tested"


def test_a_checkpoint_written_with_numpy_1(
    reference_b8: Reference, official: Write, tmp_path: Path
) -> None:
    new, old = official(reference_b8.checkpoint()), tmp_path / "numpy1.pt"
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(name, data)
    want, got = (LatentCLIP.load(path, config=SMALL_B8) for path in (new, old))
    assert got.sha256 == want.sha256


def change(loaded: dict[str, Any], key: str, value: Tensor | None) -> dict[str, Any]:
    state = loaded["state_dict"]
    if value is None:
        del state[key]
    else:
        state[key] = value
    return loaded


VISION = "module.visual.latent_vit."


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        (f"{VISION}ln_post.bias", None, r"missing image\.ln_post\.bias"),
        ("module.ln_final.weight", None, r"missing text\.ln_final\.weight"),
        ("module.logit_scale", None, "missing logit_scale"),
        (f"{VISION}transformer.resblocks.2.ln_1.bias", torch.zeros(128), r"unexpected image\.tr"),
        ("module.visual.vae_decoder.bias", torch.zeros(3), r"unexpected text\.visual\.vae_decoder"),
        (f"{VISION}proj", torch.zeros(64, 512), r"`image\.proj` must be .* \[128, 512\], got"),
        (f"{VISION}conv1.weight", None, "not a Latent-CLIP checkpoint"),
        ("module.ln_final.bias", torch.zeros(128, dtype=torch.int64), r"got torch\.int64 \[128\]"),
        ("module.ln_final.bias", torch.full((128,), torch.nan), r"NaN or infinite .* text\.ln_fin"),
        ("module.logit_scale", torch.tensor(900.0), "logarithm of 1 to 1000, got 900"),
        ("ln_final.weight", torch.ones(128), r"holds ln_final\.weight twice"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    reference_b8: Reference, official: Write, key: str, value: Tensor | None, says: str
) -> None:
    path = official(change(reference_b8.checkpoint(), key, value))
    with pytest.raises(ModelError, match=says):
        LatentCLIP.load(path, config=SMALL_B8)


def test_unpublished_sizes_are_refused(official: Write) -> None:
    config = LatentClipConfig(patch=16, embed_dim=512, text_width=64, width=64, layers=1)
    with pytest.raises(ModelError, match="patch 16 and dimension 512 belong to none of latent-cl"):
        LatentCLIP.load(official(make_reference(config).checkpoint()))


def test_files_that_are_no_checkpoint(
    reference_b8: Reference, official: Write, tmp_path: Path
) -> None:
    whole = official(reference_b8.checkpoint()).read_bytes()
    cases = {
        "cut.pt": (whole[: len(whole) // 2], "not a PyTorch checkpoint"),
        "empty.pt": (b"", "not a PyTorch checkpoint"),
        "text.pt": (b"<html>404</html>", "not a PyTorch checkpoint|refused"),
    }
    for name, (data, says) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ModelError, match=says):
            LatentCLIP.load(tmp_path / name)
    with pytest.raises(ModelError, match=r"must be a dict with a `state_dict`, got list"):
        LatentCLIP.load(official([torch.zeros(3)]))
    with pytest.raises(ModelError, match="values must be tensors, not so epoch"):
        LatentCLIP.load(official({"state_dict": {"epoch": 3}}))
    with pytest.raises(ModelError, match=r"nothing\.pt: no such file"):
        LatentCLIP.load(tmp_path / "nothing.pt")


# --- converted files -------------------------------------------------------------------------


def converted(cache: Path) -> Path:
    (path,) = (cache / "converted").iterdir()
    return path


def test_a_checkpoint_is_converted_once(
    reference_b8: Reference, official: Write, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = official(reference_b8.checkpoint())
    first = LatentCLIP.load(path, config=SMALL_B8)
    kept = converted(own_cache)
    assert kept.stem == files.file_sha256(path)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("read the checkpoint again"))
    again = LatentCLIP.load(path, config=SMALL_B8)
    direct = LatentCLIP.load(kept)
    raw = Latents(raw_latents(1, 64, 64), "sdxl", scaled=False)
    for encoder in (again, direct):
        assert (encoder.sha256, encoder.config) == (first.sha256, SMALL_B8)
        torch.testing.assert_close(encoder.encode_latents(raw), first.encode_latents(raw))
    metadata = read_metadata(kept)
    assert metadata["name"] == "latent-clip-b8"
    assert metadata["source_sha256"] == files.file_sha256(path)


def test_conversion_to_half_precision(reference_b4: Reference, official: Write) -> None:
    weights = files.read_official(official(reference_b4.checkpoint()), SMALL_B4)
    half = files.convert(weights, torch.float16)
    assert {value.dtype for key, value in half.tensors.items() if key != "logit_scale"} == {
        torch.float16
    }
    assert half.tensors["logit_scale"].dtype == torch.float32
    assert half.sha256 != files.convert(weights).sha256


def test_damaged_converted_files_are_refused(
    reference_b8: Reference, official: Write, own_cache: Path
) -> None:
    load(reference_b8, official)
    path = converted(own_cache)
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match="its weights are not those that were written"):
        LatentCLIP.load(path)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="cannot be read"):
        LatentCLIP.load(path)
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match="not a safetensors file with latentguard's metadata"):
        LatentCLIP.load(path)


def test_a_failed_write_leaves_nothing(
    reference_b8: Reference, official: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = files.convert(files.read_official(official(reference_b8.checkpoint()), SMALL_B8))

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    target = tmp_path / "models" / "m.safetensors"
    with pytest.raises(OSError, match="No space"):
        files.write(target, weights)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": 0}, "`layers` must be a whole number from 1 to 65536, got 0"),
        ({"width": 100}, "`width` must be a multiple of 64"),
        ({"patch": 7}, r"`grid` must be a multiple of `patch` \(7\), got 64"),
        ({"needs_scaled": 1}, "`needs_scaled` must be true or false"),
        ({"color": 1}, "keys must be"),
    ],
)
def test_configurations_are_validated(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        LatentClipConfig.from_dict(SMALL_B8.to_dict() | changes)


@pytest.mark.parametrize("resize", ["interpolate", "pool", "tile"])
def test_latents_are_unscaled_on_the_way(resize: Any) -> None:
    encoder = LatentCLIP.random(SMALL_B8, resize=resize).to(dtype=torch.float64)
    raw = raw_latents(2, 52, 76).double()
    scale, shift = torch.tensor([7.5, 6.0, 8.0, 9.0]), torch.tensor([0.5, -1.0, 0.0, 2.0])
    scaled = (raw - shift.double().view(-1, 1, 1)) / scale.double().view(-1, 1, 1)
    got = encoder.features(scaled, scale=scale, shift=shift)
    torch.testing.assert_close(got.pooled, encoder.features(raw).pooled, atol=1e-9, rtol=0)


@pytest.mark.parametrize("space", ["sdxl", SCALINGS["sdxl-playground25"]], ids=str)
@pytest.mark.parametrize("scaled", [True, False])
def test_scores_are_the_same_fused_and_converted_before(space: Any, scaled: bool) -> None:
    # In float64, where neither rounds. `clean` is what an encoder of another kind is given.
    encoder = LatentCLIP.random(SMALL_B8).to(dtype=torch.float64)
    scorer = Scorer("weapons", encoder)
    latents = Latents(raw_latents(2, 48, 64).double() / (7.7 if scaled else 1), space, scaled)
    noise = torch.randn_like(latents.tensor)
    prediction = Prediction(latents, noise, 0.75, 0.5)
    before = scorer.score(latents).margin, scorer.score(prediction).margin
    LatentCLIP.unscales = False
    try:
        after = scorer.score(latents).margin, scorer.score(prediction.x0()).margin
    finally:
        LatentCLIP.unscales = True
    torch.testing.assert_close(before, after, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "given", [("noise",), ("sigma",), ("noise", "sigma"), ("noise", "alpha"), ("alpha", "sigma")]
)
def test_a_part_of_an_estimate_is_refused(given: tuple[str, ...]) -> None:
    x = raw_latents(2, 64, 64)
    parts = {"noise": x, "alpha": torch.ones(2), "sigma": torch.ones(2)}
    some = {name: parts[name] for name in given}
    for encoder in (LatentCLIP.random(SMALL_B8), load_encoder("nano-sdxl")):
        with pytest.raises(LatentsError, match="noise, alpha and sigma together, or alpha alone"):
            encoder.features(x, **some)
        with pytest.raises(LatentsError, match=r"alpha must be \[2\], one for each image"):
            encoder.features(x, alpha=torch.ones(3))


def test_alpha_alone_divides() -> None:
    x, alpha = raw_latents(2, 64, 64), torch.tensor([0.5, 2.0])
    for encoder in (LatentCLIP.random(SMALL_B8), load_encoder("nano-sdxl")):
        got = encoder.features(x * alpha.view(-1, 1, 1, 1), alpha=alpha).pooled
        torch.testing.assert_close(got, encoder.features(x).pooled, atol=1e-4, rtol=1e-4)
