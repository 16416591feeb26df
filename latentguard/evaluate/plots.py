"""Pictures of what was measured, as PNG, SVG or PDF files (by matplotlib, no window)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentguard.errors import ModelError
from latentguard.judge import PURE_NOISE

if TYPE_CHECKING:
    from latentguard.evaluate.calibrate import Row
    from latentguard.evaluate.detect import Detection
    from latentguard.evaluate.zeroshot import ZeroShot

# Color-blind safe (Okabe and Ito 2008), in the order that lines take them.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def plot_detection(path: Path, detections: Sequence[Detection], title: str) -> None:
    """ROC curves, precision-recall curves and a score histogram.

    Several detections (two models, say) share the curves; the histogram is of the first.
    """
    figure, (roc, precision, scores) = _axes(3, title)
    for detection, color in zip(detections, _colors(len(detections)), strict=True):
        found, name = detection.separation, detection.model["name"]
        counts = found.counts
        roc.step(
            np.r_[0, counts.fpr],
            np.r_[0, counts.recall],
            where="post",
            color=color,
            label=f"{name}: AUROC {found.auroc}",
        )
        precision.step(
            np.r_[0, counts.recall],
            np.r_[counts.precision[0], counts.precision],
            where="pre",
            color=color,
            label=f"{name}: AP {found.average_precision}",
        )
    roc.plot([0, 1], [0, 1], color="0.8", linewidth=1, zorder=0)
    roc.axhline(0.95, color="0.6", linewidth=1, linestyle=":", zorder=0)
    roc.set(xlabel="false-positive rate", ylabel="recall", xlim=(0, 1), ylim=(0, 1.01))
    precision.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.01))
    roc.legend(loc="lower right", fontsize=8)
    precision.legend(loc="lower left", fontsize=8)
    first = detections[0]
    bins = np.histogram_bin_edges(np.r_[first.positives, first.negatives], 40)
    for values, label, color in (
        (first.negatives, f"{len(first.negatives)} negatives", "0.6"),
        (first.positives, f"{len(first.positives)} positives", COLORS[1]),
    ):
        weights = np.full(len(values), 1 / len(values))
        scores.hist(values, bins, weights=weights, alpha=0.7, color=color, label=label)
    if first.operating is not None:
        label = f"threshold {first.operating.margin:.2f}"
        scores.axvline(first.operating.margin, color="black", linewidth=1, label=label)
    scores.set(xlabel=f"margin ({first.model['name']})", ylabel="share of images")
    scores.legend(fontsize=8)
    _save(figure, path)


def plot_zeroshot(path: Path, result: ZeroShot) -> None:
    """Accuracy among the first k classes, and cosines with the right and the best wrong class."""
    title = f"{result.model}: {result.n} images, {result.classes} classes"
    figure, (top, cosines) = _axes(2, title)
    ks = np.unique(np.geomspace(1, result.classes, 60).round().astype(int))
    top.plot(ks, [result.top(int(k)).value for k in ks], color=COLORS[0])
    for k in (1, 5):
        if k <= result.classes:
            estimate = result.top(k)
            top.errorbar(
                [k],
                [estimate.value],
                [[estimate.value - estimate.low], [estimate.high - estimate.value]],
                fmt="o",
                color=COLORS[1],
                label=f"top-{k}: {estimate}",
            )
    top.set(xscale="log", xlabel="first k classes", ylabel="accuracy", ylim=(0, 1.01))
    top.legend(loc="lower right", fontsize=8)
    bins = np.histogram_bin_edges(np.r_[result.similarities, result.best_wrong], 40)
    cosines.hist(result.best_wrong, bins, alpha=0.7, color="0.6", label="best wrong class")
    cosines.hist(result.similarities, bins, alpha=0.7, color=COLORS[1], label="right class")
    cosines.set(xlabel="cosine", ylabel="images")
    cosines.legend(fontsize=8)
    _save(figure, path)


def plot_thresholds(path: Path, rows: Sequence[Row], title: str) -> None:
    """Calibrated thresholds over the noise level: a line for each concept, a panel for each rate.

    At a single noise level: a point for each concept. Pure noise stands beside the other levels.
    """
    rates = sorted({row.fpr for row in rows})
    figure, axes = _axes(len(rates), title)
    concepts = list(dict.fromkeys(row.concept for row in rows))
    levels = sorted({row.noise_level for row in rows})
    finite = [level for level in levels if level < PURE_NOISE]
    # On a scale up to PURE_NOISE the levels that matter would lie on one another.
    place = {level: level for level in finite} | {PURE_NOISE: 3 * max([1.0, *finite])}
    for axis, rate in zip(axes, rates, strict=True):
        for name, color in zip(concepts, _colors(len(concepts)), strict=True):
            found = sorted(
                (place[row.noise_level], row.margin)
                for row in rows
                if (row.concept, row.fpr) == (name, rate)
            )
            style = "-" if concepts.index(name) < len(COLORS) else "--"
            x, y = zip(*found, strict=True)
            axis.plot(x, y, style, marker="o", markersize=3, color=color, label=name)
        axis.axhline(0, color="0.6", linewidth=1, linestyle=":", zorder=0)
        smallest = next((level for level in levels if level > 0), 1.0)
        axis.set_xscale("symlog", linthresh=smallest)
        shown = levels[:: -(-len(levels) // 10)]
        names = ["pure noise" if level == PURE_NOISE else f"{level:g}" for level in shown]
        axis.set_xticks([place[level] for level in shown], names)
        axis.minorticks_off()
        axis.set_xlim(-0.2 * smallest, max(place[levels[-1]], smallest) * 1.15)
        axis.set(
            xlabel="noise-to-signal ratio",
            ylabel="threshold (margin)",
            title=f"false-positive rate {rate:g}",
        )
        axis.legend(fontsize=7)
    _save(figure, path)


def plot_shares(
    path: Path,
    title: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[Mapping[str, Any] | None]],
) -> None:
    """Shares with their intervals: a bar for each group and series; None is a gap.

    series: by name, for each group {"value", "interval": [low, high]}.
    """
    figure, (axis,) = _axes(1, title)
    figure.set_size_inches(max(4.6, 0.9 * len(groups) + 1.5), 4.2)
    width = 0.8 / max(len(series), 1)
    for place, (name, shares) in enumerate(series.items()):
        color, hatch = COLORS[place % len(COLORS)], "" if place < len(COLORS) else "//"
        there = [(i, share) for i, share in enumerate(shares) if share is not None]
        x = [i + (place - (len(series) - 1) / 2) * width for i, _ in there]
        values = [share["value"] for _, share in there]
        errors = [
            [max(0.0, share["value"] - share["interval"][0]) for _, share in there],
            [max(0.0, share["interval"][1] - share["value"]) for _, share in there],
        ]
        axis.bar(x, values, width, yerr=errors, capsize=2, color=color, hatch=hatch, label=name)
    axis.set_xticks(range(len(groups)), groups, rotation=30, ha="right", fontsize=8)
    axis.set(ylabel="share of images", xlim=(-0.6, len(groups) - 0.4), ylim=(0, 1.01))
    axis.legend(fontsize=8)
    _save(figure, path)


def plot_curves(
    path: Path, title: str, ylabel: str, series: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Means over iterations with their intervals, a panel for each series.

    series: by name, for each iteration {"value", "interval": [low, high]}.
    """
    figure, axes = _axes(len(series), title)
    for axis, (name, points), color in zip(axes, series.items(), _colors(len(axes)), strict=True):
        x = range(len(points))
        axis.plot(x, [point["value"] for point in points], color=color)
        low, high = zip(*(point["interval"] for point in points), strict=True)
        axis.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        axis.set_title(name, fontsize=9)
        axis.set(xlabel="iteration", ylabel=ylabel)
    _save(figure, path)


