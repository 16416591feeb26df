"""The bundled encoders: a latent adapter on a pretrained image classifier, in 13 MB each.

An image is its posterior over ImageNet's 1,000 classes, a prompt is a weighting of those classes
(class_text.py), and a score is the cosine of their square roots. One more axis is the same for all
images: on it lie the neutral prompts, so that they are a constant baseline. What the classes do not
span the model cannot see, and says so (`coverage`). How the weights were made: latentguard.adapt
and docs/nano.md.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from latentguard.atomic import replacing
from latentguard.encoders.any_view import of_space
from latentguard.encoders.base import EncoderBase, Features, Head, clean_estimate
from latentguard.encoders.catalog import ANY_VIEW, CATALOG, Entry, bundled_path
from latentguard.encoders.class_text import (
    CLASSES,
    DIM,
    LOGIT_SCALE,
    MIN_COVERAGE,
    NEUTRAL_PROMPTS,
    ClassText,
    normalize,
    similarities,
)
from latentguard.encoders.header import opened, read_header
from latentguard.encoders.lite import HEAD_CHANNELS, fuse
from latentguard.encoders.nano_net import NanoNet, RgbViewNet
from latentguard.errors import LatentsError, ModelError
from latentguard.regular import read_whole
from latentguard.spaces import Latents, LatentSpace

FORMAT = "latentguard-nano"
SCHEMA_VERSION = "1"
WEIGHTS = Path(__file__).parent / "weights"
BUNDLED = ("nano-flux2", "nano-view")
MAX_BYTES = 64 << 20
"""No nano model is larger; a larger file is something else."""
MAX_SIZE = 4096
"""Channels or pixels that a nano model's configuration may ask for."""

BASELINE = 0.2
"""Cosine of every image with the neutral prompts: a concept has to hold about 4 % of the posterior
to reach it. A baseline that depends on the image (the uniform distribution) ranks pictures of two
things below pictures of one: AUROC 0.35 to 0.94 instead of 0.87 to 1.00, see docs/nano.md."""


