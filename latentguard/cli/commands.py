"""Commands of two words, such as `scan report` next to `scan`; options that take many paths."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

from latentguard.errors import UsageError


class Commands(TyperGroup):
    """Finds a command by its first two words, or else by its first.

    If a path looks like the second word, it can be written differently: `scan ./report`.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        two = " ".join(args[:2])
        if len(args) > 1 and two in self.commands:
            return two, self.commands[two], args[2:]
        return super().resolve_command(ctx, args)


class Evaluations(TyperGroup):
    """`zeroshot --generate PIPELINE` runs the command `generated`, which has the options for it.

    PIPELINE is a value of --pipeline, a .yaml file as for --config, or the word exact.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        spread = [part for arg in args for part in _parted(arg, "--generate")]
        if args[0] != "zeroshot" or "--generate" not in spread:
            return super().resolve_command(ctx, args)
        place = spread.index("--generate")
        value = "".join(spread[place + 1 : place + 2])
        if not value or value.startswith("--"):
            raise UsageError(
                "--generate needs a pipeline (a folder of diffusers, or a name on the hub), a "
                ".yaml of settings, or the word exact"
            )
        if value == "exact":
            option = "--generator"
        else:
            option = "--config" if value.endswith((".yaml", ".yml")) else "--pipeline"
        spread[place] = option
        return super().resolve_command(ctx, ["generated", *spread[1:]])


def _parted(arg: str, option: str) -> list[str]:
    """`--option=value` as two."""
    return [option, arg[len(option) + 1 :]] if arg.startswith(f"{option}=") else [arg]


class ManyPaths(TyperCommand):
    """Accepts `--positives A B` for `--positives A --positives B`; arguments come before them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        option = None
        for arg in args:
            if arg.startswith("-"):
                option = arg if arg in ("--positives", "--negatives") else None
            elif option is not None and spread[-1] != option:
                spread.append(option)
            spread.append(arg)
        return super().parse_args(ctx, spread)
