"""Zero-shot and detection end to end: files in, numbers out, through the command line too."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="encoders need torch")

import torch.nn.functional as F  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from latentguard.encoders import Encoder, Features, Head  # noqa: E402
from latentguard.encoders.catalog import bundled_path  # noqa: E402
from latentguard.errors import LatentsError, ModelError, PolicyError  # noqa: E402
from latentguard.evaluate import detect, zeroshot  # noqa: E402
from latentguard.evaluate.plots import plot_detection, plot_zeroshot  # noqa: E402
from latentguard.evaluate.zeroshot import class_embeddings  # noqa: E402
from latentguard.files import save_latents  # noqa: E402
from latentguard.policy import load_policy  # noqa: E402
from latentguard.spaces import Latents  # noqa: E402

needs_nano = pytest.mark.skipif(
    not bundled_path("nano-flux2").is_file(), reason="needs the bundled nano-flux2"
)


class ChannelEncoder:
    """The plainest encoder: an image is its channels' means, "channel 3" is the third axis."""

    name, sha256, space, needs_scaled, dim = "channels", "c" * 64, "flux2", True, 32
    logit_scale, head, neutral_prompts = 10.0, Head(), ("channel 31",)
    always_neutral, uses_templates, notes, min_coverage = False, True, "", 0.5
    device, dtype = torch.device("cpu"), torch.float32

    def features(self, latents, noise=None, alpha=None, sigma=None):
        pooled = F.normalize(latents.float().mean((2, 3)), dim=-1)
        return Features(pooled, pooled[:, None], (1, 1))

    def encode_latents(self, latents):
        return self.features(latents.to_spatial().to_scaled().tensor).pooled

    def encode_text(self, texts):
        return torch.eye(32)[[int(text.rsplit(" ", 1)[1]) for text in texts]]

    def coverage(self, texts):
        return torch.tensor([0.0 if text.endswith(" 30") else 1.0 for text in texts])

    def to(self, device):
        return self


def _image(channel, strength, side=8, seed=0):
    # TAEF2's statistics (mean 0, std 0.85), so that the noise looks like what the space holds.
    latent = 0.1 * torch.randn(1, 32, side, side, generator=torch.Generator().manual_seed(seed))
    latent[:, channel] += strength
    return latent


def _save(path, latents):
    save_latents(path, Latents(latents, "flux2", True))
    return path


@pytest.fixture
def classified(tmp_path):
    """Six images of channels 0, 1, 2, 0, 1, 2 in two sizes; the fifth is a 2 labeled 1."""
    first = _save(tmp_path / "a.pt", torch.cat([_image(c, 2.0, seed=c) for c in (0, 1, 2)]))
    second = torch.cat([_image(c, 2.0, 12, c + 3) for c in (0, 2, 2)])
    return [first, _save(tmp_path / "b.safetensors", second)]


@pytest.fixture
def policy(tmp_path):
    path = tmp_path / "channels.yaml"
    path.write_text(
        """
schema_version: 1
name: channels
version: "1"
description: channels
uncovered: warn
templates: ["{}"]
concepts:
  - {id: three, category: test, prompts: [channel 3], contrast: [channel 4],
     threshold: {margin: 0.2}, action: block, severity: low}
  - {id: hidden, category: test, prompts: [channel 30], contrast: [channel 4],
     threshold: {margin: 0.2}, action: block, severity: low}
"""
    )
    return path


def test_the_plain_encoder_is_an_encoder():
    assert isinstance(ChannelEncoder(), Encoder)


