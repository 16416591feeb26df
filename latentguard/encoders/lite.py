"""EfficientNet-Lite2 (Tan and Le 2019, arXiv 1905.11946; no squeeze-excitation, ReLU6).

Two uses: whole, as the pixel-space teacher (latentguard.adapt), and from block 5 on, as the trunk
of the nano encoders, which enter it at 1/8 resolution with a latent instead of an image.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

# (repeats, kernel, stride, expansion, output channels) of Lite2: width 1.1, depth 1.2 of B0,
# with the first stage and the head left unscaled.
STAGES = (
    (1, 3, 1, 1, 16),
    (3, 3, 2, 6, 24),
    (3, 5, 2, 6, 48),
    (4, 3, 2, 6, 88),
    (4, 5, 1, 6, 120),
    (5, 5, 2, 6, 208),
    (1, 3, 1, 6, 352),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
CLASSES = 1000
BATCH_NORM_EPS = 1e-3

# The first block whose output is at 1/8 resolution; what follows it is the trunk.
ENTRY_BLOCK = 4
ENTRY_CHANNELS = 48


class ConvBN(nn.Sequential):
    """Convolution without bias, batch norm, optionally ReLU6. `fuse` folds the norm away."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
    ) -> None:
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        total = kernel - stride if stride > 1 else kernel - 1
        before = total // 2
        if stride > 1:
            # TensorFlow's "same" padding for even sizes: one more at the end than at the start.
            modules["pad"] = nn.ZeroPad2d((before, total - before, before, total - before))
            before = 0
        modules["conv"] = nn.Conv2d(
            inputs, outputs, kernel, stride, padding=before, groups=groups, bias=False
        )
        modules["bn"] = nn.BatchNorm2d(outputs, eps=BATCH_NORM_EPS, momentum=0.01)
        if act:
            modules["act"] = nn.ReLU6(inplace=True)
        super().__init__(modules)


class MBConv(nn.Module):
    """Inverted residual block: expand 1x1, depthwise, project 1x1, skip where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = ConvBN(inputs, hidden, 1) if expansion != 1 else nn.Identity()
        self.depthwise = ConvBN(hidden, hidden, kernel, stride, groups=hidden)
        self.project = ConvBN(hidden, outputs, 1, act=False)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.skip else y


def make_blocks() -> list[MBConv]:
    """All 21 blocks in order."""
    blocks, channels = [], STEM_CHANNELS
    for repeats, kernel, stride, expansion, outputs in STAGES:
        for i in range(repeats):
            blocks.append(MBConv(channels, outputs, kernel, stride if i == 0 else 1, expansion))
            channels = outputs
    return blocks


class LiteTrunk(nn.Module):
    """Blocks 5 to 20, head and classifier: [B, 48, h, w] at 1/8 resolution -> class logits."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*make_blocks()[ENTRY_BLOCK + 1 :])
        self.head = ConvBN(STAGES[-1][-1], HEAD_CHANNELS, 1)
        self.classifier = nn.Linear(HEAD_CHANNELS, CLASSES)

    def feature_map(self, x: Tensor) -> Tensor:
        """[B, 48, h, w] -> [B, 1280, ceil(h / 4), ceil(w / 4)], before pooling."""
        y: Tensor = self.head(self.blocks(x))
        return y

    def forward(self, x: Tensor) -> Tensor:
        """[B, 48, h, w] -> logits [B, 1000]."""
        y: Tensor = self.classifier(self.feature_map(x).mean((2, 3)))
        return y


class LiteStem(nn.Module):
    """Stem and blocks 0 to 4: normalized RGB [B, 3, H, W] -> [B, 48, H / 8, W / 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = ConvBN(3, STEM_CHANNELS, 3, 2)
        self.blocks = nn.Sequential(*make_blocks()[: ENTRY_BLOCK + 1])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(self.conv(x))
        return y


class Lite2(nn.Module):
    """The whole network, for RGB [B, 3, H, W] in [0, 1]; H and W multiples of 32, best 256."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = LiteStem()
        self.trunk = LiteTrunk()

    @staticmethod
    def normalize(images: Tensor) -> Tensor:
        """[0, 1] -> the input range that the weights were trained with."""
        mean = images.new_tensor(MEAN).view(3, 1, 1)
        std = images.new_tensor(STD).view(3, 1, 1)
        return (images - mean) / std

    def forward(self, images: Tensor) -> Tensor:
        """RGB [B, 3, H, W] in [0, 1] -> logits [B, 1000]."""
        y: Tensor = self.trunk(self.stem(self.normalize(images)))
        return y


# The published weights expect (value - 127) / 128 on 0..255.
MEAN = (127 / 255, 127 / 255, 127 / 255)
STD = (128 / 255, 128 / 255, 128 / 255)


def convert_package_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of efficientnet_lite_pytorch's checkpoint to those of Lite2."""
    layers = {
        "_expand_conv": "expand.conv",
        "_bn0": "expand.bn",
        "_depthwise_conv": "depthwise.conv",
        "_bn1": "depthwise.bn",
        "_project_conv": "project.conv",
        "_bn2": "project.bn",
    }
    top = {
        "_conv_stem": "stem.conv.conv",
        "_bn0": "stem.conv.bn",
        "_conv_head": "trunk.head.conv",
        "_bn1": "trunk.head.bn",
        "_fc": "trunk.classifier",
    }
    converted = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "_blocks":
            number = int(parts[1])
            where = (
                f"stem.blocks.{number}"
                if number <= ENTRY_BLOCK
                else f"trunk.blocks.{number - ENTRY_BLOCK - 1}"
            )
            name = f"{where}.{layers[parts[2]]}.{'.'.join(parts[3:])}"
        else:
            name = f"{top[parts[0]]}.{'.'.join(parts[1:])}"
        converted[name] = value
    return converted


@torch.no_grad()
def fuse(module: nn.Module) -> nn.Module:
    """Fold every batch norm into the convolution before it (in place); for inference only.

    Weights without memory, on the meta device, stay so and get the shapes alone.
    """
    for child in module.modules():
        if isinstance(child, nn.Sequential) and hasattr(child, "bn") and hasattr(child, "conv"):
            conv, bn = child.conv, child.bn
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(bn, nn.BatchNorm2d)
            assert bn.running_mean is not None
            assert bn.running_var is not None
            del child.bn
            if conv.weight.is_meta:
                # Arithmetic there would import PyTorch's compiler: 140 MB, and a second or two.
                if conv.bias is None:
                    conv.bias = nn.Parameter(torch.empty(conv.out_channels, device="meta"))
                continue
            gain = bn.weight / torch.sqrt(bn.running_var + bn.eps)
            conv.weight.mul_(gain.view(-1, 1, 1, 1))
            bias = bn.bias - bn.running_mean * gain
            if conv.bias is None:
                conv.bias = nn.Parameter(bias.clone())
            else:
                conv.bias.mul_(gain).add_(bias)
    return module
