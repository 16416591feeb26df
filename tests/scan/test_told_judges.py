"""A driver whose actors judge knows who they are, and holds neither a model nor PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import options_of

from latentguard.errors import ModelError, PolicyError
from latentguard.scan.told import ToldJudges

CODE = """
import json, sys
from latentguard.policy import load_policy
from latentguard.scan.options import RunOptions
from latentguard.scan.told import ToldJudges
if __name__ == "__main__":
    options = RunOptions(load_policy(sys.argv[1]), model="nano-flux2")
    judges = ToldJudges(options)
    found = judges.of("flux2").info.id._asdict(), judges.of("sdxl"), options.identity(judges)
    print(json.dumps([*found, "torch" in sys.modules]))
"""


def test_a_driver_knows_who_judges_without_a_model(tmp_path: Path, calm: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(CODE)
    command = [sys.executable, str(script), str(calm)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    model, why, identity, has_torch = json.loads(ran.stdout)
    options = options_of(calm, model="nano-flux2")
    judges = options.judges()
    assert identity == json.loads(json.dumps(options.identity(judges)))
    assert model == judges.models[0].id._asdict()
    assert why == judges.of("sdxl") == "model nano-flux2 reads flux2 latents, not sdxl"
    assert not has_torch


@pytest.mark.slow
def test_what_it_is_told_is_an_error_of_its_kind(calm: Path) -> None:
    with pytest.raises(ModelError, match="no-such-model"):
        ToldJudges(options_of(calm, model="no-such-model"))
    with pytest.raises(PolicyError, match="maps no concept"):
        ToldJudges(options_of(calm, taxonomies=("azure",)))
