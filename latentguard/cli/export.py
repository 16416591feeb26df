"""`latentguard export`: a policy and a model as one file for services that have no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from latentguard.export import Exported
    from latentguard.spaces import Latents

export_app = typer.Typer(
    no_args_is_help=True,
    help="Write a policy and a model as one file that a service runs without torch.",
)


Precision = Literal["fp32", "fp16", "int8"]
"""How weights and activations are kept."""

Device = Literal["auto", "cpu", "gpu"]
"""Where a Triton server computes the scores."""

Policy = Annotated[str, typer.Option(help="The name of a shipped policy, or a YAML file.")]
Sha256 = Annotated[str | None, typer.Option(help="Refuse the file unless its SHA-256 is this one.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(export_app, name="export")


@export_app.command("onnx", no_args_is_help=True)
def onnx_(
    model: Annotated[
        str, typer.Option(help="Encoder: a name from `latentguard models list`, or a file.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .onnx file to write.")],
    policy: Policy = "default",
    precision: Annotated[
        Precision,
        typer.Option(
            help="Precision of weights and activations: fp32, fp16 for GPUs, or int8 for CPUs, "
            "which is calibrated on --calibration. Without --calibration, int8 finds the range of "
            "each activation from each input (see --dynamic-quantization)."
        ),
    ] = "fp32",
    first_precision: Annotated[
        Precision | None,
        typer.Option(
            help="Precision of the first model, if the policy has a cascade. Default: that of "
            "--precision.",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            help="Latents to calibrate int8 on. Use 32 to 256 images like those that it will "
            "judge. May be repeated."
        ),
    ] = None,
    dynamic_quantization: Annotated[
        bool,
        typer.Option(
            "--dynamic-quantization",
            help="With int8: take the ranges of activations from each input. The weights are "
            "still calibrated on --calibration.",
        ),
    ] = False,
    check: Annotated[
        list[Path] | None,
        typer.Option(
            help="Real latents on which the file is compared with PyTorch before it is written. "
            "May be repeated. Default: the bundled ones, which are FLUX.2 latents."
        ),
    ] = None,
    scaled: Annotated[
        bool,
        typer.Option(
            "--scaled/--unscaled",
            help="Scaling of the latents that the file will read: as a pipeline denoises them, or "
            "as the VAE encodes them.",
        ),
    ] = True,
    height: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Fixed height in latent cells (pixels / 8). Default: any height. The nano models "
            "need a fixed size.",
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(min=1, help="Fixed width in latent cells. Default: any width."),
    ] = None,
    heatmaps: Annotated[
        bool,
        typer.Option("--heatmaps", help="Also output the margins over the encoder's grid."),
    ] = False,
    merge_tokens: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Merge this share of a Latent-CLIP's tokens into similar ones (ToMe). This is "
            "faster, but it is another model; how far its results differ is printed. Off by "
            "default. Needs --height and --width. The same as +merge=SHARE after the name in "
            "--model.",
        ),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            help="The latent space, if the model reads several (nano-view). For a model of your "
            "own it may be a file (.yaml, .json)."
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the SHA-256.")] = False,
) -> None:
    """Write a policy and a model as one .onnx file of standard operators.

    The file has the model, the policy, the embeddings of its prompts and its thresholds.
    `latentguard.runtime.Guard` gives verdicts with it, and needs only NumPy and ONNX Runtime.
    Before the file is written, its scores and verdicts are compared with PyTorch's on real latents.
    Pin the SHA-256 that is printed.

    If the policy has a cascade, its first model is written to NAME.first.onnx next to the file. The
    SHA-256 pins that file, too.

    Example: latentguard export onnx --policy family --model nano-flux2 --height 64 --width 64
    -o guard.onnx
    """
    from latentguard.errors import UsageError
    from latentguard.export import export_onnx

    if (height is None) != (width is None):
        raise UsageError("give both --height and --width, or neither")
    int8 = "int8" in (precision, first_precision)
    if not int8 and (calibration or dynamic_quantization):
        raise UsageError(
            f"--calibration and --dynamic-quantization need --precision int8, got {precision}"
        )
    _check_target(out)
    if int8 and not calibration and not dynamic_quantization:
        _say(quiet, "no --calibration given: the ranges of activations come from each input")
        dynamic_quantization = True
    from latentguard.encoders import load_encoder, needs_space
    from latentguard.encoders.catalog import MERGE

    if merge_tokens is not None:
        model = f"{model}{MERGE}{merge_tokens}"
    if space is not None:
        from latentguard.spaces import LatentSpace

        own = LatentSpace.of(space)
        own.check_standard("an exported file")
        space = own.name  # a file's space is known by its name from here on
    encoder = load_encoder(model, "cpu", space if needs_space(model) else None)
    result = export_onnx(
        policy,
        encoder,
        out,
        precision=_precision(precision, dynamic_quantization),
        first_precision=(
            None if first_precision is None else _precision(first_precision, dynamic_quantization)
        ),
        size=None if height is None or width is None else (height, width),
        scaled=scaled,
        space=space,
        heatmaps=heatmaps,
        check=_latents(check, encoder.space),
        calibrate=_latents(calibration, encoder.space),
        progress=lambda step: _say(quiet, step),
    )
    _print(result, quiet)


@export_app.command("swap", no_args_is_help=True)
def swap(
    source: Annotated[Path, typer.Argument(help="A file that `latentguard export onnx` wrote.")],
    policy: Policy,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file to write. Default: the source is replaced."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The model that the source was exported from, if it is a file and has no name. It "
            "embeds the prompts."
        ),
    ] = None,
    sha256: Sha256 = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the SHA-256.")] = False,
) -> None:
    """Give an exported file another policy, without exporting the model again.

    This takes seconds. The concept bank, the thresholds and the hashes change, but the network does
    not. The new file has another SHA-256 to pin. If there is a cascade, both of its files change.

    Example: latentguard export swap guard.onnx --policy stricter.yaml -o stricter.onnx
    """
    from latentguard.export import swap_policy

    target = out or source
    _check_target(target)
    digest = swap_policy(source, policy, target, model, sha256=sha256)
    _say(quiet, f"wrote {target}")
    typer.echo(digest if quiet else f"sha256 {digest}")


@export_app.command("triton", no_args_is_help=True)
def triton(
    source: Annotated[Path, typer.Argument(help="A file that `latentguard export onnx` wrote.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="The folder of the model repository. It may exist already."
        ),
    ],
    name: Annotated[str, typer.Option(help="Name of the model that clients call.")] = "latentguard",
    version: Annotated[
        int, typer.Option(min=1, help="Version of this model and of its two steps.")
    ] = 1,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Largest number of images in a request, and in a batch.")
    ] = 32,
    preferred: Annotated[
        list[int] | None,
        typer.Option(
            help="A batch size that runs without waiting for more requests. May be repeated. "
            "Default: 8 and 16."
        ),
    ] = None,
    max_delay_ms: Annotated[
        float,
        typer.Option(min=0, help="Milliseconds that a request waits for others to join its batch."),
    ] = 2.0,
    queue: Annotated[
        int, typer.Option(min=1, help="Number of requests that may wait. Further ones are errors.")
    ] = 256,
    timeout_ms: Annotated[
        float, typer.Option(min=1, help="Milliseconds after which a waiting request is an error.")
    ] = 10_000.0,
    device: Annotated[
        Device,
        typer.Option(help="Where the scores are computed. auto: on the GPU if there is one."),
    ] = "auto",
    instances: Annotated[
        int, typer.Option(min=1, help="Number of model instances, on each GPU or on the CPU.")
    ] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Number of threads of an instance on the CPU.")
    ] = None,
    sha256: Sha256 = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
) -> None:
    """Write a model repository for the Triton Inference Server.

    The repository has three models: the scores (ONNX Runtime backend), the decision (Python
    backend, NumPy only), and the ensemble of both. Clients send latents to the ensemble, and get
    the decision, the verdict and the scores.

    Example: latentguard export triton guard.onnx --out model_repository --device gpu
    """
    from latentguard.export import TritonOptions, export_triton

    options = TritonOptions(
        name=name,
        version=version,
        max_batch=max_batch,
        preferred=(
            tuple(size for size in (8, 16) if size <= max_batch)
            if preferred is None
            else tuple(preferred)
        ),
        max_delay_ms=max_delay_ms,
        queue=queue,
        timeout_ms=timeout_ms,
        device=device,
        instances=instances,
        threads=threads,
    )
    written = export_triton(source, out, options, sha256=sha256)
    if not quiet:
        typer.echo(f"wrote {written.path}: {', '.join(written.models)}, version {version}")
        typer.echo(f"serve it with: tritonserver --model-repository={written.path}")


def _precision(given: Precision, dynamic: bool) -> Literal["fp32", "fp16", "int8", "int8-dynamic"]:
    return "int8-dynamic" if dynamic and given == "int8" else given


def _latents(paths: list[Path] | None, space: str) -> Latents | None:
    from latentguard.export.samples import read_samples

    return None if not paths else read_samples(paths, space)


def _check_target(out: Path) -> None:
    from latentguard.errors import UsageError

    if out.suffix != ".onnx":
        raise UsageError(f"--out must be a file that ends in .onnx, got {out}")
    if not out.parent.is_dir():
        raise UsageError(f"--out: there is no folder {out.parent}")


def _say(quiet: bool, text: str) -> None:
    if not quiet:
        typer.echo(f"latentguard: {text}", err=True)


def _print(result: Exported, quiet: bool) -> None:
    if quiet:
        typer.echo(result.sha256)
        return
    if result.first is not None:
        typer.echo(f"first model: {_compared(result.first)}")
    typer.echo(_compared(result))
    if result.unmerged is not None:
        far = result.unmerged
        typer.echo(
            f"compared with the model without merging: margins differ by at most "
            f"{far.margin:.2g}, the smallest cosine of an embedding is {far.cosine:.6f}, "
            f"{far.same_decisions} of {far.images} decisions are the same"
        )
    if not result.checked.real:
        typer.echo(
            "latentguard: these latents do not come from images; compare real ones with --check "
            "before you rely on this file",
            err=True,
        )
    for exported in (result.first, result):
        if exported is not None:
            typer.echo(f"wrote {exported.path} ({exported.bytes / 1e6:.1f} MB)")
    typer.echo(f"sha256 {result.sha256}")


def _compared(result: Exported) -> str:
    checked = result.checked
    kind = "real latents" if checked.real else "latents drawn with the space's statistics"
    sent = checked.escalated
    passed = "" if sent is None else f"; the first model passed on {sent}"
    return (
        f"compared with PyTorch on {checked.images} {kind}: margins differ by at most "
        f"{checked.margin:.2g}, embeddings by {checked.embedding:.2g} (cosine "
        f"{checked.cosine:.6f}), {checked.same_decisions} of {checked.images} decisions are the "
        f"same{passed}"
    )
