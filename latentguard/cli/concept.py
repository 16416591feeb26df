"""`latentguard concept`: concepts of one's own, learned from examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentguard.cli.commands import ManyPaths
from latentguard.cli.evaluate import Device, Model, Print, Scaled, Space
from latentguard.cli.pictures import (
    AutoencoderOption,
    DownloadOption,
    EncodedOption,
    Pictures,
    SizeOption,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from latentguard.encoders import Encoder
    from latentguard.learn import Examples
    from latentguard.learn.examples import Named

concept_app = typer.Typer(
    no_args_is_help=True,
    help="Concepts that are learned from examples instead of prompts: learn, test, show, merge.",
)

Positives = Annotated[
    list[Path],
    typer.Option(
        metavar="PATH...",
        help="Examples that show the concept: latents (files, folders, shards), or pictures with "
        "--autoencoder. 20 different ones are a good start.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(concept_app, name="concept")


@concept_app.command("learn", no_args_is_help=True, cls=ManyPaths)
def teach(
    name: Annotated[
        str, typer.Argument(help="The concept's name in verdicts. Write it before the options.")
    ],
    positives: Positives,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="The concept's file (.safetensors). If it exists, the entry of this model is "
            "replaced, and the entries of other models are kept.",
        ),
    ],
    negatives: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH...",
            help="Examples that do not show the concept. The best ones are images like those that "
            "will be scanned, and things that look similar to the concept. Without them, the "
            "package's photos of everyday things are used. They exist for nano-flux2, and for "
            "nano-view on FLUX.2 latents.",
        ),
    ] = None,
    model: Model = "auto",
    space: Space = None,
    scaled: Scaled = None,
    autoencoder: AutoencoderOption = None,
    size: SizeOption = None,
    encoded: EncodedOption = None,
    download: DownloadOption = False,
    sums: Annotated[
        bool,
        typer.Option(
            "--sums/--no-sums",
            help="Keep the sums that `concept merge` needs. They reveal more about the examples "
            "than the concept alone.",
        ),
    ] = True,
    seed: Annotated[
        int, typer.Option(help="Seed that divides the examples for cross-validation.")
    ] = 0,
    device: Device = None,
    output: Print = "table",
) -> None:
    """Learn a concept from examples, and report how well it can be expected to work.

    The file has a linear head on the model's features, and figures measured on held-out examples.
    It never has a picture. A policy uses it by `examples: FILE`.

    Example: latentguard concept learn cigarette --positives smoking/ --negatives others/
    --model nano-flux2 -o cigarette.safetensors
    """
    from latentguard.cli.concept_tables import lesson_table
    from latentguard.learn import learn
    from latentguard.learn.files import entries_there, put

    entries_there(out, name)  # before the minutes that encoding may take
    pictures = Pictures(autoencoder, size, encoded, space, device, download)
    sides, encoder = _read([positives, negatives or []], pictures, model, space, scaled, device)
    lesson = learn(sides[0], sides[1] if negatives else None, encoder, seed=seed, sums=sums)
    file, replaced = put(out, name, lesson.learned)
    if output == "json":
        entry = lesson.learned
        values = {"concept": name, "file": str(out), "sha256": file.sha256, "replaced": replaced}
        typer.echo(json.dumps(values | _about(entry)))
        return
    lesson_table(name, out, lesson, replaced)


@concept_app.command("test", no_args_is_help=True, cls=ManyPaths)
def measure(
    file: Annotated[Path, typer.Argument(help="A concept's file. Write it before the options.")],
    positives: Positives,
    negatives: Annotated[
        list[Path],
        typer.Option(metavar="PATH...", help="Examples that do not show the concept."),
    ],
    model: Model = "auto",
    probability: Annotated[
        float | None,
        typer.Option(help="The threshold of your policy, as a probability. Default: 0.5."),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(help="The threshold of your policy, as a margin instead of a probability."),
    ] = None,
    space: Space = None,
    scaled: Scaled = None,
    autoencoder: AutoencoderOption = None,
    size: SizeOption = None,
    encoded: EncodedOption = None,
    download: DownloadOption = False,
    device: Device = None,
    output: Print = "table",
) -> None:
    """Measure a learned concept on examples that it was not learned from.

    This lists the positives that are missed and the negatives that match. Use new examples: on the
    ones that it was learned from, a concept looks better than it is.

    Example: latentguard concept test cigarette.safetensors --positives new/ --negatives harmless/
    """
    from latentguard.cli.concept_tables import tested_table
    from latentguard.learn import try_out
    from latentguard.learn.testing import margin_of
    from latentguard.policy.examples import load_concept

    concept = load_concept(file)
    pictures = Pictures(autoencoder, size, encoded, space, device, download)
    sides, encoder = _read([positives, negatives], pictures, model, space, scaled, device)
    entry = concept.entry(encoder.name, encoder.sha256, encoder.space)
    at = margin_of(probability, margin, encoder.logit_scale)
    tested = try_out(entry, sides[0], sides[1], encoder, at)
    if output == "json":
        typer.echo(json.dumps({"concept": concept.name, **tested.to_dict()}))
        return
    tested_table(concept.name, tested)


@concept_app.command("show", no_args_is_help=True)
def show(
    file: Annotated[Path, typer.Argument(help="A concept's file.")],
    output: Print = "table",
) -> None:
    """Show the contents of a concept's file: models, numbers of examples, figures, warnings."""
    from latentguard.cli.concept_tables import concept_table
    from latentguard.policy.examples import load_concept

    concept = load_concept(file)
    if output == "json":
        values = {"concept": concept.name, "sha256": concept.sha256}
        typer.echo(json.dumps(values | {"entries": [_about(e) for e in concept.entries]}))
        return
    concept_table(concept)


