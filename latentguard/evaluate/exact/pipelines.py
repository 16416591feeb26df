"""The real pipeline objects of diffusers around the exact denoisers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from latentguard.errors import LatentsError, ModelError
from latentguard.evaluate.exact.denoiser import Tempering
from latentguard.evaluate.exact.photos import Outcome, Photos
from latentguard.evaluate.exact.transformer import ExactFlowTransformer
from latentguard.evaluate.exact.unet import ExactUNet
from latentguard.spaces import Latents

WIDTHS = (8, 8, 8, 8)
NEGATIVE_LEAK = 0.05


def exact_sdxl_pipeline(
    latents: Latents,
    labels: Sequence[str] | None = None,
    scheduler: Any = None,
    prediction: str = "epsilon",
    tempering: Tempering | None = Tempering(),
) -> Any:
    """A StableDiffusionXLPipeline that generates the photos of a set.

    Its loop, guidance, scheduler and noise are diffusers' own; UNet and VAE are not SDXL's: the
    latents are those of the set's space (32 channels for flux2), so a guard has to be told the
    space. The VAE is a small random one with scaling factor 1: decoded pictures show nothing. Run
    it with `pipe(**prompt(pipe, ["cat"]), height=8 * H, width=8 * W, output_type="latent")`.

    Args:
        latents, labels: the set, as for `Photos`.
        scheduler: a scheduler with `alphas_cumprod`; None is SDXL's EulerDiscreteScheduler. Its
            prediction type is set to `prediction`. Another scheduler may be assigned later if it
            has the same betas and prediction type.
        prediction: "epsilon" or "v_prediction".
        tempering: how blurred early predictions are; None is the exact posterior.

    Raises:
        LatentsError: as `Photos`; or photos that are not square.
        ModelError: a scheduler without `alphas_cumprod`.
    """
    diffusers = _diffusers()

    photos = Photos(latents, labels)
    if scheduler is None:
        scheduler = diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        )
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ModelError(
            f"exact_sdxl_pipeline: scheduler must have alphas_cumprod, which "
            f"{type(scheduler).__name__} has not"
        )
    if scheduler.config.prediction_type != prediction:
        scheduler = type(scheduler).from_config(scheduler.config, prediction_type=prediction)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=photos.space.channels,
        scaling_factor=1.0,
        force_upcast=False,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae.eval(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=ExactUNet.of(photos, scheduler.alphas_cumprod, prediction, tempering),
        scheduler=scheduler,
        add_watermarker=False,
    )


def exact_flux2_pipeline(
    latents: Latents,
    labels: Sequence[str] | None = None,
    scheduler: Any = None,
    tempering: Tempering | None = Tempering(),
) -> Any:
    """A Flux2Pipeline that generates the photos of a set of flux2 latents.

    As `exact_sdxl_pipeline`; the VAE's batch-norm statistics are those of no normalization (mean
    0, variance 1 - eps), so that its raw latents are the scaled ones.

    Args:
        latents, labels: the set, as for `Photos`, of the space flux2.
        scheduler: None is FlowMatchEulerDiscreteScheduler with dynamic shifting, as FLUX.2's.
        tempering: how blurred early predictions are; None is the exact posterior.

    Raises:
        LatentsError: as `Photos`; or another space.
    """
    diffusers = _diffusers()

    photos = Photos(latents, labels)
    if photos.space.name != "flux2":
        raise LatentsError(f"the set must hold flux2 latents, got {photos.space}")
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=WIDTHS,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean.zero_()
    vae.bn.running_var.fill_(1 - vae.config.batch_norm_eps)
    return diffusers.Flux2Pipeline(
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=ExactFlowTransformer.of(photos, tempering),
    )


def prompt(
    pipe: Any,
    prompts: Sequence[str | None],
    negative: Sequence[str | None] | None = None,
    leak: float = 0.0,
) -> dict[str, Tensor]:
    """Arguments for `pipe(...)` that ask for classes of its set; None asks for any photo.

    They are the prompt embeddings (`prompt_embeds` and, for SDXL, `pooled_prompt_embeds`), as the
    pipelines have no text encoder. Without `negative` classifier-free guidance moves away from the
    unconditional prediction, with it from those classes (SDXL only).
    leak: the weight that a prompt leaves to the rest of the set (`Photos.embeds`), about the chance
        that something else comes out. With 0 a prompt's class is certain, so steering away from it
        cannot succeed; use 0.05 or so to measure steering. Negative prompts have at least 0.05:
        their prediction must be able to follow x_t out of the class.
    Raises LatentsError for a class that the set does not have.
    """
    model = _model(pipe)
    photos: Photos = model.photos
    embeds = photos.embeds(prompts, leak).to(model.device, model.dtype)
    if isinstance(model, ExactFlowTransformer):
        return {"prompt_embeds": embeds}
    found = {"prompt_embeds": embeds, "pooled_prompt_embeds": embeds[:, 0]}
    if negative is not None:
        other = photos.embeds(negative, max(leak, NEGATIVE_LEAK)).to(model.device, model.dtype)
        found |= {"negative_prompt_embeds": other, "negative_pooled_prompt_embeds": other[:, 0]}
    return found


def outcome(pipe: Any, latents: Tensor) -> Outcome:
    """Which photo each generation became: `latents` as `output_type="latent"` returns them.

    [B, C, H, W], or tokens [B, N, 128] of Flux2Pipeline. Raises LatentsError for another size.
    """
    photos: Photos = _model(pipe).photos
    if latents.ndim == 3:
        height, width = photos.tensor.shape[2:]
        latents = photos.space.to_spatial(latents, height, width)
    return photos.outcome(latents)


def _diffusers() -> Any:
    """diffusers, most of which has no types."""
    import diffusers

    return diffusers


def _model(pipe: Any) -> Any:
    for name in ("unet", "transformer"):
        model = getattr(pipe, name, None)
        if isinstance(model, ExactUNet | ExactFlowTransformer):
            return model
    raise ModelError(
        f"{type(pipe).__name__} has no exact denoiser: make it with exact_sdxl_pipeline or "
        "exact_flux2_pipeline"
    )
