"""Autoencoders of diffusers, of any class: from pictures to the latents that the VAE encodes."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentguard.encode.distribution import Distribution
from latentguard.errors import LatentsError, ModelError
from latentguard.spaces import LatentSpace

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TINY = "AutoencoderTiny"


def is_hub_name(text: str) -> bool:
    """Whether a name is of the form OWNER/NAME."""
    return _HUB.fullmatch(text) is not None


def hub_folder(name: str, download: bool) -> Path:
    """The folder of a model of the Hugging Face hub on this machine.

    download: whether the network may be asked for it.
    Raises ModelError where it is not there.
    """
    from huggingface_hub import snapshot_download

    wanted = [f"{folder}{file}" for folder in ("", "vae/") for file in _FILES]
    try:
        # A pipeline's repository may have large weights at its top, too: those are no VAE's.
        return Path(
            snapshot_download(
                name,
                allow_patterns=wanted,
                ignore_patterns=["*.fp16.*", "*.bf16.*"],
                local_files_only=not download,
            )
        )
    except Exception as error:  # the hub's errors are many, and of several libraries
        hint = "" if download else ": --download (download=True) fetches it"
        reason = str(error).split("\n", 1)[0][:200]
        raise ModelError(f"autoencoder {name} is not on this machine{hint} ({reason})") from error


_FILES = (
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model-*.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)


class DiffusersVae:
    """A VAE, and how pictures are given to it.

    space: of its latents, with its own numbers. scaled: their convention as it encodes them.
    """

    def __init__(self, folder: Path, space: LatentSpace | None) -> None:
        self.folder = vae_folder(folder)
        self.vae = _load(self.folder)
        self.space, self.scaled = _space(self.vae, self.folder, space)
        encoder = getattr(self.vae, "encoder", None)
        has_3d = encoder is not None and any(isinstance(m, nn.Conv3d) for m in encoder.modules())
        self._frames = has_3d
        self._channels = int(self.vae.config.get("in_channels", 3))

    def probe(self) -> bool:
        """Try one small picture: whether its latents are a distribution, or a mean alone.

        Raises ModelError where they are not the space's.
        """
        side = max(64, 2 * self.space.vae_scale_factor * self.space.packed_patch)
        picture = torch.zeros(1, 3, side, side, device=self.vae.device)
        try:
            found = self._try(picture)
        except Exception as error:
            reason = str(error).split("\n", 1)[0][:200]
            raise ModelError(
                f"{self.folder}: {type(self.vae).__name__} cannot encode a picture ({reason})"
            ) from error
        shape = tuple(found.mean.shape)
        cells = side // self.space.vae_scale_factor
        wanted = (1, self.space.channels, cells, cells)
        if shape != wanted:
            raise ModelError(
                f"{self.folder}: a picture of {side} px gives latents {list(shape)}, those "
                f"of space {self.space} are {list(wanted)}"
            )
        return found.std is not None

    def _try(self, picture: Tensor) -> Distribution:
        """Some classes take frames without having a convolution over them."""
        try:
            return self(picture)
        except (ValueError, RuntimeError):
            if self._frames:
                raise
            self._frames = True
            return self(picture)

    def __call__(self, images: Tensor) -> Distribution:
        """RGB [B, 3, H, W] in [0, 1] -> latents [B, C, h, w] as the VAE encodes them."""
        x = images * 2 - 1
        if self._channels == 4:  # RGB and opacity
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        x = x[:, :, None] if self._frames else x.contiguous(memory_format=torch.channels_last)
        output = self.vae.encode(x)
        found = getattr(output, "latent_dist", None)
        if found is None:
            latents = output.latents if hasattr(output, "latents") else output.latent
            mean, std = self._tiny(latents), None
        else:
            mean, std = found.mode(), getattr(found, "std", None)
        if mean.ndim == 5:
            mean, std = mean.squeeze(2), None if std is None else std.squeeze(2)
        return Distribution(mean.float(), None if std is None else std.float())

    def _tiny(self, latents: Tensor) -> Tensor:
        """An AutoencoderTiny's latents are scaled but for numbers of its own, usually 1 and 0."""
        if not self.scaled:
            return latents
        config = self.vae.config
        shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
        return (latents - shift) * scale


def vae_folder(folder: Path) -> Path:
    """The folder that holds the VAE's config.json: a VAE's own, or a pipeline's `vae`.

    Raises ModelError.
    """
    for place in (folder, folder / "vae"):
        if (place / "config.json").is_file() and not (place / "model_index.json").is_file():
            return place
    raise ModelError(
        f"{folder}: not a diffusers autoencoder: neither it nor its vae/ has a config.json"
    )


def digest(folder: Path) -> str:
    """SHA-256 of a VAE's configuration and weights."""
    found = hashlib.sha256()
    for pattern in ("config.json", "*.safetensors"):
        for file in sorted(folder.glob(pattern)):
            with file.open("rb") as stream:
                found.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()


def _load(folder: Path) -> Any:
    import diffusers

    try:
        name = json.loads((folder / "config.json").read_bytes()).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder}/config.json: not readable ({error})") from error
    known = isinstance(name, str) and re.fullmatch(r"\w*(Autoencoder|VAE)\w*", name) is not None
    found = getattr(diffusers, name, None) if known and isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, diffusers.ModelMixin):
        raise ModelError(
            f"{folder}/config.json: {name!r:.60} is not an autoencoder of diffusers "
            f"{diffusers.__version__}"
        )
    loading: Any = found
    try:
        # Weights as safetensors alone: the other kind is a pickle.
        vae = loading.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).split("\n", 1)[0][:300]
        raise ModelError(f"{folder}: not a readable diffusers autoencoder ({reason})") from error
    return vae.eval().requires_grad_(False)


def _space(vae: Any, folder: Path, given: LatentSpace | None) -> tuple[LatentSpace, bool]:
    """The space of a VAE's latents with its own numbers, and whether it encodes them scaled."""
    classes = [cls.__name__ for cls in type(vae).__mro__]
    if _TINY in classes:
        channels = int(vae.config.latent_channels)
        return tiny_space(folder, channels, given), True
    try:
        found = LatentSpace.from_vae_config(vae.config, classes)
    except LatentsError as error:
        if given is None:
            raise ModelError(f"{folder}: {error}") from error
        found = given
    if given is not None and given.name != found.name:
        raise ModelError(f"{folder}: encodes {found} latents, not {given}")
    if found.scale is None and found.statistics_of_vae == "batch_norm":
        from latentguard.spaces import BatchNorm

        found = found.with_batch_norm(*BatchNorm.from_vae(vae))
    elif found.scale is None and hasattr(vae, "latents_mean"):
        factor = float(vae.config.get("scaling_factor") or 1.0)
        found = found.with_mean_std(vae.latents_mean, vae.latents_std, factor)
    return found, False


def tiny_space(source: Path, channels: int, given: LatentSpace | None) -> LatentSpace:
    """The space of a tiny autoencoder, whose files do not say it. Raises ModelError."""
    from latentguard.spaces import SPACES

    # 4 and 16 channels fit two spaces and more.
    space = given or (SPACES["flux2"] if channels == 32 else None)
    if space is None:
        fits = ", ".join(s.name for s in SPACES.values() if s.channels == channels)
        raise ModelError(
            f"{source}: {channels} channels fit {fits or 'no space'}; say which space (--space)"
        )
    if space.channels != channels:
        raise ModelError(
            f"{source}: its latents have {channels} channels, those of space {space} have "
            f"{space.channels}"
        )
    return space
