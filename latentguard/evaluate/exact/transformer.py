"""A stand-in for the transformer of Flux2Pipeline that knows a finite set of photos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from latentguard.errors import LatentsError
from latentguard.evaluate.exact.denoiser import ExactDenoiser, Tempering, class_prior
from latentguard.evaluate.exact.photos import Photos
from latentguard.spaces import Latents


class ExactFlowTransformer(ModelMixin, ConfigMixin, CacheMixin):
    """The exact denoiser behind Flux2Transformer2DModel's interface.

    Build it with `ExactFlowTransformer.of(photos, ...)`; save_pretrained and from_pretrained work.
    x_t = (1 - sigma) x0 + sigma noise, and the prediction is the velocity noise - x0. The set is
    kept as a float32 buffer in the packed layout [N, tokens, 128].
    """

    config_name: Any = "config.json"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 128,
        joint_attention_dim: int = 2,
        guidance_embeds: bool = True,
        labels: Sequence[str] = ("", ""),
        height: int = 32,
        width: int = 32,
        tempering: Sequence[float] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        tokens = height // 2 * (width // 2)
        self.register_buffer("latents", torch.zeros(len(labels), tokens, in_channels))
        self.register_buffer("label_index", torch.zeros(len(labels), dtype=torch.long))
        # A model without parameters has no dtype to be asked for.
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)
        self.tempering = None if tempering is None else Tempering(*tempering)
        self._photos: Photos | None = None

    @classmethod
    def of(cls, photos: Photos, tempering: Tempering | None = Tempering()) -> ExactFlowTransformer:
        """The transformer of a set; tempering None is the exact posterior."""
        packed = photos.space.to_packed(photos.tensor)
        model: ExactFlowTransformer = cls(
            in_channels=packed.shape[2],
            joint_attention_dim=len(photos.classes),
            labels=photos.labels,
            height=photos.tensor.shape[2],
            width=photos.tensor.shape[3],
            tempering=None if tempering is None else (tempering.one, tempering.all),
        )
        model.latents = packed.contiguous()
        model.label_index = photos.label_index.clone()
        model._photos = photos
        model.eval().requires_grad_(False)
        return model

    @property
    def photos(self) -> Photos:
        """The set."""
        if self._photos is None:
            config: Any = self.config
            packed = Latents(
                self.latents, "flux2", True, "packed", height=config.height, width=config.width
            )
            self._photos = Photos(packed, config.labels)
        return self._photos

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        **_: Any,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The velocity of a perfectly trained transformer.

        hidden_states: x_t [B, N, 128]; tokens after the set's own number (reference images) are
            left out of the answer, as the pipeline leaves them out.
        encoder_hidden_states: class weights [B, T, K]; the mean over T counts.
        timestep: sigma, 0 to 1, [B]. guidance: distilled guidance; without effect, because the
            prompt already restricts the set.
        Raises LatentsError for fewer tokens than the set's, or other channels.
        """
        count, channels = self.latents.shape[1:]
        if hidden_states.shape[1] < count or hidden_states.shape[2] != channels:
            raise LatentsError(
                f"this transformer knows {count} tokens of {channels} channels, got "
                f"{list(hidden_states.shape[1:])}: ask for the height and width of its photos"
            )
        photos = self.latents if self.latents.dtype == torch.float64 else self.latents.float()
        exact = ExactDenoiser(photos.flatten(1), self.tempering)
        noisy = hidden_states[:, :count].to(photos.dtype)
        sigma = timestep.double().reshape(-1).expand(len(noisy)).clamp(1e-4, 1 - 1e-6)
        prior = class_prior(encoder_hidden_states.double().mean(1), self.label_index)
        clean = exact.predict(noisy.flatten(1), 1 - sigma, sigma, prior).view_as(noisy)
        velocity = (noisy - clean) / sigma.to(noisy.dtype).view(-1, 1, 1)
        found = velocity.to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=found) if return_dict else (found,)
