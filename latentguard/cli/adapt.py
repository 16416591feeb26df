"""`latentguard adapt`: make an encoder for a latent space from a folder of photos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("adapt", no_args_is_help=True)(adapt)


def adapt(
    images: Annotated[list[Path], typer.Argument(help="Folders of photos; labels not needed.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Model file to write (.safetensors).")],
    name: Annotated[str | None, typer.Option(help="Name in verdicts; else the file's.")] = None,
    autoencoder: Annotated[
        Path | None,
        typer.Option(
            help="What encodes the photos: an encoder file of madebyollin/taesd, or a folder of "
            "diffusers' AutoencoderKL. Without it the model reads the RGB view of --space."
        ),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            help="Latent space: a name of `latentguard spaces list`, or a file of your own (.yaml, "
            ".json). Needed where not certain."
        ),
    ] = None,
    view: Annotated[
        bool,
        typer.Option(
            "--view",
            help="One model for every space that has a linear RGB view, trained on views of small "
            "autoencoders that are made first; the space is said when it is loaded.",
        ),
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder for crops, latents and targets (0.4 MB a photo)."),
    ] = None,
    adapter_passes: Annotated[
        int | None, typer.Option(help="Images seen while training the adapter alone.")
    ] = None,
    joint_passes: Annotated[
        int | None, typer.Option(help="Images seen while training all of it.")
    ] = None,
    filter_passes: Annotated[
        int | None, typer.Option(help="With --view: images seen while training the filter alone.")
    ] = None,
    view_passes: Annotated[
        int | None, typer.Option(help="With --view: images seen while training on such views.")
    ] = None,
    hold_out: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Leave out photos whose file name's last number is a multiple of this, for "
            "evaluation.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of crops, order and noise.")] = 0,
) -> None:
    """Make an encoder for a latent space: a small student of a pixel-space network.

    Photos are cropped, encoded and labeled by the teacher once (kept in --cache); then the
    student is trained on them. Interrupt and repeat the command to go on where it stopped. On two
    CPU cores 5,000 photos take about half an hour to encode and an hour to train.

    Example: latentguard adapt photos/ --autoencoder taef2_encoder.pth -o my-flux2.safetensors
    """
    from dataclasses import replace

    from latentguard.adapt.hold_out import held_out
    from latentguard.adapt.run import adapt as run
    from latentguard.adapt.train import Recipe

    given: dict[str, Any] = {
        "adapter_passes": adapter_passes,
        "joint_passes": joint_passes,
        "filter_passes": filter_passes,
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
        f"{result.model}: trained on {result.images} photos; curve in {result.plot} and "
        f"{result.history}"
    )
