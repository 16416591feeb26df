"""Concepts learned from examples: photos of classes that ImageNet lacks, against all others.

    python benchmarks/concepts.py CALTECH101 --autoencoder taef2_encoder.pth --cache DIR

CALTECH101 is its folder 101_ObjectCategories. Heads are learned from photos outside of the held-out
fifth (on some of which, without labels, the bundled models were trained) and measured on the
held-out fifth. Negatives to learn from are photos of classes that are not tested. Latents are of
256 px, so nano-view sees 32 x 32 numbers of each color, the least that it reads; the teacher reads
pixels. What is not in the cache is encoded first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import readers
import torch
from caltech import files, identity, label
from machine import machine
from numpy.typing import NDArray

from latentguard.adapt.hold_out import held_out
from latentguard.adapt.images import center_crop
from latentguard.adapt.progress import Progress
from latentguard.adapt.teacher import load_teacher
from latentguard.encode import load_autoencoder
from latentguard.encoders import Encoder, load_encoder
from latentguard.evaluate.metrics import auroc, count
from latentguard.files import Reading, save_latents
from latentguard.learn import Examples, examples, learn, of_files, try_out
from latentguard.learn.examples import Named
from latentguard.learn.heads import solutions
from latentguard.learn.learning import OF_FEW, SHRINKAGES
from latentguard.learn.statistics import Sums
from latentguard.spaces import Latents

RESULTS = Path(__file__).parent / "results"
MANY = (
    *("bonsai", "brain", "buddha", "chandelier", "ferry", "joshua_tree", "lotus", "menorah"),
    *("minaret", "Faces_easy", "sunflower", "stop_sign"),
)
FEW = (
    *("dollar_bill", "yin_yang", "windsor_chair", "pyramid", "sea_horse", "wheelchair"),
    *("stegosaurus", "snoopy", "garfield", "okapi", "scissors", "metronome", "gerenuk", "wrench"),
    *("stapler", "anchor"),
)
"""No class of ImageNet is one of these; `stop_sign` is a kind of its street sign, and some are near
to another class (`minaret` to mosque, `gerenuk` to gazelle)."""
DRAWS, PROMISES = 10, 2
NUMBERS = (1, 5, 20, 50)
RATE = 0.01
NEGATIVES = 400

Rows = NDArray[np.float32]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Photo:
    """A photo and what it is for: "learn" and "test" of tested classes, "back" and "test" of the
    others."""

    path: Path
    use: str


def chosen(folder: Path) -> list[Photo]:
    """About 3,000 photos, in a random order."""
    rng = np.random.default_rng(0)
    found: list[Photo] = []
    for name in sorted({path.parent.name for path in files(folder)}):
        paths = sorted((folder / name).glob("*.jpg"))
        kept = [path for path in paths if not held_out(path, 5)]
        out = [path for path in paths if held_out(path, 5)]
        if name in MANY + FEW:
            found += [Photo(path, "learn") for path in _some(kept, 64, rng)]
            found += [Photo(path, "test") for path in _some(out, 24, rng)]
        elif name == "BACKGROUND_Google":
            found += [Photo(path, "back") for path in _some(kept, 200, rng)]
            found += [Photo(path, "test") for path in out]
        elif name != "Faces":  # the same people as Faces_easy
            found += [Photo(path, "back") for path in _some(kept, 8, rng)]
            found += [Photo(path, "test") for path in _some(out, 7, rng)]
    return [found[i] for i in rng.permutation(len(found))]


def _some(paths: list[Path], number: int, rng: np.random.Generator) -> list[Path]:
    return [paths[i] for i in sorted(rng.permutation(len(paths))[:number])]


def latents_of(photos: Sequence[Photo], autoencoder: Path, cache: Path) -> Path:
    """Their latents, encoded in bfloat16, float16 [N, 32, 32, 32] in a .npy file."""
    path = cache / "concepts-256.npy"
    if path.exists():
        return path
    encoder = load_autoencoder(autoencoder)
    found = np.zeros((len(photos), 32, 32, 32), np.float16)
    with Progress("encoding", len(photos)) as progress:
        for row, photo in enumerate(photos):
            image = readers.to_tensor(center_crop(photo.path)[None])
            with torch.autocast("cpu", torch.bfloat16):
                found[row] = encoder.encode(image).tensor[0].float().numpy()
            progress.advance(1)
    np.save(path, found)
    return path


def named(photos: Sequence[Photo], latents: Path) -> Iterator[Named]:
    """The latents one after the other."""
    for photo, one in zip(photos, np.load(latents, mmap_mode="r"), strict=True):
        tensor = torch.from_numpy(one[None].astype(np.float32))
        yield Named(identity(photo.path), Latents(tensor, "flux2", scaled=True))


def teacher_rows(photos: Sequence[Photo]) -> Rows:
    """The pixel teacher's 1,280 numbers of each photo at 256 px, unit norm."""
    net, rows = load_teacher(), []
    with Progress("teacher", len(photos)) as progress:
        for photo in photos:
            head = net.targets(readers.to_tensor(center_crop(photo.path)[None]))[1]
            rows.append(torch.nn.functional.normalize(head.mean((2, 3)), dim=-1))
            progress.advance(1)
    return torch.cat(rows).numpy()


