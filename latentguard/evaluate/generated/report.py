"""The files of the results: JSON, Markdown beside published figures, a plot, seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latentguard.evaluate.generate.asked import Asked
from latentguard.evaluate.generate.folder import RunFolder
from latentguard.evaluate.generate.results import write_results
from latentguard.evaluate.generate.shares import interval_dict, share
from latentguard.evaluate.generate.tables import Published, cell, markdown
from latentguard.evaluate.generated.measure import Measured, figures_of
from latentguard.evaluate.plots import plot_classes

LATENT_CLIP = "arXiv 2503.08455"

PUBLISHED = (
    Published("SDXL-Turbo, Latent-CLIP B/8", LATENT_CLIP, {"top-1": 0.820}),
    Published("SDXL-Turbo, Latent-CLIP B/4-plus", LATENT_CLIP, {"top-1": 0.846}),
)
"""Of ImageNet's 1,000 classes."""

COLUMNS = ("top-1", "top-5", "blocked")


def report(
    folder: RunFolder,
    names: Sequence[str],
    templates: Sequence[str],
    prompt: str,
    asked: Sequence[Asked],
    measured: Mapping[str, Sequence[Measured]],
) -> dict[str, Any]:
    """Write results.json, results.md, results.png and cost.json, and give what the first holds.

    measured: by arm, what each encoder takes its images for.
    """
    arms: dict[str, Any] = {}
    seconds = {}
    series: dict[str, Any] = {}
    for arm, every in measured.items():
        records = [folder.record(arm, one) or {} for one in asked]
        blocked = [bool(record["blocked"]) for record in records]
        models = [figures_of(one, names) for one in every]
        series |= {f"{arm}, {one['model']['name']}": one["by_class"] for one in models}
        arms[arm] = {
            "images": len(asked),
            "blocked": interval_dict(share(blocked, [one.row for one in asked])),
            "models": models,
        }
        seconds[arm] = [float(record["seconds"]) for record in records]
    generated = len({one.row for one in asked})
    figures = {
        "classes": len(names),
        "classes_generated": generated,
        "images_per_class": len(asked) // generated,
        "prompt_template": prompt,
        "templates": list(templates),
        "arms": arms,
    }
    plot_classes(folder.path / "results.png", "Zero-shot accuracy on generated latents", series)
    return write_results(folder, "generated", figures, _page, seconds)


def _page(results: Mapping[str, Any]) -> str:
    rows = []
    for arm, figures in results["arms"].items():
        for one in figures["models"]:
            cells = {"top-1": cell(one["top1"]), "top-5": cell(one["top5"])}
            cells["blocked"] = cell(figures["blocked"])
            rows.append((f"{arm}, {one['model']['name']}", cells))
    return (
        "# Zero-shot accuracy on generated latents\n\n"
        f"Images were made of the prompt `{results['prompt_template']}`, for each class "
        f"{results['images_per_class']}. Classes with images: {results['classes_generated']}. "
        f"Names that they are told apart among: {results['classes']}. Templates, for models that "
        f"read captions: {len(results['templates'])}. What is measured are the final latents. "
        "Brackets hold 95 % intervals over classes. A blocked image counts as not recognized.\n\n"
        + markdown(COLUMNS, rows, PUBLISHED)
        + "\nPublished figures are of ImageNet's 1,000 classes. results.json has the accuracy of "
        "each class, and what its images are taken for.\n"
    )
