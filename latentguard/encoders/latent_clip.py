"""Latent-CLIP (Becker, Wendler et al., arXiv 2503.08455): CLIP whose image tower reads latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Self, get_args

import torch
from torch import Tensor

from latentguard.encoders import checkpoint
from latentguard.encoders.base import EncoderBase, Features, Head, check_prediction
from latentguard.encoders.catalog import CATALOG, MERGE, Entry, LatentClipConfig, cache_dir
from latentguard.encoders.clip_text import ClipText
from latentguard.encoders.merging import schedule
from latentguard.encoders.resize import ADAPTERS, Adapter, Resize
from latentguard.encoders.vit import LatentViT
from latentguard.errors import LatentsError, ModelError
from latentguard.spaces import Latents

# What pictures have in common: the contrast for policies that give none.
NEUTRAL_PROMPTS = (
    "a photo",
    "a picture of something",
    "a drawing",
    "a painting",
    "a photo of a person",
    "a photo of an animal",
    "a photo of a place",
    "a photo of everyday objects",
)


class LatentCLIP(EncoderBase):
    """The encoder; weights are frozen, gradients flow to latents and noise.

    `resize` says how latents of another size than the trained one (64 x 64 cells) are read:

    - "interpolate": as they are, the positional embedding interpolated to their grid. A side that
      is no multiple of the patch is continued by its last row or column; nothing is cropped.
    - "pool": averaged (or repeated) to the trained grid; the aspect ratio is not kept.
    - "tile": as views of the trained size, which overlap where they must and together cover all of
      it, after one view of the whole, pooled. `Features.tiles` counts them; an image's score is
      that of its strongest view. A place's token comes from the view whose center is nearest.
      A side shorter than the trained one is continued by its last row or column.

    `merge` is the share of the patches' tokens, 0 (none, the default) to less than 1, that merge
    into like ones on the way through the image tower (see `merging`). That is faster and another
    model: `name` ends in `+merge=SHARE`, so that calibrated thresholds and records tell them apart.
    """

    pools = True
    unscales = True
    merges = True
    min_coverage = 0.5
    neutral_prompts = NEUTRAL_PROMPTS
    always_neutral = False
    uses_templates = True
    notes = (
        "Latent-CLIP (arXiv 2503.08455) reads SDXL latents of 512 px; other sizes go through "
        "interpolated positional embeddings, which its authors did not evaluate."
    )

    def __init__(
        self,
        weights: checkpoint.Weights,
        resize: Resize = "interpolate",
        name: str | None = None,
        merge: float = 0.0,
    ) -> None:
        """From checked weights; `load` and `random` are the usual ways."""
        self.config = weights.config
        self._name = name or weights.name
        self.sha256 = weights.sha256
        self.space = weights.config.space
        self.needs_scaled = weights.config.needs_scaled
        self.dim = weights.config.embed_dim
        self.resize = resize
        self.merge = merge
        self.logit_scale = _logit_scale(weights)
        with torch.device("meta"):
            self.vit = LatentViT(weights.config)
        image, self._text_weights = (
            {
                key.removeprefix(prefix): value
                for key, value in weights.tensors.items()
                if key.startswith(prefix)
            }
            for prefix in ("image.", "text.")
        )
        self.vit.load_state_dict(image, strict=True, assign=True)
        self.vit.eval().requires_grad_(False)
        self._text: ClipText | None = None

    # --- making one --------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        resize: Resize = "interpolate",
        config: LatentClipConfig | None = None,
        merge: float = 0.0,
    ) -> Self:
        """From an official checkpoint (.pt) or a converted file (.safetensors).

        A checkpoint is converted once and kept in the cache under its own digest. `config` is
        for checkpoints of sizes that are not published. Raises ModelError.
        """
        path = Path(path)
        if path.suffix == ".safetensors":
            weights = checkpoint.read_converted(path)
        else:
            weights = _converted_once(path, config)
        return cls(weights, resize, merge=merge).to(device, dtype)

    @classmethod
    def random(
        cls,
        model: str | LatentClipConfig,
        seed: int = 0,
        resize: Resize = "interpolate",
        merge: float = 0.0,
    ) -> Self:
        """Random weights of a model's shape, for benchmarks and tests; its scores mean nothing.

        `model` is a name of the catalog or a configuration; the encoder's name says "random".
        """
        if isinstance(model, str):
            entry = CATALOG.get(model)
            if entry is None or entry.config is None:
                known = ", ".join(e.name for e in CATALOG.values() if e.config is not None)
                raise ModelError(f"no Latent-CLIP is called {model!r}: choose from {known}")
            config, name = entry.config, f"{model}-random"
        else:
            config, name = model, f"latent-clip-p{model.patch}-random"
        tensors = _random_tensors(config, seed)
        digest = checkpoint.weights_sha256(tensors)
        return cls(checkpoint.Weights(tensors, config, name, digest, ""), resize, merge=merge)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Move the weights, in place; the digest stays that of the file."""
        self.vit.to(device=device, dtype=dtype)
        self._text_weights = {
            key: value.to(device=device, dtype=dtype) for key, value in self._text_weights.items()
        }
        self._text = None
        return self

    # --- what it says of itself --------------------------------------------------------------

    @property
    def name(self) -> str:
        """That of the weights; with merging, `+merge=SHARE` behind it."""
        return f"{self._name}{MERGE}{self.merge}" if self.merge else self._name

    @property
    def fixed_size(self) -> bool:  # type: ignore[override]
        """Whether sizes other than the trained one are pooled or tiled to it."""
        return self.resize != "interpolate"

    @property
    def module(self) -> LatentViT:
        """The image tower."""
        return self.vit

    @property
    def merge(self) -> float:
        """The share of the patches' tokens that merge; 0 is the model as it was published."""
        return self._merge

    @merge.setter
    def merge(self, value: float) -> None:
        if not 0 <= value < 1:  # NaN, too
            raise ModelError(
                f"the share of tokens that merge must be from 0 to less than 1, got {value}"
            )
        self._merge = float(value)

    def tokens_left(self, height: int, width: int) -> tuple[int, int]:
        """Patch tokens of latents of a size in cells, and how many are left in the last block."""
        rows, columns = self._adapter(height, width).grid
        patches = rows * columns
        return patches, patches - sum(schedule(self.merge, patches, self.config.layers))

    @property
    def resize(self) -> Resize:
        """How other sizes than the trained one are read."""
        return self._resize

    @resize.setter
    def resize(self, value: Resize) -> None:
        if value not in get_args(Resize):
            raise ModelError(f"resize must be one of {', '.join(get_args(Resize))}, got {value!r}")
        self._resize = value

    @property
    def device(self) -> torch.device:
        return self.vit.proj.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vit.proj.dtype

    @property
    def head(self) -> Head:
        """`ln_post` and the projection."""
        norm = self.vit.ln_post
        return Head(norm.weight, norm.bias, norm.eps, self.vit.proj)

    # --- latents -----------------------------------------------------------------------------

    def features(
        self,
        latents: Tensor,
        noise: Tensor | None = None,
        alpha: Tensor | None = None,
        sigma: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        tokens: bool = True,
    ) -> Features:
        """Class token (pooled) and patch tokens before `ln_post`, of raw latents [B, C, H, W].

        See `Encoder.features`. With `scale` and `shift` [C], latents in another convention are
        read as latents * scale + shift, after the x0 estimate. Latents and noise are taken to the
        weights' device and dtype; everything up to the patches is computed in float32.
        Without `tokens` the last block computes the class token alone.
        Raises LatentsError for another rank, number of channels or size 0.
        """
        channels = self.config.channels
        if latents.dim() != 4 or latents.shape[1] != channels or 0 in latents.shape[2:]:
            raise LatentsError(
                f"{self.name} reads latents of shape [B, {channels}, H, W], "
                f"got {list(latents.shape)}"
            )
        check_prediction(latents, noise, alpha, sigma)
        adapt = self._adapter(*latents.shape[2:])
        rows = self.vit(
            adapt(self._ready(latents)),
            None if noise is None else adapt(self._ready(noise)),
            self._level(alpha, adapt.tiles),
            self._level(sigma, adapt.tiles),
            None if scale is None else scale.to(self.device, torch.float32),
            None if shift is None else shift.to(self.device, torch.float32),
            share=self.merge,
            whole=tokens,
        )
        pooled, places = rows[:, 0], rows[:, 1:]
        return Features(pooled, adapt.stitch(places) if tokens else places, adapt.grid, adapt.tiles)

    def encode_latents(self, latents: Latents) -> Tensor:
        """Unit-norm float32 embeddings [B, dim], differentiable in the latents' tensor.

        Scaled latents are converted. Raises LatentsError for another space, ModelError where the
        images are read as several views, which have no single embedding.
        """
        features = self.features(self.prepare(latents))
        if features.tiles > 1:
            raise ModelError(
                f"{self.name} with resize='tile' reads {features.tiles} views of an image of "
                f"{latents.height}x{latents.width} cells, which have no single embedding: score "
                "its features, or use resize='interpolate'"
            )
        return self.head.embed(features.pooled)

    def prepare(self, latents: Latents) -> Tensor:
        """Latents as `features` reads them: [B, C, H, W], raw, on the weights' device.

        Raises LatentsError for latents of another space.
        """
        if latents.space.name != self.space:
            raise LatentsError(
                f"{self.name} reads latents of space {self.space}, got {latents.space.name}"
            )
        wide = torch.promote_types(latents.tensor.dtype, self.dtype)
        latents = latents.to(self.device, wide).to_spatial()
        return latents.to_standard(self.needs_scaled).tensor

    def _adapter(self, height: int, width: int) -> Adapter:
        return ADAPTERS[self.resize](height, width, self.config.grid, self.config.patch)

    def _ready(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    def _level(self, level: Tensor | None, tiles: int) -> Tensor | None:
        """A noise level per image [B] as one per view, in float32."""
        if level is None:
            return None
        return level.to(self.device, torch.float32).repeat_interleave(tiles)

    # --- text --------------------------------------------------------------------------------

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm float32 embeddings [P, dim] on the weights' device.

        Raises ModelError for a prompt of more than 77 tokens, which CLIP would cut in silence.
        """
        if self._text is None:
            self._text = ClipText(self.config, self._text_weights)
        return self._text.embed(texts)

    def coverage(self, texts: Sequence[str]) -> Tensor:
        """All ones [P]: its text tower reads any prompt."""
        return torch.ones(len(texts), device=self.device)


def load(
    path: Path, device: torch.device | str | None = None, entry: Entry | None = None
) -> LatentCLIP:
    """`LatentCLIP.load`, and a ModelError where the file is not of the catalog's `entry`."""
    encoder = LatentCLIP.load(path, device)
    if entry is not None and encoder.config != entry.config:
        raise ModelError(f"{path}: is not {entry.name}: its configuration is {encoder.config}")
    return encoder


def _logit_scale(weights: checkpoint.Weights) -> float:
    """The factor from its logarithm; CLIP's training keeps it at 100 or less."""
    logarithm = float(weights.tensors["logit_scale"])
    if not 0 <= logarithm <= math.log(1000):
        raise ModelError(
            f"{weights.name}: `logit_scale` must be the logarithm of 1 to 1000, got {logarithm}"
        )
    return math.exp(logarithm)


def _converted_once(path: Path, config: LatentClipConfig | None) -> checkpoint.Weights:
    """An official checkpoint through the cache, where its digest names the converted file."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    digest = checkpoint.file_sha256(path)
    kept = cache_dir() / "converted" / f"{digest}.safetensors"
    if kept.is_file():
        weights = checkpoint.read_converted(kept)
        if weights.source_sha256 != digest:
            raise ModelError(
                f"{kept}: was not converted from {path}, in spite of its name: delete it"
            )
        return weights
    weights = checkpoint.convert(checkpoint.read_official(path, config, digest))
    checkpoint.write(kept, weights)
    return weights


def _random_tensors(config: LatentClipConfig, seed: int) -> dict[str, Tensor]:
    """Weights that keep activations of order one, every parameter different from its neutral."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in checkpoint.expected_shapes(config).items():
        value = torch.randn(shape, generator=generator)
        if ".ln_" in key and key.endswith(".weight"):
            tensors[key] = 1 + 0.1 * value
        elif key == "logit_scale":
            tensors[key] = torch.tensor(math.log(100.0))
        elif len(shape) < 2:
            tensors[key] = 0.05 * value
        else:
            # Projections stand as [in, out], all else as [out, in, ...].
            outward = key.endswith(("proj", "projection"))
            inputs = shape[0] if outward else math.prod(shape[1:])
            tensors[key] = value * inputs**-0.5
    return tensors
