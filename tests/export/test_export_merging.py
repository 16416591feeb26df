"""Exports of a model that merges tokens: the same merges as PyTorch's, and a file that says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from export_helpers import constants, differences, expected, nodes, sdxl

from latentguard.encoders import Encoder
from latentguard.encoders.latent_clip import LatentCLIP
from latentguard.errors import ModelError
from latentguard.export import Exported, export_onnx, swap_policy
from latentguard.runtime import Guard
from latentguard.scorer import Scorer

pytestmark = pytest.mark.slow
"""Each export traces Latent-CLIP anew; tests/encoders has merging in short."""

Models = dict[str, Encoder]
Exports = Callable[[str], Exported]

# As without merging; worst seen 1.4e-6.
CLOSE = 1e-5


@pytest.fixture
def merging(models: Models) -> LatentCLIP:
    encoder = models["b4-merging"]
    assert isinstance(encoder, LatentCLIP)
    return encoder


def test_scores_and_heat_maps_are_pytorchs(exports: Exports, merging: LatentCLIP) -> None:
    scorer, latents = Scorer("family", merging), sdxl(5, (64, 64))
    with Guard(exports("merging").path) as guard:
        for count in (1, 2, 5):
            found = guard.scores(latents.tensor[:count].numpy())
            assert max(differences(found, expected(scorer, latents[:count])).values()) < CLOSE
        maps = guard.heatmaps(latents.tensor.numpy())
    assert np.abs(maps - scorer.heatmaps(latents)).max() < CLOSE


def test_the_file_and_the_report_say_that_tokens_merge(
    exports: Exports, merging: LatentCLIP
) -> None:
    made = exports("merging")
    with Guard(made.path) as guard:
        assert guard.metadata["merged"] == {"share": 0.5, "tokens": 256, "left": 128}
        assert guard.metadata["model"]["name"] == "latent-clip-p4-random+merge=0.5"
        found = guard.embed(sdxl(8, (64, 64)).tensor.numpy())
    assert made.unmerged is not None
    assert made.checked.margin < CLOSE < made.unmerged.margin
    merging.merge = 0.0
    try:
        whole = merging.encode_latents(sdxl(8, (64, 64))).numpy()
    finally:
        merging.merge = 0.5
    assert made.unmerged.cosine == pytest.approx(float((found * whole).sum(1).min()), abs=1e-5)
    assert made.unmerged.cosine < 0.9999
    assert exports("clip").unmerged is None
    with Guard(exports("clip").path) as guard:
        assert guard.metadata["merged"] is None


# int8 merges other pairs where two are about as similar; worst seen 0.99975.
@pytest.mark.parametrize(
    ("name", "least"),
    [("merging-fp16", 0.9999), ("merging-int8", 0.995), ("merging-dynamic", 0.995)],
)
def test_in_other_precisions(
    name: str, least: float, exports: Exports, merging: LatentCLIP
) -> None:
    latents = sdxl(24, (64, 64))[16:]
    wanted = merging.encode_latents(latents).numpy()
    with Guard(exports(name).path) as guard:
        found = guard.embed(latents.tensor.numpy())
    assert (found * wanted).sum(1).min() > least


def test_all_its_matrices_are_8_bit(exports: Exports) -> None:
    """What follows a merge counts as little less than what goes before."""
    model = onnx.load(exports("merging-int8").path)
    known = constants(model)
    matrices = [
        node
        for node in nodes(model.graph)
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in known
    ]
    names = {node.output[0]: node for node in nodes(model.graph)}
    eight = sum(
        node.op_type == "MatMul"
        and node.input[1] in names
        and names[node.input[1]].op_type == "DequantizeLinear"
        for node in nodes(model.graph)
    )
    # Three blocks of at least four, and the head; the patches are a convolution.
    assert eight >= 13
    assert not [node.name for node in matrices if known[node.input[1]].size > 1000]


def test_operators_are_standard(exports: Exports) -> None:
    for name in ("merging", "merging-fp16", "merging-int8", "merging-dynamic"):
        model = onnx.load(exports(name).path)
        onnx.checker.check_model(model, full_check=True)
        assert {node.domain for node in nodes(model.graph)} <= {"", "ai.onnx"}


def test_open_sizes_are_refused(merging: LatentCLIP, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"merges a share of its tokens, .*: give height and width"
    ):
        export_onnx("family", merging, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_a_policy_is_swapped_for_the_same_merging_only(
    exports: Exports, merging: LatentCLIP, tmp_path: Path
) -> None:
    source, out = exports("merging").path, tmp_path / "swapped.onnx"
    whole = LatentCLIP.random(merging.config)
    with pytest.raises(ModelError, match=r"was exported from latent-clip-p4-random\+merge=0.5"):
        swap_policy(source, "weapons", out, whole)
    swap_policy(source, "weapons", out, merging)
    scorer, latents = Scorer("weapons", merging), sdxl(2, (64, 64))
    with Guard(out) as guard:
        found = guard.scores(latents.tensor.numpy())
        assert guard.metadata["merged"] == {"share": 0.5, "tokens": 256, "left": 128}
    assert max(differences(found, expected(scorer, latents)).values()) < CLOSE
