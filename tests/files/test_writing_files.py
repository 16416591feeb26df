"""Files that are written whole or not at all, under names that nobody can foresee."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from latentguard.atomic import replacing
from latentguard.files import load_latents, save_latents
from latentguard.spaces import Latents


def latents() -> Latents:
    return Latents(torch.zeros(1, 32, 16, 16), "flux2", scaled=True)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_link_at_the_name_that_could_be_foreseen_is_not_followed(
    tmp_path: Path, suffix: str
) -> None:
    victim, target = tmp_path / "victim", tmp_path / f"x{suffix}"
    victim.write_text("precious")
    (tmp_path / f".{target.name}.{os.getpid()}.partial").symlink_to(victim)
    save_latents(target, latents())
    assert victim.read_text() == "precious"
    assert len(load_latents(target)) == 1


def test_a_link_at_the_target_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim, target = tmp_path / "victim", tmp_path / "x.pt"
    victim.write_text("precious")
    target.symlink_to(victim)
    save_latents(target, latents())
    assert victim.read_text() == "precious"
    assert not target.is_symlink()


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_text("old")

    def fail() -> None:
        with replacing(target) as file:
            file.write(b"half")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert target.read_text() == "old"


def test_the_mode_is_that_of_the_old_file_or_of_the_process(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.touch(0o600)
    before = os.umask(0o027)
    try:
        for path in (private, tmp_path / "new"):
            with replacing(path) as file:
                file.write(b"x")
    finally:
        os.umask(before)
    assert private.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
