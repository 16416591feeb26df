"""Commands of two words: `scan` and, beside it, `scan report`."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


class Commands(TyperGroup):
    """Finds a command by its first two words, else by its first.

    What only looks like the second word can be said otherwise: `scan ./report`.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        two = " ".join(args[:2])
        if len(args) > 1 and two in self.commands:
            return two, self.commands[two], args[2:]
        return super().resolve_command(ctx, args)
