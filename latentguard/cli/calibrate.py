"""`latentguard calibrate`: thresholds at chosen false-positive rates, into a policy's lock file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from latentguard.cli.pictures import (
    AutoencoderOption,
    DownloadOption,
    EncodedOption,
    Pictures,
    SizeOption,
)

if TYPE_CHECKING:
    from latentguard.evaluate.calibrate import Margins, Row
    from latentguard.policy import Policy


Estimate = Literal["none", "wiener"]
"""What is scored of noised latents."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("calibrate", no_args_is_help=True)(calibrate)


def calibrate(
    policy: Annotated[
        str, typer.Option(help="The policy's file. Its lock file is written next to it.")
    ],
    latents: Annotated[
        list[Path] | None,
        typer.Argument(help="Latents of harmless images: files, folders, shards."),
    ] = None,
    trajectories: Annotated[
        list[Path] | None,
        typer.Option(
            help="Use records of harmless generations instead of latents: a guard's audit log, or "
            "its to_json()."
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Encoder: a name from `latentguard models list`, a path, or auto.")
    ] = "auto",
    fpr: Annotated[
        list[float] | None,
        typer.Option(
            help="False-positive rate to calibrate for. May be repeated. Default: the rates in the "
            "policy."
        ),
    ] = None,
    noise_levels: Annotated[
        str,
        typer.Option(
            help="Noise-to-signal ratios to calibrate at, separated by commas; 0 is the image "
            "without noise."
        ),
    ] = "0",
    estimate: Annotated[
        Estimate,
        typer.Option(
            help="What is scored above noise level 0. none: x_t itself. wiener: the Wiener "
            "estimate of x0."
        ),
    ] = "none",
    space: Annotated[
        str | None, typer.Option(help="Latent space of the latents, if the files do not say.")
    ] = None,
    scaled: Annotated[
        bool | None,
        typer.Option(
            "--scaled/--unscaled",
            help="Scaling of the latents, if the files do not say: as the diffusion model denoises "
            "them, or as the VAE encodes them.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Number of images that are encoded together.")
    ] = 16,
    device: Annotated[
        str | None, typer.Option(help="Device that the model runs on, such as cpu or cuda:0.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Plot the thresholds to this .png, .svg or .pdf file.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the thresholds and write nothing.")
    ] = False,
    autoencoder: AutoencoderOption = None,
    size: SizeOption = None,
    encoded: EncodedOption = None,
    download: DownloadOption = False,
) -> None:
    """Find the thresholds that give a chosen false-positive rate on harmless images.

    A threshold is the margin that a harmless image reaches with at most that probability. The
    thresholds are written to the lock file of the policy.

    Example: latentguard calibrate harmless/ --policy shop.yaml --fpr 0.01 --noise-levels 0,0.5,1,2
    """
    from latentguard.errors import PolicyError, UsageError
    from latentguard.evaluate.calibrate import entries, merge, rows
    from latentguard.evaluate.plots import check_plot_path, plot_thresholds
    from latentguard.policy import load_lock, load_policy, lock_path, shipped_policies, write_lock

    if bool(latents) == bool(trajectories):
        raise UsageError("calibrate needs either latents files or --trajectories")
    pictures_too = (autoencoder, size, encoded) != (None, None, None)
    if trajectories and pictures_too:
        raise UsageError("--autoencoder, --size and --encoded are about pictures, not records")
    if trajectories and (noise_levels, estimate, scaled, seed) != ("0", "none", None, 0):
        raise UsageError(
            "--noise-levels, --estimate, --scaled and --seed are about latents: records say at "
            "which noise levels, and from which estimates, they were scored"
        )
    if policy in shipped_policies() and not dry_run:
        raise PolicyError(
            f"policy '{policy}' ships with latentguard, and a lock file belongs next to a policy "
            f"file of your own: copy {shipped_policies()[policy]} and give the path of the copy"
        )
    if plot:
        check_plot_path(plot)
    # A lock that went stale is what this command repairs.
    chosen = load_policy(policy, use_lock=False)
    rates = fpr or sorted({c.threshold.value for c in chosen.concepts if c.threshold.kind == "fpr"})
    if not rates:
        raise UsageError("give --fpr: no threshold of the policy is a false-positive rate")
    for rate in rates:
        if not 0 < rate < 1:
            raise UsageError(f"--fpr must be above 0 and below 1, got {rate:g}")
    if trajectories:
        margins = _from_records(trajectories, chosen, model, device, space)
    else:
        pictures = Pictures(autoencoder, size, encoded, space, device, download)
        margins = _from_latents(
            pictures.latents(latents or []), chosen, model, noise_levels, estimate,
            space, scaled, batch_size, device, seed,
        )  # fmt: skip
    new = entries(chosen, margins, rates)
    table = rows(new, margins)
    _print(chosen, margins, table)
    if plot:
        plot_thresholds(plot, table, f"{chosen.name}: {margins.model[0]}, {margins.source}")
    if dry_run:
        return
    path = lock_path(policy)
    write_lock(path, merge(load_lock(path) if path.exists() else None, chosen, new))
    load_policy(policy)
    typer.echo(f"wrote {path}")
    for sentence in _unread(chosen, rates):
        typer.echo(f"note: {sentence}", err=True)


def _unread(policy: Policy, rates: list[float]) -> Iterator[str]:
    """Which concepts do not look into the lock, as their thresholds are of another kind."""
    others = [concept.id for concept in policy.concepts if concept.threshold.kind != "fpr"]
    if others:
        yield (
            f"the thresholds of {', '.join(others)} are not false-positive rates, so these margins "
            f"change nothing for them; write `threshold: {{fpr: {rates[0]:g}}}` to use one"
        )


def _from_records(
    paths: list[Path], policy: Policy, model: str, device: str | None, space: str | None
) -> Margins:
    from latentguard.evaluate.trajectories import read_trajectories
    from latentguard.spaces import LatentSpace

    own = None if space is None else LatentSpace.of(space)
    if model == "auto":
        return read_trajectories(paths, policy, space=None if own is None else own.name)
    from latentguard.encoders import load_encoder

    encoder = load_encoder(model, device, own)
    return read_trajectories(paths, policy, (encoder.name, encoder.sha256), encoder.space)


def _from_latents(
    paths: list[Path],
    policy: Policy,
    model: str,
    noise_levels: str,
    estimate: Estimate,
    space: str | None,
    scaled: bool | None,
    batch_size: int,
    device: str | None,
    seed: int,
) -> Margins:
    from latentguard.cli.bar import Bar
    from latentguard.errors import UsageError
    from latentguard.evaluate.calibrate import measure

    try:
        levels = [float(text) for text in noise_levels.split(",")]
    except ValueError as error:
        raise UsageError(
            f"--noise-levels must be numbers separated by commas, got {noise_levels!r}"
        ) from error
    with Bar("scoring") as advance:
        return measure(
            paths,
            policy,
            model,
            noise_levels=levels,
            estimate=estimate,
            space=space,
            scaled=scaled,
            batch_size=batch_size,
            device=device,
            seed=seed,
            progress=advance,
        )


def _print(policy: Policy, margins: Margins, table: list[Row]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from latentguard.judge import PURE_NOISE

    rates = sorted({row.fpr for row in table})
    name, digest = margins.model
    shown = Table(
        title=escape(f"{policy.name}: {name} ({digest[:12]}) on {margins.space}, {margins.source}"),
        caption="thresholds as margins; a margin at or above is a match",
    )
    shown.add_column("concept")
    for title in ("noise level", "images", *(f"fpr {rate:g}" for rate in rates)):
        shown.add_column(title, justify="right")
    cells: dict[tuple[str, float, int], list[str]] = {}
    for row in table:
        key = (row.concept, row.noise_level, row.images)
        cells.setdefault(key, []).append(f"{row.margin:.4f}")
    for (concept, level, images), values in cells.items():
        at = "pure noise" if level == PURE_NOISE else f"{level:g}"
        shown.add_row(escape(concept), at, f"{images:,}", *values)
    Console().print(shown)