@concept_app.command("merge", no_args_is_help=True)
def put_together(
    files: Annotated[list[Path], typer.Argument(help="Two or more files of the same concept.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    name: Annotated[
        str | None,
        typer.Option(help="The concept's name. Needed if the files have different names for it."),
    ] = None,
) -> None:
    """Merge files of one concept into one file.

    Entries of different models are kept side by side. For the same model, the examples are added
    up. This needs no example again, because the files keep sums of them, and the merged head is
    solved from these. The cross-validation figures of the parts do not hold for the merged head:
    measure it with `concept test`.

    Example: latentguard concept merge january.safetensors february.safetensors -o both.safetensors
    """
    from latentguard.cli.concept_tables import concept_table
    from latentguard.learn import merge
    from latentguard.learn.files import check_ending, common_name
    from latentguard.policy.examples import load_concept, write_concept

    check_ending(out)
    concepts = [load_concept(file) for file in files]
    chosen = common_name(concepts, name)
    concept_table(write_concept(out, chosen, merge(concepts)))
    typer.echo(f"wrote {out}")


def _about(entry: Any) -> dict[str, Any]:
    return {
        "model": {"name": entry.model, "sha256": entry.model_sha256},
        "space": entry.space,
        "features": entry.features,
        "positives": entry.positives,
        "negatives": entry.negatives,
        "background": entry.background,
        "can_be_merged": bool(entry.statistics),
        "figures": dict(entry.figures),
    }


def _read(
    sides: list[list[Path]],
    pictures: Pictures,
    model: str,
    space: str | None,
    scaled: bool | None,
    device: str | None,
) -> tuple[list[Examples], Encoder]:
    """The examples of both sides, and the encoder that read them; a side may be empty."""
    from latentguard.cli.bar import Bar
    from latentguard.learn.examples import encoder_for, examples, known_space

    found: list[Examples] = []
    encoder: Encoder | None = None
    for paths, side in zip(sides, ("positives", "negatives"), strict=True):
        if not paths:
            continue
        images = _images(paths, pictures, space, scaled)
        with Bar(side) as advance:
            first, images = known_space(images, side)
            encoder = encoder or encoder_for(model, first, device)
            found.append(examples(images, encoder, side, advance))
    assert encoder is not None
    return found, encoder


def _images(
    paths: list[Path], pictures: Pictures, space: str | None, scaled: bool | None
) -> Iterator[Named]:
    from latentguard.files import Reading
    from latentguard.learn.examples import Named, of_files

    encoded = pictures.encoded(paths)
    if encoded is None:
        return of_files(paths, Reading.of(space, scaled))
    return (Named(one.sample.source, one.latents()) for one in encoded)
