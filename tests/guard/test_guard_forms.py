"""What a guarded pipeline gives back has the form that it has without a guard, blocked or not; a
pipeline whose latents or images cannot be read is refused when the guard is attached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")
import guard_pipelines as small
from diffusers import (
    AnimateDiffPipeline,
    Flux2KleinInpaintPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    MotionAdapter,
    StableDiffusion3InpaintPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from guard_helpers import ALWAYS, NEVER, LinearEncoder, policy
from guard_traps import FINAL_ONLY

from latentguard import LatentGuard, optimize_noise
from latentguard.errors import LatentsError
from latentguard.spaces import LatentSpace

CHANNELS = {"sd1": 4, "sdxl": 4, "sd3": 16, "flux1": 16, "flux2": 32}
WIDE = 2 * small.SIZE


def encoder(space: str) -> LinearEncoder:
    return LinearEncoder(space, CHANNELS[space])


def remade(make: Callable[[], Any], cls: Any) -> Any:
    pipe = cls(**make().components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- the safety checker's fields -----------------------------------------------------------------


def checked(kind: Any = StableDiffusionPipeline) -> Any:
    """A Stable Diffusion 1 pipeline with a safety checker of random weights."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**size, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16},
        text_config={**size, "num_hidden_layers": 1, "vocab_size": 10},
        projection_dim=8,
    )
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    parts = small.sd1().components
    parts |= {
        "safety_checker": StableDiffusionSafetyChecker(config).eval(),
        "feature_extractor": processor,
    }
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def threshold_between(pipe: Any, arguments: dict[str, Any]) -> float:
    """One that some final images of a call reach, and some do not."""
    probe = LatentGuard(policy(action="observe"), encoder("sd1"))
    pipe(**arguments, callback_on_step_end=probe)
    return float(np.mean([verdict.concepts[0].probability for verdict in probe.verdicts]))


@pytest.mark.parametrize("make", [checked, small.sd1, small.lcm], ids=["checked", "sd1", "lcm"])
@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("output_type", ["np", "pil", "latent"])
@pytest.mark.parametrize("when", ["at once", "at the end", "some", "never"])
def test_flags_of_the_safety_checker(
    make: Any, return_dict: bool, output_type: str, when: str
) -> None:
    """True for each blocked image, and never None."""
    pipe = make()
    arguments = small.lcm_arguments if make is small.lcm else small.sd1_arguments
    given = {"output_type": output_type, "return_dict": return_dict}
    threshold = {"some": 0.0, "never": NEVER}.get(when, ALWAYS)
    if when == "some":
        threshold = threshold_between(pipe, arguments(2, 2, output_type="latent"))
    rule = policy(threshold, concept="" if when == "at once" else FINAL_ONLY)
    pipe.callback_on_step_end = guard = LatentGuard(rule, encoder("sd1"))
    output = pipe(**arguments(2, 2, **given))
    assert isinstance(output, tuple) == (not return_dict)
    images, flags = output if not return_dict else (output.images, output.nsfw_content_detected)
    blocked = [verdict.decision == "block" for verdict in guard.verdicts]
    assert {"some": 1, "never": 0}.get(when, 2) == sum(blocked)
    assert flags == blocked
    if return_dict:
        assert output.to_tuple()[-1] is flags
    for row, image in enumerate(images):
        assert np.asarray(image).any() != blocked[row]


def test_what_the_safety_checker_found_stays() -> None:
    pipe = checked()
    arguments = small.sd1_arguments(2, 2)
    threshold = threshold_between(pipe, {**arguments, "output_type": "latent"})
    pipe.run_safety_checker = lambda image, *args: (image, [True, True])
    pipe.callback_on_step_end = LatentGuard(policy(threshold, concept=FINAL_ONLY), encoder("sd1"))
    output = pipe(**small.sd1_arguments(2, 2))
    assert output.nsfw_content_detected == [True, True]


# -- the form of blanks ----------------------------------------------------------------------------


def masked(width: int, height: int = small.SIZE) -> dict[str, Any]:
    mask = torch.zeros(1, 1, height, width)
    mask[..., : width // 2] = 1
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(3))
    return {"image": image, "mask_image": mask, "strength": 0.9, "height": height, "width": width}


def klein_arguments(**more: Any) -> dict[str, Any]:
    negative = torch.zeros(1, 5, 16)
    return small.flux2_arguments(1, 2, **{"negative_prompt_embeds": negative, **more})


