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
    help="Concepts that no words are needed for: learn them from examples, test, show and merge.",
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
    name: Annotated[str, typer.Argument(help="What verdicts call it; stands before the options.")],
    positives: Positives,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="The concept's file (.safetensors). Of a file that is there, other models' "
            "entries are kept and this model's is replaced.",
        ),
    ],
    negatives: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH...",
            help="Examples that do not show it, best of what will be scanned, and of what it could "
            "be taken for. Without them the package's photos of everyday things are used, which "
            "there are for nano-flux2, and for nano-view on FLUX.2 latents.",
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
            help="Keep the sums that `concept merge` needs. They tell more of the examples.",
        ),
    ] = True,
    seed: Annotated[int, typer.Option(help="Of the folds of cross-validation.")] = 0,
    device: Device = None,
    output: Print = "table",
) -> None:
    """Learn a concept from examples, and say what can be expected of it.

    The file holds a linear head over what the model sees, and figures of examples that were held
    out, never a picture. A policy names it: `examples: FILE`.

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
    file: Annotated[Path, typer.Argument(help="A concept's file; stands before the options.")],
    positives: Positives,
    negatives: Annotated[
        list[Path],
        typer.Option(metavar="PATH...", help="Examples that do not show it."),
    ],
    model: Model = "auto",
    probability: Annotated[
        float | None,
        typer.Option(help="The policy's threshold, as a probability. Default: 0.5."),
    ] = None,
    margin: Annotated[
        float | None, typer.Option(help="The policy's threshold, as a margin instead.")
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

    Lists the positives that are missed and the negatives that match. Only new examples tell
    anything: of those that it was learned from it knows too much.

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
    """Show what a concept's file holds: models, numbers of examples, figures, warnings."""
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
    files: Annotated[list[Path], typer.Argument(help="Files of one concept, two or more.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    name: Annotated[
        str | None, typer.Option(help="Its name; needed where the files' names differ.")
    ] = None,
) -> None:
    """Put files of one concept together: other models side by side, the same model's examples
    added up.

    No example is needed again: files keep sums of them, from which the head of all is solved. What
    cross-validation said of the parts does not hold for it: measure it with `concept test`.

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
