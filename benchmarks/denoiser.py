"""A small learned denoiser of 32 x 32 flux2 latents, for the bounds of early detection.

    python benchmarks/denoiser.py LATENTS... --output denoiser.pt --minutes 12

It starts from the Wiener estimate and adds what a small U-Net of 2x2 patches (3.6 M parameters)
knows beyond second-order statistics:

    x0 = W + e(r) F(W, y / sqrt(1 + r^2), log r),   y = x0 + r noise

with e(r) the Wiener estimate's own root mean squared error, so that F's target has unit variance
at every noise level, as EDM's preconditioning has it (Karras et al. 2022). Trained on photos that
no figure is measured on; averaged weights are saved.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentguard.evaluate.estimates import Wiener

RANGE = (0.05, 25.0)
"""Noise-to-signal ratios that it is trained on, evenly in the logarithm."""


class Block(nn.Module):
    """Two 3x3 convolutions with the noise level as scale and shift between them."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * width)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.film(level)[..., None, None].chunk(2, 1)
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.norm2(y) * (1 + scale) + shift
        return x + self.conv2(F.silu(y))


class Net(nn.Module):
    """F: [B, 64, 32, 32] and log r [B] -> [B, 32, 32, 32]."""

    def __init__(self, widths: tuple[int, int, int] = (128, 160, 192)) -> None:
        super().__init__()
        a, b, c = widths
        self.level = nn.Sequential(nn.Linear(32, 128), nn.SiLU())
        self.enter = nn.Conv2d(256, a, 1)
        self.down1 = nn.ModuleList([Block(a, 128)])
        self.to_b = nn.Conv2d(a, b, 2, 2)
        self.down2 = nn.ModuleList([Block(b, 128)])
        self.to_c = nn.Conv2d(b, c, 2, 2)
        self.middle = nn.ModuleList([Block(c, 128), Block(c, 128)])
        self.from_c = nn.Conv2d(c, 4 * b, 1)
        self.up2 = nn.ModuleList([Block(b, 128)])
        self.from_b = nn.Conv2d(b, 4 * a, 1)
        self.up1 = nn.ModuleList([Block(a, 128)])
        self.leave = nn.Conv2d(a, 128, 1)
        nn.init.zeros_(self.leave.weight)
        self.register_buffer("frequency", torch.linspace(0, 8, 16).exp2() / 8)

    def forward(self, x: Tensor, log_ratio: Tensor) -> Tensor:
        angle = log_ratio[:, None] * self.frequency
        level = self.level(torch.cat([angle.sin(), angle.cos()], 1))
        x = self.enter(F.pixel_unshuffle(x, 2))
        for block in self.down1:
            x = block(x, level)
        y = self.to_b(x)
        for block in self.down2:
            y = block(y, level)
        z = self.to_c(y)
        for block in self.middle:
            z = block(z, level)
        y = y + F.pixel_shuffle(self.from_c(z), 2)
        for block in self.up2:
            y = block(y, level)
        x = x + F.pixel_shuffle(self.from_b(y), 2)
        for block in self.up1:
            x = block(x, level)
        return F.pixel_shuffle(self.leave(x), 2)


class Learned:
    """The trained denoiser; called as `estimates.Denoise`."""

    def __init__(self, net: Net, wiener: Wiener) -> None:
        self.net, self.wiener = net, wiener

    @torch.inference_mode()
    def __call__(self, noisy: Tensor, noise_level: float) -> Tensor:
        if noise_level <= 0:
            return noisy
        first = self.wiener(noisy, noise_level)
        size = math.sqrt(self.wiener.expected_error(noise_level))
        level = torch.full((len(noisy),), math.log(noise_level))
        scaled = noisy / math.hypot(1, noise_level)
        return first + size * self.net(torch.cat([first, scaled], 1), level)


def save(path: Path, net: Net, wiener: Wiener) -> None:
    parts = {"mean": wiener.mean, "power": wiener.power, "basis": torch.view_as_real(wiener.basis)}
    torch.save({"net": net.state_dict(), "wiener": parts}, path)


def load(path: Path) -> Learned:
    """The denoiser that `main` wrote."""
    state = torch.load(path, weights_only=True)
    net = Net()
    net.load_state_dict(state["net"])
    parts = state["wiener"]
    basis = torch.view_as_complex(parts["basis"])
    return Learned(net.eval(), Wiener(parts["mean"], parts["power"], basis))


def read(paths: list[Path]) -> Tensor:
    """float16 [N, 32, 32, 32] of .npy arrays and latents files; rows of zeros are left out."""
    from latentguard.files import load_latents

    found = []
    for path in paths:
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            kept = np.flatnonzero([row[0].any() for row in array])
            found.append(torch.from_numpy(array[kept]))
        else:
            found.append(load_latents(path).tensor.half())
    return torch.cat(found)


def train(photos: Tensor, minutes: float, batch: int, peak: float) -> tuple[Net, Wiener]:
    torch.manual_seed(0)
    wiener = Wiener.fit(photos)
    low, high = map(math.log, RANGE)
    # e(r) on a grid: asking for each batch would cost more than the network.
    grid = torch.linspace(low, high, 200)
    sizes = torch.tensor([wiener.expected_error(math.exp(v)) for v in grid.tolist()]).sqrt()
    net = Net().to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters", file=sys.stderr)
    average = copy.deepcopy(net).eval()
    optimizer = torch.optim.AdamW(net.parameters(), peak, betas=(0.9, 0.99), weight_decay=0.01)
    rng = torch.Generator().manual_seed(1)
    start = time.process_time()
    step, running = 0, 1.0
    while (done := (time.process_time() - start) / (60 * minutes)) < 1:
        rate = peak * min(1, step / 100) * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-6
        for group in optimizer.param_groups:
            group["lr"] = rate
        clean = photos[torch.randint(len(photos), (batch,), generator=rng)].float()
        # One noise level for four images: the Wiener filter is then one product.
        noisy, firsts, logs = [], [], []
        for part in clean.split(4):
            log = low + (high - low) * float(torch.rand((), generator=rng))
            y = part + math.exp(log) * torch.randn(part.shape, generator=rng)
            firsts.append(wiener(y, math.exp(log)))
            noisy.append(y / math.hypot(1, math.exp(log)))
            logs += [log] * len(part)
        first, level = torch.cat(firsts), torch.tensor(logs)
        size = sizes[((level - low) / (high - low) * 199).round().long()].view(-1, 1, 1, 1)
        inputs = torch.cat([first, torch.cat(noisy)], 1).contiguous(
            memory_format=torch.channels_last
        )
        loss = (net(inputs, level) - (clean - first) / size).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.995, step / (step + 10))
        with torch.no_grad():
            for mine, theirs in zip(average.parameters(), net.parameters(), strict=True):
                mine.lerp_(theirs, 1 - decay)
        running += (loss.item() - running) * 0.02
        if step % 25 == 0:
            seen = step * batch
            print(f"{done:6.1%} step {step} images {seen} loss {running:.4f}", file=sys.stderr)
    return average, wiener


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("latents", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=12, help="of CPU time")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    photos = read(arguments.latents)
    print(f"{len(photos)} photos", file=sys.stderr)
    net, wiener = train(photos, arguments.minutes, arguments.batch, arguments.rate)
    save(arguments.output, net, wiener)


if __name__ == "__main__":
    main()
