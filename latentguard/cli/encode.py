"""`latentguard encode`: latents of pictures, as files or shards that every other command reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from latentguard.encode.run import Outcome, Task
    from latentguard.encode.sources import Sources

Dtype = Literal["float32", "bfloat16", "float16"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("encode", no_args_is_help=True)(encode)


def encode(
    pictures: Annotated[
        list[Path],
        typer.Argument(
            help="Folders, picture files, WebDataset shards (.tar), Parquet files, or datasets "
            "that Hugging Face's save_to_disk wrote."
        ),
    ],
    autoencoder: Annotated[
        str,
        typer.Option(
            help="An encoder file of madebyollin/taesd, a folder of a diffusers autoencoder or "
            "pipeline, or OWNER/NAME of one on the Hugging Face hub."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="A folder for WebDataset shards, or a file (.safetensors, .pt, .npy) if all "
            "latents fit in memory.",
        ),
    ],
    size: Annotated[
        str,
        typer.Option(
            help="Size in pixels that pictures are brought to: 512, 1024x768 (width x height), or "
            "original."
        ),
    ] = "512",
    crop: Annotated[
        Literal["center", "none", "resize"],
        typer.Option(
            help="center: crop the largest centered part with the shape of --size, and scale it. "
            "none: keep the whole picture and its shape; 512 is then its shorter side, and "
            "1024x768 a box that it fits in. resize: stretch the whole picture to --size."
        ),
    ] = "center",
    mode: Annotated[
        Literal["mean", "sample"],
        typer.Option(
            help="The autoencoder gives a distribution for each picture: write its mean, or a "
            "sample of it."
        ),
    ] = "mean",
    seed: Annotated[
        int,
        typer.Option(help="Seed for --mode sample. A sample depends on the seed and the picture."),
    ] = 0,
    space: Annotated[
        str | None,
        typer.Option(
            help="Latent space: a name from `latentguard spaces list`, or a file of your own. "
            "Needed if the autoencoder does not state it."
        ),
    ] = None,
    scaled: Annotated[
        bool | None,
        typer.Option(
            "--scaled/--unscaled",
            help="Write latents as the diffusion model denoises them, or as the VAE encodes them. "
            "Default: scaled, unless the autoencoder has an unusual scaling of its own.",
        ),
    ] = None,
    labels: Annotated[
        Literal["beside", "folder", "none"],
        typer.Option(
            help="Where labels come from. beside: KEY.cls in shards, label columns in tables. "
            "folder: the folder that a picture is in (ImageFolder). none: no labels."
        ),
    ] = "beside",
    image_column: Annotated[
        str | None,
        typer.Option(help="Column of a table that has the pictures. Needed if it is not certain."),
    ] = None,
    caption_column: Annotated[
        str | None, typer.Option(help="Column of a table that has the captions.")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of a table that has the labels.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of pictures of one size that are encoded together. Default: 1 on the CPU, "
            "8 elsewhere.",
        ),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Type that the autoencoder computes in (autocast).")
    ] = "float32",
    store: Annotated[Dtype, typer.Option(help="Type of the latents that are written.")] = "float32",
    device: Annotated[
        str | None,
        typer.Option(help="Device, such as cpu or cuda:0. Default: CUDA if there is a GPU."),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Number of threads that decode pictures.")
    ] = 2,
    shard_size: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Largest number of pictures in a shard.")
    ] = 1000,
    task: Annotated[
        str,
        typer.Option(
            metavar="K/N",
            help="Encode only the K-th of N shares, such as 2/8. All tasks write to one folder.",
        ),
    ] = "1/1",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in this folder where it stopped.")
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps the latents of each picture. A picture that is in it is not "
            "encoded again."
        ),
    ] = None,
    download: Annotated[
        bool,
        typer.Option(
            "--download", help="Allow the autoencoder to be downloaded from the Hugging Face hub."
        ),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first picture that cannot be encoded.")
    ] = False,
) -> None:
    """Encode pictures to latents, with their space, scaling, ids, captions and labels.

    `latentguard scan` and all other commands read the result without further options, except for
    a .npy file, which cannot state its space. Pictures that cannot be read are listed in a problems
    file, and the exit code is then 3.

    Example: latentguard encode photos/ --autoencoder taef2_encoder.pth --size 512 -o latents/
    """
    from latentguard.adapt.progress import Progress
    from latentguard.cli.exit_codes import EXIT_UNREADABLE
    from latentguard.encode.autoencoders import load_autoencoder
    from latentguard.encode.cache import Cache
    from latentguard.encode.encoding import Encoding, How
    from latentguard.encode.latents_file import SUFFIXES, encode_to_file
    from latentguard.encode.run import ShardRun
    from latentguard.encode.sources import find_sources
    from latentguard.encode.tables import Columns
    from latentguard.errors import UsageError

    share = _task(task)
    to_file = out.suffix.lower() in SUFFIXES
    if to_file and (share.of > 1 or resume):
        raise UsageError(
            "--task and --resume work on folders of shards: give -o a folder (for a file, --cache "
            "keeps what was encoded)"
        )
    if not to_file and out.suffix and not out.is_dir():
        raise UsageError(
            f"-o {out}: a latents file ends in {', '.join(SUFFIXES)}; a folder of shards has no "
            "ending"
        )
    columns = Columns(image_column, caption_column, label_column)
    sources = find_sources(pictures, labels, columns, group=shard_size)
    model = load_autoencoder(autoencoder, space, device=device, dtype=dtype, download=download)
    how = How.of(
        model, size=size, crop=crop, mode=mode, seed=seed, scaled=scaled, store=store,
        batch_size=batch_size,
    )  # fmt: skip
    kept = None if cache is None else Cache(cache)
    with Encoding(model, how, workers, kept) as encoding:
        if to_file:
            counts = [unit.count() for unit in sources.units]
            total = None if None in counts else sum(count or 0 for count in counts)
            with Progress("encoding", total) as progress:
                outcome = encode_to_file(
                    out, sources, encoding, strict=strict, advance=progress.advance
                )
        else:
            run = ShardRun(
                out, sources, encoding, shard_size=shard_size, task=share, resume=resume,
                strict=strict,
            )  # fmt: skip
            with Progress("encoding", run.total(), run.done()) as progress:
                outcome = run.run(progress.advance)
    _say(out, sources, outcome, to_file)
    if outcome.problems:
        raise typer.Exit(EXIT_UNREADABLE)


def _task(text: str) -> Task:
    from latentguard.encode.run import Task
    from latentguard.errors import UsageError

    found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"--task must be K/N with K from 1 to N, such as 2/8, got {text!r:.60}")
    return Task(int(found[1]), int(found[2]))


def _say(out: Path, sources: Sources, outcome: Outcome, to_file: bool) -> None:
    from latentguard.text import counted, visible

    where = "" if to_file else f" in {counted(outcome.shards, 'shard')}"
    typer.echo(f"{out}: latents of {counted(outcome.pictures, 'picture')}{where}")
    if sources.passed.counts:
        typer.echo(f"passed over, because they are not pictures: {sources.passed}", err=True)
    if outcome.problems:
        listed = out.with_suffix(".problems.jsonl") if to_file else out / "problems.jsonl"
        first = outcome.problems[0]
        typer.echo(
            visible(
                f"{counted(len(outcome.problems), 'picture')} could not be encoded (see "
                f"{listed}); the first: {first.source}: {first.error}",
                2000,
            ),
            err=True,
        )