FORMS: dict[str, tuple[str, Callable[[], Any], Callable[..., dict[str, Any]]]] = {
    "flux2": ("flux2", small.flux2, lambda **more: small.flux2_arguments(1, 2, **more)),
    "flux2-odd": (
        "flux2",
        small.flux2,
        lambda **more: small.flux2_arguments(1, 2, **{**more, "height": 72, "width": 100}),
    ),
    "klein": ("flux2", lambda: remade(small.flux2, Flux2KleinPipeline), klein_arguments),
    "klein-inpaint": (
        "flux2",
        lambda: remade(small.flux2, Flux2KleinInpaintPipeline),
        lambda **more: klein_arguments(**masked(WIDE), **more),
    ),
    "flux": ("flux1", small.flux, lambda **more: small.flux_arguments(1, 2, **more)),
    "flux-odd": (
        "flux1",
        small.flux,
        lambda **more: small.flux_arguments(1, 2, **{**more, "height": 72, "width": 100}),
    ),
    "flux-inpaint": (
        "flux1",
        lambda: remade(small.flux, FluxInpaintPipeline),
        lambda **more: small.flux_arguments(1, 2, **{**masked(WIDE), **more}),
    ),
    "sd3": ("sd3", small.sd3, lambda **more: small.sd3_arguments(1, 2, **more)),
    "sd3-inpaint": (
        "sd3",
        lambda: remade(small.sd3, StableDiffusion3InpaintPipeline),
        lambda **more: small.sdxl_arguments(1, 2, **{**masked(small.SIZE), **more}),
    ),
    "sdxl": ("sdxl", small.sdxl, lambda **more: small.sdxl_arguments(1, 2, **more)),
    "sdxl-tall": (
        "sdxl",
        small.sdxl,
        lambda **more: small.sdxl_arguments(1, 2, **{**more, "height": 96, "width": 72}),
    ),
    "sdxl-inpaint": (
        "sdxl",
        small.inpaint,
        lambda **more: small.sdxl_arguments(1, 2, **{**masked(small.SIZE), **more}),
    ),
    "sd1": ("sd1", small.sd1, lambda **more: small.sd1_arguments(1, 2, **more)),
    "sd1-img2img": (
        "sd1",
        lambda: remade_sd1(StableDiffusionImg2ImgPipeline),
        lambda **more: small.sd1_arguments(
            1, 2, **{"image": torch.rand(1, 3, 64, 72), "strength": 0.9, **more}
        ),
    ),
    "lcm": ("sd1", small.lcm, lambda **more: small.lcm_arguments(1, 2, **more)),
}


def remade_sd1(cls: Any) -> Any:
    pipe = cls(**small.sd1().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("output_type", ["np", "pil", "pt", "latent"])
def test_blanks_have_the_form_of_images(kind: str, output_type: str) -> None:
    """Blocked at the first step or at the end, in a tuple or not."""
    space, make, arguments = FORMS[kind]
    pipe = make()
    plain = pipe(**arguments(output_type=output_type))
    for concept in ("", FINAL_ONLY):
        pipe.callback_on_step_end = LatentGuard(policy(ALWAYS, concept=concept), encoder(space))
        output = pipe(**arguments(output_type=output_type))
        assert type(output) is type(plain)
        assert next(iter(output.keys())) == "images"
        assert described(output.images) == described(plain.images)
        assert not any(np.asarray(image).any() for image in output.images)
    pipe.callback_on_step_end = None
    pair = pipe(**arguments(output_type=output_type, return_dict=False))
    pipe.callback_on_step_end = LatentGuard(policy(ALWAYS), encoder(space))
    blanks = pipe(**arguments(output_type=output_type, return_dict=False))
    assert len(blanks) == len(pair)
    assert described(blanks[0]) == described(pair[0])


def test_blanks_of_a_cropped_inpainting_have_the_size_of_the_whole_image() -> None:
    from PIL import Image

    mask = Image.new("L", (160, 96))
    mask.paste(255, (60, 30, 90, 50))
    arguments = small.sdxl_arguments(
        1,
        2,
        image=Image.new("RGB", (160, 96), "gray"),
        mask_image=mask,
        padding_mask_crop=4,
        height=small.SIZE,
        width=small.SIZE,
        output_type="pil",
    )
    pipe = small.inpaint()
    plain = pipe(**arguments).images
    pipe.callback_on_step_end = LatentGuard(policy(ALWAYS), encoder("sdxl"))
    blanks = pipe(**arguments).images
    assert described(blanks) == described(plain)
    assert not np.asarray(blanks[0]).any()


def described(images: Any) -> Any:
    if isinstance(images, list):
        return [(type(image), image.mode, image.size) for image in images]
    return type(images), images.dtype, images.shape


# -- what cannot be read ---------------------------------------------------------------------------


def animatediff() -> Any:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
    )
    parts = {**small.sd1().components, "unet": unet, "motion_adapter": adapter}
    del parts["safety_checker"]
    return AnimateDiffPipeline(**parts)


