"""Every Python block of docs/guard.md, run as it stands, in order."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")
import guard_pipelines as small
from diffusers import EulerAncestralDiscreteScheduler
from guard_helpers import ALWAYS, LinearEncoder, policy

from latentguard import Scorer

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "guard.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)


def block(having: str) -> str:
    (found,) = (one for one in BLOCKS if having in one)
    return found


def test_no_block_is_left_out() -> None:
    tried = (
        *("pipe.callback_on_step_end = LatentGuard", "guard.plot", "output.latentguard.verdicts"),
        *("outcome.kind", "guard.request(", "guard.into(", "optimize_noise(", "session("),
    )
    assert sorted(BLOCKS) == sorted(block(having) for having in tried)


def test_attaching_and_what_came_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = small.sdxl_with_text()
    found: dict[str, Any] = {"pipe": pipe}
    exec(block("pipe.callback_on_step_end = LatentGuard"), found)
    assert found["image"].size == (small.SIZE, small.SIZE)
    exec(block("guard.plot"), found)
    assert len(found["guard"].verdicts) == 1
    assert found["guard"].history[-1].final
    assert (tmp_path / "run.png").stat().st_size > 1000
    assert json.loads((tmp_path / "run.json").read_text())["policy"] == "default"


def test_whose_verdicts() -> None:
    pipe = small.sdxl_with_text()
    found: dict[str, Any] = {"pipe": pipe}
    exec(block("pipe.callback_on_step_end = LatentGuard"), found)
    exec(block("output.latentguard.verdicts"), found)
    exec(block("outcome.kind"), found)
    assert len(found["output"].latentguard.verdicts) == 1
    found["guard"] = pipe.callback_on_step_end
    exec(block("guard.request("), found)
    output, verdicts = asyncio.run(found["serve"]("a lighthouse at dawn", "request-1"))
    assert list(output.latentguard.verdicts) == verdicts
    assert output.latentguard.request_id == "request-1"


def test_a_modular_pipeline(tmp_path: Path) -> None:
    pytest.importorskip("diffusers.modular_pipelines", reason="needs modular pipelines")
    small.sdxl_with_text().save_pretrained(tmp_path)
    text = block("guard.into(").replace('dawn")', 'dawn", num_inference_steps=2)')
    found: dict[str, Any] = {"repository": str(tmp_path)}
    exec(text, found)
    assert found["state"].images[0].size == (small.SIZE, small.SIZE)
    assert len(found["state"].latentguard.verdicts) == 1


def test_optimizing_the_noise_of_a_one_step_model() -> None:
    text = block("optimize_noise(")
    scheduler = EulerAncestralDiscreteScheduler(**small.BETAS, timestep_spacing="trailing")
    turbo = small.sdxl_with_text(scheduler)
    found: dict[str, Any] = {"turbo": turbo}
    exec(text.replace("agreement=1.0", "agreement=1.0, iterations=3"), found)
    assert found["found"].verdicts[0].decision in ("allow", "review", "block")
    assert found["image"].size == (small.SIZE, small.SIZE)


def test_a_loop_of_ones_own() -> None:
    found: dict[str, Any] = {}
    exec(block("session("), found)
    clean = 0.5 * torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    sigmas = torch.tensor([10.0, 2.0, 0.5, 0.0])
    start = clean + 10 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    x, verdicts = found["generate"](lambda x, sigma: clean, start, sigmas, "request-1")
    assert [verdict.decision for verdict in verdicts] == ["allow", "allow"]
    assert torch.allclose(x, clean, atol=1e-5)


def test_a_loop_of_ones_own_that_ends_above_zero_is_judged_at_its_end() -> None:
    found: dict[str, Any] = {}
    exec(block("session("), found)
    rule = policy(ALWAYS, concept="noise_window: [0, 0.01]")
    found["scorer"] = Scorer(rule, LinearEncoder("sdxl", 4))
    clean = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    sigmas = torch.tensor([10.0, 0.5, 0.03])
    x, (verdict,) = found["generate"](lambda x, sigma: clean, 10 * clean, sigmas, "request-1")
    assert "matched" in verdict.reason
    assert not x.any()