def uses(photos: Sequence[Photo]) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
    """Each photo's class and use; of those to learn negatives from the first `NEGATIVES`."""
    use = np.array([photo.use for photo in photos])
    use[np.flatnonzero(use == "back")[NEGATIVES:]] = "none"
    return np.array([photo.path.parent.name for photo in photos]), use


def trials(rows: Rows, photos: Sequence[Photo]) -> list[dict[str, object]]:
    """AUROC and recall of heads from 1 to 50 positives, by class and draw."""
    classes, use = uses(photos)
    back = Sums.of(rows[use == "back"])
    found: list[dict[str, object]] = []
    for name in sorted(set(classes[use == "learn"])):
        pool = rows[(use == "learn") & (classes == name)]
        tests = rows[(use == "test") & (classes == name)], rows[(use == "test") & (classes != name)]
        for number in NUMBERS:
            if len(pool) < number:
                continue
            for draw in range(DRAWS):
                some = _drawn(len(pool), number, name, draw)
                positives = Sums.of(pool[some])
                usual = OF_FEW if number < 10 else SHRINKAGES[1]
                heads = solutions(positives, back, (usual, 1.0))
                for way, head in zip(("discriminant", "prototype"), heads, strict=True):
                    area, recall = _measured(head(tests[0]), head(tests[1]))
                    row = {"class": name, "positives": number, "draw": draw, "head": way}
                    found.append({**row, "auroc": area, "recall": recall})
    return found


def _drawn(size: int, number: int, name: str, draw: int) -> NDArray[np.int64]:
    return np.random.default_rng([number, draw, *name.encode()]).permutation(size)[:number]


def _measured(
    positives: NDArray[np.float64], negatives: NDArray[np.float64]
) -> tuple[float, float]:
    bound = np.quantile(negatives, 1 - RATE, method="higher")
    return float(auroc(count(positives, negatives))), float((positives > bound).mean())


def promises(rows: Rows, photos: Sequence[Photo], model: str) -> list[dict[str, object]]:
    """What learning promised, and what the held-out photos then gave."""
    encoder = load_encoder(model, "cpu")
    classes, use = uses(photos)

    def side(which: NDArray[np.bool_]) -> Examples:
        names = tuple(identity(photos[i].path) for i in np.flatnonzero(which))
        return Examples(rows[which], names, np.zeros(1, np.float32))

    found: list[dict[str, object]] = []
    for name in sorted(set(classes[use == "learn"])):
        pool = np.flatnonzero((use == "learn") & (classes == name))
        tests = (use == "test") & (classes == name), (use == "test") & (classes != name)
        for number in NUMBERS[1:]:
            if len(pool) < number:
                continue
            for draw in range(PROMISES):
                some = np.zeros(len(rows), bool)
                some[pool[_drawn(len(pool), number, name, draw)]] = True
                lesson = learn(side(some), side(use == "back"), encoder)
                told = lesson.figures
                at = told.at_rates[0]
                seen = try_out(lesson.learned, side(tests[0]), side(tests[1]), encoder, at.margin)
                even = try_out(lesson.learned, side(tests[0]), side(tests[1]), encoder)
                found.append(
                    {
                        "class": name,
                        "positives": number,
                        "draw": draw,
                        "shrinkage": lesson.learned.figures["shrinkage"],
                        "promised": told.to_dict(),
                        "auroc": asdict(seen.figures.auroc),
                        "recall": asdict(seen.recall),
                        "fpr": seen.false_positive_rate.value,
                        "recall_at_half": even.recall.value,
                        "fpr_at_half": even.false_positive_rate.value,
                    }
                )
    return found


def timed(photos: Sequence[Photo], latents: Path, encoder: Encoder) -> dict[str, float]:
    """Seconds to learn from 50 + 500 latents in files, reading included, on two threads."""
    torch.set_num_threads(2)
    every = list(named(photos, latents))
    sides = (
        [one for one in every if label(one.name) == "bonsai"][:50],
        [one for one in every if label(one.name) not in MANY + FEW][:500],
    )
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{side}.safetensors" for side in ("positives", "negatives")]
        for path, side in zip(paths, sides, strict=True):
            tensor = torch.cat([one.latents.tensor for one in side]).half()
            names = [one.name for one in side]
            save_latents(path, Latents(tensor, "flux2", scaled=True, ids=names))
        begin, busy = time.perf_counter(), time.process_time()
        read = [examples(of_files([path], Reading.of()), encoder, "examples") for path in paths]
        middle, halfway = time.perf_counter(), time.process_time()
        learn(read[0], read[1], encoder)
        end, ended = time.perf_counter(), time.process_time()
    return {
        "features": middle - begin,
        "learning": end - middle,
        "features, of a core": halfway - busy,
        "learning, of a core": ended - halfway,
    }


