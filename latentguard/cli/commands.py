"""Commands of two words: `scan` and, beside it, `scan report`; options that take many paths."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


class Commands(TyperGroup):
    """Finds a command by its first two words, else by its first.

    What only looks like the second word can be said otherwise: `scan ./report`.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        two = " ".join(args[:2])
        if len(args) > 1 and two in self.commands:
            return two, self.commands[two], args[2:]
        return super().resolve_command(ctx, args)


class ManyPaths(TyperCommand):
    """`--positives A B` as well as `--positives A --positives B`: arguments stand before them."""

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
