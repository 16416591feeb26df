"""Which class an image is of: from folders, shards, tables and files of labels, or an error."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="pictures are encoded with torch")

from PIL import Image  # noqa: E402

from latentguard.encode.tiny import tae_encoder  # noqa: E402
from latentguard.errors import LatentsError, ModelError  # noqa: E402
from latentguard.evaluate.classes import Classes  # noqa: E402
from latentguard.evaluate.labels import (  # noqa: E402
    Told,
    resolve,
    told_of_file,
    told_of_latents,
    told_of_pictures,
)
from latentguard.files import Record, save_latents  # noqa: E402
from latentguard.files.labels import LABELS, FileLabels, Label  # noqa: E402
from latentguard.files.labels import NAMES as KEYS  # noqa: E402
from latentguard.spaces import Latents  # noqa: E402

SYNSETS = ("n01440764", "n01443537", "n01484850")
NAMES = ("tench", "goldfish", "great white shark")
CLASSES = Classes("names.txt", NAMES, SYNSETS)
BARE = Classes("names.txt", NAMES)
PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data"


def _told(value=None, name=None, folder=None):
    return Told("here.tar::1.jpg", Label(value, name), "1", folder)


@pytest.mark.parametrize(
    ("told", "number"),
    [
        (_told(2), 2),
        (_told("1"), 1),
        (_told("n01443537"), 1),
        (_told(0, "n01484850"), 2),  # numbers are of whatever made the labels
        (_told("Great_White_Shark"), 2),
        (_told(None, None, "n01440764"), 0),
        (_told(None, None, "2"), 2),  # ImageNet-V2
        (_told(1, None, "n01440764"), 1),  # a folder counts where nothing else is said
    ],
)
def test_what_a_label_means(told, number):
    assert resolve([told], CLASSES) == [number]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (_told(3), "here.tar::1.jpg: the label 3 is outside of names.txt, .* 0 to 2"),
        (_told(-1), "the label -1 is outside"),
        (_told("n02012849"), "its synset n02012849 has no name in names.txt"),
        (_told("crane"), "its label 'crane' is none of the classes"),
        (_told(1, "crane"), "its label 1 stands for 'crane', .*--match number"),
        (_told(None, None, "val"), "no label of its own, and the folder that it is in, 'val'"),
        (_told(), "brings no label"),
    ],
)
def test_a_label_that_means_nothing_here_is_an_error(told, said):
    with pytest.raises(ModelError, match=said):
        resolve([_told(0), told], CLASSES)


def test_numbers_where_they_are_asked_for():
    assert resolve([_told(1, "crane")], CLASSES, by_number=True) == [1]
    with pytest.raises(ModelError, match="brings no number"):
        resolve([_told("tench")], CLASSES, by_number=True)


def test_a_name_of_two_classes_is_certain_by_its_number_alone():
    cranes = Classes("names.txt", ("crane", "tench", "crane"))
    assert resolve([_told(2, "crane")], cranes) == [2]
    for told in (_told("crane"), _told(1, "crane")):
        with pytest.raises(ModelError, match=r"'crane' is the name of several classes .*: 0, 2"):
            resolve([told], cranes)


def test_synsets_without_a_map_count_in_their_order_where_all_of_them_are_there():
    every = [_told(None, None, synset) for synset in reversed(SYNSETS)]
    assert resolve(every, BARE) == [2, 1, 0]
    with pytest.raises(ModelError, match=r"names\.txt has names alone: give --synsets"):
        resolve(every[:2], BARE)


@given(
    st.lists(
        st.builds(
            _told,
            st.none() | st.integers(-3, 5) | st.sampled_from([*NAMES, *SYNSETS, "x", "7", "²"]),
            st.none() | st.sampled_from([*NAMES, *SYNSETS, ""]) | st.text(max_size=5),
            st.none() | st.text(max_size=5),
        ),
        max_size=4,
    ),
    st.booleans(),
)
def test_every_label_is_a_class_or_an_error(images, by_number):
    for classes in (CLASSES, BARE):
        try:
            found = resolve(images, classes, by_number)
        except ModelError:
            continue
        assert len(found) == len(images)
        assert all(0 <= number < 3 for number in found)


def test_files_of_labels(tmp_path):
    file = tmp_path / "labels.txt"
    file.write_text("0\nn01443537\ngreat white shark\n", encoding="utf-8-sig")
    assert resolve(told_of_file(file, list), CLASSES) == [0, 1, 2]
    for bad in ("3", "-1", "x", "1.0", "²", ""):
        file.write_text(f"0\n{bad}\n")
        with pytest.raises(ModelError, match=r"labels\.txt, line 2: "):
            resolve(told_of_file(file, list), CLASSES)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match="cannot be read as text"):
        told_of_file(file, list)


def test_kaggles_solution_goes_by_the_images_names(tmp_path):
    file = tmp_path / "LOC_val_solution.csv"
    lines = ["ImageId,PredictionString", "b,n01443537 1 2 3 4 n01443537 5 6 7 8", "a,n01484850 1 2"]
    file.write_text("\n".join(lines))
    images = [Told(f"flat/{name}.JPEG", Label(), f"{name}.JPEG") for name in "ab"]
    assert resolve(told_of_file(file, lambda: images), CLASSES) == [2, 1]
    other = [Told("flat/c.JPEG", Label(), "c.JPEG")]
    with pytest.raises(ModelError, match=r"flat/c\.JPEG: no line of .* is of the image 'c'"):
        told_of_file(file, lambda: other)
    for bad in ("a,n01443537", "c,tench", "c,n01443537 n01484850", "c"):
        file.write_text("\n".join([*lines, bad]))
        with pytest.raises(ModelError, match=r"solution\.csv, line 4: must be a name"):
            told_of_file(file, lambda: images)
    file.write_text("a,n01443537\n")
    with pytest.raises(ModelError, match="line 1: must be ImageId,PredictionString"):
        told_of_file(file, lambda: images)


# -- files of latents ------------------------------------------------------------------------


def _latents(count=1, ids=None):
    return Latents(torch.randn(count, 32, 16, 16) * 0.85, "flux2", True, ids=ids)


def _numbers(path):
    return resolve(told_of_latents([path]), CLASSES)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_a_file_says_of_its_images(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    save_latents(path, _latents(2), labels=[0, 1], label_names=["n01484850", "n01440764"])
    assert _numbers(path) == [2, 0]
    save_latents(path, _latents(2), labels=["goldfish", 2])
    assert _numbers(path) == [1, 2]
    save_latents(path, _latents(2), labels=[0])
    with pytest.raises(LatentsError, match=f"a{suffix}: has 2 images, and labels of 1"):
        _numbers(path)
    save_latents(path, _latents(2), labels=[0, [1]])
    with pytest.raises(LatentsError, match="neither number nor name"):
        _numbers(path)
    # A file of somebody else's, whose labels are another thing: the names say it, or nothing does.
    save_latents(path, _latents(2, ["n01443537/a.JPEG", "n01440764/b.JPEG"]), labels="none")
    assert _numbers(path) == [1, 0]
    path.with_suffix(".labels.txt").write_text("2\n2\n")
    assert _numbers(path) == [2, 2]


def test_files_in_folders_of_their_classes(tmp_path):
    for number, synset in enumerate(SYNSETS):
        (tmp_path / synset).mkdir()
        save_latents(tmp_path / synset / f"{number}.pt", _latents())
    assert _numbers(tmp_path) == [0, 1, 2]
    (tmp_path / "loose.pt").write_bytes((tmp_path / SYNSETS[0] / "0.pt").read_bytes())
    with pytest.raises(ModelError, match=r"loose\.pt: brings no label of its own"):
        _numbers(tmp_path)


def _tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def _npy():
    held = io.BytesIO()
    np.save(held, _latents().tensor[0].numpy())
    return held.getvalue()


def test_shards_of_latents(tmp_path):
    said = {"space": "flux2", "scaled": True}
    members = {
        "0.cls": b"2\n", "0.latent.npy": _npy(), "0.json": json.dumps(said).encode(),
        "1.json": json.dumps({**said, "label": 7, "label_name": "n01443537"}).encode(),
        "1.latent.npy": _npy(),
        "n01440764/2.latent.npy": _npy(), "n01440764/2.json": json.dumps(said).encode(),
    }  # fmt: skip
    assert _numbers(_tar(tmp_path / "a.tar", members)) == [2, 1, 0]
    members["1.cls"] = b"0"
    with pytest.raises(LatentsError, match=r"a\.tar: 1\.cls: .* different labels, 7 and 0"):
        _numbers(_tar(tmp_path / "a.tar", members))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=4,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.dictionaries(st.sampled_from([*LABELS, *KEYS, "space"]), JSON, max_size=4),
    cls=st.none() | st.binary(max_size=4),
)
def test_labels_of_any_shard_are_numbers_or_names_or_an_error(tmp_path, values, cls):
    members = {"1.json": json.dumps(values).encode()} | ({} if cls is None else {"1.cls": cls})
    path = _tar(tmp_path / "a.tar", members)
    try:
        found = FileLabels(path).of(Record(f"{path}::1.latent.npy", 0, "1", None, "x"))
    except LatentsError:
        return
    assert found.value is None or type(found.value) in (int, str)
    assert found.name is None or isinstance(found.name, str)


# -- the command -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An autoencoder of random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tae") / "taef2_encoder.pth"
    torch.save({k: v.half() for k, v in tae_encoder(32).state_dict().items()}, path)
    return path


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """val/ with a picture for each synset, as shards, flat, and with files of names."""
    monkeypatch.chdir(tmp_path)
    shard = {}
    for number, synset in enumerate(SYNSETS):
        noise = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        held = io.BytesIO()
        Image.fromarray(noise).resize((64, 64)).save(held, "JPEG")
        name = f"ILSVRC2012_val_{number:08}"
        for folder in (tmp_path / "val" / synset, tmp_path / "flat"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.JPEG").write_bytes(held.getvalue())
        shard |= {f"{name}.cls": str(number).encode(), f"{name}.jpg": held.getvalue()}
    _tar(tmp_path / "shard.tar", shard)
    (tmp_path / "map.txt").write_text(
        "".join(f"{s} {n}\n" for s, n in zip(SYNSETS, NAMES, strict=True))
    )
    (tmp_path / "names.txt").write_text("".join(f"{n}\n" for n in NAMES))
    (tmp_path / "labels.txt").write_text("0\n1\n2\n")
    return tmp_path


def test_every_layout_is_the_same_measurement(command, imagenet, tiny):
    encoding = ("--autoencoder", tiny, "--size", 128)
    ran = command("encode", "val", *encoding, "--labels", "folder", "-o", "latents.pt")
    assert ran.code == 0, ran.err
    assert command("encode", "shard.tar", *encoding, "-o", "shards").code == 0
    encoding = (*encoding, "--encoded", imagenet / "encoded")
    found = {
        ran.out
        for paths in (
            ("val", "--names", "map.txt", *encoding),
            (*sorted(Path("val").iterdir()), "--names", "map.txt", *encoding),
            ("val", "--names", "names.txt", *encoding),
            ("shard.tar", "--names", "names.txt", *encoding),
            ("flat", "--names", "names.txt", "--labels", "labels.txt", *encoding),
            ("latents.pt", "--names", "map.txt"),
            ("shards", "--names", "names.txt"),
        )
        if (ran := command("evaluate", "zeroshot", *paths, "--format", "json")).code == 0
        or pytest.fail(f"{paths}: {ran.err}")
    }
    assert len(found) == 1
    assert json.loads(found.pop())["n"] == 3
    (imagenet / "flat" / "notes.md").write_text("of these pictures")
    ran = command(
        "evaluate", "zeroshot", "flat", "--names", "names.txt", "--labels", "labels.txt", *encoding
    )
    assert ran.code == 0
    assert "passed over, because they are not pictures: 1 .md" in ran.err


def test_a_dataset_of_hugging_face(imagenet):
    pa = pytest.importorskip("pyarrow", reason="tables need pyarrow")
    import pyarrow.parquet as pq

    pictures = [path.read_bytes() for path in sorted((imagenet / "flat").iterdir())]
    rows = {"image": [{"bytes": data, "path": None} for data in pictures], "label": [1, 0, 1]}
    features = {
        "image": {"_type": "Image"},
        "label": {"names": ["goldfish", "great white shark"], "_type": "ClassLabel"},
    }
    said = json.dumps({"info": {"features": features}})
    pq.write_table(pa.table(rows).replace_schema_metadata({"huggingface": said}), "a.parquet")
    told = told_of_pictures(["a.parquet"])
    assert resolve(told, CLASSES) == [2, 1, 2]
    assert resolve(told, CLASSES, by_number=True) == [1, 0, 1]
    with pytest.raises(ModelError, match=r"a\.parquet::row 1: its label 0 stands for 'goldfish'"):
        resolve(told, Classes("names.txt", ("tench", "great white shark")))


def test_what_is_wrong_is_said_before_anything_is_encoded(command, imagenet, tiny):
    encoded = imagenet / "encoded"
    options = ("--autoencoder", tiny, "--size", 128, "--encoded", encoded)
    (imagenet / "two.txt").write_text("n01440764 tench\nn01443537 goldfish\n")
    ran = command("evaluate", "zeroshot", "val", "--names", "two.txt", *options)
    assert ran.code == 2
    assert "ILSVRC2012_val_00000002.JPEG: its synset n01484850 has no name in two.txt" in ran.err
    ran = command("evaluate", "zeroshot", "flat", "--names", "map.txt", *options)
    assert "brings no label of its own, and the folder that it is in, 'flat'" in ran.err
    assert not encoded.exists()
    ran = command("evaluate", "zeroshot", "val", "--names", "map.txt")
    assert "is a picture, but this command reads latents: give --autoencoder" in ran.err
    (imagenet / "templates.txt").write_text("a {}\nphoto\n")
    ran = command(
        "evaluate", "zeroshot", "val", "--names", "map.txt", "--templates", "templates.txt",
        *options,
    )  # fmt: skip
    assert "templates.txt, line 2: a template must have one {}" in ran.err


@pytest.mark.slow
def test_photos_of_imagenets_classes_in_folders(command, tmp_path):
    encoder = PHOTOS / "taef2" / "taef2_encoder.pth"
    if not encoder.is_file() or not (PHOTOS / "photos500").is_dir():
        pytest.skip(f"needs photos and an autoencoder in {PHOTOS}")
    names = (PHOTOS / "names.txt").read_text().splitlines()
    labels = [int(line) for line in (PHOTOS / "labels.txt").read_text().split()]
    photos = sorted((PHOTOS / "photos500").iterdir(), key=os.fspath)
    index = {number: [f"n9{number:07}", name] for number, name in enumerate(names)}
    for photo, number in zip(photos, labels, strict=True):
        index[number][0] = photo.name[:9]
    for photo in photos[::50]:
        folder = tmp_path / "val" / photo.name[:9]
        folder.mkdir(parents=True)
        shutil.copy(photo, folder)
    (tmp_path / "imagenet_class_index.json").write_text(json.dumps(index))
    ran = command(
        "evaluate", "zeroshot", tmp_path / "val", "--names", tmp_path / "imagenet_class_index.json",
        "--autoencoder", encoder, "--size", 256, "--encoded", tmp_path / "encoded",
        "--format", "json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["n"] == 10
    assert found["top5"] >= 0.8
