"""nano-view on views of real latents that it never saw, beside perfect views and the pixel teacher.

    python benchmarks/views.py PHOTOS --names names.txt --labels labels.txt --caltech CALTECH101 \\
        --autoencoder taef2_encoder.pth --factors rgb_factors.json --cache DIR

Spaces: FLUX.2 by TAEF2 with the published factors (a file of ComfyUI's, see docs/nano.md; without
it those of this package), and the autoencoders of `adapt.small_autoencoders.HELD_OUT`, which are
trained here on --caltech without every fifth photo, with a view fitted to crops of them. None of
them is in the training of nano-view. A perfect view is the picture averaged down to one pixel per
cell: no latents have it.

Top-1 and top-5: PHOTOS, one of each of as many classes, largest centered square at 512 px, fewer of
them at 1024 px. Detection: the held-out revolvers and cannons of Caltech-101 against PHOTOS,
margins under the family policy; `matched` is the largest share of PHOTOS, of all concepts of the
policies that the model can judge by, at the shipped thresholds. Encoding is in bfloat16, which
changes a view by 0.002 of a range of 1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import readers
import torch
from detection import CLASSES, margins
from numpy.typing import NDArray
from torch import Tensor

from latentguard import Scorer
from latentguard.adapt.hold_out import held_out
from latentguard.adapt.images import center_crop, random_crop
from latentguard.adapt.progress import Progress
from latentguard.adapt.small_autoencoders import (
    HELD_OUT,
    averaged_down,
    fit_view,
    train_autoencoder,
)
from latentguard.adapt.teacher import load_teacher
from latentguard.encode.autoencoders import load_autoencoder
from latentguard.encode.folders import find_pictures
from latentguard.encoders.nano import NanoEncoder, embed_logits, load_nano
from latentguard.evaluate.metrics import ranks_of, separation, wilson
from latentguard.spaces import LatentSpace

POLICIES = ("default", "family", "weapons")
RESULTS = Path(__file__).parent / "results"
FIT_ON = 160
"""Training crops at 512 px that the view of an own autoencoder is fitted to."""


class Space:
    """One held-out space: how it encodes, and its linear view."""

    def __init__(self, name: str, encode: Any, factors: Tensor, bias: Tensor) -> None:
        self.name, self._encode = name, encode
        self._factors, self._bias = factors, bias

    def views(self, files: Sequence[Path], px: int, cache: Path) -> Tensor:
        """Views [N, 3, px/8, px/8] of pictures; kept in `cache`, an interrupted run goes on."""
        cache.mkdir(parents=True, exist_ok=True)
        made = []
        with Progress(f"{self.name} at {px} px", len(files)) as progress:
            for file in files:
                kept = cache / f"{self.name}-{px}-{file.parent.name}-{file.stem}.npy"
                if not kept.exists():
                    np.save(kept, self._view(picture(file, px)).half().numpy())
                made.append(torch.from_numpy(np.load(kept)).float())
                progress.advance(1)
        return torch.cat(made)

    def _view(self, image: Tensor) -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            latents = self._encode(image.contiguous(memory_format=torch.channels_last)).float()
        rgb = torch.einsum("bchw,cr->brhw", latents, self._factors)
        return (rgb + self._bias.view(1, 3, 1, 1)) * 0.5 + 0.5


def picture(file: Path, px: int) -> Tensor:
    """The largest centered square, [1, 3, px, px] in [0, 1]."""
    return readers.to_tensor(center_crop(file, px)[None])


def flux2(autoencoder: Path, factors: Path | None) -> Space:
    """FLUX.2 by TAEF2, seen through published factors."""
    space = LatentSpace.get("flux2")
    found: dict[str, Any] = {"rgb_factors": space.rgb_factors, "bias": space.rgb_bias}
    if factors is not None:
        found = next(v for v in json.loads(factors.read_text()) if v["space"] == "flux2")
    encoder = load_autoencoder(autoencoder)

    def encode(image: Tensor) -> Tensor:
        return encoder.encode(image).tensor

    return Space("flux2", encode, torch.tensor(found["rgb_factors"]), torch.tensor(found["bias"]))


def own(caltech: Path, cache: Path) -> list[Space]:
    """The held-out autoencoders of our own, trained where `cache` does not hold them."""
    photos = [file for file in find_pictures([caltech]) if not held_out(file, 5)]
    teacher = load_teacher()
    found = []
    for design in HELD_OUT:
        net = train_autoencoder(design, photos, teacher, cache / f"autoencoder-{design.name}.pt")
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        some = np.random.default_rng(0).choice(len(photos), FIT_ON, replace=False)
        latents, wanted = [], []
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for index in some:
                image = readers.to_tensor(random_crop(photos[index], int(index), 512)[None])
                latents.append(net.encode(image).float())
                wanted.append(averaged_down(image))
        view = fit_view(torch.cat(latents), torch.cat(wanted))
        factors, bias = torch.from_numpy(view.factors).float(), torch.from_numpy(view.bias).float()
        found.append(Space(f"own-{design.name}", net.encode, factors, bias))
    return found


def read(encoder: NanoEncoder, views: Tensor, title: str) -> Tensor:
    """Embeddings [N, 1008] of views."""
    net = encoder.net

    def one(batch: Tensor) -> Tensor:
        cells = net.from_view(batch.contiguous(memory_format=torch.channels_last))
        return embed_logits(net.trunk.classifier(cells.mean((2, 3))))

    return readers.in_batches(one, views, title)


def perfect(files: Sequence[Path], px: int) -> Tensor:
    """Perfect views [N, 3, px/8, px/8] of pictures."""
    return torch.cat([averaged_down(picture(file, px)) for file in files])


def row(
    name: str,
    embedded: Tensor,
    text: Tensor,
    labels: NDArray[np.intp],
    detected: NDArray[np.float32] | None,
    kinds: NDArray[Any] | None,
    ids: list[str],
) -> dict[str, Any]:
    """The figures of one reader at one size, with intervals of 95 %."""
    ranks = ranks_of((embedded @ text.T).numpy(), labels)
    values: dict[str, Any] = {"reader": name, "photos": len(ranks)}
    for key, limit in (("top1", 1), ("top5", 5)):
        found = wilson(int((ranks < limit).sum()), len(ranks))
        values |= {key: found.value, f"{key}_95": [found.low, found.high]}
    if detected is None or kinds is None:
        return values
    negative = detected[kinds == "photo"]
    for kind, concept in CLASSES.items():
        column = ids.index(concept)
        result = separation(detected[kinds == kind][:, column], negative[:, column])
        values[f"auroc_{kind}"] = result.auroc.value
        values[f"auroc_{kind}_95"] = [result.auroc.low, result.auroc.high]
        values[f"matched_{kind}"] = float((detected[kinds == kind][:, column] >= 0).mean())
    return values


def matched(
    scorers: dict[str, Scorer], embedded: Tensor, files: Sequence[Path]
) -> dict[str, list[str]]:
    """By `policy/concept`, the photos that meet its shipped threshold; others are left out."""
    found: dict[str, list[str]] = {}
    for policy, scorer in scorers.items():
        values = margins(scorer, embedded)
        for k, concept in enumerate(scorer.policy.concepts):
            names = [
                files[i].stem for i in np.flatnonzero(values[:, k] >= scorer.bound.threshold(k))
            ]
            if names:
                found[f"{policy}/{concept.id}"] = names
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--names", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--caltech", type=Path, required=True)
    parser.add_argument("--autoencoder", type=Path, required=True, help="taef2_encoder.pth")
    parser.add_argument("--factors", type=Path, help="published factors; else the package's own")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--model", default="nano-view", help="or a file of `latentguard adapt`")
    parser.add_argument("--count", type=int, nargs=2, default=(100, 60), help="at 512 and 1024 px")
    a = parser.parse_args()
    files = find_pictures([a.photos])
    labels = np.array([int(line) for line in a.labels.read_text().split()])
    encoder = load_nano(a.model, space="sdxl")
    text = encoder.encode_text([line.strip() for line in a.names.read_text().splitlines()])
    scorer = Scorer("family", encoder)
    ids = [concept.id for concept in scorer.policy.concepts]
    scorers = {name: Scorer(name, encoder) for name in POLICIES}
    spaces = [flux2(a.autoencoder, a.factors), *own(a.caltech, a.cache)]
    shown = [f for kind in CLASSES for f in find_pictures([a.caltech / kind]) if held_out(f, 5)]
    rows: list[dict[str, Any]] = []
    for px, count in zip((512, 1024), a.count, strict=True):
        some = np.linspace(0, len(files) - 1, min(count, len(files))).astype(int)
        chosen = [files[i] for i in some]
        # Detection at 512 px only: 1024 px of TAEF2 take four times as long.
        also = shown if px == 512 else []
        kinds = np.array(["photo"] * len(chosen) + [file.parent.name for file in also])
        pictures = np.stack([center_crop(file) for file in chosen + also])
        read_by = {"teacher, on pixels": readers.teacher(pictures)}
        read_by["perfect view"] = read(encoder, perfect(chosen + also, px), f"perfect {px}")
        for space in spaces:
            views = space.views(chosen + also, px, a.cache / "views")
            read_by[f"view of {space.name}"] = read(encoder, views, f"{space.name} {px}")
        for name, embedded in read_by.items():
            detected = margins(scorer, embedded) if also else None
            alone = embedded[: len(chosen)]
            figures = row(name, alone, text, labels[some], detected, kinds if also else None, ids)
            figures["matched"] = matched(scorers, alone, chosen)
            rows.append({"px": px, **figures})
    write(rows)


def write(rows: list[dict[str, Any]]) -> None:
    """The table as Markdown and JSON."""
    head = ["px", "read", "photos", "top-1 [95 %]", "top-5", "of the perfect view's top-1"]
    head += [f"AUROC of {kind}" for kind in CLASSES] + ["harmless matched, at most"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    ideal = {r["px"]: r["top1"] for r in rows if r["reader"] == "perfect view"}
    for r in rows:
        low, high = r["top1_95"]
        share = "" if r["reader"].startswith("teacher") else f"{r['top1'] / ideal[r['px']]:.0%}"
        cells = [str(r["px"]), r["reader"], str(r["photos"])]
        cells += [f"{r['top1']:.3f} [{low:.2f}, {high:.2f}]", f"{r['top5']:.3f}", share]
        for kind in CLASSES:
            value = r.get(f"auroc_{kind}")
            cells.append("" if value is None else f"{value:.3f}")
        worst = max(r["matched"].items(), key=lambda pair: len(pair[1]), default=("none", []))
        cells.append(f"{len(worst[1]) / r['photos']:.3f} ({worst[0]})")
        lines.append(f"| {' | '.join(cells)} |")
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "views.json").write_text(json.dumps(rows, indent=1))
    (RESULTS / "views.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
