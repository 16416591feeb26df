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
Space = Annotated[
    str | None, typer.Option(help="Latent space of the latents, if the files do not say.")
]
Scaled = Annotated[
    bool | None,
    typer.Option(
        "--scaled/--unscaled",
        help="Scaling of the latents, if the files do not say: as the diffusion model denoises "
        "them, or as the VAE encodes them.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Number of images that are encoded together.")]
Device = Annotated[
    str | None, typer.Option(help="Device that the models run on, such as cpu or cuda:0.")
]
Plot = Annotated[Path | None, typer.Option(help="Write a plot to this .png, .svg or .pdf file.")]
Print = Annotated[
    Literal["table", "json"],
    typer.Option("--format", "-f", help="Print a table, or one line of JSON."),
]


Names = Annotated[
    Path,
    typer.Option(
        help="Class names: a file with one name per line, LOC_synset_mapping.txt, or "
        "imagenet_class_index.json."
    ),
]
TemplateOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Text around a class name, with {} in its place. May be repeated. The nano models "
        "compare names with names, and use the name alone."
    ),
]
TemplatesOption = Annotated[
    Path | None,
    typer.Option(
        help="A file with one template per line, or with a Python list of templates as CLIP has."
    ),
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
    latents: Annotated[
        list[Path],
        typer.Argument(help="Files, folders or shards of latents; of pictures with --autoencoder."),
    ],
    names: Names,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="A file with the class of each image, one per line, in the order of the latents: "
            "a number (a line of --names, from 0), a synset or a name. Kaggle's "
            "LOC_val_solution.csv works too. Without this option the labels come with the images, "
            "from a shard, a table, or the folder that an image is in."
        ),
    ] = None,
    synsets: Annotated[
        Path | None,
        typer.Option(
            help="If --names has no synsets: a file of synsets and names, line by line the same."
        ),
    ] = None,
    match: Annotated[
        Literal["auto", "number"],
        typer.Option(
            help="If a label has a number and a name: auto goes by the name, number by the number."
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
    """Measure how often the most similar class name is the right one.

    With --generate PIPELINE the images are generated first. This runs the command
    `latentguard evaluate generated`, and its --help lists the options. PIPELINE may also be a .yaml
    file of settings, or the word exact.

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
    policy: Annotated[str, typer.Option(help="The name of a shipped policy, or a YAML file.")],
    concept: Annotated[str, typer.Option(help="The id of the policy's concept that is measured.")],
    model: Model = "auto",
    space: Space = None,
    scaled: Scaled = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    resamples: Annotated[
        int,
        typer.Option(
            min=0,
            max=100_000,
            help="Bootstrap resamples that the intervals come from; 0 leaves the intervals out.",
        ),
    ] = 1000,
    plot: Plot = None,
    output: Print = "table",
    autoencoder: AutoencoderOption = None,
    size: SizeOption = None,
    encoded: EncodedOption = None,
    download: DownloadOption = False,
) -> None:
    """Measure how well a concept's scores tell images that show it from images that do not.

    One model is measured. If the policy has a cascade, this is its second model, or the one that
    --model names.

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
