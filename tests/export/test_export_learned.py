"""Concepts that were learned from examples, in files that need no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from learned import NANO, photos

from latentguard.errors import ModelError
from latentguard.export import Exported, swap_policy
from latentguard.runtime import Guard
from latentguard.scorer import Scorer

TORCH_FREE = """
import json, sys
sys.modules.update(dict.fromkeys(["torch", "pydantic", "yaml", "safetensors"]))
import numpy as np
from latentguard.runtime import Guard
guard = Guard(sys.argv[1])
print(json.dumps([verdict.to_dict() for verdict in guard.scan(np.load(sys.argv[2]))]))
"""


def test_the_torch_free_runtime_gives_the_same_verdicts(
    learned_export: Exported, tmp_path: Path
) -> None:
    latents = photos()
    np.save(tmp_path / "latents.npy", latents.tensor.numpy())
    command = [sys.executable, "-c", TORCH_FREE, learned_export.path, tmp_path / "latents.npy"]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    expected = Scorer(learned_export.path.with_name("house.yaml"), NANO).verdicts(latents)
    for found, verdict in zip(json.loads(ran.stdout), expected, strict=True):
        assert found["decision"] == verdict.decision
        for one, other in zip(found["concepts"], verdict.to_dict()["concepts"], strict=True):
            for score in ("margin", "probability"):
                assert one.pop(score) == pytest.approx(other.pop(score), abs=1e-4)
            assert one == other


def test_heat_maps_and_embeddings_are_those_of_pytorch(learned_export: Exported) -> None:
    latents = photos()[:3]
    scorer = Scorer(learned_export.path.with_name("house.yaml"), NANO)
    with Guard(learned_export.path) as guard:
        judged = guard.judge(latents.tensor.numpy(), heatmaps=True)
        assert judged.heatmaps is not None
        np.testing.assert_allclose(judged.heatmaps.margins, scorer.heatmaps(latents), atol=1e-4)
        embedding = guard.scores(latents.tensor.numpy())["embedding"]
    with torch.no_grad():
        np.testing.assert_allclose(embedding, scorer.encoder.encode_latents(latents), atol=1e-4)


def test_a_swap_keeps_the_place_for_examples(learned_export: Exported, tmp_path: Path) -> None:
    plain, back = tmp_path / "plain.onnx", tmp_path / "back.onnx"
    swap_policy(learned_export.path, "weapons", plain)
    swap_policy(plain, learned_export.path.with_name("house.yaml"), back)
    latents = photos()
    with Guard(plain) as guard:
        found = guard.scan(latents.tensor.numpy())
    expected = Scorer("weapons", NANO).verdicts(latents)
    assert [verdict.decision for verdict in found] == [verdict.decision for verdict in expected]
    with Guard(back) as guard, Guard(learned_export.path) as first:
        both = (one.scan(latents.tensor.numpy()) for one in (guard, first))
        assert next(both) == next(both)


def test_a_file_of_prompts_alone_has_no_place_for_examples(
    learned_export: Exported, exports: Callable[[str], Exported], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="was exported for policies of prompts alone, and policy"):
        swap_policy(
            exports("nano").path,
            learned_export.path.with_name("house.yaml"),
            tmp_path / "out.onnx",
        )
    assert not (tmp_path / "out.onnx").exists()