def test_zeroshot_counts(classified, tmp_path):
    names = [f"channel {i}" for i in range(8)]
    seen = []
    result = zeroshot(
        classified,
        names,
        [0, 1, 2, 0, 1, 2],
        ChannelEncoder(),
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert result.n == 6
    assert result.top(1).value == pytest.approx(5 / 6)
    assert result.to_dict() == {"top1": 5 / 6, "top5": result.top(5).value, "n": 6}
    assert seen == [(2, 6), (3, 6), (5, 6), (6, 6)]
    assert (result.similarities[[0, 1, 2, 3, 5]] > 0.9).all()
    assert result.predicted.tolist() == [0, 1, 2, 0, 2, 2]
    assert result.best_wrong[4] > 0.9 > result.similarities[4]
    plot_zeroshot(tmp_path / "plot.png", result)
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_zeroshot_refuses_numbers_that_do_not_fit(classified):
    names = ["channel 0", "channel 1", "channel 2"]
    with pytest.raises(LatentsError, match="6 latents, but 7 labels"):
        zeroshot(classified, names, [0] * 7, ChannelEncoder())
    with pytest.raises(LatentsError, match="more latents than labels: 4"):
        zeroshot(classified, names, [0] * 4, ChannelEncoder())
    with pytest.raises(ValueError, match=r"0 to 2 .*, got 3"):
        zeroshot(classified, names, [0, 1, 2, 0, 1, 3], ChannelEncoder())
    with pytest.raises(ModelError, match="at least two names"):
        zeroshot(classified, names[:1], [0] * 6, ChannelEncoder())


def test_an_unreadable_image_is_an_error_and_not_a_gap(classified, tmp_path):
    broken = _image(0, 2.0)
    broken[0, 0, 0, 0] = float("nan")
    torch.save({"latents": broken, "space": "flux2", "scaled": True}, tmp_path / "broken.pt")
    with pytest.raises(LatentsError, match=r"broken\.pt"):
        zeroshot(
            [*classified, tmp_path / "broken.pt"], ["channel 0", "channel 1"], [0] * 7,
            ChannelEncoder(),
        )  # fmt: skip


def test_templates_are_averaged_and_only_where_they_are_used():
    class TwoTemplates(ChannelEncoder):
        def encode_text(self, texts):
            # "b" puts the name three channels further.
            rows = [int(text.split(" ")[-1]) + 3 * text.startswith("b") for text in texts]
            return torch.eye(32)[rows]

    encoder = TwoTemplates()
    both = class_embeddings(encoder, ["channel 0"], ["a {}", "b {}"])
    expected = torch.zeros(32)
    expected[[0, 3]] = 0.5**0.5
    torch.testing.assert_close(both, expected[None])
    encoder.uses_templates = False
    torch.testing.assert_close(
        class_embeddings(encoder, ["channel 0"], ["b {}"]), torch.eye(32)[:1]
    )
    with pytest.raises(ValueError, match=r"one \{\} for the class name"):
        class_embeddings(encoder, ["channel 0"], ["a photo"])


def _sides(tmp_path):
    threes = torch.cat([_image(3, s, seed=i) for i, s in enumerate((2.0, 2.0, -1.0))])
    fours = torch.cat([_image(4, 2.0, seed=9), _image(5, 2.0, seed=10)])
    return _save(tmp_path / "pos.pt", threes), _save(tmp_path / "neg.pt", fours)


def test_detect(policy, tmp_path):
    positive, negative = _sides(tmp_path)
    result = detect([positive], [negative], policy, "three", ChannelEncoder(), resamples=200)
    assert len(result.positives) == 3
    assert (result.positives[:2] > 0.9).all()
    assert result.negatives[0] == pytest.approx(-1, abs=0.1)
    assert result.operating.margin == 0.2
    assert result.operating.recall.value == pytest.approx(2 / 3)
    assert result.operating.fpr.value == 0
    values = result.to_dict()
    assert (values["positives"], values["negatives"]) == (3, 2)
    assert values["auroc"] == result.separation.auroc.value
    assert values["model"] == {"name": "channels", "sha256": "c" * 64}
    assert values["policy"]["sha256"] == load_policy(policy).sha256
    json.dumps(values, allow_nan=False)
    for name in ("plot.png", "plot.svg"):
        plot_detection(tmp_path / name, [result, result], "three")
        assert (tmp_path / name).stat().st_size > 5000


def test_detect_refuses(policy, tmp_path):
    positive, negative = _sides(tmp_path)
    with pytest.raises(PolicyError, match="no concept 'four': choose from three, hidden"):
        detect([positive], [negative], policy, "four", ChannelEncoder())
    with pytest.raises(ModelError, match=r"cannot see .*hidden"):
        detect([positive], [negative], policy, "hidden", ChannelEncoder())
    with pytest.raises(LatentsError, match=r"no latents in|none"):
        detect([tmp_path / "none"], [negative], policy, "three", ChannelEncoder())
    raw = tmp_path / "other.pt"
    save_latents(raw, Latents(torch.randn(1, 4, 8, 8), "sdxl", True))
    with pytest.raises(LatentsError, match="reads flux2 latents, got sdxl"):
        detect([positive], [raw], policy, "three", ChannelEncoder())


@needs_nano
def test_commands(tmp_path, monkeypatch):
    """The real command line with the bundled model on a few latents."""
    import typer

    from latentguard.cli import evaluate

    app = typer.Typer()
    evaluate.register(app)
    monkeypatch.chdir(tmp_path)
    latents = torch.cat([_image(0, 0.0, 16, seed) * 8 for seed in range(4)])
    _save(tmp_path / "a.pt", latents)
    _save(tmp_path / "b.pt", latents[:2])
    (tmp_path / "names.txt").write_text("tench\ngoldfish\ngreat white shark\n")
    (tmp_path / "labels.txt").write_text("0\n1\n2\n0\n")
    run = CliRunner().invoke
    found = run(
        app,
        [
            "evaluate",
            "zeroshot",
            "a.pt",
            "--names",
            "names.txt",
            "--labels",
            "labels.txt",
            "--format",
            "json",
        ],
    )
    assert found.exit_code == 0, found.output
    line = json.loads(found.stdout)
    assert set(line) == {"top1", "top5", "n"}
    assert (line["top5"], line["n"]) == (1, 4)
    spoken = [
        "evaluate",
        "detect",
        "--positives",
        "a.pt",
        "b.pt",
        "--negatives",
        "b.pt",
        "--policy",
        "weapons",
    ]
    found = run(app, [*spoken, "--concept", "handguns", "--plot", "p.png", "--format", "json"])
    assert found.exit_code == 0, found.output
    values = json.loads(found.stdout)
    assert (values["positives"], values["negatives"]) == (6, 2)
    assert np.isfinite(values["auroc"])
    assert (tmp_path / "p.png").is_file()
    found = run(app, [*spoken, "--concept", "handguns"])
    assert found.exit_code == 0, found.output
    assert "AUROC" in found.stdout
    assert "weapons: handguns, by nano-flux2" in found.stdout
    found = run(app, [*spoken, "--concept", "handguns", "--plot", "p.gif"])
    assert found.exit_code != 0
    assert "--plot: the file must end in" in str(found.exception)
