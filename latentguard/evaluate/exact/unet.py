"""A stand-in for the UNet of StableDiffusionXLPipeline that knows a finite set of photos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from latentguard.errors import LatentsError
from latentguard.evaluate.exact.denoiser import ExactDenoiser, Tempering, class_prior
from latentguard.evaluate.exact.photos import Photos
from latentguard.spaces import Latents

TIME_IDS = 6
PREDICTIONS = ("epsilon", "v_prediction")


class ExactUNet(ModelMixin, ConfigMixin):
    """The exact denoiser behind UNet2DConditionModel's interface.

    Build it with `ExactUNet.of(photos, alphas_cumprod, ...)`; save_pretrained and from_pretrained
    work. It keeps the set as a float32 buffer that `.to(dtype)` casts as it would cast weights;
    posteriors are computed in float32 or better. `tempering` may be changed at any time.
    """

    config_name: Any = "config.json"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 32,
        out_channels: int = 32,
        sample_size: int = 32,
        cross_attention_dim: int = 2,
        prediction_type: str = "epsilon",
        time_cond_proj_dim: int | None = None,
        addition_embed_type: str = "text_time",
        addition_time_embed_dim: int = 256,
        labels: Sequence[str] = ("", ""),
        space: str = "flux2",
        ratios: Sequence[float] = (0.0,),
        tempering: Sequence[float] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if prediction_type not in PREDICTIONS:
            raise ValueError(
                f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction_type!r}"
            )
        shape = (len(labels), in_channels, sample_size, sample_size)
        self.register_buffer("latents", torch.zeros(shape))
        self.register_buffer("label_index", torch.zeros(len(labels), dtype=torch.long))
        # The pipeline checks the width of what it would be given; nothing goes through it.
        self.add_embedding = nn.Module()
        width = addition_time_embed_dim * TIME_IDS + cross_attention_dim
        self.add_embedding.linear_1 = nn.Linear(width, 1)
        self.tempering = None if tempering is None else Tempering(*tempering)
        # Not a buffer: a pipeline in half precision must not round the noise levels.
        self.ratios = torch.tensor(list(ratios), dtype=torch.float64)
        self._photos: Photos | None = None

    @classmethod
    def of(
        cls,
        photos: Photos,
        alphas_cumprod: Tensor,
        prediction: str = "epsilon",
        tempering: Tempering | None = Tempering(),
    ) -> ExactUNet:
        """The UNet of a set.

        alphas_cumprod: the scheduler's, [T]: timestep t has signal sqrt(a_t) and noise
            sqrt(1 - a_t). prediction: "epsilon" or "v_prediction". tempering: None is exact.
        Raises LatentsError unless the photos are square.
        """
        channels, height, width = photos.tensor.shape[1:]
        if height != width:
            raise LatentsError(f"the SDXL pipeline's set must be square, got {height}x{width}")
        signal = alphas_cumprod.double().cpu()
        unet: ExactUNet = cls(
            in_channels=channels,
            out_channels=channels,
            sample_size=height,
            cross_attention_dim=len(photos.classes),
            prediction_type=prediction,
            labels=photos.labels,
            space=photos.space.name,
            ratios=((1 - signal) / signal).sqrt().tolist(),
            tempering=None if tempering is None else (tempering.one, tempering.all),
        )
        unet.latents = photos.tensor.clone()
        unet.label_index = photos.label_index.clone()
        unet._photos = photos
        unet.eval().requires_grad_(False)
        return unet

    @property
    def photos(self) -> Photos:
        """The set."""
        if self._photos is None:
            config: Any = self.config
            self._photos = Photos(Latents(self.latents, config.space, True), config.labels)
        return self._photos

    def levels(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at timesteps, float64; between two the noise-to-signal ratio is linear,
        as in the schedulers that use fractional timesteps."""
        position = timestep.double().cpu().clamp(0, len(self.ratios) - 1)
        below = position.floor().long()
        above = (below + 1).clamp(max=len(self.ratios) - 1)
        ratio = torch.lerp(self.ratios[below], self.ratios[above], position - below)
        alpha = (1 + ratio**2).rsqrt()
        return alpha, ratio * alpha

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        return_dict: bool = True,
        **_: Any,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """What a perfectly trained UNet would predict.

        sample: x_t [B, C, H, W] of unit variance schedules (alpha^2 + sigma^2 = 1), which is what
            every scheduler's `scale_model_input` gives. timestep: one, or [B].
        encoder_hidden_states: class weights [B, T, K]; the mean over T counts.
        Raises LatentsError for a sample of another size than the set's.
        """
        if sample.shape[1:] != self.latents.shape[1:]:
            raise LatentsError(
                f"this UNet knows latents of {list(self.latents.shape[1:])}, got "
                f"{list(sample.shape[1:])}: ask for height and width of 8 times that"
            )
        times = torch.as_tensor(timestep).reshape(-1).expand(len(sample))
        alpha, sigma = (v.to(sample.device) for v in self.levels(times))
        exact = ExactDenoiser(_at_least_float32(self.latents).flatten(1), self.tempering)
        noisy = sample.to(exact.photos.dtype)
        prior = class_prior(encoder_hidden_states.double().mean(1), self.label_index)
        clean = exact.predict(noisy.flatten(1), alpha, sigma, prior).view_as(noisy)
        a, s = (v.to(noisy.dtype).view(-1, 1, 1, 1) for v in (alpha, sigma))
        noise = (noisy - a * clean) / s
        config: Any = self.config
        found = noise if config.prediction_type == "epsilon" else a * noise - s * clean
        found = found.to(sample.dtype)
        return UNet2DConditionOutput(sample=found) if return_dict else (found,)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