def plot_classes(
    path: Path, title: str, series: Mapping[str, Sequence[Mapping[str, Any]]], most: int = 15
) -> None:
    """Accuracy of the classes from the best to the worst, and what is most often mistaken.

    series: by name, for each class {"name", "top1", "taken_for": [{"name", "images"}]}; the
    mistakes are those of the first series, `most` at most.
    """
    figure, (accuracy, mistakes) = _axes(2, title)
    figure.set_size_inches(11, 4.6)
    for (name, classes), color in zip(series.items(), _colors(len(series)), strict=True):
        values = sorted((one["top1"] for one in classes), reverse=True)
        accuracy.step(np.arange(1, len(values) + 1), values, where="mid", color=color, label=name)
    accuracy.set(xlabel="classes, best first", ylabel="top-1 accuracy", ylim=(-0.01, 1.01))
    accuracy.legend(loc="lower left", fontsize=8)
    first = next(iter(series.values()))
    pairs = [
        (other["images"], f"{one['name'][:24]}: {other['name'][:24]}")
        for one in first
        for other in one["taken_for"]
    ]
    pairs = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:most]
    mistakes.barh(range(len(pairs)), [count for count, _ in pairs], color=COLORS[1])
    mistakes.set_yticks(range(len(pairs)), [shown for _, shown in pairs], fontsize=7)
    mistakes.invert_yaxis()
    mistakes.xaxis.get_major_locator().set_params(integer=True)
    mistakes.set(xlabel="images", title=f"class: taken for ({next(iter(series))})")
    _save(figure, path)


def check_plot_path(path: Path) -> None:
    """ModelError, before the measuring starts, where a plot could not be written afterward."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ModelError(f"--plot: the file must end in .png, .svg or .pdf, got {path.name}")
    if not path.absolute().parent.is_dir():
        raise ModelError(f"--plot: there is no folder {path.absolute().parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ModelError(
            "--plot needs matplotlib: install it with `pip install 'latentguard[eval]'`"
        ) from error


def _axes(number: int, title: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * number, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    axes = np.atleast_1d(figure.subplots(1, number))
    for axis in axes:
        axis.grid(color="0.93")
        axis.set_axisbelow(True)
    return figure, axes


def _colors(number: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(number)]


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120, metadata={"Software": None} if path.suffix == ".png" else None)
