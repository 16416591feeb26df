"""`latentguard concept`, end to end: drawings as FLUX.2 latents, learned by nano-flux2."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="learning needs torch")

from learn_helpers import drawings, drawn, nano, photos, pictures_of  # noqa: E402

from latentguard import Scorer, load_policy  # noqa: E402
from latentguard.encode.tiny import tae_encoder  # noqa: E402
from latentguard.files import save_latents  # noqa: E402
from latentguard.learn import Examples, learn  # noqa: E402
from latentguard.learn.files import put  # noqa: E402
from latentguard.policy.examples import load_concept, write_concept  # noqa: E402
from latentguard.spaces import Latents  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawings")
    return {
        "crosses": drawn(folder, "cross", 10, 1),
        "disks": drawn(folder, "disk", 20, 2),
        "new crosses": drawn(folder, "cross", 6, 3),
        "new disks": drawn(folder, "disk", 6, 4),
    }


def test_a_concept_is_learned_tested_shown_and_used_by_a_policy(command, files, tmp_path):
    out = tmp_path / "cross.safetensors"
    given = ("--positives", files["crosses"], "--negatives", files["disks"])
    ran = command("concept", "learn", "Red Cross!", *given, "-o", out)
    assert ran.code == 0, ran.err
    assert "AUROC" in ran.out
    assert "needs 99 different negatives" in ran.out
    assert f"wrote {out}" in ran.out
    snippet = ran.out[ran.out.index("  - id: red-cross") :]
    policy = tmp_path / "house.yaml"
    policy.write_text(f'schema_version: 1\nname: house\nversion: "1"\nconcepts:\n{snippet}')
    scorer = Scorer(load_policy(policy), "nano-flux2", device="cpu")
    crosses, disks = drawings("cross", 6, 3), drawings("disk", 6, 4)
    assert [v.decision for v in scorer.verdicts(crosses)].count("review") >= 5
    assert [v.decision for v in scorer.verdicts(disks)].count("allow") >= 5

    given = ("--positives", files["new crosses"], "--negatives", files["new disks"])
    ran = command("concept", "test", out, *given, "-f", "json")
    tested = json.loads(ran.out)
    margins = scorer.score(crosses).margin[:, 0].tolist()
    wanted = [value for value in sorted(margins) if value < 0]
    assert [m["margin"] for m in tested["missed"]] == pytest.approx(wanted, abs=1e-4)
    assert tested["recall"]["value"] == 1 - len(wanted) / 6

    ran = command("concept", "show", out, "--format", "json")
    (entry,) = json.loads(ran.out)["entries"]
    assert entry["model"]["name"] == "nano-flux2"
    assert (entry["positives"], entry["negatives"], entry["background"]) == (10, 20, False)
    assert entry["can_be_merged"]
    ran = command("concept", "show", out)
    assert "say nothing of a false-positive rate of 0.01: that needs 99" in ran.out


def test_merging(command, tmp_path):
    bikes, others = photos("Motorbikes"), photos("Motorbikes", rest=True)
    parts = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for place, out in enumerate(parts):
        sides = (
            Examples(e.rows[place:100:2], e.names[place:100:2], e.joint) for e in (bikes, others)
        )
        put(out, "bike", learn(*sides, nano()).learned)
    both = tmp_path / "both.safetensors"
    ran = command("concept", "merge", *parts, "-o", both)
    assert ran.code == 0, ran.err
    assert "merged from 2 and not measured since" in ran.out
    assert load_concept(both).entries[0].positives == 8
    write_concept(parts[0], "motorcycle", load_concept(parts[0]).entries)
    ran = command("concept", "merge", *parts, "-o", both)
    assert ran.code == 2
    assert "the files are of motorcycle and bike: say which name to give (--name)" in ran.err
    assert "merging needs two files" in command("concept", "merge", parts[0], "-o", both).err


def test_one_picture_on_both_sides_and_another_space_are_one_sentence(command, files, tmp_path):
    out = tmp_path / "x.safetensors"
    given = ("--positives", files["crosses"], "-o", out)
    ran = command("concept", "learn", "x", *given, "--negatives", files["disks"], files["crosses"])
    assert ran.code == 2
    assert "10 of the positives are among the negatives, too" in ran.err
    assert len(ran.err.strip().splitlines()) == 1
    path = tmp_path / "sdxl.safetensors"
    save_latents(path, Latents(torch.randn(3, 4, 32, 32), "sdxl", scaled=True))
    ran = command("concept", "learn", "x", *given, "--negatives", path)
    assert ran.code == 2
    assert "is of sdxl latents, and nano-flux2 reads flux2" in ran.err
    assert not out.exists()


def test_pictures_are_encoded_first(command, tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
    monkeypatch.setenv("LATENTGUARD_CACHE", str(tmp_path / "cache"))
    for shape, number in (("cross", 5), ("disk", 20)):
        (tmp_path / shape).mkdir()
        for i, shown in enumerate(pictures_of(shape, number, number)):
            pixels = ((shown.transpose(1, 2, 0) + 1) * 127).clip(0, 255).astype(np.uint8)
            image.fromarray(pixels).resize((80, 80)).save(tmp_path / shape / f"{i:02}.png")
    given = ("--positives", tmp_path / "cross", "--negatives", tmp_path / "disk")
    out = tmp_path / "cross.safetensors"
    ran = command("concept", "learn", "cross", *given, "-o", out)
    assert ran.code == 2
    assert "00.png is a picture, but this command reads latents: give --autoencoder" in ran.err
    assert len(ran.err.strip().splitlines()) == 1
    weights = tmp_path / "taef2_encoder.pth"
    torch.manual_seed(0)
    torch.save(tae_encoder(32).state_dict(), weights)
    encoded = ("--autoencoder", weights, "--size", "64", "-o", out)
    ran = command("concept", "learn", "cross", *given, *encoded)
    # An autoencoder of random weights writes nearly the same for all: names are the pictures'.
    assert ran.code == 2
    assert "5 of the positives are among the negatives, too" in ran.err
    assert f"{tmp_path / 'cross' / '00.png'} = {tmp_path / 'disk'}" in ran.err
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 25


def test_what_is_no_concept_is_one_sentence(command, files, tmp_path):
    path = tmp_path / "cross.safetensors"
    path.write_bytes(files["disks"].read_bytes())
    for arguments in (("show", path), ("merge", path, path, "-o", path)):
        ran = command("concept", *arguments)
        assert ran.code == 2
        assert "is not a concept's file" in ran.err
        assert len(ran.err.strip().splitlines()) == 1
    assert "it has no 'latentguard' in it" in ran.err


def test_the_file_to_write_is_checked_before_anything_is_read(command, tmp_path):
    given = ("--positives", tmp_path / "none", "-o", tmp_path / "cross.pt")
    for arguments in (("learn", "cross", *given), ("merge", "a", "b", "-o", "cross.pt")):
        ran = command("concept", *arguments)
        assert ran.code == 2
        assert "a concept's file ends in .safetensors" in ran.err
