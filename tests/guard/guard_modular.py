"""Small modular pipelines with random weights, run from prompt embeddings: mechanics alone."""

from __future__ import annotations

import copy
from typing import Any

import guard_pipelines as small
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.modular_pipelines import (
    ComponentSpec,
    Flux2AutoBlocks,
    FluxAutoBlocks,
    InputParam,
    ModularPipelineBlocks,
    OutputParam,
    QwenImageAutoBlocks,
    StableDiffusion3AutoBlocks,
    StableDiffusionXLAutoBlocks,
    ZImageAutoBlocks,
)

SIZE = small.SIZE


def sdxl_blocks() -> Any:
    return _without(StableDiffusionXLAutoBlocks(), "text_encoder", "ip_adapter")


def flux_blocks() -> Any:
    return _without(FluxAutoBlocks(), "text_encoder", "vae_encoder")


def flux2_blocks() -> Any:
    return _without(Flux2AutoBlocks(), "text_encoder", "vae_encoder")


def qwen_blocks() -> Any:
    return _without(QwenImageAutoBlocks(), "text_encoder", "vae_encoder", "controlnet_vae_encoder")


def sd3_blocks() -> Any:
    return _without(StableDiffusion3AutoBlocks(), "text_encoder", "vae_encoder")


def zimage_blocks() -> Any:
    return _without(ZImageAutoBlocks(), "text_encoder", "vae_encoder")


def _without(blocks: Any, *names: str) -> Any:
    blocks = copy.deepcopy(blocks)  # diffusers' own share some of theirs
    for name in names:
        blocks.sub_blocks.pop(name)
    return blocks


BLOCKS = {
    "sdxl": sdxl_blocks,
    "flux": flux_blocks,
    "flux2": flux2_blocks,
    "qwen": qwen_blocks,
    "sd3": sd3_blocks,
    "zimage": zimage_blocks,
}


def components(family: str) -> dict[str, Any]:
    """The components of a family, the same weights each time."""
    torch.manual_seed(0)
    if family == "qwen":
        return _qwen()
    if family == "zimage":
        return _zimage()
    made = getattr(small, family)().components
    return {name: one for name, one in made.items() if one is not None}


def _qwen() -> dict[str, Any]:
    transformer = QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    # Its latents_mean and latents_std are those that are published.
    vae = AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    scheduler = small.FlowMatchEulerDiscreteScheduler()
    return {"transformer": transformer.eval(), "vae": vae.eval(), "scheduler": scheduler}


def _zimage() -> dict[str, Any]:
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 4, 8],
        axes_lens=[256, 32, 32],
    )
    vae = small.autoencoder(16, 0.3611, 0.1159, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = small.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return {"transformer": transformer.eval(), "vae": vae, "scheduler": scheduler}


def pipeline(blocks: ModularPipelineBlocks, parts: dict[str, Any]) -> Any:
    """A pipeline of blocks, with those of the components that they take."""
    pipe = blocks.init_pipeline()
    for bar in _loops(pipe._blocks):
        bar.set_progress_bar_config(disable=True)
    pipe.update_components(**{k: v for k, v in parts.items() if k in pipe._component_specs})
    return pipe


def _loops(block: Any) -> Any:
    if hasattr(block, "set_progress_bar_config"):
        yield block
    for inner in block.sub_blocks.values():
        yield from _loops(inner)


def inputs(family: str, batch: int = 1, steps: int = 4, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    given: dict[str, Any] = {
        "prompt_embeds": torch.randn(batch, 5, 16, generator=generator),
        "num_inference_steps": steps,
        "height": SIZE,
        "width": 2 * SIZE,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(0),
    }
    if family in ("sdxl", "sd3", "flux"):
        given["pooled_prompt_embeds"] = torch.randn(batch, 16, generator=generator)
    if family in ("sdxl", "sd3"):
        given["negative_prompt_embeds"] = torch.zeros(batch, 5, 16)
        given["negative_pooled_prompt_embeds"] = torch.zeros(batch, 16)
    if family == "zimage":
        given["prompt_embeds"] = list(given["prompt_embeds"])
        given["negative_prompt_embeds"] = [torch.zeros(5, 16)] * batch
    if family == "qwen":
        given["prompt_embeds_mask"] = torch.ones(batch, 5, dtype=torch.bool)
        given["negative_prompt_embeds"] = torch.zeros(batch, 5, 16)
        given["negative_prompt_embeds_mask"] = torch.ones(batch, 5, dtype=torch.bool)
    return {**given, **more}


class Decoder(ModularPipelineBlocks):
    """A decoder of the user's own."""

    model_name = "stable-diffusion-xl"

    @property
    def expected_components(self) -> list[Any]:
        return [ComponentSpec("vae", AutoencoderKL)]

    @property
    def inputs(self) -> list[Any]:
        return [InputParam("latents", required=True), InputParam("output_type", default="np")]

    @property
    def intermediate_outputs(self) -> list[Any]:
        return [OutputParam("images")]
