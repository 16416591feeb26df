"""An exported file carries a space of one's own: whoever runs it needs nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import SECOND, two_stages

from latentguard.encoders.catalog import LatentClipConfig
from latentguard.encoders.latent_clip import LatentCLIP
from latentguard.errors import LatentsError
from latentguard.export import export_onnx
from latentguard.runtime import Guard
from latentguard.spaces import SPACES, LatentSpace

OWN = LatentSpace("own-eight", channels=8, scale=0.5, shift=0.25, packed_patch=2)
CONFIG: LatentClipConfig = replace(SECOND, channels=8, space="own-eight", grid=16)


@pytest.mark.slow
def test_a_file_of_an_own_space_runs_where_nobody_knows_it(tmp_path: Path) -> None:
    encoder = LatentCLIP.random(CONFIG)
    path = tmp_path / "guard.onnx"
    try:
        with pytest.raises(LatentsError, match="unknown latent space 'own-eight'"):
            export_onnx(two_stages(None), encoder, path, size=(16, 16))
        export_onnx(two_stages(None), encoder, path, size=(16, 16), space=OWN)
        with Guard(path) as guard:
            expected = [v.decision for v in guard.scan(np.ones((2, 8, 16, 16), np.float32))]
    finally:
        SPACES.pop("own-eight", None)
    code = (
        "import json, sys, numpy as np\n"
        "from latentguard.runtime import Guard\n"
        "from latentguard.spaces import SPACES\n"
        "assert 'own-eight' not in SPACES\n"
        f"with Guard({str(path)!r}) as guard:\n"
        "    tokens = np.ones((2, 64, 32), np.float32)\n"
        "    print(json.dumps([v.decision for v in guard.scan(tokens, height=16, width=16)]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == expected


@pytest.mark.slow
def test_a_space_is_given_by_its_file(command: Callable[..., Any], tmp_path: Path) -> None:
    """With the model that reads the RGB view of any space, and then under another policy."""
    space, out, other = tmp_path / "own-four.yaml", tmp_path / "a.onnx", tmp_path / "b.onnx"
    rows = ", ".join(["[0.1, 0.2, 0.3]"] * 4)
    space.write_text(
        "schema_version: 1\nchannels: 4\nfactor: 8\nscaling: {scale: 0.5}\n"
        f"rgb_view: {{acts_on: scaled, factors: [{rows}]}}\n"
    )
    given = ("--model", "nano-view", "--policy", "family", "--height", 64, "--width", 64)
    try:
        ran = command("export", "onnx", *given, "--space", space, "-o", out)
        assert ran.code == 0, ran.err
        SPACES.pop("own-four")
        ran = command("export", "swap", out, "--policy", "weapons", "-o", other)
        assert ran.code == 0, ran.err
    finally:
        SPACES.pop("own-four", None)
    with Guard(other) as guard:
        assert guard.space == "own-four"
        assert len(guard.scan(np.ones((2, 4, 64, 64), np.float32))) == 2
