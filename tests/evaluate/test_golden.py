"""`latentguard models check`: a right model passes, and each kind of wrong one fails by name."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="encoders need torch")
pytest.importorskip("skimage", reason="the pictures lie in scikit-image")

from latentguard import load_encoder  # noqa: E402
from latentguard.encode.tiny import tae_encoder  # noqa: E402
from latentguard.encoders import checkpoint  # noqa: E402
from latentguard.encoders.catalog import LatentClipConfig  # noqa: E402
from latentguard.encoders.latent_clip import LatentCLIP  # noqa: E402
from latentguard.errors import MissingExtraError, ModelError  # noqa: E402
from latentguard.evaluate.golden import (  # noqa: E402
    Case,
    bundled_cases,
    check_model,
    picture_cases,
)
from latentguard.evaluate.golden import checks as golden_checks  # noqa: E402
from latentguard.evaluate.golden.embedded import Embedded, Similar, asked_of  # noqa: E402
from latentguard.files import load_latents, save_latents  # noqa: E402
from latentguard.spaces import Latents, LatentSpace  # noqa: E402

LATENTS = Path(__file__).resolve().parents[2] / "examples" / "latents.pt"
SMALL = LatentClipConfig(
    patch=8, embed_dim=512, text_width=128, width=128, layers=2, text_layers=2, grid=16
)


@pytest.fixture(scope="module")
def bundled():
    found = load_latents(LATENTS)
    return found, bundled_cases(found.ids)


@pytest.fixture
def nano():
    return copy.deepcopy(load_encoder("nano-flux2"))


@pytest.fixture(scope="module")
def drawn():
    """Raw latents [17, 4, 16, 16] of SDXL's space whose linear view shows the pictures: a stand-in
    for what its VAE would give."""
    from PIL import Image

    found = picture_cases()
    view = LatentSpace.get("sdxl").rgb_view
    rgb = np.stack(
        [
            np.asarray(Image.open(path).convert("RGB").resize((16, 16)), np.float64) / 127.5 - 1
            for path, _ in found
        ]
    )
    tensor = (rgb - np.array(view.bias)) @ np.linalg.pinv(np.array(view.factors))
    scaled = Latents(torch.tensor(tensor.transpose(0, 3, 1, 2)).float(), "sdxl", scaled=True)
    return scaled.to_raw(), [case for _, case in found]


@pytest.fixture(scope="module")
def taught(drawn):
    """A small Latent-CLIP that knows the pictures: its projection is solved for. As in a trained
    one its places weigh as much as its patches, which is why the scaling matters."""
    latents, cases = drawn
    model = LatentCLIP.random(SMALL)
    with torch.no_grad():
        model.vit.positional_embedding *= 100
        pooled = model.features(latents.tensor).pooled
        normed = torch.nn.functional.layer_norm(
            pooled, pooled.shape[-1:], model.vit.ln_post.weight, model.vit.ln_post.bias
        )
        texts = model.encode_text([f"a photo of {case.texts[0]}" for case in cases])
        model.vit.proj.copy_(torch.linalg.lstsq(normed, texts, driver="gelsd").solution)
    return model


def by_name(found):
    return {check.name: check for check in found.checks}


def failed(found):
    return {check.name for check in found.checks if check.passed is False}


def test_the_bundled_model_on_the_bundled_latents_passes(command):
    ran = command("models", "check", "nano-flux2", "--format", "json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    assert said["passed"] is True
    assert [check["name"] for check in said["checks"]] == [
        "embeddings", "order", "margins", "shuffled labels", "convention", "weights", "bfloat16",
        "float16",
    ]  # fmt: skip
    assert all(check["passed"] for check in said["checks"])
    assert {one["id"] for one in said["pictures"]} >= {"revolver", "cat"}
    # It has no class for an astronaut, and is not asked for one.
    assert said["left_out"] == ["astronaut"]


def test_latents_in_a_wrong_scaling_are_named(command, tmp_path):
    latents = load_latents(LATENTS)
    wrong = tmp_path / "wrong.safetensors"
    latents = latents.pick([1, 2, 8, 10, 13, 15, 19, 21, 22, 23])
    small = latents.tensor.float() / 5
    save_latents(wrong, Latents(small, latents.space, latents.scaled, ids=latents.ids))
    ran = command("models", "check", "nano-flux2", "--latents", wrong)
    assert ran.code == 1
    (line,) = (line for line in ran.out.splitlines() if line.startswith("convention"))
    assert "FAILED" in line
    assert "does better with them four times as large: the convention is wrong" in ran.out
    assert ran.out.rstrip().endswith("on flux2 must NOT be trusted")


def test_a_latent_clip_that_knows_the_pictures_passes(taught, drawn):
    found = check_model(taught, *drawn)
    assert failed(found) == set()
    assert by_name(found)["order"].found.startswith("the right text of 17 wins for 17 of 17")
    assert by_name(found)["convention"].passed


def test_a_latent_clip_that_is_given_scaled_latents_is_told_so(taught, drawn):
    config = replace(SMALL, needs_scaled=True)
    tensors = {f"image.{key}": value for key, value in taught.vit.state_dict().items()}
    tensors |= {f"text.{key}": value for key, value in taught._text_weights.items()}
    tensors["logit_scale"] = torch.tensor(math.log(100.0))
    wrong = LatentCLIP(checkpoint.Weights(tensors, config, "wrong", "0" * 64, ""))
    found = by_name(check_model(wrong, *drawn))["convention"]
    assert found.passed is False
    assert "given scaled latents and does better with them unscaled" in found.do


def test_channels_in_another_order_are_told(taught, drawn):
    latents, cases = drawn
    found = by_name(check_model(taught, Latents(latents.tensor.flip(1), "sdxl", False), cases))
    assert "with the channels in reverse" in found["convention"].do


def test_random_weights_by_the_command_fail_and_say_what_to_do(command, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTGUARD_CACHE", str(tmp_path / "cache"))
    model = LatentCLIP.random(SMALL)
    tensors = {f"image.{key}": value for key, value in model.vit.state_dict().items()}
    tensors |= {f"text.{key}": value for key, value in model._text_weights.items()}
    tensors["logit_scale"] = torch.tensor(math.log(100.0))
    digest = checkpoint.weights_sha256(tensors)
    file = tmp_path / "random.safetensors"
    checkpoint.write(file, checkpoint.Weights(tensors, SMALL, "random", digest, ""))
    autoencoder = tmp_path / "taesdxl_encoder.pth"
    torch.save(tae_encoder(4, pooled=False).state_dict(), autoencoder)
    ran = command(
        "models", "check", file, "--autoencoder", autoencoder, "--size", 128, "--format", "json"
    )
    assert ran.code == 1, ran.err
    said = {check["name"]: check for check in json.loads(ran.out)["checks"]}
    assert said["order"]["passed"] is False
    assert "the weights are wrong or damaged, or the latents are of another" in said["order"]["do"]
    assert said["shuffled labels"]["passed"] is False
    # Nothing is said of scaling where no reading is better than chance.
    assert said["convention"]["passed"] is None


def test_shuffled_weights_fail(nano, bundled):
    rows = nano.net.trunk.classifier.weight
    rows.copy_(rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))])
    latents, cases = bundled
    similar = Embedded(nano, latents, asked_of(nano, cases)).similar
    for check in (golden_checks.order, golden_checks.margins, golden_checks.control):
        assert check(similar).passed is False


def test_weights_rounded_to_eight_bits_are_found(nano, bundled):
    for weight in nano.net.parameters():
        weight.copy_(weight.to(torch.float8_e4m3fn).float())
    latents, cases = bundled
    found = golden_checks.weights(Embedded(nano, latents, asked_of(nano, cases)))
    assert found.passed is False
    assert "has 3 bits of fraction, and bfloat16 has 7" in found.found


def test_a_model_that_overflows_in_float16_is_found(taught, drawn):
    large = copy.deepcopy(taught)
    block = large.vit.state_dict()
    # The same function: a factor in one weight, its inverse behind what is linear in it.
    key = next(name for name in block if name.endswith("attn.in_proj_weight"))
    width = SMALL.width
    bias = key.replace("weight", "bias")
    out = key.replace("in_proj_weight", "out_proj.weight")
    block[key][2 * width :] *= 1e6
    block[bias][2 * width :] *= 1e6
    block[out] *= 1e-6
    found = by_name(check_model(large, *drawn))
    assert found["order"].passed
    assert found["bfloat16"].passed
    assert found["float16"].passed is False
    assert "do not run this model in float16" in found["float16"].do


def test_embeddings_that_are_not_finite_end_the_check(nano, bundled):
    nano.net.trunk.classifier.bias[3] = math.nan
    found = check_model(nano, *bundled)
    assert [check.name for check in found.checks] == ["embeddings"]
    assert not found.passed
    assert "not finite" in found.checks[0].found
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_model_that_says_the_same_of_everything_fails(nano, bundled):
    nano.net.trunk.classifier.weight.zero_()
    found = check_model(nano, *bundled)
    assert found.checks[0].found == "every picture has the same embedding"
    # And by the control alone: one picture's scores for all.
    same = Similar(np.tile([[0.3, 0.2, 0.1, 0.0]], (8, 1)), np.array([0, 0, 0, 0, 0, 1, 2, 3]), 100)
    assert golden_checks.order(same).passed is False
    assert golden_checks.control(same).found.endswith("p = 1.0000")
    assert golden_checks.control(same).passed is False


def test_a_model_that_cannot_tell_scalings_apart_is_not_failed_for_it():
    # Half of the pictures are a little clearer in one reading, half in the other.
    by = 0.01 * np.resize([1.0, -1.0], 12)
    right = np.arange(12)
    worse = Similar(0.1 + np.diag(0.2 - by), right, 100)
    for other in (worse, Similar(0.1 + np.diag(0.201 + by), right, 100)):
        found = golden_checks.convention(False, worse, [("scaled", other)])
        assert found.passed is None
        assert "does no worse with them scaled, so it cannot tell" in found.found
    # What is plainly better is another matter.
    plainly = Similar(worse.cosines + np.diag(0.05 + by / 5), right, 100)
    assert golden_checks.convention(False, worse, [("scaled", plainly)]).passed is False


def test_ties_are_no_hits():
    tied = Similar(np.ones((5, 5)), np.arange(5), 100)
    assert tied.hits == 0
    assert golden_checks.margins(tied).passed is False


def test_the_luck_of_guessing_is_the_binomial_tail():
    exact = sum(
        math.comb(7, k) * Fraction(1, 7) ** k * Fraction(6, 7) ** (7 - k) for k in range(5, 8)
    )
    assert golden_checks._at_least(5, 7, 1 / 7) == pytest.approx(float(exact))


def test_the_bits_of_a_fraction():
    numbers = torch.randn(64, 64)
    for dtype, bits in ((torch.float16, 10), (torch.bfloat16, 7), (torch.float8_e5m2, 2)):
        assert golden_checks._fraction_bits(numbers.to(dtype)) == bits
    assert golden_checks._fraction_bits(numbers) == 23


def test_what_cannot_be_asked_for(command, nano, bundled, tmp_path):
    latents, _ = bundled
    cases = [Case("a", ("hatred",)), *[None] * (len(latents) - 1)]
    with pytest.raises(ModelError, match="can be asked for 0 of the pictures"):
        check_model(nano, latents, cases)
    for arguments, said in (
        (("nano-view", "--space", "sdxl"), "reads sdxl latents and"),
        (("nano-flux2", "--latents", tmp_path / "none.pt"), "examples/latents.pt is (--latents)"),
        (("nano-flux2", "--size", "256"), "--size and --download are about pictures"),
        (
            ("nano-flux2", "--latents", LATENTS, "--autoencoder", "x"),
            "either them or --autoencoder",
        ),
    ):
        ran = command("models", "check", *arguments)
        assert ran.code == 2
        assert said in ran.err


def test_without_the_packages_that_have_pictures_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("latentguard.evaluate.golden.cases.find_spec", lambda package: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'latentguard\[eval\]'"):
        picture_cases()