def panorama() -> Any:
    from diffusers import StableDiffusionPanoramaPipeline

    return remade_sd1(StableDiffusionPanoramaPipeline)


class _Turned(FluxPipeline):
    """Packs the two rows of a patch the other way round."""

    @staticmethod
    def _pack_latents(latents: Any, *args: Any) -> Any:
        return FluxPipeline._pack_latents(latents.flip(2), *args)


class _Unturned(Flux2Pipeline):
    @staticmethod
    def _unpatchify_latents(latents: Any) -> Any:
        return Flux2Pipeline._unpatchify_latents(latents).flip(3)


class _Sizes(FluxPipeline):
    """Unpacks by something that is not known here."""

    @staticmethod
    def _unpack_latents(latents: Any, sizes: Any, vae_scale_factor: int) -> Any:
        raise NotImplementedError


class _Tokens(Flux2Pipeline):
    """Packs in a place that cannot be asked."""

    _pack_latents = property(lambda self: None)


REFUSED: dict[str, tuple[str, Callable[[], Any], str]] = {
    "frames": ("sd1", animatediff, "AnimateDiffPipeline returns frames and no images"),
    "views": ("sd1", panorama, "StableDiffusionPanoramaPipeline denoises .* overlapping views"),
    "packed otherwise": (
        "flux1",
        lambda: remade(small.flux, _Turned),
        "_Turned is not known to pack",
    ),
    "unpacked otherwise": (
        "flux2",
        lambda: remade(small.flux2, _Unturned),
        "_Unturned is not known to",
    ),
    "unpacked by sizes": (
        "flux1",
        lambda: remade(small.flux, _Sizes),
        "_Sizes is not known to pack",
    ),
    "packed somewhere": (
        "flux2",
        lambda: remade(small.flux2, _Tokens),
        "_Tokens is not known to pack",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_pipeline_that_cannot_be_read_is_refused_at_attachment(why: str) -> None:
    space, make, message = REFUSED[why]
    pipe, guard = make(), LatentGuard(policy(NEVER), encoder(space))
    with pytest.raises(LatentsError, match=message):
        pipe.callback_on_step_end = guard
    assert pipe.callback_on_step_end is None


def test_a_search_for_a_noise_reads_no_tokens_of_another_order() -> None:
    pipe = remade(small.flux, _Turned)
    with pytest.raises(LatentsError, match="_Turned is not known to pack"):
        optimize_noise(pipe, None, policy(), model=encoder("flux1"), iterations=0)


@pytest.mark.parametrize("make", [small.flux, small.flux2])
def test_pipelines_that_pack_as_their_space_does(make: Any) -> None:
    from latentguard.guard.forms import SPATIAL, tokens
    from latentguard.guard.layout import layout_of

    pipe = make()
    space = LatentGuard(policy(), space=None)._space_of(pipe)
    assert layout_of(pipe, space).forms == (tokens(2), SPATIAL)
    assert layout_of(small.sdxl(), LatentSpace.get("sdxl")).forms == (SPATIAL,)


def test_tokens_of_a_pipeline_that_is_not_known_to_pack_are_not_read() -> None:
    """One that learned to pack after the guard was attached, so that nothing refused it."""
    guard = LatentGuard(policy(NEVER), encoder("flux1"))
    pipe = small.flux()
    pipe.callback_on_step_end = guard
    pipe.__class__ = _Turned
    with pytest.raises(LatentsError, match="_Turned is not known to pack"):
        pipe(**small.flux_arguments(1, 2))


def test_a_pipeline_of_ones_own_with_its_parents_outputs_is_taken() -> None:
    class Mine(StableDiffusionXLPipeline):
        pass

    pipe = remade(small.sdxl, Mine)
    pipe.callback_on_step_end = LatentGuard(policy(NEVER), encoder("sdxl"))
    assert pipe(**small.sdxl_arguments(1, 2)).images.any()
