"""The mapping to published schemes travels with the policy, into files and out of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from exported import photos

from latentguard.encoders import Encoder
from latentguard.export import Exported, swap_policy
from latentguard.judge import Rules, categorize
from latentguard.policy import load_policy
from latentguard.runtime import Guard
from latentguard.scorer import Scorer

JUDGE = """
import json, sys
sys.modules.update(dict.fromkeys(["torch", "pydantic", "yaml"]))
import numpy as np
from latentguard.judge import categorize
from latentguard.runtime import Guard
guard = Guard(sys.argv[1])
told = [categorize(v, guard.rules, sys.argv[2]).to_dict() for v in guard.scan(np.load(sys.argv[3]))]
print(json.dumps(told))
"""


def test_the_torch_free_runtime_answers_in_the_same_words(
    exports: Callable[[str], Exported], models: dict[str, Encoder], tmp_path: Path
) -> None:
    made, latents = exports("nano"), photos()[:4]
    np.save(tmp_path / "latents.npy", latents.tensor.numpy())
    scorer = Scorer("family", models["nano-flux2"])
    rules = Rules.of(scorer.policy.to_dict())
    expected = [categorize(v, rules, "azure").to_dict() for v in scorer.verdicts(latents)]
    command = [sys.executable, "-c", JUDGE, made.path, "azure", tmp_path / "latents.npy"]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    for one, other in zip(json.loads(ran.stdout), expected, strict=True):
        assert one.pop("scores") == pytest.approx(other.pop("scores"), abs=1e-4)
        assert one == other


def test_a_swap_brings_the_new_policy_s_mapping(
    exports: Callable[[str], Exported], tmp_path: Path
) -> None:
    with Guard(exports("nano").path) as guard:
        assert list(guard.rules.schemes) == ["azure", "mlcommons", "openai", "rekognition"]
    out = tmp_path / "weapons.onnx"
    swap_policy(exports("nano").path, "weapons", out)
    with Guard(out) as guard:
        assert list(guard.rules.schemes) == ["azure", "rekognition"]
        assert guard.rules == Rules.of(load_policy("weapons").to_dict())
