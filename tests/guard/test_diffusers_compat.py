"""What diffusers' own pipeline tests check, on pipelines with an observing guard and without one.

diffusers' wheel does not hold its tests, so the checks of its `PipelineTesterMixin` are written out
here. Each runs on two pipelines of the same weights; one of them has a guard. The check has to hold
on both, and what it returns has to be the same to the last bit.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
import guard_pipelines as small
from diffusers import (
    DiffusionPipeline,
    Flux2KleinInpaintPipeline,
    Flux2KleinPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from guard_helpers import LinearEncoder, policy

from latentguard import LatentGuard

Arguments = dict[str, Any]
CHANNELS = {"sd1": 4, "sdxl": 4, "sd3": 16, "flux1": 16, "flux2": 32}
ENCODERS = {space: LinearEncoder(space, channels) for space, channels in CHANNELS.items()}


def remade(make: Callable[[], Any], cls: Any) -> Callable[[], Any]:
    """A pipeline of another class, of the same parts."""

    def build() -> Any:
        pipe = cls(**make().components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


def klein_arguments(batch: int = 1, steps: int = 4, **more: Any) -> Arguments:
    negative = torch.zeros(batch, 5, 16)
    return small.flux2_arguments(batch, steps, **{"negative_prompt_embeds": negative, **more})


def with_image(arguments: Callable[..., Arguments], mask: bool, width: int) -> Any:
    def build(batch: int = 1, steps: int = 4, **more: Any) -> Arguments:
        generator = torch.Generator().manual_seed(3)
        image = torch.rand(batch, 3, small.SIZE, width, generator=generator)
        found = {"image": image, "strength": 0.9}
        if mask:
            hole = torch.zeros(batch, 1, small.SIZE, width)
            hole[..., : width // 2] = 1
            found |= {"mask_image": hole, "height": small.SIZE, "width": width}
        return arguments(batch, steps, **{**found, **more})

    return build


WIDE = 2 * small.SIZE
KINDS: dict[str, tuple[str, Callable[[], Any], Callable[..., Arguments]]] = {
    "sdxl": ("sdxl", small.sdxl, small.sdxl_arguments),
    "sdxl-img2img": ("sdxl", small.img2img, with_image(small.sdxl_arguments, False, small.SIZE)),
    "sdxl-inpaint": ("sdxl", small.inpaint, with_image(small.sdxl_arguments, True, small.SIZE)),
    "sd3": ("sd3", small.sd3, small.sd3_arguments),
    "sd3-img2img": (
        "sd3",
        remade(small.sd3, StableDiffusion3Img2ImgPipeline),
        with_image(small.sd3_arguments, False, small.SIZE),
    ),
    "sd3-inpaint": (
        "sd3",
        remade(small.sd3, StableDiffusion3InpaintPipeline),
        with_image(small.sdxl_arguments, True, small.SIZE),
    ),
    "flux": ("flux1", small.flux, small.flux_arguments),
    "flux-img2img": (
        "flux1",
        remade(small.flux, FluxImg2ImgPipeline),
        with_image(small.flux_arguments, False, WIDE),
    ),
    "flux-inpaint": (
        "flux1",
        remade(small.flux, FluxInpaintPipeline),
        with_image(small.flux_arguments, True, WIDE),
    ),
    "flux2": ("flux2", small.flux2, small.flux2_arguments),
    "flux2-klein": ("flux2", remade(small.flux2, Flux2KleinPipeline), klein_arguments),
    "flux2-klein-inpaint": (
        "flux2",
        remade(small.flux2, Flux2KleinInpaintPipeline),
        with_image(klein_arguments, True, WIDE),
    ),
    "sd1": ("sd1", small.sd1, small.sd1_arguments),
    "lcm": ("sd1", small.lcm, small.lcm_arguments),
}
# One of each space, and of each way to begin; with the others it is the same again.
FIRST = ("sdxl", "sd3-img2img", "flux-inpaint", "flux2-klein", "lcm")


def array(images: Any) -> Any:
    if isinstance(images, list):
        return np.stack([np.asarray(image) for image in images])
    return np.array(images)


# -- the checks: each gets a pipeline and its arguments, and returns what is to be compared ------


def callback_inputs(pipe: Any, arguments: Callable[..., Arguments]) -> Any:
    allowed, found = pipe._callback_tensor_inputs, []
    known = set(inspect.signature(pipe.__call__).parameters)
    assert {"callback_on_step_end", "callback_on_step_end_tensor_inputs"} <= known
    # Some pipelines list tensors that their loops do not have without guidance.
    tensors = [name for name in allowed if name in ("latents", "denoised", "prompt_embeds")]

    def subset(pipe: Any, i: int, t: Any, given: Any) -> Any:
        assert set(given) == {"latents"}
        return given

    def everything(pipe: Any, i: int, t: Any, given: Any) -> Any:
        assert set(given) == set(tensors)
        return given

    def change_last(pipe: Any, i: int, t: Any, given: Any) -> Any:
        if i == pipe.num_timesteps - 1:
            for name in {"latents", "denoised"} & set(given):
                given[name] = torch.zeros_like(given[name])
        return given

    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        pipe(
            **arguments(),
            callback_on_step_end=subset,
            callback_on_step_end_tensor_inputs=["no such tensor"],
        )
    for callback, inputs in ((subset, ["latents"]), (everything, tensors), (change_last, tensors)):
        found.append(
            pipe(
                **arguments(output_type="latent"),
                callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=inputs,
            )[0]
        )
    if "Klein" not in type(pipe).__name__:  # it denormalizes its latents
        assert found[-1].abs().sum() == 0
    return [array(one) for one in found]


def callback_of_guidance(pipe: Any, arguments: Callable[..., Arguments]) -> Any:
    if not hasattr(type(pipe), "guidance_scale"):
        return None
    seen = []

    def increase(pipe: Any, i: int, t: Any, given: Any) -> Any:
        pipe._guidance_scale += 1.0
        seen.append((i, float(t)))
        return given

    images = pipe(**arguments(guidance_scale=2.0), callback_on_step_end=increase)[0]
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
    return array(images), seen


def dict_and_tuple(pipe: Any, arguments: Callable[..., Arguments]) -> Any:
    given, pair = pipe(**arguments()), pipe(**arguments(return_dict=False))
    assert isinstance(pair, tuple)
    assert np.array_equal(array(given[0]), array(pair[0]))
    assert next(iter(given.keys())) == "images"
    return array(pair[0]), type(given).__name__, len(pair)


def batches(pipe: Any, arguments: Callable[..., Arguments]) -> Any:
    found = []
    for batch in (1, 3):
        generators = [torch.Generator().manual_seed(i) for i in range(batch)]
        found.append(array(pipe(**arguments(batch, 2, generator=generators))[0]))
        assert len(found[-1]) == batch
    return found


def many_a_prompt(pipe: Any, arguments: Callable[..., Arguments]) -> Any:
    if type(pipe).__name__.startswith("StableDiffusion3"):
        return None  # they do not repeat embeddings that are given
    images = pipe(**arguments(1, 2), num_images_per_prompt=2)[0]
    assert len(images) == 2
    return array(images)


def output_types(pipe: Any, arguments: Callable[..., Arguments]) -> Any:
    return [array(pipe(**arguments(2, 2, output_type=t))[0]) for t in ("pil", "pt", "np", "latent")]


def progress_bar(pipe: Any, arguments: Callable[..., Arguments]) -> Any:
    pipe.set_progress_bar_config(disable=False)
    with io.StringIO() as text, contextlib.redirect_stderr(text):
        pipe(**arguments())
        shown = text.getvalue()
    steps = re.findall(r"(\d+)/(\d+) ", shown)
    assert steps[-1][0] == steps[-1][1] == str(pipe.num_timesteps)
    pipe.set_progress_bar_config(disable=True)
    with io.StringIO() as text, contextlib.redirect_stderr(text):
        pipe(**arguments())
        assert text.getvalue() == ""
    return steps[-1]


def components(pipe: Any, arguments: Callable[..., Arguments]) -> Any:
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    assert all(other.components[name] is part for name, part in pipe.components.items())
    return sorted(pipe.components), array(other(**arguments())[0]), array(pipe(**arguments())[0])


def made_from_pipe(pipe: Any, arguments: Callable[..., Arguments]) -> Any:
    other = type(pipe).from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    configs = [json.dumps(dict(p.config), default=str, sort_keys=True) for p in (pipe, other)]
    assert configs[0] == configs[1]
    return configs[0], array(other(**arguments())[0])


def dtypes_and_devices(pipe: Any, arguments: Callable[..., Arguments]) -> Any:
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert pipe.to("cpu") is pipe
    assert pipe.device.type == "cpu"
    for dtype in (torch.bfloat16, torch.float32):
        pipe.to(dtype=dtype)
        assert pipe.dtype == dtype
        assert {p.dtype for model in models for p in model.parameters()} == {dtype}
    return array(pipe.to("cpu", torch.float32)(**arguments())[0])


def saved_and_loaded(pipe: Any, arguments: Callable[..., Arguments]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder, safe_serialization=True)
        files = sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())
        index = json.loads((Path(folder) / "model_index.json").read_text())
        for path in Path(folder).rglob("*.json"):
            text = path.read_text()
            assert "guard" not in text
            assert "callback" not in text
        absent = {name: None for name, part in pipe.components.items() if part is None}
        loaded = type(pipe).from_pretrained(folder, **absent)
        generic = DiffusionPipeline.from_pretrained(folder, **absent)
    assert loaded.callback_on_step_end is None
    assert type(generic) is type(pipe)
    loaded.set_progress_bar_config(disable=True)
    images = array(loaded(**arguments())[0])
    assert np.allclose(images, array(pipe(**arguments())[0]), atol=1e-4)
    return files, index, images


def signatures(pipe: Any, arguments: Callable[..., Arguments]) -> Any:
    call = type(pipe).__call__
    assert inspect.signature(pipe.__call__) == inspect.signature(inspect.unwrap(call)).replace(
        parameters=list(inspect.signature(inspect.unwrap(call)).parameters.values())[1:]
    )
    optional = {"num_inference_steps", "generator", "latents", "output_type", "return_dict"}
    assert optional - set(inspect.signature(call).parameters) <= {"latents"}
    step = pipe.scheduler.step
    return (
        str(inspect.signature(call)),
        (call.__doc__, call.__name__, call.__qualname__, call.__module__),
        inspect.getsource(call),
        str(inspect.signature(step)),
        str(inspect.signature(pipe.vae.decode)),
        sorted(name for name in pipe.config if not name.startswith("_")),
    )


def copies(pipe: Any, arguments: Callable[..., Arguments]) -> Any:
    found = []
    for other in (copy.copy(pipe), copy.deepcopy(pipe)):
        other.set_progress_bar_config(disable=True)
        found.append(array(other(**arguments())[0]))
    return found


def offloaded(pipe: Any, arguments: Callable[..., Arguments]) -> Any:
    pytest.importorskip("accelerate", reason="offloading needs accelerate")
    pipe.enable_model_cpu_offload(device="cpu")
    assert pipe._execution_device.type == "cpu"
    images = array(pipe(**arguments())[0])
    hooks = sorted(name for name, part in pipe.components.items() if hasattr(part, "_hf_hook"))
    assert "vae" in hooks
    pipe.remove_all_hooks()
    return images, hooks


def sliced_and_tiled(pipe: Any, arguments: Callable[..., Arguments]) -> Any:
    for what in (pipe.vae, pipe):
        for name in ("enable_slicing", "enable_tiling", "enable_attention_slicing"):
            if hasattr(what, name):
                getattr(what, name)()
    return array(pipe(**arguments(2, 2))[0])


def interrupted(pipe: Any, arguments: Callable[..., Arguments]) -> Any:
    def stop(pipe: Any, i: int, t: Any, given: Any) -> Any:
        pipe._interrupt = i == 1
        return given

    return array(pipe(**arguments(output_type="latent"), callback_on_step_end=stop)[0])


CHECKS = (
    *(callback_inputs, callback_of_guidance, dict_and_tuple, batches, many_a_prompt),
    *(output_types, progress_bar, components, made_from_pipe, dtypes_and_devices),
    *(saved_and_loaded, signatures, copies, offloaded, sliced_and_tiled, interrupted),
)


@pytest.mark.parametrize(
    "kind",
    [kind if kind in FIRST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_with_a_guard_as_without_one(kind: str, check: Callable[..., Any]) -> None:
    space, make, arguments = KINDS[kind]
    plain = check(make(), arguments)
    pipe, guard = make(), LatentGuard(policy(action="observe"), ENCODERS[space])
    pipe.callback_on_step_end = guard
    assert_same(plain, check(pipe, arguments))
    assert pipe.callback_on_step_end is guard
    if plain is not None and check is not signatures:
        assert guard.history[-1].final
        assert {verdict.decision for verdict in guard.verdicts} == {"allow"}


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)
    else:
        assert one == other


# -- where latentguard was never imported ------------------------------------------------------


def fingerprint() -> dict[str, Any]:
    """What a process makes of pipelines and their classes."""
    found: dict[str, Any] = {}
    for kind in ("sdxl", "sd3", "flux", "flux2", "lcm"):
        pipe, arguments = getattr(small, kind)(), getattr(small, f"{kind}_arguments")
        images = np.ascontiguousarray(pipe(**arguments()).images)
        call = type(pipe).__call__
        found[kind] = [
            hashlib.sha256(images.tobytes()).hexdigest(),
            str(inspect.signature(call)),
            str(inspect.signature(pipe.scheduler.step)),
            str(inspect.signature(pipe.prepare_latents)),
            str(inspect.signature(type(pipe).from_pipe)),
            hashlib.sha256(str(call.__doc__).encode()).hexdigest(),
            sorted(vars(pipe)),
        ]
    return found


@pytest.mark.slow
def test_as_where_latentguard_was_never_imported() -> None:
    code = """
