"""Training a nano student on a cache of photos: two recipes, one loop.

adapter: first the adapter alone, by regressing the teacher's features at 1/8 resolution; then the
    whole network gently, on those features, the teacher's head map and its class posterior.
rgb: the whole pixel network, on the RGB view of a latent instead of the image (its head map
    averaged, and its class posterior), for spaces whose autoencoder is not at hand.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from latentguard.adapt.cache import Cache
from latentguard.adapt.progress import Progress
from latentguard.adapt.teacher import teacher_weights
from latentguard.encoders.lite import fuse
from latentguard.encoders.nano_net import NanoNet, RgbViewNet
from latentguard.errors import ModelError

VALIDATION = 192
"""Photos of the cache, at most, that are never trained on: the curve that shows overfitting."""

CHECKPOINT_SECONDS = 120.0
VALIDATE_EVERY = 50


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train. Passes are images seen; docs/nano.md tells how the
    bundled weights were made, which differs a little from these defaults."""

    adapter_passes: int = 22_400
    joint_passes: int = 4_800
    batch_size: int = 32
    adapter_lr: float = 2.5e-3
    joint_adapter_lr: float = 3e-4
    trunk_lr: float = 2e-5
    noise: float = 0.15
    noise_share: float = 0.3
    view_noise: float = 0.05
    view_cells: tuple[int, ...] = (64, 128)
    view_passes: int = 6_400
    view_lr: float = 1.2e-4
    seed: int = 0


@dataclass
class Stage:
    """One stretch of training: which parameters, which loss, how many passes."""

    name: str
    groups: list[dict[str, Any]]
    passes: int
    loss: Callable[[nn.Module, NDArray[np.intp], bool], Tensor]
    rows: int


class AdapterRecipe:
    """Stages for NanoNet; see the module's text."""

    def __init__(self, cache: Cache, recipe: Recipe, config: dict[str, Any]) -> None:
        if cache.latents is None:
            raise ModelError("this cache holds no latents: it was prepared without an autoencoder")
        self.cache, self.recipe = cache, recipe
        self.net = NanoNet(**config)
        trunk = {k[6:]: v for k, v in teacher_weights().items() if k.startswith("trunk.")}
        self.net.trunk.load_state_dict(trunk)
        fuse(self.net.trunk)
        sample = np.arange(min(512, cache.meta.done))
        latents, entries = cache.batch("latents", sample), cache.batch("entries", sample)
        self.net.adapter.mean.copy_(_per_channel(latents.mean((0, 2, 3))))
        self.net.adapter.std.copy_(_per_channel(latents.std((0, 2, 3))))
        self.entry_mean = _per_channel(entries.mean((0, 2, 3)))
        self.entry_std = _per_channel(entries.std((0, 2, 3)))
        self.head_std = _per_channel(_scale(cache.batch("heads", sample[:128]).std((0, 2, 3))))

    def stages(self) -> list[Stage]:
        # The halving is fitted (halving.py), not trained.
        adapter = [p for p in self.net.adapter.parameters() if p.requires_grad]
        # The depthwise kernels stay: their weight gradients cost as much as everything else.
        trunk = [
            p for n, p in self.net.trunk.named_parameters() if "depthwise.conv.weight" not in n
        ]
        r = self.recipe
        groups = [
            {"params": adapter, "lr": r.joint_adapter_lr},
            {"params": trunk, "lr": r.trunk_lr},
        ]
        first = [{"params": adapter, "lr": r.adapter_lr}]
        done = self.cache.meta.done
        return [
            Stage("adapter", first, r.adapter_passes, self.entry, done),
            Stage("joint", groups, r.joint_passes, self.joint, done),
        ]

    def _latents(self, rows: NDArray[np.intp], noisy: bool) -> Tensor:
        x = self.cache.batch("latents", rows)
        if noisy:
            level = torch.rand(len(x), 1, 1, 1) * self.recipe.noise
            x = x + level * (
                torch.rand(len(x), 1, 1, 1) < self.recipe.noise_share
            ) * torch.randn_like(x)
        return x.contiguous(memory_format=torch.channels_last)

    def _entry_error(self, found: Tensor, rows: NDArray[np.intp]) -> Tensor:
        wanted = self.cache.batch("entries", rows)
        return ((found - wanted) / self.entry_std).square().mean()

    def entry(self, net: nn.Module, rows: NDArray[np.intp], training: bool) -> Tensor:
        """Mean squared error of the features at 1/8 resolution, in standard deviations."""
        assert isinstance(net, NanoNet)
        return self._entry_error(net.adapter(self._latents(rows, training)), rows)

    def joint(self, net: nn.Module, rows: NDArray[np.intp], training: bool) -> Tensor:
        """KL divergence from the teacher's posterior, plus both regressions."""
        assert isinstance(net, NanoNet)
        entry = net.adapter(self._latents(rows, training))
        head = net.trunk.feature_map(entry)
        wanted = self.cache.batch("heads", rows)
        regression = ((head - wanted) / self.head_std).square().mean()
        distance = divergence(net, head, wanted)
        return distance + regression + 0.25 * self._entry_error(entry, rows)


