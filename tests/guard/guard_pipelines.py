"""Small real pipelines with random weights, run from prompt embeddings: mechanics, not pictures."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
SIZE = 64


def autoencoder(channels: int, scale: float, shift: float | None = None, **more: Any) -> Any:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        scaling_factor=scale,
        shift_factor=shift,
        **more,
    )


def _unet(channels: int = 4, **more: Any) -> Any:
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=SIZE // 8,
        in_channels=channels,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        **more,
    )


def _xl_unet(channels: int = 4) -> Any:
    return _unet(
        channels,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=64,
    )


def sdxl(kind: Any = StableDiffusionXLPipeline, scheduler: Any = None, channels: int = 4) -> Any:
    """An SDXL pipeline of 64 px, its text encoders left out."""
    torch.manual_seed(0)
    more = {"requires_aesthetics_score": False} if kind is not StableDiffusionXLPipeline else {}
    pipe = kind(
        vae=autoencoder(4, 0.13025),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=_xl_unet(channels),
        scheduler=scheduler or EulerDiscreteScheduler(**BETAS),
        add_watermarker=False,
        **more,
    )
    return _quiet(pipe)


def sdxl_with_text(scheduler: Any = None) -> Any:
    """An SDXL pipeline that takes prompts: text encoders with random weights, words spelled out."""
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    pipe = sdxl(scheduler=scheduler)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = (*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>")
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    size = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    config = CLIPTextConfig(
        vocab_size=len(words),
        num_hidden_layers=2,
        projection_dim=16,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        **size,
    )
    pipe.register_modules(
        text_encoder=CLIPTextModel(config).eval(),
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
    )
    return pipe


def sdxl_arguments(batch: int = 1, steps: int = 4, seed: int = 0, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    embeds = torch.randn(batch, 5, 16, generator=generator)
    pooled = torch.randn(batch, 16, generator=generator)
    return {
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": torch.zeros_like(embeds),
        "negative_pooled_prompt_embeds": torch.zeros_like(pooled),
        "num_inference_steps": steps,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(seed),
        **more,
    }


def img2img() -> Any:
    return sdxl(StableDiffusionXLImg2ImgPipeline)


def inpaint() -> Any:
    return sdxl(StableDiffusionXLInpaintPipeline)


def sd1(kind: Any = StableDiffusionPipeline, scheduler: Any = None) -> Any:
    torch.manual_seed(0)
    return _quiet(
        kind(
            vae=autoencoder(4, 0.18215),
            text_encoder=None,
            tokenizer=None,
            unet=_unet(time_cond_proj_dim=8 if kind is LatentConsistencyModelPipeline else None),
            scheduler=scheduler or DDIMScheduler(**BETAS, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def lcm() -> Any:
    return sd1(LatentConsistencyModelPipeline, LCMScheduler(**BETAS))


def sd1_arguments(batch: int = 1, steps: int = 4, **more: Any) -> dict[str, Any]:
    embeds = torch.randn(batch, 5, 16, generator=torch.Generator().manual_seed(7))
    return {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": torch.zeros_like(embeds),
        "num_inference_steps": steps,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(0),
        **more,
    }


def lcm_arguments(batch: int = 1, steps: int = 4, **more: Any) -> dict[str, Any]:
    arguments = sd1_arguments(batch, steps, **more)
    del arguments["negative_prompt_embeds"]
    return arguments


def sd3() -> Any:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 8,
        patch_size=2,
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=16,
        pos_embed_max_size=16,
    )
    return _quiet(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(16, 1.5305, 0.0609, use_quant_conv=False, use_post_quant_conv=False),
            **dict.fromkeys(
                (
                    *("text_encoder", "tokenizer", "text_encoder_2"),
                    *("tokenizer_2", "text_encoder_3", "tokenizer_3"),
                )
            ),
        )
    )


def sd3_arguments(batch: int = 1, steps: int = 4, **more: Any) -> dict[str, Any]:
    return sdxl_arguments(batch, steps, height=SIZE, width=SIZE, **more)


def flux() -> Any:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    vae = autoencoder(16, 0.3611, 0.1159, use_quant_conv=False, use_post_quant_conv=False)
    return _quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            transformer=transformer,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
        )
    )


def flux_arguments(batch: int = 1, steps: int = 4, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    return {
        "prompt_embeds": torch.randn(batch, 5, 16, generator=generator),
        "pooled_prompt_embeds": torch.randn(batch, 16, generator=generator),
        "num_inference_steps": steps,
        "height": SIZE,
        "width": 2 * SIZE,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(0),
        **more,
    }


def flux2() -> Any:
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=128,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=32
    )
    return _quiet(
        Flux2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae.eval(),
            text_encoder=None,
            tokenizer=None,
            transformer=transformer,
        )
    )


def flux2_arguments(batch: int = 1, steps: int = 4, **more: Any) -> dict[str, Any]:
    arguments = flux_arguments(batch, steps, **more)
    del arguments["pooled_prompt_embeds"]
    return arguments


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
