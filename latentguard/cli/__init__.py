"""The command line: one Typer app, one file per command, each a thin call into a room.

Nothing heavy is imported here: `latentguard --help` must answer in well under half a second.
"""

from __future__ import annotations

import sys
from functools import cache

import typer

from latentguard import __version__
from latentguard.cli.commands import Commands
from latentguard.cli.exit_codes import EXIT_USAGE
from latentguard.errors import LatentGuardError, missing_extra
from latentguard.text import visible

app = typer.Typer(
    name="latentguard",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Moderate images while they are still latents: scan files against a YAML policy, and "
    "see which concept and prompt matched, with which score, at which threshold.",
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"latentguard {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Options that come before a command."""


@cache
def register() -> None:
    """Add the commands to the application, once however often `main` is called."""
    import latentguard.cli.adapt as adapt
    import latentguard.cli.calibrate as calibrate
    import latentguard.cli.concept as concept
    import latentguard.cli.doctor as doctor
    import latentguard.cli.encode as encode
    import latentguard.cli.evaluate as evaluate
    import latentguard.cli.evaluate_bias as evaluate_bias
    import latentguard.cli.evaluate_generated as evaluate_generated
    import latentguard.cli.evaluate_geneval as evaluate_geneval
    import latentguard.cli.evaluate_i2p as evaluate_i2p
    import latentguard.cli.evaluate_reno as evaluate_reno
    import latentguard.cli.evaluate_t2i_compbench as evaluate_t2i_compbench
    import latentguard.cli.export as export
    import latentguard.cli.models as models
    import latentguard.cli.models_check as models_check
    import latentguard.cli.policy as policy
    import latentguard.cli.scan as scan
    import latentguard.cli.scan_report as scan_report
    import latentguard.cli.spaces as spaces

    for module in (
        scan,
        scan_report,
        policy,
        models,
        models_check,
        spaces,
        concept,
        encode,
        evaluate,
        evaluate_bias,
        evaluate_generated,
        evaluate_geneval,
        evaluate_i2p,
        evaluate_reno,
        evaluate_t2i_compbench,
        calibrate,
        adapt,
        export,
        doctor,
    ):
        module.register(app)


def main() -> None:
    """Entry point: expected errors become one line on stderr and exit code 2, never a traceback."""
    from latentguard.cli.console import abandon, prepare

    register()
    prepare()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # not at exit, where a full disk would be a traceback
    except LatentGuardError as error:
        # The lines are the project's own, one for a problem; what they quote may not be.
        first, *more = str(error).splitlines() or [""]
        for line in (f"latentguard: {first}", *more):
            typer.echo(visible(line, 4000), err=True)
        sys.exit(EXIT_USAGE)
    except ModuleNotFoundError as error:
        missing = missing_extra("this command", error)
        if missing is None:
            raise
        abandon()
        typer.echo(f"latentguard: {missing}", err=True)
        sys.exit(EXIT_USAGE)
    except OSError as error:
        abandon()
        what = error.filename or "the output"
        typer.echo(f"latentguard: cannot use {what}: {error.strerror or error}", err=True)
        sys.exit(EXIT_USAGE)
