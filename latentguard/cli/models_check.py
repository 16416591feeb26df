"""`latentguard models check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentguard.cli.exit_codes import EXIT_FAILED
from latentguard.cli.models import Format, models_app
from latentguard.cli.pictures import DownloadOption, Pictures

if TYPE_CHECKING:
    from latentguard.encoders import Encoder
    from latentguard.evaluate.golden import Case, Golden
    from latentguard.spaces import Latents


def register(app: typer.Typer) -> None:
    """Add the command to those of `models`."""
    models_app.command("check")(check)


def check(
    name: Annotated[
        str, typer.Argument(help="A name from `latentguard models list`, or a model file.")
    ],
    autoencoder: Annotated[
        str | None,
        typer.Option(
            help="Check with pictures from scikit-image and other packages, encoded with this "
            "autoencoder (see `latentguard encode`)."
        ),
    ] = None,
    latents: Annotated[
        Path | None,
        typer.Option(help="Path of examples/latents.pt. Needed if this is not a checkout."),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            help="Latent space to check, if the model reads several: a name, or a file of your own."
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="With --autoencoder: size of the pictures in pixels. Default: 512."),
    ] = None,
    download: DownloadOption = False,
    device: Annotated[
        str | None, typer.Option(help="Device that the model runs on, such as cpu or cuda:0.")
    ] = None,
    output: Annotated[
        Format, typer.Option("--format", help="Print lines, or one JSON object.")
    ] = "table",
) -> None:
    """Check on unmistakable pictures whether a model works as it should.

    This finds wrong or damaged weights, latents that are read in the wrong scaling, and precision
    that is too low.

    Exit codes: 0 no check failed; 1 a check failed.

    Example: latentguard models check latent-clip-b4-plus --autoencoder path/to/sdxl-vae
    """
    from latentguard.encoders import load_encoder
    from latentguard.errors import UsageError
    from latentguard.evaluate.golden import check_model
    from latentguard.spaces import LatentSpace

    if autoencoder is not None and latents is not None:
        raise UsageError("--latents are already encoded: give either them or --autoencoder")
    # A space of one's own is known by its name from here on.
    encoder = load_encoder(name, device, None if space is None else LatentSpace.of(space))
    if autoencoder is None:
        given = _bundled(encoder, latents)
        if size is not None or download:
            raise UsageError("--size and --download are about pictures: give --autoencoder, too")
    else:
        given = _encoded(Pictures(autoencoder, size, None, encoder.space, device, download))
    found = check_model(encoder, *given)
    if output == "json":
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _print(found)
    if not found.passed:
        raise typer.Exit(EXIT_FAILED)


def _bundled(encoder: Encoder, path: Path | None) -> tuple[Latents, list[Case | None]]:
    """The latents of examples/latents.pt. Raises UsageError where they are not there, or do not
    fit the model."""
    import latentguard
    from latentguard.errors import UsageError
    from latentguard.evaluate.golden import bundled_cases
    from latentguard.files import load_latents

    path = path or Path(latentguard.__file__).parents[1] / "examples" / "latents.pt"
    if not path.is_file():
        raise UsageError(
            f"{path}: there is no such file: say where the repository's examples/latents.pt is "
            "(--latents), or give --autoencoder, which encodes pictures"
        )
    found = load_latents(path)
    if found.space.name != encoder.space:
        raise UsageError(
            f"model {encoder.name} reads {encoder.space} latents and {path} has "
            f"{found.space.name} ones: give --autoencoder, which encodes pictures"
        )
    return found, bundled_cases(found.ids or ())


def _encoded(pictures: Pictures) -> tuple[Latents, list[Case | None]]:
    from latentguard.evaluate.golden import picture_cases

    paths, cases = zip(*picture_cases(), strict=True)
    found = pictures.encoded(paths)
    assert found is not None  # there is an autoencoder
    return found.latents(), list(cases)


_MARKS = {True: "passed", False: "FAILED", None: "unknown"}


def _print(found: Golden) -> None:
    for one in found.checks:
        typer.echo(f"{one.name:<16} {_MARKS[one.passed]:<9} {one.found}")
        if one.do:
            typer.echo(f"{'':<16} {'':<9} {one.do}")
    for picture in found.to_dict()["pictures"]:
        if picture.get("margin", 1) <= 0:
            typer.echo(
                f"{picture['id']}: expected {picture['text']}, but {picture['best']} scores higher "
                f"({picture['margin']:.2f} logits)"
            )
    if found.asked.left_out:
        typer.echo(f"left out, because no text fits: {', '.join(found.asked.left_out)}")
    encoder = found.encoder
    said = "works as it should" if found.passed else "must NOT be trusted"
    typer.echo(f"{encoder.name} ({encoder.sha256[:12]}) on {encoder.space} {said}")