class NanoEncoder(nn.Module, EncoderBase):
    """An Encoder (latentguard.encoders.base) over class posteriors; see the module's text."""

    fixed_size = True
    pools = True
    crop_lead = 0.25
    trunk_dim = HEAD_CHANNELS

    def __init__(
        self,
        net: NanoNet | RgbViewNet,
        text: ClassText,
        *,
        name: str,
        sha256: str,
        space: str,
        card: str,
        class_names: Sequence[str],
        needs_scaled: bool = True,
    ) -> None:
        super().__init__()
        self.net = net
        self.text = text
        self.name = name
        self.sha256 = sha256
        self.space = space
        self.notes = card
        self.class_names = tuple(class_names)
        self.needs_scaled = needs_scaled
        self.uses_templates = False
        self.always_neutral = True
        self.dim = DIM
        self.logit_scale = LOGIT_SCALE
        self.head = Head()
        self.neutral_prompts = NEUTRAL_PROMPTS
        self.min_coverage = MIN_COVERAGE
        self.crop_side = net.crop_side

    @property
    def module(self) -> nn.Module:
        """The encoder itself."""
        return self

    @property
    def device(self) -> torch.device:
        return self.net.trunk.classifier.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.net.trunk.classifier.weight.dtype

    def features(
        self,
        latents: Tensor,
        noise: Tensor | None = None,
        alpha: Tensor | None = None,
        sigma: Tensor | None = None,
        *,
        tokens: bool = True,
        trunk: bool = False,
    ) -> Features:
        """Square roots of class posteriors, of the image and of each cell of the final grid, and
        the baseline's axis.

        Args:
            latents: [B, C, H, W] in the convention that `needs_scaled` names.
            noise, alpha, sigma: predicted noise [B, C, H, W] and the levels [B]: the x0 estimate
                (latents - sigma * noise) / alpha is read instead, computed in float32.
            tokens: whether the cells are wanted, too.
            trunk: whether the trunk's 1,280 numbers stand behind, of norm 1 as well.

        Returns:
            pooled [B, 1008] and tokens [B, N, 1008] of unit norm, differentiable in latents.
        """
        x = (
            clean_estimate(latents, noise, alpha, sigma)
            .to(self.dtype)
            .contiguous(memory_format=torch.channels_last)
        )
        cells = self.net.feature_map(x)
        grid = (cells.shape[2], cells.shape[3])
        places = cells.flatten(2).transpose(1, 2)
        rows = places.mean(1, keepdim=True)
        if tokens:
            # The image and its cells in one product: at batch 1 reading the classifier is the cost.
            rows = torch.cat([rows, places], 1)
        embedded = embed_logits(self.net.trunk.classifier(rows))
        if trunk:
            unit = torch.nn.functional.normalize(rows.float(), dim=-1).to(embedded.dtype)
            embedded = torch.cat([embedded, unit], -1)
        return Features(pooled=embedded[:, 0], tokens=embedded[:, 1:], grid=grid)

    def encode_latents(self, latents: Latents) -> Tensor:
        """Unit-norm embeddings [B, 1008]; entry c goes with the root of class c's probability."""
        if latents.space.name != self.space:
            raise LatentsError(
                f"model {self.name} reads {self.space} latents, got {latents.space.name}"
            )
        tensor = latents.to_spatial().to_standard(self.needs_scaled).tensor
        return self.features(tensor.to(self.device)).pooled

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm class weightings [P, 1008].

        A text that no class is near to (coverage below `min_coverage`) lies on the baseline's axis.
        """
        return torch.from_numpy(self.text.encode(texts)).to(self.device, self.dtype)

    def coverage(self, texts: Sequence[str]) -> Tensor:
        """How near [P] the nearest class is to each text, 0 to 1."""
        return torch.from_numpy(self.text.coverage(texts))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        super().to(*args, **kwargs)
        return self


def embed_logits(logits: Tensor) -> Tensor:
    """Class logits [..., 1000] -> unit vectors [..., 1008] of the joint space."""
    # exp(log / 2) rather than sqrt(softmax): its gradient stays finite at probability 0.
    root = torch.exp(0.5 * torch.log_softmax(logits.float(), -1)) * (1 - BASELINE**2) ** 0.5
    padded = torch.nn.functional.pad(root, (0, DIM - CLASSES))
    axis = torch.zeros(DIM, device=logits.device)
    axis[CLASSES] = BASELINE
    return (padded + axis).to(logits.dtype)


def load_nano(
    name_or_path: str | Path,
    device: str | torch.device | None = None,
    space: str | LatentSpace | None = None,
) -> NanoEncoder:
    """A bundled nano encoder by name, or one that `latentguard adapt` wrote, by path.

    space: whose RGB view a model of several spaces is to read; other models read the space that
    their file says.

    Raises:
        ModelError: no such file, not a nano model, an unknown schema_version, a broken file, a
            model of several spaces without a space, or a space without a view that can be read.
    """
    import safetensors
    import safetensors.torch

    path = Path(name_or_path)
    entry = CATALOG.get(str(name_or_path))
    if entry is not None and entry.format == FORMAT:
        return load(bundled_path(entry.name), device, entry, space)
    if not path.is_file():
        raise ModelError(f"no nano model at {path}; bundled are {', '.join(BUNDLED)}")
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            raise ModelError(f"{path}: {size} bytes is too large for a nano model")
        data = read_whole(file)
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error})") from error
    metadata = read_header(path, BytesIO(data)).metadata
    if metadata.get("format") != FORMAT:
        raise ModelError(
            f"{path}: not a nano model (metadata format {metadata.get('format')!r}, "
            f"wanted {FORMAT!r})"
        )
    if metadata.get("schema_version") != SCHEMA_VERSION:
        raise ModelError(
            f"{path}: schema_version {metadata.get('schema_version')!r}, "
            f"this latentguard reads {SCHEMA_VERSION!r}"
        )
    several = metadata.get("kind") == ANY_VIEW
    own = str(metadata.get("space"))
    try:
        LatentSpace.get("sdxl" if several else own)
    except LatentsError as error:
        raise ModelError(
            f"{path}: reads latents of space {own!r:.60}, which is not known here: give the file "
            "of that space, too (--space FILE.yaml, space=)"
        ) from error
    try:
        if several:
            metadata = metadata | of_space(metadata, space)
        encoder = _build(metadata, tensors, hashlib.sha256(data).hexdigest())
    except (ModelError, LatentsError):
        raise
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: damaged nano model ({error})") from error
    return encoder if device is None else encoder.to(device)


def load(
    path: Path,
    device: torch.device | str | None = None,
    entry: Entry | None = None,
    space: str | LatentSpace | None = None,
) -> NanoEncoder:
    """`load_nano` for the catalog, whose `entry` may say the space, or another name."""
    own = None if entry is None else entry.space
    encoder = load_nano(path, device, own or space)
    if entry is not None and entry.same_as is not None:
        encoder.name = entry.name
    return encoder


def _build(metadata: dict[str, str], tensors: dict[str, Tensor], sha256: str) -> NanoEncoder:
    weights = {k[4:]: v.float() for k, v in tensors.items() if k.startswith("net.")}
    config = json.loads(metadata["config"])
    if metadata["kind"] == ANY_VIEW:
        # The view is the space's, not the file's.
        weights |= {key: torch.tensor(config[key]) for key in ("factors", "bias")}
    # Without memory: the file's own tensors become the weights, and no size is taken at its word.
    with torch.device("meta"):
        net = make_net(metadata["kind"], _config(config, len(weights)))
    fuse(net)
    net.load_state_dict(weights, assign=True)
    net.eval().requires_grad_(False)
    net.to(memory_format=torch.channels_last)
    prompts = json.loads(metadata["prompts"])
    stored = dict(zip(prompts, tensors["text.prompts"].numpy(), strict=True))
    names = json.loads(metadata["class_names"])
    return NanoEncoder(
        net,
        ClassText(tensors["text.table"].numpy(), stored, names),
        name=metadata["name"],
        sha256=sha256,
        space=metadata["space"],
        card=metadata["card"],
        class_names=names,
        needs_scaled=metadata.get("scaled", "yes") == "yes",
    )


def _config(config: dict[str, Any], tensors: int) -> dict[str, Any]:
    """Sizes that a file of so many tensors can have. Raises ValueError for others."""
    for key, value in config.items():
        limit = tensors if key == "depth" else MAX_SIZE
        if key not in ("factors", "bias") and not (type(value) is int and 0 < value <= limit):
            raise ValueError(f"{key} must be a whole number from 1 to {limit}, got {value!r:.40}")
    return config


def make_net(kind: str, config: dict[str, Any]) -> NanoNet | RgbViewNet:
    """The network that a model file's `kind` and `config` describe, with fresh weights."""
    kinds: dict[str, type[NanoNet] | type[RgbViewNet]] = {
        "adapter": NanoNet,
        "rgb": RgbViewNet,
        ANY_VIEW: RgbViewNet,
    }
    if kind not in kinds:
        raise ModelError(f"unknown nano network {kind!r}; known are {', '.join(kinds)}")
    return kinds[kind](**config)