import ast, json, sys
sys.path.insert(0, sys.argv[1])
import hashlib, inspect
from typing import Any
import numpy as np
import guard_pipelines as small
tree = ast.parse(open(sys.argv[2]).read())
body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "fingerprint"]
exec(compile(ast.Module(body, []), "fingerprint", "exec"))
found = fingerprint()
assert not any(name.startswith("latentguard") for name in sys.modules)
print(json.dumps(found))
"""
    here = Path(__file__)
    done = subprocess.run(
        [sys.executable, "-c", code, str(here.parent), str(here)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == fingerprint()


def test_a_pipeline_of_another_class_made_from_a_guarded_one() -> None:
    pipe = small.sdxl()
    pipe.callback_on_step_end = LatentGuard(policy(action="observe"), ENCODERS["sdxl"])
    other = StableDiffusionXLImg2ImgPipeline.from_pipe(pipe)
    back = StableDiffusionXLPipeline.from_pipe(other)
    back.set_progress_bar_config(disable=True)
    plain = small.sdxl()
    again = StableDiffusionXLPipeline.from_pipe(StableDiffusionXLImg2ImgPipeline.from_pipe(plain))
    assert dict(back.config) == dict(again.config)
    images = array(back(**small.sdxl_arguments()).images)
    assert np.array_equal(images, array(plain(**small.sdxl_arguments()).images))
