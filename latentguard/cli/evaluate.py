"""`latentguard evaluate`: measure a model or a policy on latents whose content is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from latentguard.cli.bar import Bar
from latentguard.cli.commands import Evaluations, ManyPaths
from latentguard.cli.pictures import (
    AutoencoderOption,
    DownloadOption,
    EncodedOption,
    Pictures,
    SizeOption,
)

if TYPE_CHECKING:
    from latentguard.evaluate.labels import Told

evaluate_app = typer.Typer(
    cls=Evaluations,
    no_args_is_help=True,
    help="Measure a model or a policy on latents whose content is known.",
)


Model = Annotated[
    str, typer.Option(help="Encoder: a name from `latentguard models list`, a path, or auto.")
]
Space = Annotated[str | None, typer.Option(help="Latent space, where the files do not say.")]
Scaled = Annotated[
    bool | None,
    typer.Option(
        "--scaled/--unscaled", help="The latents' convention, where the files do not say."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images that are encoded together.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0.")]
Plot = Annotated[Path | None, typer.Option(help="Write a plot: a .png, .svg or .pdf file.")]
Print = Annotated[
    Literal["table", "json"], typer.Option("--format", "-f", help="table, or one line of JSON.")
]


Names = Annotated[
    Path,
    typer.Option(
        help="Class names: one a line, LOC_synset_mapping.txt, or imagenet_class_index.json."
    ),
]
TemplateOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Text around a class name, {} for the name; may be repeated. Models whose text side "
        "names things (nano) take the bare name."
    ),
]
TemplatesOption = Annotated[
    Path | None,
    typer.Option(help="A file of them, one a line; also a list of Python's as CLIP has it."),
]


def templates_of(given: list[str] | None, file: Path | None) -> tuple[str, ...]:
    """What --template and --templates say. Raises ModelError for a file with another line."""
    from latentguard.evaluate.templates import read_templates
    from latentguard.evaluate.zeroshot import TEMPLATES

    found = (*(given or ()), *(() if file is None else read_templates(file)))
    return found or TEMPLATES


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(evaluate_app, name="evaluate")


@evaluate_app.command("zeroshot", no_args_is_help=True)
def zeroshot_(
    latents: Annotated[list[Path], typer.Argument(help="Latents: files, folders, shards.")],
    names: Names,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Each image's class, in the latents' order: a number (a line of --names, from 0), "
            "a synset or a name a line; or Kaggle's LOC_val_solution.csv. Without it images bring "
            "their labels: in a shard, a table, or by their folder."
        ),
    ] = None,
    synsets: Annotated[
        Path | None,
        typer.Option(help="Where --names has names alone: the synset of each, in a file of both."),
    ] = None,
    match: Annotated[
        Literal["auto", "number"],
        typer.Option(
            help="auto: what labels are called counts over their numbers. number: their numbers."
        ),
    ] = "auto",
    model: Model = "auto",
    template: TemplateOption = None,
    templates: TemplatesOption = None,
    space: Space = None,
    scaled: Scaled = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    plot: Plot = None,
    output: Print = "table",
    autoencoder: AutoencoderOption = None,
    size: SizeOption = None,
    encoded: EncodedOption = None,
    download: DownloadOption = False,
) -> None:
    """How often the most similar class name is the right one.

    With --generate PIPELINE the images are generated first, and the command is
    `latentguard evaluate generated`, whose --help has its options. PIPELINE may be the settings in
    a .yaml, or the word exact.

    Example: latentguard evaluate zeroshot imagenet/val --autoencoder sdxl-vae/ --names
    LOC_synset_mapping.txt --templates templates.txt
    """
    from latentguard.errors import UsageError
    from latentguard.evaluate import zeroshot as run
    from latentguard.evaluate.classes import read_classes
    from latentguard.evaluate.labels import resolve, told_of_file
    from latentguard.evaluate.plots import check_plot_path, plot_zeroshot

    if plot:
        check_plot_path(plot)
    classes = read_classes(names)
    if synsets is not None:
        classes = classes.with_synsets(read_classes(synsets))
    texts = templates_of(template, templates)
    pictures = Pictures(autoencoder, size, encoded, space, device, download)

    def told() -> list[Told]:
        from latentguard.evaluate.labels import told_of_latents, told_of_pictures

        if autoencoder is not None:
            return told_of_pictures(latents)
        with Bar("reading labels") as advance:
            return told_of_latents(pictures.latents(latents), space, scaled, advance)

    # Before anything is encoded, which takes hours for all of ImageNet.
    images = told() if labels is None else told_of_file(labels, told)
    right = resolve(images, classes, match == "number")
    found = pictures.latents(latents)
    with Bar("encoding") as advance:
        try:
            result = run(
                found,
                classes.names,
                right,
                model,
                templates=texts,
                space=space,
                scaled=scaled,
                batch_size=batch_size,
                device=device,
                progress=advance,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
    if plot:
        plot_zeroshot(plot, result)
    if output == "json":
        typer.echo(json.dumps(result.to_dict()))
        return
    rows = [("top-1", str(result.top(1))), ("top-5", str(result.top(5)))]
    rows += [("images", str(result.n)), ("classes", str(result.classes))]
    _table(f"{result.model} ({result.sha256[:12]})", rows)


@evaluate_app.command("detect", no_args_is_help=True, cls=ManyPaths)
def detect_(
    positives: Annotated[
        list[Path], typer.Option(metavar="PATH...", help="Latents that show the concept.")
    ],
    negatives: Annotated[
        list[Path], typer.Option(metavar="PATH...", help="Latents that do not show it.")
    ],
    policy: Annotated[str, typer.Option(help="A shipped policy's name, or a path.")],
    concept: Annotated[str, typer.Option(help="The id of one of its concepts.")],
    model: Model = "auto",
    space: Space = None,
    scaled: Scaled = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    resamples: Annotated[
        int, typer.Option(min=0, max=100_000, help="Of the bootstrap; 0 leaves intervals out.")
    ] = 1000,
    plot: Plot = None,
    output: Print = "table",
    autoencoder: AutoencoderOption = None,
    size: SizeOption = None,
    encoded: EncodedOption = None,
    download: DownloadOption = False,
) -> None:
    """How well a concept's scores tell images that show it from images that do not.

    One model is measured: of a policy's cascade the second, or the one that --model names.

    Example: latentguard evaluate detect --positives guns/ --negatives others/ --policy weapons
    --concept handguns --plot handguns.png
    """
    from latentguard.evaluate import detect as run
    from latentguard.evaluate.plots import check_plot_path, plot_detection

    if plot:
        check_plot_path(plot)
    pictures = Pictures(autoencoder, size, encoded, space, device, download)
    shows, shows_not = pictures.latents(positives), pictures.latents(negatives)
    with Bar("scoring") as advance:
        result = run(
            shows,
            shows_not,
            policy,
            concept,
            model,
            space=space,
            scaled=scaled,
            batch_size=batch_size,
            device=device,
            resamples=resamples,
            progress=advance,
        )
    if plot:
        plot_detection(plot, [result], f"{result.policy['name']}: {result.concept}")
    if output == "json":
        typer.echo(json.dumps(result.to_dict()))
        return
    found = result.separation
    rows = [
        ("AUROC", str(found.auroc)),
        ("average precision", str(found.average_precision)),
        ("false-positive rate at 95 % recall", str(found.fpr_at_recall)),
    ]
    if result.operating is not None:
        rows += [
            (f"recall at the policy's threshold ({result.operating.margin:.2f})",
             str(result.operating.recall)),
            ("false-positive rate there", str(result.operating.fpr)),
        ]  # fmt: skip
    rows += [("positives", str(found.positives)), ("negatives", str(found.negatives))]
    title = f"{result.policy['name']}: {result.concept}, by {result.model['name']}"
    _table(f"{title} ({result.model['sha256'][:12]})", rows)


def _table(title: str, rows: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(title), caption=escape("[low, high]: 95 % interval"), show_header=False
    )
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    Console().print(table)
