"""`latentguard export` as it is typed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_helpers import SMALL_B8, sdxl
from exported import EXAMPLES, photos

from latentguard.encoders import checkpoint
from latentguard.files import save_latents
from latentguard.runtime import Guard
from latentguard.scorer import Scorer

Command = Callable[..., Any]
NANO = ("--model", "nano-flux2", "--policy", "family", "--height", 32, "--width", 32, "--heatmaps")


def test_export_and_swap(command: Command, tmp_path: Path) -> None:
    out, other = tmp_path / "guard.onnx", tmp_path / "weapons.onnx"
    ran = command("export", "onnx", *NANO, "--check", EXAMPLES, "-o", out)
    assert ran.code == 0, ran.err
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert "compared with PyTorch on 25 real latents: margins differ by at most" in ran.out
    assert "25 of 25 decisions are the same" in ran.out
    assert f"wrote {out} (" in ran.out
    assert ran.out.splitlines()[-1] == f"sha256 {digest}"
    assert "tracing nano-flux2" in ran.err

    ran = command("export", "swap", out, "--policy", "weapons", "-o", other, "--sha256", digest)
    assert ran.code == 0, ran.err
    pinned = ran.out.split()[-1]
    with Guard(other, sha256=pinned) as guard:
        verdicts = guard.scan(photos().tensor.numpy())
    decided = Scorer("weapons", "nano-flux2").verdicts(photos())
    assert [v.decision for v in verdicts] == [v.decision for v in decided]


@pytest.mark.slow
def test_int8_on_files(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "guard.onnx"
    arguments = ("--precision", "int8", "--calibration", EXAMPLES, "--quiet")
    ran = command("export", "onnx", *NANO, *arguments, "-o", out)
    assert ran.code == 0, ran.err
    assert ran.out.strip() == hashlib.sha256(out.read_bytes()).hexdigest()
    assert "tracing" not in ran.err
    with Guard(out) as guard:
        assert guard.metadata["calibration"] == "25 latents of flux2"


@pytest.mark.slow
def test_a_model_file_and_drawn_latents(command: Command, tmp_path: Path) -> None:
    path, out = tmp_path / "model.safetensors", tmp_path / "guard.onnx"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: torch.randn(shape, generator=generator) * 0.1
        for key, shape in checkpoint.expected_shapes(SMALL_B8).items()
    } | {"logit_scale": torch.tensor(4.0)}
    weights = checkpoint.Weights(tensors, SMALL_B8, "small", "", "")
    checkpoint.write(path, checkpoint.convert(weights))
    size = ("--height", 64, "--width", 64)
    ran = command("export", "onnx", "--model", path, *size, "--merge-tokens", 0.5, "-o", out)
    assert ran.code == 0, ran.err
    assert "compared with the model without merging: margins differ by at most" in ran.out
    with Guard(out) as guard:
        assert guard.metadata["model"]["name"] == "small+merge=0.5"
    assert "8 latents drawn with the space's statistics" in ran.out
    assert "compare real ones with --check before" in ran.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("-o", "guard.bin"), "--out must be a file that ends in .onnx, got guard.bin"),
        (("-o", "no/guard.onnx"), "--out: there is no folder no"),
        (("-o", "guard.onnx", "--height", "64"), "give both --height and --width, or neither"),
        (
            ("-o", "guard.onnx", "--calibration", str(EXAMPLES)),
            "--calibration and --dynamic-quantization need --precision int8, got fp32",
        ),
        (("-o", "guard.onnx"), "give them in latent cells (--height 64 --width 64 for 512 pixels)"),
        (("-o", "guard.onnx", "--first-precision", "int8"), "policy 'default' has no cascade"),
        (("-o", "guard.onnx", "--policy", "no-such"), "no-such"),
        (("-o", "guard.onnx", "--model", "nano-flux3"), "did you mean nano-flux2?"),
        (("-o", "guard.onnx", "--check", "missing.pt"), "missing.pt"),
        (("-o", "guard.onnx", "--merge-tokens", "0.5"), "nano-flux2 has no tokens to merge"),
    ],
)
def test_wrong_usage(
    arguments: tuple[str, ...],
    text: str,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = arguments if "--model" in arguments else ("--model", "nano-flux2", *arguments)
    ran = command("export", "onnx", *given)
    assert ran.code == 2
    assert text in " ".join(ran.err.split())
    assert "Traceback" not in ran.err
    assert list(tmp_path.iterdir()) == []


def test_calibration_latents_of_another_space(command: Command, tmp_path: Path) -> None:
    save_latents(tmp_path / "a.pt", sdxl(2, (32, 32)))
    out = tmp_path / "guard.onnx"
    ran = command(
        *("export", "onnx", *NANO, "--precision", "int8", "-o", out),
        *("--calibration", tmp_path / "a.pt"),
    )
    assert ran.code == 2
    assert "sdxl" in ran.err
    assert not out.exists()


def test_swap_of_no_export(command: Command, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"not a model")
    ran = command("export", "swap", tmp_path / "a.onnx", "--policy", "family")
    assert ran.code == 2
    assert "is no readable .onnx file" in " ".join(ran.err.split())
    assert (tmp_path / "a.onnx").read_bytes() == b"not a model"