class RgbRecipe:
    """The one stage for RgbViewNet; see the module's text."""

    def __init__(self, cache: Cache, recipe: Recipe, config: dict[str, Any]) -> None:
        self.cache, self.recipe = cache, recipe
        self.net = RgbViewNet(**config)
        # What the teacher has not (the view, a filter) stays as it is made.
        self.net.load_state_dict(self.net.state_dict() | teacher_weights())
        fuse(self.net)
        sample = cache.batch("heads", np.arange(min(128, cache.meta.done)))
        self.pooled_std = _scale(sample.mean((2, 3)).std(0))

    def stages(self) -> list[Stage]:
        trained = [p for n, p in self.net.named_parameters() if "depthwise.conv.weight" not in n]
        group = {"params": trained, "lr": self.recipe.trunk_lr}
        return [Stage("joint", [group], self.recipe.joint_passes, self.joint, self.cache.meta.done)]

    def joint(self, net: nn.Module, rows: NDArray[np.intp], training: bool) -> Tensor:
        """KL divergence from the teacher's posterior, plus the averaged head map's error."""
        assert isinstance(net, RgbViewNet)
        pixels = self.cache.batch("crops", rows).permute(0, 3, 1, 2) / 255
        cells = self.recipe.view_cells
        size = cells[int(torch.randint(len(cells), ()))] if training else cells[0]
        view = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
        level = torch.rand(len(view), 1, 1, 1) * 2 if training else torch.ones(len(view), 1, 1, 1)
        view = view + self.recipe.view_noise * level * torch.randn_like(view)
        head = net.from_view(view.contiguous(memory_format=torch.channels_last))
        wanted = self.cache.batch("heads", rows)
        error = (head.mean((2, 3)) - wanted.mean((2, 3))) / self.pooled_std
        return divergence(net, head, wanted) + error.square().mean()


def _scale(std: Tensor) -> Tensor:
    """Deviations to divide errors by: a channel that is rarely active must not dominate."""
    return std.clamp_min(0.3 * float(std.mean()))


