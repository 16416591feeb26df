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
            help="A folder, which gets WebDataset shards; or a file (.safetensors, .pt, .npy) for "
            "sets that fit in memory.",
        ),
    ],
    size: Annotated[
        str, typer.Option(help="Pixels: 512, 1024x768 (width x height), or original.")
    ] = "512",
    crop: Annotated[
        Literal["center", "none", "resize"],
        typer.Option(
            help="center: the largest part of that shape from the middle, scaled. none: the whole "
            "picture in its own shape; 512 is its shorter side, 1024x768 what it fits in. resize: "
            "the whole picture, stretched."
        ),
    ] = "center",
    mode: Annotated[
        Literal["mean", "sample"],
        typer.Option(help="Of the distribution that the autoencoder gives for a picture."),
    ] = "mean",
    seed: Annotated[
        int, typer.Option(help="With --mode sample; what is drawn depends on it and the picture.")
    ] = 0,
    space: Annotated[
        str | None,
        typer.Option(
            help="Latent space: a name of `latentguard spaces list`, or a file of your own. Needed "
            "where the autoencoder does not tell it."
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
            help="beside: KEY.cls of shards, label columns of tables. folder: the folder that a "
            "picture is in (ImageFolder)."
        ),
    ] = "beside",
    image_column: Annotated[
        str | None, typer.Option(help="Of tables: the column of pictures, where not certain.")
    ] = None,
    caption_column: Annotated[str | None, typer.Option(help="Of tables.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Of tables.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pictures of one size that are encoded together; else 1 on the CPU, 8 elsewhere.",
        ),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="In which the autoencoder computes (autocast).")
    ] = "float32",
    store: Annotated[Dtype, typer.Option(help="Type of the latents that are written.")] = "float32",
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:0; else CUDA where there is one.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode pictures.")] = 2,
    shard_size: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Pictures of a shard, at most.")
    ] = 1000,
    task: Annotated[
        str,
        typer.Option(
            metavar="K/N", help="The share of this process, such as 2/8; all write one folder."
        ),
    ] = "1/1",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the folder's run where it stopped.")
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder of latents by picture: what it holds is not encoded again."),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch an autoencoder of the hub if need be.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="End at the first picture that cannot be encoded.")
    ] = False,
) -> None:
    """Encode pictures to latents, with their space, scaling, ids, captions and labels.

    What is written is read by `latentguard scan` and every other command without options (a .npy
    says nothing of itself). Pictures that cannot be read are listed in a problems file; the exit
    code is then 3.

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
            "--task and --resume are of folders of shards: give -o a folder (a file goes on with "
            "what --cache holds)"
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
    from latentguard.text import visible

    where = "" if to_file else f" in {_counted(outcome.shards, 'shard')}"
    typer.echo(f"{out}: latents of {_counted(outcome.pictures, 'picture')}{where}")
    if sources.passed.counts:
        typer.echo(f"passed over, as they are no pictures: {sources.passed}", err=True)
    if outcome.problems:
        listed = out.with_suffix(".problems.jsonl") if to_file else out / "problems.jsonl"
        first = outcome.problems[0]
        typer.echo(
            visible(
                f"{_counted(len(outcome.problems), 'picture')} could not be encoded, listed in "
                f"{listed}; the first: {first.source}: {first.error}",
                2000,
            ),
            err=True,
        )


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"
