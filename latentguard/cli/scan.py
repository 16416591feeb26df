"""`latentguard scan`: moderate latents files, one verdict per image."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

import typer

from latentguard.cli.exit_codes import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, FailOn, of_scan
from latentguard.cli.scan_progress import ProgressKind
from latentguard.cli.scan_run import scan_run
from latentguard.errors import UsageError

if TYPE_CHECKING:
    from latentguard.scan import Report, Scan, Summary
    from latentguard.scan.lines import Sink
    from latentguard.scan.sampling import Draw
    from latentguard.scan.tally import Tally


Format = Literal["table", "json", "csv"]
"""How verdicts are written."""

Runtime = Literal["auto", "torch", "onnx"]
"""What judges."""

Views = Literal["whole", "crops"]
"""How images are read."""

Layout = Literal["spatial", "packed", "patches"]
"""How an array holds images: [C, H, W], tokens [N, C], or [C * 4, H/2, W/2]."""

Dtype = Literal["bfloat16", "float16", "float32", "uint8", "int8"]
"""What numbers without a type are."""


SinkName = Literal["parquet", "json"]
"""How a run's records are written."""

Keep = Literal["allow", "review", "block"]
"""Which samples a run copies."""

Engine = Literal["local", "ray"]
"""What scans a run."""

_MANY = "Many shards: a run"
_SAMPLE = "A random sample"
_PROGRESS = "Progress"
_SAID = "What files do not say about themselves"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("scan", no_args_is_help=True)(scan)