def _per_channel(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


def divergence(net: NanoNet | RgbViewNet, head: Tensor, wanted: Tensor) -> Tensor:
    """KL(teacher || student); the teacher's classifier is the student's start, kept in `wanted`."""
    found = torch.log_softmax(net.trunk.classifier(head.mean((2, 3))), 1)
    target = torch.log_softmax(F.linear(wanted.mean((2, 3)), *_teacher_classifier()), 1)
    return F.kl_div(found, target, reduction="batchmean", log_target=True)


_classifier: list[tuple[Tensor, Tensor]] = []


def _teacher_classifier() -> tuple[Tensor, Tensor]:
    if not _classifier:
        state = teacher_weights()
        _classifier.append((state["trunk.classifier.weight"], state["trunk.classifier.bias"]))
    return _classifier[0]


class Trainer:
    """Runs a recipe's stages in order; stops and goes on at any point.

    checkpoint: file that holds everything needed to go on. Averaged weights (decay 0.995 to 0.999)
    are what `result` returns. `history` has one dict per validation.
    """

    def __init__(self, work: AdapterRecipe | RgbRecipe, checkpoint: Path) -> None:
        self.work = work
        self.checkpoint = checkpoint
        self.net: nn.Module = work.net.to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.net).eval()
        self.history: list[dict[str, Any]] = []

    def run(self) -> nn.Module:
        """Train to the end and return the averaged network."""
        torch.manual_seed(self.work.recipe.seed)
        saved = self._load()
        for number, stage in enumerate(self.work.stages()):
            if saved is not None and saved["stage"] > number:
                continue
            resume = saved if saved is not None and saved["stage"] == number else None
            self._stage(number, stage, resume)
            # The next stage starts from the averaged weights.
            self.net.load_state_dict(self.average.state_dict())
            self._save(number + 1, 0, None, None)
        return self.average

    def _stage(self, number: int, stage: Stage, resume: dict[str, Any] | None) -> None:
        size = self.work.recipe.batch_size
        steps = stage.passes // size
        if steps == 0:
            return
        optimizer = torch.optim.AdamW(stage.groups, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in stage.groups], total_steps=steps + 1, pct_start=0.1
        )
        start = 0
        if resume is not None and resume["step"] > 0:
            start = resume["step"]
            optimizer.load_state_dict(resume["optimizer"])
            schedule.load_state_dict(resume["schedule"])
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        rows = _batches(
            stage.rows, held_rows(stage.rows), size, self.work.recipe.seed + number, start
        )
        self.net.train()
        saved_at = time.monotonic()
        with Progress(f"training {stage.name}", steps * size, start * size) as progress:
            for step in range(start, steps):
                loss = stage.loss(self.net, next(rows), True)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(trained, 5.0)
                optimizer.step()
                schedule.step()
                self._update_average(step)
                note = f"loss {loss.item():.3f}"
                if step % VALIDATE_EVERY == 0 or step == steps - 1:
                    validation = self._validate(stage)
                    entry = {"stage": stage.name, "passes": (step + 1) * size}
                    self.history.append({**entry, "loss": loss.item(), "validation": validation})
                    note += f", validation {validation:.3f}"
                progress.advance(size, note)
                if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                    self._save(number, step + 1, optimizer, schedule)
                    saved_at = time.monotonic()

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        decay = min(0.997, (1 + step) / (10 + step))
        pairs = zip(self.average.state_dict().values(), self.net.state_dict().values(), strict=True)
        for kept, new in pairs:
            if kept.dtype.is_floating_point:
                kept.lerp_(new, 1 - decay)
            else:
                kept.copy_(new)

    @torch.no_grad()
    def _validate(self, stage: Stage) -> float:
        rows = np.arange(held_rows(stage.rows))
        parts = np.array_split(rows, max(1, len(rows) // 32))
        losses = [stage.loss(self.average, part, False).item() for part in parts]
        return float(np.mean(losses))

    def _save(self, stage: int, step: int, optimizer: Any, schedule: Any) -> None:
        state = {
            "stage": stage,
            "step": step,
            "net": self.net.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": optimizer.state_dict() if optimizer else None,
            "schedule": schedule.state_dict() if schedule else None,
            "history": self.history,
        }
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.checkpoint)

    def _load(self) -> dict[str, Any] | None:
        if not self.checkpoint.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
            self.net.load_state_dict(state["net"])
            self.average.load_state_dict(state["average"])
        except (KeyError, RuntimeError) as error:
            raise ModelError(
                f"{self.checkpoint}: not a checkpoint of this recipe ({error}); "
                "give another --out or delete it"
            ) from error
        self.history = state["history"]
        return state


def held_rows(rows: int) -> int:
    """How many of the first rows are for validation only: at most an eighth."""
    return min(VALIDATION, max(1, rows // 8))


def _batches(count: int, held: int, size: int, seed: int, skip: int) -> Iterator[NDArray[np.intp]]:
    """Batches of shuffled rows without end, all but the first `held`; `skip` are passed over."""
    if count - held < size:
        raise ModelError(
            f"{count} photos are too few to train on in batches of {size}: give at least "
            f"{size * 8 // 7 + 1}"
        )
    rng = np.random.default_rng(seed)
    rest: NDArray[np.intp] = np.empty(0, np.intp)
    number = 0
    while True:
        while len(rest) < size:
            rest = np.concatenate([rest, held + rng.permutation(count - held)])
        if number >= skip:
            yield rest[:size]
        rest = rest[size:]
        number += 1
