"""How early in a generation a forbidden class can be recognized, between two bounds.

    python benchmarks/caltech.py CALTECH101 --autoencoder taef2_encoder.pth --cache DIR/caltech
    python benchmarks/caltech.py CALTECH101 --autoencoder taef2_encoder.pth --cache DIR/trained \
        --trained 600
    latentguard export onnx --model nano-flux2 --policy weapons --height 32 --width 32 \
        --out weapons.onnx
    python benchmarks/early.py CALTECH101 --autoencoder taef2_encoder.pth --cache DIR/caltech \
        --more photos.pt --spectrum DIR/trained/*.pt --guard weapons.onnx --scores DIR/scores

Photos are noised forward to the noise levels of every third step of SDXL's 30-step Euler schedule,
with the same noise at all of them, as a deterministic sampler has it, and scored by nano-flux2, in
ONNX Runtime, as x_t itself and as three estimates of x0. Forbidden: revolvers and cannons that the
bundled model was not trained on; harmless: held-out photos of every other class of Caltech-101 and
those of --more. Score: the highest margin of the policy's blocking concepts that concern guns. Half
of the harmless photos calibrate, the other half is measured on. Scores are kept in --scores, so
that the report can be made again. With --only, one estimate is scored and no report made; --without
leaves some out; with --at-most, a run scores so many photos, and the next goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import caltech
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentguard.adapt.progress import Progress
from latentguard.evaluate.calibrate import threshold
from latentguard.evaluate.estimates import Wiener, unit_variance
from latentguard.evaluate.exact import ExactDenoiser, Tempering
from latentguard.evaluate.metrics import separation, wilson
from latentguard.evaluate.plots import COLORS
from latentguard.files import load_latents
from latentguard.runtime import Guard

RESULTS = Path(__file__).parent / "results"
FORBIDDEN = ("revolver", "cannon")
CONCEPTS = ("handguns", "long-guns", "artillery")
STEPS, EVERY = 30, 3
RATE = 0.01
BATCH = 25
ESTIMATES = {
    "x_t": "x_t itself",
    "wiener": "Wiener estimate (lower bound)",
    "tempered": "tempered posterior",
    "exact": "exact posterior (upper bound)",
}
Array = NDArray[np.float64]
Estimate = Callable[[Tensor, float, NDArray[np.int64]], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Sample:
    """Photos and what each is for.

    latents: [N, 32, 32, 32] float16. forbidden, calibrates: [N]. None was in the model's training.
    """

    latents: Tensor
    forbidden: NDArray[np.bool_]
    calibrates: NDArray[np.bool_]


def schedule() -> Array:
    """Noise-to-signal ratios [31] of SDXL's Euler schedule of 30 steps, 0 last."""
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    scheduler.set_timesteps(STEPS)
    found: Array = scheduler.sigmas.double().numpy()
    return found


def levels() -> list[float]:
    """Every level that is scored, ascending: 0 and the schedule's."""
    return [0.0, *sorted(schedule()[:-1:EVERY].tolist())]


