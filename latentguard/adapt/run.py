"""From a folder of photos to a nano encoder: cache, train, write the model, its card and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from latentguard.adapt.cache import prepare
from latentguard.adapt.halving import halving, set_halving
from latentguard.adapt.small_autoencoders import (
    DESIGNS,
    FACTOR,
    Design,
    SmallAutoencoder,
    train_autoencoder,
)
from latentguard.adapt.teacher import Teacher, class_names, class_table, load_teacher
from latentguard.adapt.train import AdapterRecipe, Recipe, RgbRecipe, Trainer
from latentguard.adapt.view_cache import encode_all
from latentguard.adapt.view_recipe import ViewRecipe
from latentguard.encode.autoencoders import Autoencoder, load_autoencoder
from latentguard.encode.folders import find_pictures
from latentguard.encoders.catalog import ANY_VIEW
from latentguard.encoders.nano import save_nano
from latentguard.encoders.nano_net import KERNEL
from latentguard.encoders.nano_sizes import OCTAVES
from latentguard.errors import ModelError
from latentguard.policy import load_policy, shipped_policies
from latentguard.spaces import LatentSpace

RGB_SIZE = 192
"""Pixels per side at which the rgb recipe reads a view: 64 cells are magnified threefold."""


@dataclass(frozen=True)
class Result:
    """What a run wrote: the model, its training curve as JSON and as a picture."""

    model: Path
    history: Path
    plot: Path
    images: int


def adapt(
    images: Sequence[str | Path],
    out: str | Path,
    *,
    name: str,
    space: str | Path | LatentSpace | None = None,
    autoencoder: str | Path | None = None,
    any_view: bool = False,
    cache: str | Path | None = None,
    recipe: Recipe | None = None,
    keep: Callable[[Path], bool] = lambda path: True,
) -> Result:
    """Make a nano encoder; an interrupted run goes on where it stopped.

    Args:
        images: folders of photos, labels not needed; 37 at least, thousands for a useful model.
        out: the model file to write (.safetensors); the checkpoint, history and plot lie beside it.
        name: the model's name in verdicts.
        space: the latent space, by name, file or itself; may be left out where the autoencoder's is
            certain.
        autoencoder: an encoder file of madebyollin/taesd or a diffusers VAE folder. Without one
            the model reads the space's published RGB view instead.
        any_view: make a model that reads the RGB view of every space that has one, whose space is
            said when it is loaded. It is trained on views of small autoencoders of our own
            (small_autoencoders.py), which are made first and kept in the cache.
        cache: folder for crops, latents and targets, 360 kB to 430 kB a photo; beside `out`
            unless given.
        keep: photos for which it is False are left out, to hold some out of training.

    Raises:
        ModelError: the teacher is not installed, or the space is not known or has no RGB view, or
            a space or an autoencoder is given together with any_view.
        LatentsError: no images, or a cache folder of another run.
    """
    if any_view and (space is not None or autoencoder is not None):
        raise ModelError(
            "a model of any space's view is trained without a space and without an autoencoder: "
            "give any_view (--view) alone, or not at all"
        )
    recipe = recipe or Recipe()
    target = Path(out)
    if target.suffix != ".safetensors":
        raise ModelError(f"the model file must end in .safetensors, got {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    photos = [path for path in find_pictures(images) if keep(path)]
    encoder = _autoencoder(autoencoder, space) if autoencoder else None
    found = None if any_view else _space(encoder, space)
    teacher = load_teacher()
    folder = Path(cache) if cache else target.with_suffix(".cache")
    filled = prepare(
        folder,
        photos,
        encoder,
        teacher,
        space="" if found is None else found.name,
        seed=recipe.seed,
    )
    work: AdapterRecipe | RgbRecipe
    if found is None:
        kind, config = ANY_VIEW, any_view_config()
        own = own_autoencoders(folder, photos, teacher)
        encoded = encode_all(folder / "encoded", filled, own, recipe.view_cells)
        work = ViewRecipe(filled, recipe, config, encoded)
    elif encoder is not None:
        kind, config = "adapter", {"channels": found.channels, "halving": KERNEL}
        work = AdapterRecipe(filled, recipe, config)
        set_halving(work.net, *halving(filled, encoder))
    else:
        kind, config = "rgb", rgb_config(found)
        work = RgbRecipe(filled, recipe, config)
    trainer = Trainer(work, target.with_suffix(".checkpoint"))
    net = trainer.run()
    save_nano(
        target,
        net,  # type: ignore[arg-type]
        kind=kind,
        config=config,
        name=name,
        space="" if found is None else found.name,
        card=card(name, found, encoder, filled.meta.done),
        class_names=class_names(),
        table=class_table(),
        prompts=stored_prompts(),
    )
    history = target.with_suffix(".history.json")
    history.write_text(json.dumps({"recipe": asdict(recipe), "history": trainer.history}, indent=1))
    picture = target.with_suffix(".png")
    plot_history(trainer.history, picture)
    return Result(target, history, picture, filled.meta.done)


def own_autoencoders(
    folder: Path, photos: Sequence[Path], teacher: Teacher
) -> list[tuple[Design, SmallAutoencoder]]:
    """The autoencoders to train a reader of views on; made where `folder` does not hold them."""
    return [
        (design, train_autoencoder(design, photos, teacher, folder / f"{design.name}.pt"))
        for design in DESIGNS
    ]


def any_view_config() -> dict[str, Any]:
    """RgbViewNet's configuration while it is trained: latents that are their own view."""
    identity = [[float(row == column) for column in range(3)] for row in range(3)]
    octaves = len(OCTAVES)
    return {"factors": identity, "bias": [0.0] * 3, "size": RGB_SIZE, "octaves": octaves}


