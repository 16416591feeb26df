"""`latentguard adapt`: make an encoder for a latent space from a folder of photos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("adapt", no_args_is_help=True)(adapt)


def adapt(
    images: Annotated[list[Path], typer.Argument(help="Folders of photos. They need no labels.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Model file to write (.safetensors).")],
    name: Annotated[
        str | None,
        typer.Option(help="The model's name in verdicts. Default: the name of the file."),
    ] = None,
    autoencoder: Annotated[
        Path | None,
        typer.Option(
            help="The autoencoder that encodes the photos: an encoder file of madebyollin/taesd, "
            "or a folder with a diffusers autoencoder. Without it the model reads the RGB view of "
            "--space."
        ),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            help="Latent space: a name from `latentguard spaces list`, or a file of your own "
            "(.yaml, .json). Needed if the autoencoder does not make it certain."
        ),
    ] = None,
    view: Annotated[
        bool,
        typer.Option(
            "--view",
            help="Make one model for every space that has a linear RGB view. It is trained on "
            "views of small autoencoders, which are made first. The space is named when the model "
            "is loaded.",
        ),
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps crops, latents and targets (0.4 MB per photo)."),
    ] = None,
    adapter_passes: Annotated[
        int | None, typer.Option(help="Number of images that the adapter alone is trained on.")
    ] = None,
    joint_passes: Annotated[
        int | None, typer.Option(help="Number of images that the whole model is trained on.")
    ] = None,
    view_passes: Annotated[
        int | None,
        typer.Option(help="With --view: number of images that it is trained on as such views."),
    ] = None,
    hold_out: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Keep photos out of training, for evaluation: those whose file name ends in a "
            "number that is a multiple of this.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of crops, order and noise.")] = 0,
) -> None:
    """Make an encoder for a latent space by training a small student of a pixel-space network.

    The photos are cropped, encoded and labeled by the teacher once, and this is kept in --cache.
    Then the student is trained on them. If you interrupt the command, repeat it to continue where
    it stopped. On two CPU cores, 5,000 photos take about half an hour to encode and an hour to
    train.

    Example: latentguard adapt photos/ --autoencoder taef2_encoder.pth -o my-flux2.safetensors
    """
    from dataclasses import replace

    from latentguard.adapt.hold_out import held_out
    from latentguard.adapt.run import adapt as run
    from latentguard.adapt.train import Recipe

    given: dict[str, Any] = {
        "adapter_passes": adapter_passes,
        "joint_passes": joint_passes,
        "view_passes": view_passes,
        "seed": seed,
    }
    recipe = replace(Recipe(), **{key: value for key, value in given.items() if value is not None})
    result = run(
        images,
        out,
        name=name or out.stem,
        space=space,
        autoencoder=autoencoder,
        any_view=view,
        cache=cache,
        recipe=recipe,
        keep=lambda path: hold_out is None or not held_out(path, hold_out),
    )
    typer.echo(
        f"{result.model}: trained on {result.images} photos; the training curve is in "
        f"{result.plot} and {result.history}"
    )
