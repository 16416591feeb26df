"""The runtime where torch is not: what it imports, and a real environment without torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runtime_helpers import ROOT, run_without_torch

from latentguard import Scorer, load_policy
from latentguard.runtime import Guard
from latentguard.spaces import Latents

JUDGE = """
import json, numpy as np
from latentguard.runtime import Guard
guard = Guard(sys.argv[1], sys.argv[2] or None)
print(json.dumps([verdict.to_dict() for verdict in guard.scan(np.load(sys.argv[3]))]))
"""


def test_importing_the_runtime_imports_nothing_heavy() -> None:
    code = (
        "import sys, latentguard.runtime\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'safetensors', 'pydantic', 'yaml', 'typer'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_judging_where_torch_cannot_be_imported(
    artifact: Path, guard: Guard, arrays: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "latents.npy", arrays[:4])
    ran = run_without_torch(JUDGE, artifact, guard.sha256, tmp_path / "latents.npy")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    expected = [verdict.to_dict() for verdict in guard.scan(arrays[:4])]
    assert [v["decision"] for v in found] == [v["decision"] for v in expected]
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one["concepts"], other["concepts"], strict=True):
            # Threads add in another order: as between two runs of one process.
            assert a["margin"] == pytest.approx(b["margin"], abs=1e-5)


def test_without_onnx_runtime(artifact: Path) -> None:
    code = (
        "sys.modules['onnxruntime'] = None\n"
        "from latentguard.runtime import Guard, ModelError\n"
        "try: Guard(sys.argv[1])\n"
        "except ModelError as error: print(error)"
    )
    ran = run_without_torch(code, artifact)
    assert ran.stdout.strip() == "this needs onnxruntime: pip install 'latentguard[onnx]'"


@pytest.mark.slow
def test_a_virtual_environment_without_torch(
    artifact: Path, guard: Guard, arrays: np.ndarray, tmp_path: Path
) -> None:
    """`pip install latentguard[onnx]` is enough to judge, by Python and by the command line."""
    source = tmp_path / "source"
    kept = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__", "_build.json")
    for name in ("latentguard", "policies"):
        shutil.copytree(ROOT / name, source / name, ignore=kept)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    made = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made], check=True)
    wheels, pip = tmp_path / "wheels", [sys.executable, "-m", "pip", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source]
    built = subprocess.run(
        [*pip, *build],
        capture_output=True,
        text=True,
        env={**os.environ, "LATENTGUARD_CPP": "0"},
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.glob("latentguard-*.whl")
    python = made / "bin" / "python"
    install = ["install", "--no-compile", "--retries", "0", f"{wheel}[onnx]"]
    try:
        installed = subprocess.run(
            [*pip, "--python", python, *install],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    except subprocess.TimeoutExpired:
        pytest.skip("needs a package index that answers: pip took more than 300 s")
    if installed.returncode and re.search("No matching distribution|connection", installed.stderr):
        pytest.skip(f"needs a package index: {installed.stderr.strip().splitlines()[-1][:200]}")
    assert installed.returncode == 0, installed.stderr
    np.save(tmp_path / "latents.npy", arrays[14:18])
    code = "import sys, importlib.util as u; assert not u.find_spec('torch')\n" + JUDGE
    arguments = [artifact, guard.sha256, tmp_path / "latents.npy"]
    ran = subprocess.run(
        [python, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert ran.returncode == 0, ran.stderr
    decisions = [verdict["decision"] for verdict in json.loads(ran.stdout)]
    assert decisions == [verdict.decision for verdict in guard.scan(arrays[14:18])]
    scan = ["scan", "--runtime", "onnx", "--model", artifact, tmp_path / "latents.npy"]
    ran = subprocess.run(
        [made / "bin" / "latentguard", *scan, "--space", "flux2", "--scaled"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert ran.returncode == 1, ran.stderr
    assert "revolver" in ran.stdout


# -- the example of the documentation --------------------------------------------------------


def tiny_pipeline() -> Any:
    """A Flux2Pipeline of real parts with random weights, without its text encoder."""
    diffusers = pytest.importorskip("diffusers", reason="the example makes latents with diffusers")
    torch.manual_seed(0)
    pipe = diffusers.Flux2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            layers_per_block=1,
            latent_channels=32,
        ).eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=diffusers.Flux2Transformer2DModel(
            patch_size=1,
            in_channels=128,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_example_from_a_pipeline_to_a_verdict(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two blocks of docs/runtime.md, with a small pipeline at 256 x 256 pixels."""
    text = (ROOT / "docs" / "runtime.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    make = next(block for block in blocks if "Flux2Pipeline" in block)
    judge = next(block for block in blocks if 'np.load("latents.npy")' in block)

    made = re.sub(r"Flux2Pipeline\.from_pretrained\([^)]*\)", "tiny_pipeline()", make)
    made = made.replace(
        '"a cat on a chair"', "prompt_embeds=torch.zeros(1, 4, 16), num_inference_steps=2"
    )
    made = made.replace("1024", "256")
    assert made.count("tiny_pipeline()") == made.count("prompt_embeds") == 1
    assert made.count("256") == 2
    monkeypatch.chdir(tmp_path)
    exec(made, {"tiny_pipeline": tiny_pipeline})

    shutil.copy(artifact, tmp_path / "guard.onnx")
    judged = judge.replace("height=128, width=128", "height=32, width=32")
    assert judged != judge
    ran = run_without_torch(judged, folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    tokens = torch.from_numpy(np.load(tmp_path / "latents.npy"))
    assert tokens.shape == (1, 256, 128)
    latents = Latents(tokens, "flux2", True, "packed", 32, 32)
    (verdict,) = Scorer(load_policy("family"), "nano-flux2", device="cpu").verdicts(latents)
    assert ran.stdout.split()[0] == verdict.decision
    assert verdict.error is None