def table(by_reader: dict[str, list[dict[str, object]]]) -> list[str]:
    """Mean and spread over classes and draws."""
    head = ("reader", "positives", "classes", "head", "AUROC", "lowest class", "recall at 1 %")
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for reader, found in by_reader.items():
        for number in NUMBERS:
            for way in ("discriminant", "prototype"):
                rows = [r for r in found if (r["positives"], r["head"]) == (number, way)]
                if not rows:
                    continue
                area, recall = (np.array([r[key] for r in rows]) for key in ("auroc", "recall"))
                names = sorted({str(r["class"]) for r in rows})
                means = [area[[r["class"] == name for r in rows]].mean() for name in names]
                cells = (reader, number, len(names), way, _spread(area))
                cells += (f"{min(means):.3f} ({names[int(np.argmin(means))]})", _spread(recall))
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def by_class(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means and deviations over the draws of each class."""
    drawn: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in found:
        drawn.setdefault((row["class"], row["positives"], row["head"]), []).append(row)
    rows = []
    for (name, number, way), some in drawn.items():
        row = {"class": name, "positives": number, "head": way, "draws": len(some)}
        for key in ("auroc", "recall"):
            values = [one[key] for one in some]
            row |= {key: round(float(np.mean(values)), 4)}
            row |= {f"{key} deviation": round(float(np.std(values)), 4)}
        rows.append(row)
    return rows


def _spread(values: NDArray[np.float64]) -> str:
    return f"{values.mean():.3f} ± {values.std():.3f}"


def promise_table(found: list[dict[str, object]]) -> list[str]:
    """How often what was promised held: the figure lies in the interval, the intervals overlap."""
    held = ("within the interval", "intervals overlap")
    head = ("positives", "trials", "AUROC promised", "found", *held)
    head += ("recall promised at 1 %", "found", *held, "false positives found")
    head += ("recall found at probability 0.5", "false positives found there")
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for number in NUMBERS[1:]:
        rows = [r for r in found if r["positives"] == number]
        if not rows:
            continue
        said = [r["promised"]["auroc"] for r in rows]
        caught = [r["promised"]["at_false_positive_rate"][0]["recall"] for r in rows]
        cells = [number, len(rows)]
        for key, promised in (("auroc", said), ("recall", caught)):
            real = [r[key] for r in rows]
            both = list(zip(promised, real, strict=True))
            within = [p["low"] <= x["value"] <= p["high"] for p, x in both]
            overlap = [p["low"] <= x["high"] and x["low"] <= p["high"] for p, x in both]
            cells += [f"{np.mean([one['value'] for one in s]):.3f}" for s in (promised, real)]
            cells += [f"{np.mean(within):.2f}", f"{np.mean(overlap):.2f}"]
        cells += [f"{np.mean([r[key] for r in rows]):.4f}" for key in ("fpr",)]
        cells += [f"{np.mean([r['recall_at_half'] for r in rows]):.3f}"]
        cells += [f"{np.mean([r['fpr_at_half'] for r in rows]):.4f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, help="Caltech-101's 101_ObjectCategories")
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    a = parser.parse_args()
    photos = chosen(a.photos)
    latents = latents_of(photos, a.autoencoder, a.cache)
    flux2, view = load_encoder("nano-flux2", "cpu"), load_encoder("nano-view", "cpu", "flux2")
    kept = a.cache / "concepts-rows.npz"
    if not kept.exists():
        np.savez(
            kept,
            flux2=examples(named(photos, latents), flux2, "photos").rows,
            view=examples(named(photos, latents), view, "photos").rows,
            teacher=teacher_rows(photos),
        )
    rows = np.load(kept, allow_pickle=False)
    readers_of = {
        "nano-flux2": "flux2",
        "nano-view on FLUX.2's view": "view",
        "pixel teacher": "teacher",
    }
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(readers_of) + 1, context, torch.set_num_threads, (1,)) as pool:
        jobs = {name: pool.submit(trials, rows[key], photos) for name, key in readers_of.items()}
        promising = pool.submit(promises, rows["flux2"], photos, "nano-flux2")
        by_reader = {name: job.result() for name, job in jobs.items()}
        promised = promising.result()
    seconds = timed(photos, latents, flux2)
    data = {"trials": by_reader, "promises": promised, "seconds": seconds, "machine": machine()}
    lines = page(data)
    print("\n".join(lines))
    kept = data | {"trials": {reader: by_class(found) for reader, found in by_reader.items()}}
    (RESULTS / "concepts.json").write_text(json.dumps(kept) + "\n")
    (RESULTS / "concepts.md").write_text("\n".join(lines) + "\n")


def page(data: dict[str, Any]) -> list[str]:
    """The results as they are read."""
    took = "; ".join(f"{name} {value:.1f} s" for name, value in data["seconds"].items())
    return [
        *table(data["trials"]),
        "",
        "What `nano-flux2` promised by cross-validation, and what the held-out photos gave:",
        "",
        *promise_table(data["promises"]),
        "",
        f"Learning from 50 + 500 latents in files, two threads: {took}.",
        "",
        ", ".join(f"{key}: {value}" for key, value in data["machine"].items()),
    ]


if __name__ == "__main__":
    main()
