"""The nodes in ComfyUI itself: its engine, samplers, model classes and files, on the CPU."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_headless import FLOW, ComfyUI, Ran
from comfy_pictures import bundled, policy_file, raw
from latentguard_comfyui.conventions import FORMATS, empty, held_by, read

from latentguard import LatentsError, LatentSpace, scan_files

CHECKOUT = os.environ.get("LATENTGUARD_COMFYUI")
pytestmark = pytest.mark.skipif(
    not CHECKOUT, reason="needs ComfyUI: set LATENTGUARD_COMFYUI to a checkout of it"
)
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
Workflow = dict[str, Any]


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> ComfyUI:
    assert CHECKOUT is not None
    found = ComfyUI(CHECKOUT, tmp_path_factory.mktemp("comfyui"))
    import comfy.latent_formats

    patchify = LatentSpace.get("flux2").patchify
    for name in ("cat", "revolver"):
        for space in ("sd1", "sdxl", "flux1"):
            found.given[f"{space} {name}"] = raw(space, name)
        found.given[f"wan21 {name}"] = raw("wan21", name)[:, :, None]
        if hasattr(comfy.latent_formats, "Flux2"):
            found.given[f"flux2 {name}"] = patchify(bundled(name).tensor)
    for space in ("sdxl", "flux1"):
        found.given[f"{space} both"] = raw(space, "cat", "revolver")
    found.given["sdxl four"] = raw("sdxl", "revolver", "cat", "rocket", "pagoda")
    for key, latents in list(found.given.items()):
        found.given[key.replace(" ", " empty ").replace(" cat", "")] = torch.zeros_like(latents)
    return found


def node(class_type: str, /, **inputs: Any) -> Workflow:
    return {"class_type": class_type, "inputs": inputs}


def policy(path: str) -> Workflow:
    return node("LatentGuardPolicy", policy="default", model="auto", policy_file=path, device="cpu")


def keep(name: str, source: str, output: int = 0) -> Workflow:
    return node("TestKeep", latent=[source, output], name=name)


def checking(key: str, path: str, on_block: str, **options: Any) -> Workflow:
    return {
        "policy": policy(path),
        "picture": node("TestPicture", key=key),
        "check": node(
            "LatentGuardCheck",
            guard=["policy", 0],
            samples=["picture", 0],
            on_block=on_block,
            **options,
        ),
        "keep": keep("out", "check"),
    }


def sampling(
    kind: str, key: str, path: str | None, on_block: str = "blank", **options: Any
) -> Workflow:
    """A KSampler over a tiny model, with a guard where a policy is given."""
    empty = f"{kind} empty both" if "both" in key else f"{kind} empty"
    settings = {
        "seed": 7,
        "steps": 6,
        "cfg": 2.0,
        "sampler_name": "euler",
        "scheduler": "simple" if kind in FLOW else "normal",
        "denoise": 1.0,
        **options,
    }
    workflow = {
        "model": node("TestModel", kind=kind, key=key),
        "text": node("TestText", seed=0),
        "other": node("TestText", seed=1),
        "empty": node("TestPicture", key=empty),
        "sampler": node(
            "KSampler",
            model=["model" if path is None else "guarded", 0],
            positive=["text", 0],
            negative=["other", 0],
            latent_image=["empty", 0],
            **settings,
        ),
        "keep": keep("out", "sampler"),
    }
    if path is not None:
        workflow["policy"] = policy(path)
        workflow["guarded"] = node(
            "LatentGuardSamplerGuard", model=["model", 0], guard=["policy", 0], on_block=on_block
        )
    return workflow


def out(ran: Ran) -> torch.Tensor:
    assert ran.error is None, ran.error
    return ran.kept["out"]


# -- formats -------------------------------------------------------------------------------------


def test_each_latent_format_is_read_right_or_refused(comfyui: ComfyUI) -> None:
    import comfy.latent_formats as formats

    known = []
    for name, kind in inspect.getmembers(formats, inspect.isclass):
        if name in FORMATS:
            assert held_by(kind()) == FORMATS[name]
            known.append(name)
        else:
            with pytest.raises(LatentsError, match="is not known"):
                held_by(kind())
    assert {"SD15", "SDXL", "SD3", "Flux", "Wan21", "Wan22"} <= set(known)


def test_an_empty_latent_of_comfyui_is_no_picture(comfyui: ComfyUI) -> None:
    (latent,) = comfyui.nodes.EmptyLatentImage().generate(256, 256)
    with pytest.raises(LatentsError, match="is not certain"):
        read(latent)


# -- checks --------------------------------------------------------------------------------------


def test_a_check_passes_blanks_and_stops(comfyui: ComfyUI, tmp_path: Path) -> None:
    path = policy_file(tmp_path)
    given = comfyui.given["sdxl both"]
    blank = comfyui.run(checking("sdxl both", path, "blank", space="sdxl"))
    assert torch.equal(out(blank)[0], given[0])
    assert not out(blank)[1].any()
    assert "image 1: block: concept 'guns' matched 'revolver'" in blank.ui["check"]["text"][0]
    passed = comfyui.run(checking("sdxl both", path, "pass", space="sdxl"))
    assert torch.equal(out(passed), given)
    stopped = comfyui.run(checking("sdxl both", path, "stop", space="sdxl"))
    assert stopped.error is not None
    assert stopped.error["node_id"] == "check"
    assert "concept 'guns' matched 'revolver'" in stopped.error["exception_message"]
    assert stopped.kept == {}
    allowed = comfyui.run(checking("sdxl cat", path, "stop", space="sdxl"))
    assert torch.equal(out(allowed), comfyui.given["sdxl cat"])


def test_a_check_asks_for_the_space_or_takes_the_models(comfyui: ComfyUI, tmp_path: Path) -> None:
    path = policy_file(tmp_path)
    asked = comfyui.run(checking("flux1 revolver", path, "pass"))
    assert asked.error is not None
    assert "choose it in `space`, or connect the model" in asked.error["exception_message"]
    assert asked.kept == {}
    workflow = checking("flux1 revolver", path, "blank", model=["model", 0])
    workflow["model"] = node("TestModel", kind="flux1", key="flux1 cat")
    assert not out(comfyui.run(workflow)).any()


def test_an_edited_policy_judges_anew(comfyui: ComfyUI, tmp_path: Path) -> None:
    path = policy_file(tmp_path)
    assert not out(comfyui.run(checking("sdxl revolver", path, "blank", space="sdxl"))).any()
    Path(path).write_text(Path(path).read_text().replace("action: block", "action: observe"))
    assert out(comfyui.run(checking("sdxl revolver", path, "blank", space="sdxl"))).any()


def test_what_comfyui_saves_is_scanned_to_the_same_verdicts(
    comfyui: ComfyUI, tmp_path: Path
) -> None:
    path = policy_file(tmp_path)
    workflow = checking("sdxl four", path, "pass")
    workflow["save"] = node("SaveLatent", samples=["picture", 0], filename_prefix="saved")
    text = comfyui.run(workflow).ui["check"]["text"][0]
    (file,) = comfyui.output.glob("saved*.latent")
    records = list(scan_files([file], policy=path))
    told = [f"image {i}: {record.verdict.reason}" for i, record in enumerate(records)]
    assert [line for line in text.splitlines() if line.startswith("image")] == told
    assert [record.verdict.decision for record in records] == ["block", "allow", "allow", "allow"]


# -- samplers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd1", "sdxl", *FLOW])
def test_a_sampler_is_guarded(comfyui: ComfyUI, tmp_path: Path, kind: str) -> None:
    if f"{kind} cat" not in comfyui.given:
        pytest.skip(
            f"needs a newer ComfyUI, one with the latent format {FLOW[kind]} (0.8.0 has it)"
        )
    path = policy_file(tmp_path)
    free = out(comfyui.run(sampling(kind, f"{kind} cat", None)))
    assert torch.equal(out(comfyui.run(sampling(kind, f"{kind} cat", path))), free)
    gun = out(comfyui.run(sampling(kind, f"{kind} revolver", None)))
    assert read({"samples": gun}, kind)[0].space.name == kind
    blank = out(comfyui.run(sampling(kind, f"{kind} revolver", path)))
    assert empty(blank) == [0]
    stopped = comfyui.run(sampling(kind, f"{kind} revolver", path, "stop"))
    assert stopped.error is not None
    assert stopped.error["node_id"] == "sampler"
    assert "concept 'guns' matched 'revolver'" in stopped.error["exception_message"]
    assert stopped.kept == {}


@pytest.mark.parametrize(
    "sampler",
    [
        *("euler_ancestral", "heun", "dpm_2", "dpmpp_2m", "dpmpp_2m_sde", "lms", "uni_pc", "lcm"),
        *("ddim", "euler_cfg_pp", "res_multistep", "ddpm", "dpmpp_sde"),
    ],
)
def test_every_kind_of_sampler_is_guarded(comfyui: ComfyUI, tmp_path: Path, sampler: str) -> None:
    path = policy_file(tmp_path)
    options = {"sampler_name": sampler}
    free = out(comfyui.run(sampling("sdxl", "sdxl both", None, **options)))
    found = out(comfyui.run(sampling("sdxl", "sdxl both", path, **options)))
    assert torch.equal(found[0], free[0])
    assert not found[1].any()


def test_a_sampler_that_chooses_its_steps_by_the_whole_batch(
    comfyui: ComfyUI, tmp_path: Path
) -> None:
    options = {"sampler_name": "dpm_adaptive"}
    found = out(comfyui.run(sampling("sdxl", "sdxl both", policy_file(tmp_path), **options)))
    assert found[0].any()
    assert not found[1].any()


def test_two_guards_on_one_model_both_judge(comfyui: ComfyUI, tmp_path: Path) -> None:
    mild = policy(policy_file(tmp_path, "observe"))
    for first, second in (("policy", "mild"), ("mild", "policy")):
        workflow = sampling("sdxl", "sdxl both", policy_file(tmp_path))
        workflow["mild"] = mild
        workflow["guarded"]["inputs"] |= {"model": ["inner", 0], "guard": [second, 0]}
        workflow["inner"] = node(
            "LatentGuardSamplerGuard", model=["model", 0], guard=[first, 0], on_block="blank"
        )
        assert empty(out(comfyui.run(workflow))) == [1]


def test_a_network_of_random_weights(comfyui: ComfyUI, tmp_path: Path) -> None:
    free = out(comfyui.run(sampling("sd1", "none", None)))
    never = policy_file(tmp_path, threshold=1.0)
    assert torch.equal(out(comfyui.run(sampling("sd1", "none", never))), free)
    always = policy_file(tmp_path, threshold=0.0)
    assert not out(comfyui.run(sampling("sd1", "none", always))).any()


@pytest.mark.parametrize("kind", ["sdxl", "flux1"])
def test_steering_moves_an_image_away(comfyui: ComfyUI, tmp_path: Path, kind: str) -> None:
    path = policy_file(tmp_path, "steer")
    key, options = f"{kind} both", {"steps": 12}
    free = out(comfyui.run(sampling(kind, key, None, **options)))
    found = out(comfyui.run(sampling(kind, key, path, **options)))
    assert torch.equal(found[0], free[0])
    assert empty(found) == []
    assert not torch.equal(found[1], free[1])
    comfyui.given["steered"] = found
    after = comfyui.run(checking("steered", policy_file(tmp_path), "pass", space=kind))
    assert "block" not in after.ui["check"]["text"][0]


@pytest.mark.parametrize("guider", ["BasicGuider", "CFGGuider", "DualCFGGuider"])
def test_the_last_prediction_of_a_custom_sampler_is_blank_too(
    comfyui: ComfyUI, tmp_path: Path, guider: str
) -> None:
    workflow = sampling("sdxl", "sdxl revolver", policy_file(tmp_path))
    model = workflow.pop("sampler")["inputs"]["model"]
    texts: dict[str, Workflow] = {
        "BasicGuider": {"conditioning": ["text", 0]},
        "CFGGuider": {"positive": ["text", 0], "negative": ["other", 0], "cfg": 2.0},
        "DualCFGGuider": {
            "cond1": ["text", 0],
            "cond2": ["other", 0],
            "negative": ["other", 0],
            "cfg_conds": 2.0,
            "cfg_cond2_negative": 2.0,
            "style": "regular",
        },
    }
    workflow |= {
        "guider": node(guider, model=model, **texts[guider]),
        "sigmas": node("BasicScheduler", model=model, scheduler="normal", steps=6, denoise=1.0),
        "select": node("KSamplerSelect", sampler_name="euler"),
        "noise": node("RandomNoise", noise_seed=7),
        "sampler": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["select", 0],
            sigmas=["sigmas", 0],
            latent_image=["empty", 0],
        ),
        "keep 1": keep("denoised", "sampler", 1),
    }
    ran = comfyui.run(workflow)
    assert not out(ran).any()
    assert not ran.kept["denoised"].any()


def test_noise_that_is_left_for_another_sampler(comfyui: ComfyUI, tmp_path: Path) -> None:
    path = policy_file(tmp_path)

    def half(key: str) -> torch.Tensor:
        workflow = sampling("sdxl", key, path)
        inputs = dict(workflow["sampler"]["inputs"])
        del inputs["denoise"]
        inputs |= {
            "noise_seed": inputs.pop("seed"),
            "add_noise": "enable",
            "start_at_step": 0,
            "end_at_step": 4,
            "return_with_leftover_noise": "enable",
        }
        workflow["sampler"] = node("KSamplerAdvanced", **inputs)
        return out(comfyui.run(workflow))

    assert half("sdxl cat").any()
    assert not half("sdxl revolver").any()


def test_a_mask_keeps_what_is_outside(comfyui: ComfyUI, tmp_path: Path) -> None:
    before, comfyui.given["sdxl empty"] = comfyui.given["sdxl empty"], comfyui.given["sdxl cat"]
    try:
        workflow = sampling("sdxl", "sdxl revolver", policy_file(tmp_path))
        workflow["mask"] = node("SolidMask", value=0.0, width=256, height=256)
        workflow["masked"] = node("SetLatentNoiseMask", samples=["empty", 0], mask=["mask", 0])
        workflow["sampler"]["inputs"]["latent_image"] = ["masked", 0]
        assert torch.allclose(out(comfyui.run(workflow)), comfyui.given["sdxl cat"], atol=1e-4)
        workflow["mask"]["inputs"]["value"] = 1.0
        assert not out(comfyui.run(workflow)).any()
    finally:
        comfyui.given["sdxl empty"] = before


def test_a_run_of_no_steps_is_left_to_the_check(comfyui: ComfyUI, tmp_path: Path) -> None:
    path = policy_file(tmp_path)
    workflow = sampling("sdxl", "sdxl cat", path, denoise=0.0)
    workflow["empty"] = node("TestPicture", key="sdxl revolver")
    workflow["check"] = node(
        "LatentGuardCheck",
        guard=["policy", 0],
        samples=["sampler", 0],
        on_block="blank",
        model=["model", 0],
    )
    workflow["keep 1"] = keep("checked", "check")
    ran = comfyui.run(workflow)
    assert torch.equal(out(ran), comfyui.given["sdxl revolver"])  # nothing was sampled
    assert not ran.kept["checked"].any()


def test_a_model_whose_latents_are_not_known_stops(comfyui: ComfyUI, tmp_path: Path) -> None:
    workflow = sampling("sdxl", "sdxl cat", policy_file(tmp_path))
    workflow["model"]["inputs"]["kind"] = "unknown"
    ran = comfyui.run(workflow)
    assert ran.error is not None
    assert ran.error["node_id"] == "guarded"
    assert "latent format SC_B is not known" in ran.error["exception_message"]


# -- examples ------------------------------------------------------------------------------------


def example(name: str) -> Workflow:
    found: Workflow = json.loads((EXAMPLES / name).read_text("utf-8"))
    return found


def test_the_example_that_checks_a_latent(comfyui: ComfyUI) -> None:
    comfyui.run(
        {
            "picture": node("TestPicture", key="sdxl revolver"),
            "save": node("SaveLatent", samples=["picture", 0], filename_prefix="ComfyUI"),
        }
    )
    (file,) = comfyui.output.glob("ComfyUI*.latent")
    file.rename(comfyui.input / "ComfyUI_00001_.latent")
    ran = comfyui.run(example("check_a_latent.json"))
    assert ran.error is None
    assert "firearms" in ran.ui["3"]["text"][0]
    assert len(ran.ui["5"]["images"]) == 1


def test_the_example_that_guards_a_generation(comfyui: ComfyUI) -> None:
    workflow = example("guarded_text_to_image.json")
    # In place of a checkpoint: a tiny model, and latents in place of the picture.
    workflow["1"] = node("TestModel", kind="sdxl", key="sdxl revolver")
    workflow["2"], workflow["3"] = node("TestText", seed=0), node("TestText", seed=1)
    workflow["4"]["inputs"] |= {"width": 256, "height": 256}
    del workflow["10"]
    workflow["9"] = keep("out", "8")
    ran = comfyui.run(workflow)
    assert ran.error is not None
    assert "concept 'firearms' matched 'revolver'" in ran.error["exception_message"]
    assert ran.kept == {}
    workflow["1"]["inputs"]["key"] = "sdxl cat"
    ran = comfyui.run(workflow)
    assert out(ran).any()
    assert "image 0: allow" in ran.ui["8"]["text"][0]
