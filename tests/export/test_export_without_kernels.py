"""Exports where nothing was compiled: operators are their references, and stay operators."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from export_helpers import differences, expected
from exported import photos

from latentguard.encoders import Encoder
from latentguard.export import swap_policy
from latentguard.runtime import Guard
from latentguard.scorer import Scorer

CODE = """
import sys

sys.modules["latentguard._C"] = None  # as where nothing was compiled
from latentguard.export import export_onnx
from latentguard.ops import library

assert library.extension is None
export_onnx("family", "nano-flux2", sys.argv[1], size=(32, 32), heatmaps=True)
"""


@pytest.mark.slow
def test_an_export_without_kernels(tmp_path: Path, models: dict[str, Encoder]) -> None:
    path, other = tmp_path / "plain.onnx", tmp_path / "weapons.onnx"
    subprocess.run([sys.executable, "-c", CODE, str(path)], check=True, capture_output=True)
    latents = photos()
    for policy, file in (("family", path), ("weapons", other)):
        if policy == "weapons":  # another number of prompts and concepts: the sizes were left open
            swap_policy(path, policy, other, models["nano-flux2"])
        wanted = expected(Scorer(policy, models["nano-flux2"]), latents)
        with Guard(file) as guard:
            found = guard.scores(latents.tensor.numpy())
        assert np.isfinite(found["margin"]).any()
        assert max(differences(found, wanted).values()) < 1e-5
