"""Small autoencoders of our own: latent spaces to train a view reader on, made in minutes each.

A reader of linear RGB views has to hold on the views of spaces that nobody trained it on. Their
errors are no white noise: texture and edges leak into the three numbers, in a way that is each
encoder's own. So several KL-regularized autoencoders at 1/8 resolution are trained, which differ
in seed, width, activation, norm, channels and loss, and a linear view is fitted to each as the
published ones were: least squares from latents to the picture averaged down to the latent's grid.
They are a tool for training and are not shipped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from latentguard.adapt.progress import Progress
from latentguard.adapt.teacher import Teacher
from latentguard.encode.pictures import open_picture
from latentguard.encoders.lite import Lite2
from latentguard.errors import ModelError

FACTOR = 8
CHECKPOINT_SECONDS = 60.0
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}


@dataclass(frozen=True)
class Design:
    """What one autoencoder is and how it is trained.

    channels: of its latents. width: of its first stage (the next two have twice that, the last
    three times). kl: weight of the latents' KL divergence from a standard normal, per number.
    perceptual: weight of the error of the teacher's features. crop: pixels per side.
    """

    name: str
    channels: int
    width: int
    activation: str
    norm: bool
    kl: float
    perceptual: float
    seed: int
    crop: int = 96
    batch: int = 4
    steps: int = 450
    lr: float = 2e-3


DESIGNS = (
    Design("a", 4, 24, "silu", True, 1e-4, 0.3, seed=1, steps=900),
    Design("b", 4, 16, "relu", False, 1e-3, 0.0, seed=2, crop=128),
    Design("c", 16, 24, "silu", True, 1e-4, 0.3, seed=3),
)
"""To train a reader on. Four and sixteen channels, as SDXL's and FLUX.1's autoencoders have."""

HELD_OUT = (
    Design("d", 4, 20, "gelu", True, 3e-4, 0.0, seed=4),
    Design("e", 16, 20, "relu", False, 1e-3, 0.3, seed=5, crop=128),
)
"""To measure a reader on (benchmarks/views.py): in no training."""


class _Residual(nn.Module):
    def __init__(self, width: int, activation: str, norm: bool) -> None:
        super().__init__()
        act = ACTIVATIONS[activation]
        before = [nn.GroupNorm(4, width)] if norm else []
        self.layers = nn.Sequential(
            *before, act(), nn.Conv2d(width, width, 3, padding=1), act(), _last(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y


def _last(width: int) -> nn.Conv2d:
    """A block's last convolution, which starts near zero."""
    conv = nn.Conv2d(width, width, 3, padding=1)
    with torch.no_grad():
        conv.weight.mul_(0.3)
    return conv


class SmallAutoencoder(nn.Module):
    """RGB [B, 3, H, W] in [0, 1] <-> latents [B, C, H/8, W/8] with a Gaussian bottleneck."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        w, act, norm = design.width, design.activation, design.norm
        widths = (w, 2 * w, 3 * w)
        down: list[nn.Module] = []
        inputs = 3
        for number, width in enumerate(widths):
            down.append(nn.Conv2d(inputs, width, 4, 2, padding=1))
            down += [_Residual(width, act, norm) for _ in range(2 if number == 2 else 1)]
            inputs = width
        self.encoder = nn.Sequential(*down, nn.Conv2d(inputs, 2 * design.channels, 1))
        up: list[nn.Module] = [nn.Conv2d(design.channels, widths[-1], 3, padding=1)]
        for number, width in enumerate(reversed(widths)):
            up += [_Residual(width, act, norm) for _ in range(2 if number == 0 else 1)]
            after = widths[1 - number] if number < 2 else 3
            up += [nn.Conv2d(width, 4 * after, 3, padding=1), nn.PixelShuffle(2)]
        self.decoder = nn.Sequential(*up)

    def distribution(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the latents, [B, C, H/8, W/8] each."""
        mean, log_variance = self.encoder(images * 2 - 1).chunk(2, 1)
        return mean, log_variance.clamp(-20, 10)

    def encode(self, images: Tensor) -> Tensor:
        """The latents' mean."""
        return self.distribution(images)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """RGB in about [0, 1]."""
        y: Tensor = self.decoder(latents)
        return y * 0.5 + 0.5