def sample(arguments: argparse.Namespace) -> Sample:
    paths = caltech.choose(arguments.photos, FORBIDDEN, arguments.per_class)
    found = caltech.encode(paths, arguments.autoencoder, arguments.cache, arguments.threads)
    ids, parts = list(found.ids or ()), [found.tensor.half()]
    for path in arguments.more:
        more = load_latents(path)
        ids += [f"{path.stem}/{number}" for number in range(len(more))]
        parts.append(more.tensor.half())
    forbidden = np.array([caltech.label(name) in FORBIDDEN for name in ids])
    seen = caltech.seen(arguments.photos)
    trained = np.array([name in seen for name in ids])
    harmless = np.flatnonzero(~forbidden)
    order = np.random.default_rng(0).permutation(harmless)
    kept = np.sort(np.r_[np.flatnonzero(forbidden & ~trained), order[: arguments.harmless]])
    calibrates = np.isin(np.arange(len(ids)), order[: arguments.harmless // 2])
    return Sample(
        torch.cat(parts)[torch.from_numpy(kept)],
        forbidden[kept],
        calibrates[kept],
    )


# -- scoring ---------------------------------------------------------------------------------------


def spectrum(paths: list[Path]) -> Tensor:
    """Latents [N, 32, 32, 32] of photos that nothing is measured on."""
    return torch.cat([load_latents(path).tensor for path in paths])


def estimates(arguments: argparse.Namespace, photos: Sample) -> dict[str, Callable[[], Estimate]]:
    """Each makes x0 of (y = x0 + r noise, r, rows); second the photo that it is, -1 for none."""

    def plain(denoise: Callable[[Tensor, float], Tensor]) -> Estimate:
        return lambda noisy, level, rows: (denoise(noisy, level), None)

    def posterior(tempering: Tempering | None) -> Estimate:
        everything = photos.latents.float().flatten(1)
        exact = ExactDenoiser(everything, tempering)

        def estimate(
            noisy: Tensor, level: float, rows: NDArray[np.int64]
        ) -> tuple[Tensor, Tensor | None]:
            count = torch.ones(len(noisy))
            weights = exact.weights(noisy.flatten(1), count, level * count)
            best, index = weights.max(1)
            clean = (weights.float() @ everything).view_as(noisy)
            return clean, torch.where(best > 0.9999, index, -1)

        return estimate

    return {
        "x_t": lambda: plain(unit_variance),
        "wiener": lambda: plain(Wiener.fit(spectrum(arguments.spectrum))),
        "tempered": lambda: posterior(Tempering()),
        "exact": lambda: posterior(None),
    }


def score(
    name: str,
    estimate: Estimate,
    photos: Sample,
    clean: Array | None,
    guard: Guard,
    folder: Path,
    at_most: int,
) -> tuple[Array, Array]:
    """Scores and mean squared errors [levels, N] of an estimate; `clean` are the photos' own.

    Level 0 is the photo itself. Where a posterior is one photo, that photo's score is taken.
    """
    kept = folder / f"{name}.npz"
    grid = levels()
    if kept.is_file():
        data = np.load(kept)
        if data["scores"].shape == (len(grid), len(photos.latents)):
            return data["scores"], data["errors"]
    columns = [[c["id"] for c in guard.policy["concepts"]].index(name) for name in CONCEPTS]
    count = len(photos.latents)
    scores, errors = np.zeros((len(grid), count)), np.zeros((len(grid), count))
    partial, start = folder / f"{name}.part", 0
    if partial.is_file():
        with partial.open("rb") as file:
            data = np.load(file)
            if data["scores"].shape == scores.shape:
                scores, errors, start = data["scores"], data["errors"], int(data["done"])
    folder.mkdir(parents=True, exist_ok=True)
    end = min(count, start + at_most)

    def read(latents: Tensor) -> Array:
        best: Array = guard.scores(latents.numpy())["margin"][:, columns].max(1).astype(np.float64)
        return best

    with Progress(f"scoring {name}", len(grid) * (end - start)) as progress:
        for begin in range(start, end, BATCH):
            rows = np.arange(begin, min(begin + BATCH, end))
            images = photos.latents[rows].float()
            noise = torch.stack(
                [
                    torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(int(i)))
                    for i in rows
                ]
            )
            for number, level in enumerate(grid):
                if level == 0:
                    scores[number, rows] = read(images) if clean is None else clean[rows]
                    continue
                with torch.inference_mode():
                    found, photo = estimate(images + level * noise, level, rows)
                errors[number, rows] = (found - images).square().mean((1, 2, 3)).numpy()
                todo = np.ones(len(rows), bool)
                if photo is not None and clean is not None:
                    todo = photo.numpy() < 0
                    scores[number, rows[~todo]] = clean[photo.numpy()[~todo]]
                if todo.any():
                    scores[number, rows[todo]] = read(found[torch.from_numpy(todo)])
            progress.advance(len(grid) * len(rows))
    if end < count:
        with partial.open("wb") as output:
            np.savez(output, scores=scores, errors=errors, done=end)
        raise SystemExit(f"{name}: {end} of {count} photos are scored; run it again for the rest")
    np.savez(kept, scores=scores, errors=errors)
    partial.unlink(missing_ok=True)
    return scores, errors


# -- the report ------------------------------------------------------------------------------------


def by_level(scores: Array, errors: Array, photos: Sample) -> list[dict[str, Any]]:
    """What an estimate tells at each level, thresholds calibrated there and on clean photos."""
    forbidden = photos.forbidden
    harmless = ~photos.forbidden & ~photos.calibrates
    once = threshold(scores[0, photos.calibrates], RATE)
    rows = []
    for number, level in enumerate(levels()):
        values = scores[number]
        found = separation(values[forbidden], values[harmless])
        own = threshold(values[photos.calibrates], RATE)
        rows.append(
            {
                "noise_level": level,
                "auroc": found.auroc.value,
                "auroc_95": [found.auroc.low, found.auroc.high],
                "fpr_at_95_recall": found.fpr_at_recall.value,
                "fpr_at_95_recall_95": [found.fpr_at_recall.low, found.fpr_at_recall.high],
                "recall_calibrated": float((values[forbidden] >= own).mean()),
                "fpr_calibrated": float((values[harmless] >= own).mean()),
                "recall_clean_threshold": float((values[forbidden] >= once).mean()),
                "fpr_clean_threshold": float((values[harmless] >= once).mean()),
                "mean_squared_error": float(errors[number].mean()),
            }
        )
    return rows


def normalized(scores: Array, rows: NDArray[np.int64]) -> Array:
    """Scores by how far above the median of harmless photos (`rows`) they are at their noise level,
    in units of what the 95th percentile is above it."""
    center = np.median(scores[:, rows], 1, keepdims=True)
    spread = np.quantile(scores[:, rows], 0.95, axis=1, keepdims=True) - center
    found: Array = (scores - center) / np.maximum(spread, 1e-6)
    return found


def pooled(scores: Array, photos: Sample) -> dict[str, dict[str, float]]:
    """One threshold for every scored step, of the scores as they are and by noise level."""
    forbidden, harmless = photos.forbidden, ~photos.forbidden & ~photos.calibrates
    result = {}
    by_noise_level = normalized(scores, np.flatnonzero(photos.calibrates))
    for name, values in (("as_they_are", scores), ("calibrated", by_noise_level)):
        noisy = values[1:]
        found = separation(noisy[:, forbidden].ravel(), noisy[:, harmless].ravel(), resamples=0)
        result[name] = {
            "auroc": found.auroc.value,
            "fpr_at_95_recall": found.fpr_at_recall.value,
        }
    return result


def trajectories(scores: Array, photos: Sample, calibrated: bool) -> dict[str, Any]:
    """Blocking at the first scored step above its threshold, at 1 % false blocks a generation.

    One number sets all thresholds: calibrated, of scores normalized at their noise level by half of
    the harmless photos that calibrate; otherwise of the scores themselves. The other half gives it:
    the conformal threshold of each generation's highest score over all of its steps, the finished
    image included.
    """
    grid = levels()
    steps = np.arange(0, STEPS, EVERY)
    order = [grid.index(level) for level in schedule()[:-1:EVERY].tolist()] + [0]
    path = scores[order]
    mine = np.flatnonzero(photos.calibrates)
    first, second = mine[::2], mine[1::2]
    normal = normalized(path, first) if calibrated else path
    # Normalized scores have no upper end: scaled into the margins' range for `threshold`.
    scale = 1 / np.abs(normal).max()
    limit = threshold(normal[:, second].max(0) * scale, RATE) / scale
    above = normal >= limit
    blocked = above.any(0)
    done = np.where(blocked, above.argmax(0), len(order))
    # At scored step k the model has run k + 1 times; at the end, all 30.
    spent = np.r_[steps + 1, STEPS, STEPS][done]
    result: dict[str, Any] = {}
    for name, kept in (
        ("forbidden", photos.forbidden),
        ("harmless", ~photos.forbidden & ~photos.calibrates),
    ):
        half = wilson(int((spent[kept] <= STEPS // 2).sum()), int(kept.sum()))
        every = wilson(int(blocked[kept].sum()), int(kept.sum()))
        result[name] = {
            "images": int(kept.sum()),
            "blocked": every.value,
            "blocked_95": [every.low, every.high],
            "before_half": half.value,
            "before_half_95": [half.low, half.high],
            "median_evaluations": float(np.median(spent[kept])),
            "evaluations_saved": float(1 - spent[kept].mean() / STEPS),
            "stopped_by": [float((done[kept] <= number).mean()) for number in range(len(order))],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, help="Caltech-101's 101_ObjectCategories")
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--more", type=Path, nargs="*", default=[], help="further harmless latents")
    parser.add_argument("--spectrum", type=Path, nargs="+", required=True, help="for Wiener's")
    parser.add_argument("--guard", type=Path, required=True, help="the exported policy and model")
    parser.add_argument("--scores", type=Path, required=True)
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--harmless", type=int, default=1200)
    parser.add_argument("--only", choices=ESTIMATES)
    parser.add_argument("--without", choices=ESTIMATES, nargs="*", default=[])
    parser.add_argument(
        "--at-most", type=int, default=1_000_000, help="photos that a run scores of an estimate"
    )
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    photos = sample(arguments)
    makers = estimates(arguments, photos)
    guard = Guard(arguments.guard, threads=arguments.threads)
    names = [name for name in ESTIMATES if name not in arguments.without]
    if arguments.only:
        names = [arguments.only]
    measured: dict[str, tuple[Array, Array]] = {}
    clean = None
    for kept in sorted(arguments.scores.glob("*.npz")):
        clean = np.load(kept)["scores"][0]
    for name in names:
        measured[name] = score(
            name, makers[name](), photos, clean, guard, arguments.scores, arguments.at_most
        )
        clean = measured[name][0][0]
    if not arguments.only:
        report(photos, measured)


def report(photos: Sample, measured: dict[str, tuple[Array, Array]]) -> None:
    result = {
        "photos": {
            "forbidden": int(photos.forbidden.sum()),
            "harmless_calibrating": int(photos.calibrates.sum()),
            "harmless_measured": int((~photos.forbidden & ~photos.calibrates).sum()),
        },
        "steps": STEPS,
        "scored_every": EVERY,
        "false_block_rate": RATE,
        "sigmas": schedule().tolist(),
        "variance": float(photos.latents.float().var()),
        "levels": {name: by_level(*values, photos) for name, values in measured.items()},
        "trajectories": {
            name: {
                "calibrated": trajectories(values[0], photos, True),
                "as_they_are": trajectories(values[0], photos, False),
            }
            for name, values in measured.items()
        },
        "pooled": {name: pooled(values[0], photos) for name, values in measured.items()},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "early.json").write_text(json.dumps(result, indent=1) + "\n")
    text = tables(result)
    (RESULTS / "early.md").write_text(text)
    plot(result, RESULTS / "early.png")
    print(text)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def tables(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    found, count = result["levels"], result["photos"]
    names = list(found)
    lines = [
        "# Early detection",
        "",
        f"{count['forbidden']} forbidden photos (revolvers, cannons), "
        f"{count['harmless_measured']} harmless ones, {count['harmless_calibrating']} more for "
        f"calibration. Noise level: noise-to-signal ratio.",
        "",
    ]
    numbers = range(len(found[names[0]]))
    for title, key in (
        ("AUROC", "auroc"),
        ("False-block rate at 95 % recall", "fpr_at_95_recall"),
        ("Recall at 1 % false blocks, threshold calibrated at that noise level",
         "recall_calibrated"),
        ("False blocks measured there", "fpr_calibrated"),
        ("Recall with the threshold calibrated on clean photos", "recall_clean_threshold"),
        ("False blocks measured with it", "fpr_clean_threshold"),
        (f"Mean squared error of the estimate (variance {result['variance']:.2f})",
         "mean_squared_error"),
    ):  # fmt: skip
        lines += [f"## {title}", ""]
        rows = [
            [f"{found[names[0]][i]['noise_level']:.2f}"]
            + [f"{found[name][i][key]:.3f}" for name in names]
            for i in numbers
        ]
        lines += _table(["noise level", *(ESTIMATES[name] for name in names)], rows)
    lines += [
        f"## Generations of {result['steps']} steps, scored at every third, 1 % false blocks each",
        "",
    ]
    rows = []
    for name in names:
        for mode, label in (("calibrated", "by noise level"), ("as_they_are", "no")):
            one = result["trajectories"][name][mode]
            bad, good = one["forbidden"], one["harmless"]
            low, high = bad["before_half_95"]
            rows.append(
                [
                    ESTIMATES[name],
                    label,
                    f"{bad['before_half']:.2f} [{low:.2f}, {high:.2f}]",
                    f"{bad['blocked']:.2f}",
                    f"{bad['median_evaluations']:.0f}",
                    f"{bad['evaluations_saved']:.2f}",
                    f"{good['blocked']:.3f}",
                ]
            )
    head = ["estimate", "calibrated", "forbidden stopped in the first half [95 %]"]
    head += ["stopped at all", "median evaluations", "evaluations saved", "harmless stopped"]
    lines += [*_table(head, rows), "## One threshold for every scored step", ""]
    rows = []
    for name in names:
        for mode, label in (("calibrated", "by noise level"), ("as_they_are", "no")):
            one = result["pooled"][name][mode]
            rows.append(
                [ESTIMATES[name], label, f"{one['auroc']:.3f}", f"{one['fpr_at_95_recall']:.3f}"]
            )
    head = ["estimate", "calibrated", "AUROC", "false-block rate at 95 % recall"]
    return "\n".join([*lines, *_table(head, rows)])


def plot(result: dict[str, Any], path: Path) -> None:
    """AUROC, false-block rate and recall over the noise level; what is stopped over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2).ravel()
    steps = [*range(1, STEPS + 1, EVERY), STEPS]
    titles = {
        "auroc": "AUROC",
        "fpr_at_95_recall": "false-block rate at 95 % recall",
        "recall_calibrated": "recall at 1 % false blocks, calibrated at the noise level",
    }
    for (name, rows), color in zip(result["levels"].items(), COLORS, strict=False):
        style = ":" if name == "tempered" else "-"
        look = {"linestyle": style, "marker": "o", "markersize": 3, "color": color}
        x = [row["noise_level"] for row in rows]
        for axis, key in zip(axes, titles, strict=False):
            axis.plot(x, [row[key] for row in rows], label=ESTIMATES[name], **look)
            if f"{key}_95" in rows[0]:
                low, high = zip(*(row[f"{key}_95"] for row in rows), strict=True)
                axis.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        stopped = result["trajectories"][name]["calibrated"]["forbidden"]["stopped_by"]
        axes[3].step(steps, stopped, where="post", **look)
    half = result["sigmas"][STEPS // 2]
    for axis, title in zip(axes, titles.values(), strict=False):
        axis.set_xscale("symlog", linthresh=0.2)
        axis.set_xticks(
            [0, 0.2, 0.5, 1, 2, 5, 10, 20], ["0", ".2", ".5", "1", "2", "5", "10", "20"]
        )
        axis.invert_xaxis()
        axis.axvline(half, color="0.5", linewidth=1, linestyle=":")
        axis.text(half, 0.02, " half of 30 steps", rotation=90, fontsize=7, color="0.4",
                  transform=axis.get_xaxis_transform())  # fmt: skip
        axis.set(title=title, xlabel="noise-to-signal ratio (generation runs to the right)")
    axes[3].set(
        title="forbidden generations stopped, 1 % false blocks a generation",
        xlabel="model evaluations of 30",
    )
    axes[3].axvline(STEPS // 2, color="0.5", linewidth=1, linestyle=":")
    for axis in axes:
        axis.grid(color="0.93")
        axis.set_axisbelow(True)
        axis.set_ylim(-0.02, 1.02)
    axes[0].set_ylim(0.4, 1.01)
    axes[0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
