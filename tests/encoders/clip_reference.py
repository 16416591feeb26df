"""An independent Latent-CLIP for comparison: open_clip's own towers, and a checkpoint of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentguard.encoders.catalog import LatentClipConfig

# The published sizes but for depth and width, which only cost time here.
SMALL_B8 = LatentClipConfig(
    patch=8, embed_dim=512, text_width=128, width=128, layers=2, text_layers=2
)
SMALL_B4 = LatentClipConfig(
    patch=4, embed_dim=640, text_width=128, width=192, layers=2, text_layers=2
)


@dataclass
class Reference:
    """open_clip's image tower, its patch convolution swapped for one of 4 channels, and text."""

    config: LatentClipConfig
    image: nn.Module
    text: nn.Module

    def encode_latents(self, raw: Tensor) -> Tensor:
        return F.normalize(self.at_size(raw.shape[2], raw.shape[3])(raw), dim=-1)

    def encode_text(self, texts: list[str]) -> Tensor:
        import open_clip

        return F.normalize(self.text(open_clip.tokenize(texts)), dim=-1)

    def at_size(self, height: int, width: int) -> nn.Module:
        """The image tower with the positional embedding that open_clip gives another size."""
        import open_clip

        model = image_tower(self.config, (height, width))
        state = {f"visual.{key}": value for key, value in self.image.state_dict().items()}
        holder = nn.Module()
        holder.visual = model
        open_clip.model.resize_pos_embed(state, holder)
        holder.load_state_dict(state, strict=True)
        return model.eval()

    def checkpoint(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """What training wrote: the official layout, with all that a reader has to pass over."""
        state = {"module.logit_scale": torch.tensor(np.log(50.0), dtype=torch.float32)}
        for key, value in self.image.state_dict().items():
            state[f"module.visual.latent_vit.{key}"] = value.to(dtype, copy=True)
        for key, value in self.text.state_dict().items():
            state[f"module.{key}"] = value.to(dtype, copy=True)
        state["module.visual.vae_encoder.conv_in.weight"] = torch.zeros(128, 3, 3, 3)
        state["module.visual.vae_encoder.mid_block.attentions.0.to_q.bias"] = torch.zeros(512)
        state["module.visual.vae_quant_conv.weight"] = torch.zeros(8, 8, 1, 1)
        moments = {"step": torch.tensor(80_000.0), "exp_avg": torch.zeros(3)}
        group = {"lr": np.float64(5e-4), "betas": (0.9, np.float32(0.98)), "params": [0]}
        return {
            "epoch": np.int64(34),
            "name": "latent-clip",
            "state_dict": state,
            "optimizer": {"state": {0: moments}, "param_groups": [group]},
        }


def image_tower(config: LatentClipConfig, size: tuple[int, int]) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    tower = VisionTransformer(
        image_size=size,
        patch_size=config.patch,
        width=config.width,
        layers=config.layers,
        heads=config.width // 64,
        mlp_ratio=4.0,
        output_dim=config.embed_dim,
    )
    tower.conv1 = nn.Conv2d(4, config.width, config.patch, stride=config.patch, bias=False)
    return tower


def make_reference(config: LatentClipConfig, seed: int = 0, attention: float = 2.5) -> Reference:
    """Random towers; `attention` multiplies the weights that make queries, keys and values.

    At 1 random attention is flat, and two layers of it give every image nearly the same class
    token. At 2.5 they tell images apart, but twelve such layers are chaotic: at 3 any change of
    1e-7, rounding as well, grows to 1e-2.
    """
    from open_clip.transformer import TextTransformer

    torch.manual_seed(seed)
    image = image_tower(config, (config.grid, config.grid))
    text = TextTransformer(
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        width=config.text_width,
        heads=config.text_width // 64,
        layers=config.text_layers,
        output_dim=config.embed_dim,
    )
    with torch.no_grad():
        for tower in (image, text):
            for parameter in tower.parameters():
                # Norms start at 1 and biases at 0, where exchanged ones would not be noticed.
                parameter.add_(0.05 * torch.randn_like(parameter))
            for name, parameter in tower.named_parameters():
                if name.endswith("in_proj_weight"):
                    parameter.mul_(attention)
    for tower in (image, text):
        tower.eval().requires_grad_(False)
    return Reference(config, image, text)