def train_autoencoder(
    design: Design, photos: Sequence[Path], teacher: Teacher, checkpoint: Path
) -> SmallAutoencoder:
    """Train one autoencoder on random crops; an interrupted run goes on at `checkpoint`.

    Raises ModelError where the checkpoint is of another design.
    """
    torch.manual_seed(design.seed)
    net = SmallAutoencoder(design).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=design.lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, design.lr, total_steps=design.steps + 1, pct_start=0.05
    )
    start = _resume(design, checkpoint, net, optimizer, schedule)
    saved_at = time.monotonic()
    title = f"training autoencoder {design.name}"
    with Progress(title, design.steps, start) as progress:
        for step in range(start, design.steps):
            images = _crops(photos, design, step)
            # Half precision saves a third of the time; what is learned is no different.
            with torch.autocast("cpu", torch.bfloat16):
                loss, error = _loss(net, images, design, teacher)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            decibels = -10 * float(np.log10(max(error, 1e-9)))
            progress.advance(1, f"loss {loss.item():.4f}, {decibels:.1f} dB")
            if step + 1 == design.steps or time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                _save(design, checkpoint, step + 1, net, optimizer, schedule)
                saved_at = time.monotonic()
    return net.eval().requires_grad_(False)


def _crops(photos: Sequence[Path], design: Design, step: int) -> Tensor:
    """Float [B, 3, crop, crop]: windows of photos, as they are to three times magnified."""
    from PIL import Image

    rng = np.random.default_rng((design.seed, step))
    made = []
    for index in rng.integers(len(photos), size=design.batch):
        image = open_picture(photos[index])
        side = min(design.crop / rng.uniform(1, 3), *image.size)
        x, y = (rng.uniform(0, length - side) for length in image.size)
        window = image.resize(
            (design.crop, design.crop), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side)
        )
        pixels = np.asarray(window)
        made.append(pixels[:, ::-1] if rng.random() < 0.5 else pixels)
    batch = torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float() / 255
    return batch.contiguous(memory_format=torch.channels_last)


def _loss(
    net: SmallAutoencoder, images: Tensor, design: Design, teacher: Teacher
) -> tuple[Tensor, float]:
    mean, log_variance = net.distribution(images)
    found = net.decode(mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean))
    loss = (found - images).abs().mean()
    loss = loss + design.kl * 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    if design.perceptual:
        stem = teacher.net.stem
        with torch.no_grad():
            wanted = stem(Lite2.normalize(images))
        distance = (stem(Lite2.normalize(found)) - wanted).abs().mean() / wanted.abs().mean()
        loss = loss + 0.1 * design.perceptual * distance
    return loss, float((found.detach() - images).square().mean())


def _resume(design: Design, checkpoint: Path, net: nn.Module, optimizer: Any, schedule: Any) -> int:
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    if state["design"] != asdict(design):
        raise ModelError(f"{checkpoint}: of another design of autoencoder; delete it")
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return int(state["step"])


def _save(
    design: Design, checkpoint: Path, step: int, net: nn.Module, optimizer: Any, schedule: Any
) -> None:
    state = {
        "design": asdict(design),
        "step": step,
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
    }
    temporary = checkpoint.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(checkpoint)


@dataclass(frozen=True)
class LinearView:
    """factors [C, 3] and bias [3] from latents to RGB in about [-1, 1]; r2: share explained."""

    factors: NDArray[np.float64]
    bias: NDArray[np.float64]
    r2: float


def fit_view(latents: Tensor, pictures: Tensor) -> LinearView:
    """Least squares from latents [N, C, h, w] to pictures [N, 3, h, w] in [0, 1]."""
    x = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).double()
    y = pictures.permute(0, 2, 3, 1).reshape(-1, 3).double() * 2 - 1
    design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    solution = torch.linalg.lstsq(design, y).solution
    rest = (y - design @ solution).square().sum() / (y - y.mean(0)).square().sum()
    return LinearView(solution[:-1].numpy(), solution[-1].numpy(), 1 - float(rest))


def averaged_down(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 3, H/8, W/8], the perfect view."""
    return F.avg_pool2d(images, FACTOR)
