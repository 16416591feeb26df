"""The nodes' inputs, outputs and errors, without ComfyUI."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_pictures import bundled, policy_file, raw
from latentguard_comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from latentguard_comfyui.conventions import BY_SPACE
from latentguard_comfyui.loaded import Loaded
from latentguard_comfyui.told import BlockedError
from safetensors.torch import save_file

from latentguard import LatentGuardError, LatentsError, LatentSpace, PolicyError, scan_files

FOLDER = Path(__file__).resolve().parents[1]
NAMES = ("revolver", "cat", "rocket", "pagoda")


def loaded(policy: str = "family", policy_file: str = "") -> Loaded:
    node = NODE_CLASS_MAPPINGS["LatentGuardPolicy"]()
    return node.load(policy, "auto", policy_file, "cpu")[0]


@pytest.fixture(scope="module")
def family() -> Loaded:
    return loaded()


def check(guard: Loaded, samples: Any, on_block: str, **options: Any) -> tuple[Any, str, bool]:
    given = samples if isinstance(samples, dict) else {"samples": samples}
    found = NODE_CLASS_MAPPINGS["LatentGuardCheck"]().check(guard, given, on_block, **options)
    assert found["ui"] == {"text": [found["result"][1]]}
    return found["result"]


# -- what ComfyUI asks of a node -----------------------------------------------------------------


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_a_node_says_what_it_takes_and_gives(name: str) -> None:
    node = NODE_CLASS_MAPPINGS[name]
    inputs = node.INPUT_TYPES()
    assert set(inputs) <= {"required", "optional"}
    arguments = [key for part in inputs.values() for key in part]
    function = getattr(node, node.FUNCTION)
    taken = function.__code__.co_varnames[1 : function.__code__.co_argcount]
    if name != "LatentGuardHeatMap":  # inference_mode wraps it
        assert list(taken) == arguments
    assert len(getattr(node, "RETURN_NAMES", node.RETURN_TYPES)) == len(node.RETURN_TYPES)
    assert name in NODE_DISPLAY_NAME_MAPPINGS
    for part in inputs.values():
        for kind, *options in part.values():
            if isinstance(kind, list) and options:
                assert options[0]["default"] in kind


def test_nothing_of_comfyui_is_imported_before_a_node_runs() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import latentguard_comfyui; "
        "assert not any(name.split('.')[0] in ('comfy', 'nodes', 'folder_paths') "
        "for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_folder_loads_as_comfyui_loads_it() -> None:
    spec = importlib.util.spec_from_file_location(
        "custom_nodes_latentguard", FOLDER / "__init__.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    assert set(module.NODE_CLASS_MAPPINGS) == set(NODE_CLASS_MAPPINGS)


def test_the_registry_is_told_what_it_asks_for() -> None:
    told = tomllib.loads((FOLDER / "pyproject.toml").read_text("utf-8"))
    assert told["project"]["license"] == {"file": "LICENSE"}
    assert (FOLDER / "LICENSE").read_bytes() == (FOLDER.parents[1] / "LICENSE").read_bytes()
    assert told["tool"]["comfy"]["DisplayName"] == "LatentGuard"
    required = (FOLDER / "requirements.txt").read_text("utf-8").split()
    assert required == told["project"]["dependencies"]


@pytest.mark.parametrize("path", sorted((FOLDER / "examples").glob("*.json")), ids=lambda p: p.stem)
def test_the_examples_use_inputs_that_there_are(path: Path) -> None:
    workflow = json.loads(path.read_text("utf-8"))
    used = [node for node in workflow.values() if node["class_type"] in NODE_CLASS_MAPPINGS]
    assert used
    for node in used:
        inputs = NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()
        known = {key for part in inputs.values() for key in part}
        assert set(inputs["required"]) <= set(node["inputs"]) <= known
    for node in workflow.values():
        for value in node["inputs"].values():
            if isinstance(value, list):
                assert value[0] in workflow


# -- policies ------------------------------------------------------------------------------------


def test_a_policy_is_loaded_by_name_or_from_a_file(tmp_path: Path) -> None:
    assert loaded("weapons").policy.name == "weapons"
    assert loaded("weapons", policy_file(tmp_path)).policy.name == "test"
    with pytest.raises(PolicyError):
        loaded("weapons", str(tmp_path / "missing.yaml"))


def test_an_edited_policy_is_read_again(tmp_path: Path) -> None:
    node = NODE_CLASS_MAPPINGS["LatentGuardPolicy"]
    path = policy_file(tmp_path)
    before = node.IS_CHANGED("family", "auto", path)
    assert node.IS_CHANGED("family", "auto", path) == before
    Path(path).write_text(Path(path).read_text().replace("0.5", "0.25"))
    assert node.IS_CHANGED("family", "auto", path) != before


# -- checks --------------------------------------------------------------------------------------


def test_a_check_passes_what_is_allowed_bit_for_bit(family: Loaded) -> None:
    given = raw("sdxl", "cat", "pagoda")
    latent = {"samples": given, "noise_mask": torch.ones(1, 8, 8), "batch_index": [3, 4]}
    for on_block in ("stop", "blank", "pass"):
        out, text, flag = check(family, latent, on_block, space="sdxl")
        assert torch.equal(out["samples"], given)
        assert out["samples"].data_ptr() != given.data_ptr()
        assert out["batch_index"] == [3, 4]
        assert not flag
        assert text.startswith("image 0: allow: ")
        assert "not visible to this model" in text


def test_a_check_says_what_matched_and_stops_blanks_or_flags(family: Loaded) -> None:
    given = raw("sdxl", *NAMES)
    with pytest.raises(BlockedError, match=r"(?s)'firearms' matched 'revolver' .*threshold 0\.500"):
        check(family, given, "stop")
    out, text, flag = check(family, given, "blank")
    assert flag
    assert not out["samples"][0].any()
    assert torch.equal(out["samples"][1:], given[1:])
    assert "firearms (block): 'revolver', probability 0.99" in text
    assert given[0].any()
    out, passed_text, flag = check(family, given, "pass")
    assert flag
    assert passed_text == text
    assert torch.equal(out["samples"], given)


@pytest.mark.parametrize("space", ["sd1", "sdxl", "sd3", "flux1", "wan21"])
def test_the_same_picture_is_judged_alike_in_each_space(family: Loaded, space: str) -> None:
    given = raw(space, "revolver", "cat")
    if BY_SPACE[space].frames:
        given = given[:, :, None]
    out, _, flag = check(family, given, "blank", space=space)
    assert flag
    assert not out["samples"][0].any()
    assert torch.equal(out["samples"][1], given[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_judged_and_kept(family: Loaded, dtype: torch.dtype) -> None:
    given = raw("sdxl", "revolver", "cat").to(dtype)
    out, _, _ = check(family, given, "blank", space="sdxl")
    assert out["samples"].dtype == dtype
    assert not out["samples"][0].any()
    assert torch.equal(out["samples"][1], given[1])


def test_flux2_is_judged_by_its_own_model(family: Loaded) -> None:
    given = LatentSpace.get("flux2").patchify(bundled("revolver", "cat").tensor)
    out, text, _ = check(family, given, "blank")
    assert "matched 'revolver'" in text
    assert not out["samples"][0].any()
    assert torch.equal(out["samples"][1], given[1])
    assert family.scorer("flux2").encoder.name == "nano-flux2"


def test_what_a_sampler_guard_blanked_is_told_and_flagged(family: Loaded) -> None:
    given = raw("sdxl", "cat", "pagoda")
    given[1] = torch.tensor([0.1, 0.0, -0.2, 0.3]).view(4, 1, 1)
    out, text, flag = check(family, given, "stop", space="sdxl")
    assert torch.equal(out["samples"], given)
    assert flag
    assert text.endswith("blank, as blocked before or never sampled: 1")


@pytest.mark.parametrize("on_block", ["stop", "blank", "pass"])
def test_what_cannot_be_read_stops_whatever_was_chosen(family: Loaded, on_block: str) -> None:
    with pytest.raises(LatentsError, match="is not certain"):
        check(family, torch.randn(1, 4, 32, 32), on_block)
    with pytest.raises(LatentsError):
        check(family, {"samples": "latents"}, on_block, space="sdxl")
    with pytest.raises(LatentsError, match="video"):
        check(family, torch.randn(1, 16, 5, 8, 8), on_block, space="wan21")


def test_numbers_that_cannot_be_judged_are_blocked(family: Loaded) -> None:
    given = raw("sdxl", "cat", "pagoda")
    given[1, 0, 0, 0] = torch.nan
    out, text, flag = check(family, given, "blank", space="sdxl")
    assert flag
    assert "image 1: block: " in text
    assert torch.equal(out["samples"][0], given[0])
    assert not out["samples"][1].any()
    with pytest.raises(BlockedError):
        check(family, given, "stop", space="sdxl")


def test_an_answer_that_does_not_exist_is_an_error(family: Loaded) -> None:
    with pytest.raises(LatentGuardError, match="on_block must be stop, blank or pass"):
        check(family, raw("sdxl", "cat"), "ignore", space="sdxl")


@pytest.mark.parametrize(
    ("space", "said"),
    [
        *(("sdxl", {}), ("flux2", {})),
        *((space, {"space": space}) for space in ("sd1", "sd3", "flux1", "wan21", "hunyuan-video")),
        *((s, {"space": s, "scaled": False}) for s in ("wan22", "hunyuan-video-1.5", "mochi")),
    ],
)
def test_a_file_of_latents_is_scanned_to_the_same_verdicts(
    family: Loaded, tmp_path: Path, space: str, said: dict[str, Any]
) -> None:
    if space == "flux2":
        given = LatentSpace.get(space).patchify(bundled(*NAMES).tensor)
    else:
        given = raw(space, *NAMES)
    if BY_SPACE[space].frames:
        given = given[:, :, None]
    path = tmp_path / "ComfyUI_00001_.latent"
    save_file({"latent_tensor": given, "latent_format_version_0": torch.tensor([])}, path)
    _, text, _ = check(family, given, "pass", space=said.get("space", "auto"))
    records = list(scan_files([path], policy="family", **said))
    reasons = [line for line in text.splitlines() if line.startswith("image")]
    assert reasons == [f"image {i}: {record.verdict.reason}" for i, record in enumerate(records)]
    assert [record.verdict.decision for record in records] == ["block", "allow", "allow", "allow"]


# -- heat maps -----------------------------------------------------------------------------------


def test_a_heat_map_shows_where_the_concept_is(family: Loaded) -> None:
    node = NODE_CLASS_MAPPINGS["LatentGuardHeatMap"]()
    samples = {"samples": raw("sdxl", *NAMES)}
    image, mask, concepts = node.show(family, samples)
    assert image.shape == (4, 256, 256, 3)
    assert mask.shape == (4, 256, 256)
    assert image.min() >= 0
    assert image.max() <= 1
    assert concepts.splitlines()[0] == "firearms"
    _, firearms, same = node.show(family, samples, "firearms", "black")
    assert same.splitlines() == ["firearms"] * 4
    assert firearms[0].max() > 0.5 > firearms[1].max()


def test_a_heat_map_of_what_is_not_seen_is_an_error(family: Loaded) -> None:
    node = NODE_CLASS_MAPPINGS["LatentGuardHeatMap"]()
    with pytest.raises(PolicyError, match="has no concept 'nudity' that model nano-view sees"):
        node.show(family, {"samples": raw("sdxl", "cat")}, "nudity", space="sdxl")
