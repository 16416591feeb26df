"""An export that reads images in crops, too: the same scores in the runtime, and no policy of other
views swapped into a file that reads images whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import photos

from latentguard import Latents
from latentguard.encoders import Encoder
from latentguard.errors import ModelError
from latentguard.export import Exported, export_onnx, swap_policy
from latentguard.policy import load_policy
from latentguard.runtime import Guard
from latentguard.scorer import Scorer

CROPS = load_policy("weapons").with_views("crops")


def scene() -> torch.Tensor:
    """A picture of 512 px with a revolver of 256 px in its corner."""
    latents = photos()
    names = latents.ids or ()
    gun = next(i for i, name in enumerate(names) if "revolver" in name)
    large = torch.nn.functional.interpolate(
        latents[0].tensor.float(), size=(64, 64), mode="bilinear"
    )
    large[..., 24:56, 24:56] = latents[gun].tensor.float()[..., :32, :32]
    return large


@pytest.mark.slow
@pytest.mark.parametrize("by", ["policy", "name"])
def test_the_runtime_reads_crops(by: str, tmp_path: Path) -> None:
    name = "nano-flux2" if by == "policy" else "nano-flux2+views=crops"
    policy = CROPS if by == "policy" else load_policy("weapons")
    made = export_onnx(policy, name, tmp_path / "crops.onnx", size=(64, 64))
    scorer, latents = Scorer(policy, name), scene()
    with Guard(made.path) as guard:
        assert guard.model.name == "nano-flux2+views=crops"
        found = guard.scores(latents.numpy())["margin"]
        verdict = guard.scan(latents.numpy())[0]
    wanted = scorer.verdicts(Latents(latents, "flux2", scaled=True))[0]
    assert np.allclose(found[0], [c.margin for c in wanted.concepts], atol=1e-5)
    assert (verdict.decision, verdict.reason) == (wanted.decision, wanted.reason)
    assert verdict.decision == "block"


def test_a_file_that_reads_whole_takes_no_policy_of_crops(
    exports: Callable[[str], Exported], models: dict[str, Encoder], tmp_path: Path
) -> None:
    made = exports("nano")
    with pytest.raises(ModelError, match=r"reads images whole, .* views: crops: export it anew"):
        swap_policy(made.path, CROPS, tmp_path / "out.onnx", models["nano-flux2"])
    assert not (tmp_path / "out.onnx").exists()