def scan(
    paths: list[str] = typer.Argument(
        None,
        metavar="PATH",
        help="Latents: files (.pt, .pth, .safetensors, .latent, .npy, .npz), WebDataset .tar "
        "shards, .parquet tables, MosaicML .mds shards, folders, glob patterns, ranges "
        "({000..099}), addresses (s3://...), @FILE with a list of paths, or - for a list on "
        "standard input.",
        show_default=False,
    ),
    policy: str | None = typer.Option(
        None,
        help="The name of a shipped policy, or a YAML file. An exported .onnx file has its own.",
        show_default="default",
    ),
    model: str = typer.Option(
        "auto",
        help="A name from `latentguard models list`, or a file. auto: the policy's own `model`, or "
        "else the best one on this machine for each latent space.",
    ),
    space: str | None = typer.Option(
        None,
        help="Latent space of files that do not say: a name from `latentguard spaces list`, or a "
        "file of your own (.yaml, .json).",
        rich_help_panel=_SAID,
    ),
    device: str | None = typer.Option(
        None, help="Device: cpu, cuda, cuda:1 and so on. Default: CUDA if there is a GPU."
    ),
    runtime: Runtime = typer.Option(
        "auto",
        help="Library that judges. onnx: ONNX Runtime without torch, for a packaged model or a "
        "--model FILE.onnx from `latentguard export onnx`. auto: torch if it is installed, unless "
        "the model is such a file.",
    ),
    sha256: str | None = typer.Option(
        None, help="SHA-256 that --model FILE.onnx must have; another file is refused."
    ),
    layout: Layout | None = typer.Option(
        None,
        help="Layout of the arrays, if neither the file nor their shape tells it. spatial: "
        "[C, H, W]. packed: tokens [N, C]. patches: [C * 4, H/2, W/2].",
        rich_help_panel=_SAID,
    ),
    height: int | None = typer.Option(
        None,
        min=1,
        help="Height, in latent cells, of packed latents that do not say.",
        rich_help_panel=_SAID,
    ),
    width: int | None = typer.Option(
        None,
        min=1,
        help="Width, in latent cells, of packed latents that do not say.",
        rich_help_panel=_SAID,
    ),
    pixels: bool = typer.Option(
        False,
        "--pixels",
        help="Heights and widths, here and in files, are in pixels and not in latent cells.",
        rich_help_panel=_SAID,
    ),
    key: str | None = typer.Option(
        None,
        metavar="NAME",
        help="Name of the array that holds the latents: a key of a dict (a/b for b in a), .npz or "
        ".safetensors, or a column of a table. Other arrays are skipped and counted.",
        rich_help_panel=_SAID,
    ),
    member: str | None = typer.Option(
        None,
        metavar="ENDING",
        help="How the names of shard members that hold latents end, after the sample's key, such "
        "as latents.npy or npy. Default: latent.pt and the like. Others are skipped and counted.",
        rich_help_panel=_SAID,
    ),
    moments: bool = typer.Option(
        False,
        "--moments",
        help="Arrays have twice the channels, means and then deviations. The means are judged.",
        rich_help_panel=_SAID,
    ),
    dequantize: str | None = typer.Option(
        None,
        metavar="SCALE,ZERO",
        help="Turn whole numbers into (number - ZERO) * SCALE. imagenet.int8 stands for the "
        "numbers of that data set.",
        rich_help_panel=_SAID,
    ),
    dtype: Dtype | None = typer.Option(
        None,
        help="Type of numbers whose file does not state one, such as bfloat16 from numpy.save.",
        rich_help_panel=_SAID,
    ),
    strict: bool = typer.Option(
        False,
        "--strict",
        help="Treat files that would be passed over, because they do not hold latents, as errors: "
        "captions, pictures, notes.",
        rich_help_panel=_SAID,
    ),
    scaled: bool | None = typer.Option(
        None,
        "--scaled/--unscaled",
        help="Scaling of files that do not say: as the diffusion model denoises the latents, or "
        "as the VAE encodes them.",
        show_default=False,
        rich_help_panel=_SAID,
    ),
    views: Views | None = typer.Option(
        None,
        help="whole: read each image as a whole. crops: also read overlapping crops, which finds "
        "small objects in large images and costs several times as much.",
        show_default="the policy's",
    ),
    taxonomy: list[str] = typer.Option(
        [],
        metavar="NAME",
        help="Also report verdicts in the categories of a published hazard scheme, as far as the "
        "policy is mapped to it: mlcommons, openai, azure, rekognition. May be repeated.",
        show_default=False,
    ),
    output_format: Format = typer.Option(
        "table", "--format", help="How verdicts are written: table, json (one per line) or csv."
    ),
    output: Path | None = typer.Option(
        None, "--output", "-o", help="Write the verdicts to this file, not to standard output."
    ),
    report: Path | None = typer.Option(
        None, metavar="FILE.html", help="Also write a self-contained HTML report."
    ),
    heatmap: bool = typer.Option(
        False, "--heatmap", help="Show in the report where in each image a concept is."
    ),
    max_cards: int = typer.Option(
        1000, min=1, help="Largest number of images that the report shows. All are counted."
    ),
    report_limit: int | None = typer.Option(
        None, "--report-limit", min=1, hidden=True, help="The former name of --max-cards."
    ),
    batch_size: int = typer.Option(
        16, min=1, max=4096, help="Number of images of one size that are scored together."
    ),
    fail_on: FailOn = typer.Option(
        "block", help="Mildest decision that gives exit code 1. never: no decision does."
    ),
    run_place: str | None = typer.Option(
        None,
        "--run",
        metavar="DIR",
        help="Scan shard by shard, each exactly once, and write the records to this folder or "
        "address.",
        rich_help_panel=_MANY,
    ),
    resume: bool = typer.Option(
        False, "--resume", help="Continue the run where it stopped.", rich_help_panel=_MANY
    ),
    sink: SinkName | None = typer.Option(
        None,
        help="Format of the records: Parquet or JSON lines.",
        show_default="parquet",
        rich_help_panel=_MANY,
    ),
    keep: Keep | None = typer.Option(
        None,
        help="Copy the samples with this decision, each with all of its members, to a new shard in "
        "the run.",
        rich_help_panel=_MANY,
    ),
    previews: bool = typer.Option(
        False,
        "--previews",
        help="Keep small pictures of the images that scored highest, for `latentguard scan "
        "report`.",
        rich_help_panel=_MANY,
    ),
    engine: Engine | None = typer.Option(
        None,
        help="What scans. local: processes on this machine. ray: a Ray cluster, at RAY_ADDRESS or "
        "else started here.",
        show_default="local",
        rich_help_panel=_MANY,
    ),
    actors: str | None = typer.Option(
        None,
        metavar="MIN:MAX",
        help="With --engine ray: number of processes that scan, each with its own model.",
        show_default="as many as fit into the cluster",
        rich_help_panel=_MANY,
    ),
    cpus_per_actor: float | None = typer.Option(
        None,
        help="With --engine ray: CPUs of each scanning process.",
        show_default="1",
        rich_help_panel=_MANY,
    ),
    gpus_per_actor: float | None = typer.Option(
        None,
        help="With --engine ray: GPUs of each scanning process, such as 0.25.",
        show_default="1 if there are any",
        rich_help_panel=_MANY,
    ),
    workers: int | None = typer.Option(
        None,
        min=0,
        help="Number of processes that read and decode. With 0 the process that scores also reads.",
        show_default="half of the cores, at most 4",
        rich_help_panel=_MANY,
    ),
    max_memory: str | None = typer.Option(
        None,
        metavar="SIZE",
        help="Largest size of the decoded latents that wait to be scored.",
        show_default="256MiB",
        rich_help_panel=_MANY,
    ),
    max_errors: int | None = typer.Option(
        None,
        min=0,
        help="Stop when more images or files than this could not be read or judged.",
        rich_help_panel=_MANY,
    ),
    task: str | None = typer.Option(
        None,
        metavar="K/N",
        help="Scan every N-th shard, starting at the K-th (counted from 0). Other tasks scan the "
        "rest into the same run.",
        rich_help_panel=_MANY,
    ),
    summary_file: Path | None = typer.Option(
        None,
        "--summary",
        metavar="FILE.json",
        help="Write the counts as a tally, for `latentguard scan report`.",
    ),
    sample: int | None = typer.Option(
        None,
        min=1,
        metavar="IMAGES",
        help="Look only at about this many images, drawn at random, and estimate the share of each "
        "decision with 95 % intervals.",
        rich_help_panel=_SAMPLE,
    ),
    sample_shards: int | None = typer.Option(
        None,
        min=1,
        help="Smallest number of files to draw the sample from. Each of them is read whole.",
        show_default="200",
        rich_help_panel=_SAMPLE,
    ),
    seed: int | None = typer.Option(
        None, help="Seed of the random draw.", show_default="0", rich_help_panel=_SAMPLE
    ),
    progress: ProgressKind = typer.Option(
        "auto",
        help="Progress on standard error: a bar, or JSON lines for logs. auto: a bar if it is a "
        "terminal.",
        rich_help_panel=_PROGRESS,
    ),
    progress_every: float = typer.Option(
        10.0,
        min=0.1,
        help="Seconds between two JSON lines of progress.",
        rich_help_panel=_PROGRESS,
    ),
    metrics_port: int | None = typer.Option(
        None,
        min=0,
        max=65535,
        help="Port on which to serve metrics for Prometheus while the scan runs.",
        rich_help_panel=_PROGRESS,
    ),
    metrics_host: str = typer.Option(
        "127.0.0.1", help="Address on which the metrics are served.", rich_help_panel=_PROGRESS
    ),
    quiet: bool = typer.Option(
        False, "--quiet", "-q", help="Show no progress bar, notes or summary. Errors still show."
    ),
) -> None:
    """Moderate latents files against a policy, without decoding anything.

    Files that trainers and curators write are recognized by the names in them. If a file leaves
    something open, the error says which option answers it: `--space sdxl --unscaled` for the cache
    of a trainer, `--member npy` for the KEY.npy of img2dataset, `--key NAME` for one of several
    arrays, `--layout packed --pixels --height 1024 --width 1024` for the tokens of a pipeline.

    `latentguard scan report PART... -o FILE.html` combines runs and summaries in one report:
    throughput, decisions, and what other thresholds would do. To scan a path called `report`, write
    `./report`.

    Exit codes: 0 no decision at or above --fail-on; 1 some decision is; 2 wrong usage, policy or
    model; 3 some input could not be read or judged (its record says why). 3 wins over 1.
    """
    reading: dict[str, Any] = {
        "space": space,
        "scaled": scaled,
        "layout": layout,
        "height": height,
        "width": width,
        "pixels": pixels,
        "key": key,
        "member": member,
        "moments": moments,
        "dequantize": dequantize,
        "dtype": dtype,
        "strict": strict,
    }
    run_options = {
        "resume": resume or None,
        "sink": sink,
        "keep": keep,
        "previews": previews or None,
        "engine": engine,
        "actors": actors,
        "cpus_per_actor": cpus_per_actor,
        "gpus_per_actor": gpus_per_actor,
        "workers": workers,
        "max_memory": max_memory,
        "max_errors": max_errors,
        "task": task,
    }
    if sample is None and (sample_shards is not None or seed is not None):
        raise UsageError("--sample-shards and --seed need --sample IMAGES")
    showing = {
        "kind": "none" if quiet and progress == "auto" else progress,
        "every": progress_every,
        "metrics_port": metrics_port,
        "metrics_host": metrics_host,
    }
    if run_place is not None:
        if report or output or heatmap or summary_file or output_format != "table":
            raise UsageError(
                "a run writes its records into its folder: leave out --report, --output, "
                "--heatmap, --summary and --format, and see --sink and `latentguard scan report`"
            )
        scan_run(
            run_place,
            paths or [],
            reading,
            {
                "policy": policy,
                "model": model,
                "runtime": runtime,
                "sha256": sha256,
                "views": views,
                "device": device,
                "batch_size": batch_size,
                "taxonomies": tuple(dict.fromkeys(taxonomy)),
                "sample": None if sample is None else _draw(sample, sample_shards, seed),
            },
            run_options,
            fail_on,
            quiet,
            showing,
        )
    said = [name for name, value in run_options.items() if value is not None]
    if said:
        raise UsageError(f"--{said[0].replace('_', '-')} belongs to a run: give --run DIR, too")
    from latentguard.files.lists import listed

    paths = list(listed(paths or [], sys.stdin))
    _check_targets(paths, output, report, summary_file, heatmap)
    if report_limit is not None:
        typer.echo("latentguard: --report-limit is now called --max-cards", err=True)
        max_cards = report_limit
    from latentguard.cli.console import abandon
    from latentguard.scan import Report, Scan, Summary
    from latentguard.scan.concept_tally import MAX_EXAMPLES
    from latentguard.scan.sampling import SPREAD
    from latentguard.scan.tally import Tally

    run = Scan(
        paths,
        policy,
        model,
        device=device,
        **reading,
        batch_size=batch_size,
        previews=report is not None or summary_file is not None,
        heatmaps=heatmap,
        runtime=runtime,
        sha256=sha256,
        views=views,
        taxonomies=taxonomy,
        sample=sample,
        sample_shards=SPREAD if sample_shards is None else sample_shards,
        seed=seed or 0,
    )
    summary = Summary(run.policy_id, passed=run.passed)
    page = Report(run.rules, max_cards) if report else None
    tally = Tally(run.policy_id, MAX_EXAMPLES) if summary_file else None
    try:
        _run(run, summary, page, tally, output_format, output, quiet, showing)
        if page is not None and report is not None and summary.images:
            page.write(report, run.models, summary)
        if tally is not None and summary_file is not None:
            _write_tally(summary_file, tally, run)
        if summary.images and not quiet:
            to_stdout = output_format == "table" and output is None
            _conclude(run, summary, report, summary_file, to_stdout)
    except KeyboardInterrupt:
        typer.echo(f"latentguard: interrupted after {summary.images} images", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        abandon()  # the reader has gone
        raise typer.Exit(EXIT_BROKEN_PIPE) from None
    except OSError as error:
        abandon()
        raise UsageError(
            f"cannot write {error.filename or 'the output'}: {error.strerror}"
        ) from error
    if not summary.images:
        raise UsageError("nothing was scanned: the paths hold no images")
    raise typer.Exit(of_scan(summary, fail_on))


def _draw(images: int, spread: int | None, seed: int | None) -> Draw:
    from latentguard.scan.sampling import SPREAD, Draw

    return Draw(images, SPREAD if spread is None else spread, seed or 0)


def _run(
    run: Scan,
    summary: Summary,
    page: Report | None,
    tally: Tally | None,
    output_format: Format,
    output: Path | None,
    quiet: bool,
    showing: Mapping[str, Any],
) -> None:
    """Every record to the sinks, with a progress bar where it disturbs nothing."""
    from latentguard.cli.scan_progress import Told, shown

    with ExitStack() as stack:
        file: TextIO = sys.stdout
        if output is not None:
            file = stack.enter_context(output.open("w", encoding="utf-8", newline=""))
        sink = _sink(output_format, file, run)
        rows_on_screen = output_format != "table" and file.isatty()
        began = time.time()
        with shown(disturbs=rows_on_screen, **showing) as progress:
            told = Told(progress, run.notes, quiet)
            for record in run:
                sink.add(record)
                summary.add(record)
                summary.seconds = run.seconds
                for also in (page, tally):
                    if also is not None:
                        also.add(record)
                told([record], run.phases)
        if tally is not None:
            tally.add_span(began, time.time())
        sink.close()


def _sink(output_format: Format, file: TextIO, run: Scan) -> Sink:
    from latentguard.scan.lines import Csv, JsonLines

    if output_format == "json":
        return JsonLines(file)
    if output_format == "csv":
        return Csv(file, run.rules, run.taxonomies)
    from latentguard.scan.table import Table

    return Table(file)


def _write_tally(path: Path, tally: Tally, run: Scan) -> None:
    from latentguard.scan.tally_file import write_tally

    for info in run.models:
        tally.note_model(info)
    tally.add_seconds(**run.phases)
    tally.sample = run.drawn
    write_tally(path, tally)


def _conclude(
    run: Scan, summary: Summary, report: Path | None, summary_file: Path | None, to_stdout: bool
) -> None:
    from latentguard.scan.estimates import sentences
    from latentguard.scan.text import visible

    drawn = sentences(run.drawn) if run.drawn is not None else []
    for line in filter(None, (summary.passed.line(), summary.line(), *drawn)):
        typer.echo(visible(line, 2000), err=not to_stdout)
    for name, path in (("report", report), ("summary", summary_file)):
        if path is not None:
            typer.echo(f"{name}: {visible(path.resolve(), 2000)}", err=not to_stdout)


def _check_targets(
    paths: list[str],
    output: Path | None,
    report: Path | None,
    summary: Path | None,
    heatmap: bool,
) -> None:
    """Find what cannot be written before an hour of scanning, and never write over latents."""
    from latentguard.files import SUFFIXES

    if heatmap and report is None:
        raise UsageError("heat maps are shown in the report: give --report FILE.html too")
    if report is not None and report.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--report must be a file that ends in .html, got {report}")
    if summary is not None and summary.suffix.lower() != ".json":
        raise UsageError(f"--summary must be a file that ends in .json, got {summary}")
    for option, target in (("--report", report), ("--output", output), ("--summary", summary)):
        if target is None:
            continue
        if (
            target.name.lower().endswith(SUFFIXES)
            or target.resolve().suffix in SUFFIXES
            or _is_one_of(target, paths)
        ):
            raise UsageError(f"{option} would write over latents: {target}")
        if target.is_dir():
            raise UsageError(f"{option} must be a file, {target} is a folder")
        if not target.parent.is_dir():
            raise UsageError(f"{option}: there is no folder {target.parent}")
        if not os.access(target if target.exists() else target.parent, os.W_OK):
            raise UsageError(f"{option}: {target} cannot be written")


def _is_one_of(target: Path, paths: list[str]) -> bool:
    """Whether a target is a path that is scanned, under whatever name or link."""
    return any(
        str(target) == path
        or (target.exists() and os.path.exists(path) and os.path.samefile(target, path))
        for path in paths
    )
