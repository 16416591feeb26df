"""The files of the spaces that ship, and files of one's own: all is checked, with its line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentguard.errors import LatentsError
from latentguard.spaces import RECORDS, SCALINGS, SPACES, LatentSpace, RGBView, register
from latentguard.spaces.records import DATA

MINE: dict[str, Any] = {
    "schema_version": 1,
    "channels": 3,
    "factor": 8,
    "scaling": {"mean": [0.5, -1.0, 0.0], "std": [2.0, 1.0, 4.0]},
    "packing": {"patch": 2, "order": "dy dx c"},
    "statistics": {"mean": [0.5, -1.0, 0.0], "std": [2.0, 1.0, 4.0], "source": "mine"},
    "rgb_view": {"acts_on": "raw", "factors": [[0.1, 0.0, 0.2]] * 3, "bias": [0.0, 0.1, 0.0]},
}
YAML = """\
schema_version: 1
channels: 3
factor: 8
scaling:
  scale: 5e-1
  shift: [1, 2, 3]
"""


def write(folder: Path, values: dict[str, Any], name: str = "mine.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return path


def test_every_file_is_a_space_of_its_name() -> None:
    names = {path.stem for path in DATA.glob("*.json")}
    assert names == set(RECORDS) == SPACES.keys() | SCALINGS.keys()
    for name, record in RECORDS.items():
        assert record.source, name
        assert record.summary, name
        assert record.used_by, name
        assert record.vae is not None or record.of is not None
        view = record.fields["rgb_view"]
        assert view is None or view.source, name


def test_a_space_says_where_the_numbers_of_its_view_act() -> None:
    view = SPACES["wan21"].rgb_view
    assert view is not None
    assert view.scaled
    assert (view.matrix.shape, view.offset.shape) == ((16, 3), (3,))
    assert SPACES["sana"].rgb_view is None
    flux2 = SPACES["flux2"].rgb_view
    assert flux2 is not None
    assert flux2.r2 == (0.742, 0.761, 0.722)


def test_a_file_of_one_s_own(tmp_path: Path) -> None:
    space = LatentSpace.from_file(write(tmp_path, MINE))
    assert (space.name, space.channels, space.packed_channels) == ("mine", 3, 12)
    assert space.shift == (0.5, -1.0, 0.0)
    assert space.scale == (0.5, 1.0, 0.25)
    assert space.packed_order == "dy dx c"
    assert space.rgb_view is not None
    assert not space.rgb_view.scaled
    assert "mine" not in SPACES  # only what is handed over is known by its name


def test_yaml_numbers_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(YAML, encoding="utf-8")
    space = LatentSpace.from_file(path)
    assert (space.scale, space.shift) == (0.5, (1.0, 2.0, 3.0))


@pytest.mark.parametrize("name", [*RECORDS])
def test_what_a_space_says_of_itself_gives_it_back(name: str) -> None:
    space = LatentSpace.get(name)
    assert LatentSpace.from_dict(space.to_dict()) == space


def test_flux2_with_its_statistics_gives_itself_back() -> None:
    space = SPACES["flux2"].with_batch_norm([0.1] * 128, [3.0] * 128)
    back = LatentSpace.from_dict(space.to_dict())
    assert (back.scale, back.shift) == (space.scale, space.shift)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, r"mine.json:2: `schema_version` must be 1, got 2"),
        ({"channels": 0}, r"mine.json:3: `channels` must be a number from 1 to 4096, got 0"),
        ({"channels": True}, "`channels` must be"),
        ({"channels": None}, "`channels` is missing: it must be"),
        (
            {"factor": None, "faktor": 8},
            "`factor` is missing .`faktor` is no key: was it meant.*: it must be a number",
        ),
        ({"factor": "8"}, "`factor` must be a number of pixels from 1 to 256, got '8'"),
        ({"tint": 1}, "`tint` is no key of a latent space: there are schema_version, name"),
        ({"scaling": None}, "`scaling` is missing"),
        ({"scaling": 3}, "`scaling` must be a mapping, got 3"),
        (
            {"scaling": {"scale": [1.0]}},
            r"`scaling.scale` must be a finite number or a list of 3 or",
        ),
        ({"scaling": {"scale": -1.0}}, "mine.json: space mine: scale must be above 0"),
        ({"scaling": {"scale": 1e9}}, "scale must be within"),
        ({"scaling": {"mean": [0.0] * 3}}, "`mean` and `std` together"),
        ({"scaling": {"mean": [0.0] * 3, "std": [1.0, 0.0, 1.0]}}, "`scaling.std` must be above 0"),
        ({"scaling": {"from_vae": "batch_norm", "scale": 1}}, "stands alone"),
        ({"scaling": {"from_vae": "bn"}}, "must be batch_norm or mean_std, got 'bn'"),
        ({"packing": {"patch": 2}}, "`packing.order` is missing: it must be c dy dx or"),
        ({"packing": {"patch": 2, "order": "dx c"}}, "`packing.order` must be c dy dx or"),
        ({"statistics": {"mean": [0.0], "std": [1.0]}}, "`statistics.mean` must be a list of 3"),
        ({"rgb_view": {"factors": [[0.1] * 3] * 3}}, "`rgb_view.acts_on` is missing"),
        (
            {"rgb_view": {"acts_on": "scaled", "factors": [[0.1] * 3] * 2}},
            "`rgb_view.factors` must be 3 lists of 3 finite numbers, got a list of 2",
        ),
        (
            {"rgb_view": {"acts_on": "scaled", "factors": [[0.1] * 3, [0.1] * 3, [0.1, "x", 0]]}},
            r"`rgb_view.factors` must be 3 lists .*, got 'x' at `rgb_view.factors\[2\]\[1\]`",
        ),
        ({"name": "Mine"}, "`name` must be a name of small letters"),
        ({"of": "sd9"}, "`of` must be one of sdxl"),
        ({"of": "sdxl"}, "space sdxl is known with another shape"),
        ({"name": "flux1"}, "space flux1 is known with another shape"),
    ],
)
def test_a_wrong_file_is_one_sentence(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(LatentsError, match=message) as caught:
        LatentSpace.from_file(write(tmp_path, MINE | changes))
    assert str(tmp_path / "mine.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (YAML + "factor: 8\n", r"mine.yaml:7: key 'factor' stands twice"),
        (YAML.replace("5e-1", ".nan"), r"mine.yaml:5: `scaling.scale` must be a finite number"),
        (
            YAML.replace("8", "!!python/object:os.system x"),
            "mine.yaml:3: YAML tags are not allowed",
        ),
        (YAML + "  - [", "is not valid YAML"),
        ("", "the file is empty"),
        ("[1, 2]", "a latent space must be a mapping, got a list of 2"),
        ("a: " + "[" * 50 + "]" * 50, "nesting is deeper than 16 levels"),
        ("a: &a [1]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(3)), "is missing"),
        ("# " + "x" * (1 << 20), "larger than 1 MiB"),
    ],
)
def test_hostile_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(LatentsError, match=message):
        LatentSpace.from_file(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"mine.json:\d: this is not valid YAML"),
        ('{"channels": 1,\n\t"channels": 2}', "mine.json:2: key 'channels' stands twice"),
        ('{"schema_version": 1, "channels": NaN}', "`channels` must be"),
        ("[" * 100_000, "nesting is deeper"),
    ],
)
def test_hostile_json(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(LatentsError, match=message):
        LatentSpace.from_file(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(LatentsError, match="there is no such file"):
        LatentSpace.from_file(tmp_path / "none.yaml")
    with pytest.raises(LatentsError, match=r"ends in \.json, \.yaml, \.yml"):
        LatentSpace.from_file(tmp_path / "mine.txt")
    with pytest.raises(LatentsError, match="there is no such file"):
        LatentSpace.of("none.yaml")


def test_a_name_never_opens_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, MINE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LatentsError, match=r"unknown latent space 'mine\.json'"):
        LatentSpace.get("mine.json")


def test_a_name_with_a_slip_is_guessed() -> None:
    with pytest.raises(LatentsError, match=r"'sdxll' \(did you mean sdxl\?\): use one of sdxl"):
        LatentSpace.get("sdxll")


def test_other_names_of_a_space() -> None:
    assert LatentSpace.get("playground25") == LatentSpace.get("sdxl-playground25")
    assert LatentSpace.get("wan2.1") is SPACES["wan21"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "My Space"}, "a latent space's name must be small letters"),
        ({"channels": 2.0}, "channels must be a whole number from 1 to 4096, got 2.0"),
        ({"packed_patch": 2, "packed_order": "c"}, "packed_order must be c dy dx or"),
        ({"scale": "1"}, "scale must be a number or a list of numbers|scale must be"),
        ({"mean": (0.0,)}, "mean must hold 2 numbers, got 1"),
        ({"rgb_view": RGBView(((0.0,) * 3,), (0.0,) * 3)}, "rgb_view must have 2 factors"),
    ],
)
def test_a_space_in_python_is_checked_too(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(LatentsError, match=message):
        LatentSpace(**{"name": "mine", "channels": 2, "scale": 1.0, **arguments})


def test_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentguard.spaces.space.SPACES", dict(SPACES))
    mine = LatentSpace("registered-here", channels=2, scale=1)
    assert LatentSpace.of(mine) is mine
    assert LatentSpace.get("registered-here") is mine
    with pytest.raises(LatentsError, match="there is another latent space called registered-here"):
        register(replace(mine, scale=2.0))
    # A space that ships keeps its numbers, whatever scaling somebody gives.
    other = replace(LatentSpace.get("sdxl"), scale=0.2)
    assert LatentSpace.of(other) is other
    assert LatentSpace.get("sdxl").scale == 0.13025


def test_tokens_in_another_order() -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    from latentguard.spaces import LatentArray, Latents
    from latentguard.spaces.arrays import unpack

    space = LatentSpace.get("ideogram4")
    spatial = torch.arange(2 * 32 * 4 * 6, dtype=torch.float32).reshape(2, 32, 4, 6)
    packed = Latents(spatial, space, True).to_packed()
    # As Ideogram4Pipeline unpacks: [B, rows, columns, dy, dx, C].
    cells = packed.tensor.view(2, 2, 3, 2, 2, 32).permute(0, 5, 1, 3, 2, 4).reshape(2, 32, 4, 6)
    torch.testing.assert_close(cells, spatial)
    torch.testing.assert_close(packed.to_spatial().tensor, spatial)
    array = unpack(packed.tensor.numpy(), space, 4, 6)
    np.testing.assert_array_equal(array, spatial.numpy())
    assert LatentArray(array, space, True).space.name == "flux2"
    usual = Latents(spatial, "flux2", True).to_packed()
    assert not torch.equal(usual.tensor, packed.tensor)