def rgb_config(space: LatentSpace) -> dict[str, Any]:
    """RgbViewNet's configuration for a space with a published RGB view."""
    view = space.rgb_view
    if view is None:
        raise ModelError(f"space {space.name} has no published RGB view: give an autoencoder")
    if not view.scaled:
        raise ModelError(
            f"the RGB view of space {space.name} acts on raw latents, and a nano model reads "
            "scaled ones: give an autoencoder, or a view of scaled latents"
        )
    return {
        "factors": [list(row) for row in view.factors],
        "bias": list(view.bias),
        "size": RGB_SIZE,
    }


def _autoencoder(source: str | Path, space: str | Path | LatentSpace | None) -> Autoencoder:
    """Raises ModelError for one of other cells than the networks are made for."""
    found = load_autoencoder(source, space, device="cpu")
    if found.space.vae_scale_factor != FACTOR:
        raise ModelError(
            f"{source}: a cell of its latents is {found.space.vae_scale_factor} pixels wide; "
            f"models are made for cells of {FACTOR}"
        )
    return found


def _space(encoder: Autoencoder | None, name: str | Path | LatentSpace | None) -> LatentSpace:
    if encoder is not None:
        return encoder.space
    if name is None:
        raise ModelError("say which latent space (space=..., --space), or give an autoencoder")
    return LatentSpace.of(name)


def stored_prompts() -> list[str]:
    """Every prompt and contrast prompt of the shipped policies, and the neutral ones."""
    from latentguard.encoders.class_text import NEUTRAL_PROMPTS

    prompts = list(NEUTRAL_PROMPTS)
    for path in shipped_policies().values():
        policy = load_policy(path)
        for concept in policy.concepts:
            prompts += [*concept.prompts, *policy.contrast_of(concept)]
    return list(dict.fromkeys(prompts))


def card(name: str, space: LatentSpace | None, encoder: Autoencoder | None, photos: int) -> str:
    """The model's card in a few sentences, as reports show it."""
    limits = (
        "It sees what ImageNet's 1,000 classes span: objects and animals, not nudity, hate, gore "
        "or acts; concepts outside are marked as not visible."
    )
    if space is None:
        source = (
            "It reads only the linear RGB view of latents (3 numbers a cell, about an eighth of "
            f"the image's resolution) and was trained on {photos:,} photos and on views of small "
            "autoencoders made for it. Of the latent space that it is used on it saw nothing, and "
            "it recognizes less there than figures on photos say."
        )
    elif encoder is None:
        source = (
            f"It reads only the linear RGB view of {space.name} latents (3 numbers a cell, about "
            f"an eighth of the image's resolution) and was trained on {photos:,} photos "
            "downsampled to that size, not on latents of the autoencoder."
        )
    else:
        source = (
            f"It was trained on {photos:,} photos encoded by {encoder.name}; latents of another "
            f"autoencoder of the {space.name} space may differ."
        )
    return f"{name}: a student of EfficientNet-Lite2. {source} {limits}"


def plot_history(history: Sequence[dict[str, Any]], path: Path) -> None:
    """The training and validation loss of each stage over the images seen, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    stages = list(dict.fromkeys(entry["stage"] for entry in history))
    figure, axes = plt.subplots(1, max(1, len(stages)), figsize=(5 * max(1, len(stages)), 3.5))
    panels = [axes] if len(stages) <= 1 else list(axes)
    for panel, stage in zip(panels, stages, strict=False):
        rows = [entry for entry in history if entry["stage"] == stage]
        passes = [row["passes"] for row in rows]
        panel.plot(passes, [row["loss"] for row in rows], label="training", alpha=0.5)
        panel.plot(passes, [row["validation"] for row in rows], label="validation (average)")
        panel.set(title=f"stage: {stage}", xlabel="images seen", ylabel="loss", yscale="log")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