def save_nano(
    path: str | Path,
    net: NanoNet | RgbViewNet,
    *,
    kind: str,
    config: dict[str, Any],
    name: str,
    space: str,
    card: str,
    class_names: Sequence[str],
    table: Tensor,
    prompts: Sequence[str],
) -> None:
    """Write a nano model: fused weights in float16, class table and stored prompts beside them.

    Args:
        net: a trained network; its batch norms are folded in a copy.
        space: that it reads; "" where `kind` is `ANY_VIEW`, and the view is left out.
        table: [2, 1000, 384], see ClassText.
        prompts: stored with the model, so that they need no sentence encoder.
    """
    import copy

    import safetensors.torch

    from latentguard.encoders.minilm import minilm

    fused = fuse(copy.deepcopy(net).eval())
    keys = list(dict.fromkeys(normalize(prompt) for prompt in prompts))
    weights = fused.state_dict()
    if kind == ANY_VIEW:
        weights = {k: v for k, v in weights.items() if k not in ("factors", "bias")}
        config = {k: v for k, v in config.items() if k not in ("factors", "bias")}
    tensors = {f"net.{k}": v.half().contiguous() for k, v in weights.items()}
    tensors["text.table"] = table.half().contiguous()
    placed = similarities(minilm().encode(keys).numpy(), table.float().numpy())
    tensors["text.prompts"] = torch.from_numpy(placed).half().contiguous()
    metadata = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "config": json.dumps(config),
        "name": name,
        "space": space,
        "card": card,
        "class_names": json.dumps(list(class_names)),
        "prompts": json.dumps(keys),
    }
    with replacing(path) as file:
        file.write(safetensors.torch.save(tensors, metadata))
