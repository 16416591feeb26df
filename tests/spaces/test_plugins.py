"""Spaces and encoders that an installed package brings, and packages that are broken."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from latentguard.errors import LatentsError, ModelError
from latentguard.spaces import LatentSpace, all_spaces, known_names, recognize

SPACE = {
    "schema_version": 1,
    "name": "plugged-4",
    "channels": 4,
    "factor": 8,
    "scaling": {"scale": 0.5},
}
MODULE = """
from pathlib import Path
from latentguard.encoders.catalog import Entry
from latentguard.spaces import LatentSpace

folder = Path(__file__).parent
plugged = LatentSpace.from_file(folder / "plugged-4.json")
other_name = LatentSpace("another", channels=5, scale=1.0)
number = 3
encoder = Entry.read(folder / "plugged-model.json", folder / "w.bin", "plugged_package")
without_weights = Entry.read(folder / "plugged-model.json", module="plugged_package")


def load(path, device, entry):
    return f"{entry.name} of {path.read_text()} on {device}"
"""
POINTS = """
[latentguard.spaces]
plugged-4 = plugged_package:plugged
wrong-name = plugged_package:other_name
wrong-kind = plugged_package:number
broken = plugged_package_that_is_not_there:x

[latentguard.encoders]
plugged-model = plugged_package:encoder
weightless = plugged_package:without_weights
broken-model = plugged_package:missing
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the search path that holds a package and what an installer writes of it."""
    (tmp_path / "plugged_package.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "plugged-4.json").write_text(json.dumps(SPACE), encoding="utf-8")
    described = {"rank": 1, "format": "plugged", "space": "plugged-4", "summary": "a toy"}
    (tmp_path / "plugged-model.json").write_text(json.dumps(described), encoding="utf-8")
    (tmp_path / "w.bin").write_text("weights", encoding="utf-8")
    told = tmp_path / "plugged_package-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged-package\nVersion: 1.0\n")
    (told / "entry_points.txt").write_text(POINTS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    from latentguard.spaces import SPACES

    before = dict(SPACES)
    yield tmp_path
    sys.modules.pop("plugged_package", None)
    for name in SPACES.keys() - before.keys():
        del SPACES[name]


@pytest.mark.usefixtures("installed")
def test_a_package_s_space_is_known_by_its_name() -> None:
    assert "plugged-4" in known_names()
    assert "plugged_package" not in sys.modules  # until it is asked for
    space = LatentSpace.get("plugged-4")
    assert (space.channels, space.scale) == (4, 0.5)
    assert LatentSpace.get("plugged-4") is space
    assert space in list(all_spaces())


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "'broken' of package plugged-package cannot be loaded .*ModuleNotFoundError"),
        ("wrong-kind", "must be a LatentSpace, got int"),
        ("wrong-name", "gives a space that is called another: they must have one name"),
    ],
)
def test_a_broken_entry_point_is_an_error_where_it_is_asked_for(name: str, message: str) -> None:
    assert LatentSpace.get("sdxl").name == "sdxl"
    list(all_spaces())
    with pytest.raises(LatentsError, match=message):
        LatentSpace.get(name)


@pytest.mark.usefixtures("installed")
def test_a_package_s_space_of_the_same_shape_makes_sdxl_a_question() -> None:
    import numpy as np

    generator = np.random.default_rng(0)
    images = np.cumsum(np.cumsum(generator.normal(size=(2, 4, 32, 32)), 2), 3)
    found = recognize(images)
    assert not found.certain
    assert "space plugged-4 has the same shape" in found.question
    assert "--space plugged-4" in found.question


@pytest.mark.usefixtures("installed")
def test_a_file_may_name_a_package_s_space(tmp_path: Path) -> None:
    import numpy as np

    from latentguard.files import read_arrays

    np.savez(
        tmp_path / "a.npz", latents=np.zeros((1, 4, 8, 8), "f4"), space="plugged-4", scaled=True
    )
    (record,) = read_arrays(tmp_path / "a.npz")
    assert record.error is None
    assert record.latents is not None
    assert record.latents.space.name == "plugged-4"
    np.savez(tmp_path / "b.npz", latents=np.zeros((1, 4, 8, 8), "f4"), space="broken", scaled=True)
    (record,) = read_arrays(tmp_path / "b.npz")
    assert record.error is not None
    assert "cannot be loaded" in record.error


@pytest.mark.usefixtures("installed")
def test_a_package_s_encoder_is_loaded_by_its_name() -> None:
    pytest.importorskip("torch", reason="needs torch")
    from latentguard.encoders import best_encoder, load_encoder
    from latentguard.encoders.catalog import entries

    assert str(load_encoder("plugged-model", "cpu")) == "plugged-model of weights on cpu"
    assert best_encoder("plugged-4") == "plugged-model"
    assert best_encoder("sdxl") != "plugged-model"
    assert [e.name for e in entries() if e.weights] == ["plugged-model"]
    with pytest.raises(ModelError, match="must be an Entry of that name with its weights"):
        load_encoder("weightless", "cpu")
    with pytest.raises(
        ModelError, match="'broken-model' of package plugged-package cannot be load"
    ):
        load_encoder("broken-model", "cpu")


def test_the_command_line_shows_a_package_s_space(installed: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        "from latentguard.cli import main\n"
        "sys.argv = ['latentguard', 'spaces', 'list', '--format', 'json']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows = {row["space"]: row for row in json.loads(done.stdout)}
    assert rows["plugged-4"]["channels"] == 4
    assert "broken" not in rows
