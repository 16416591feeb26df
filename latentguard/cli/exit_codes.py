"""The exit codes of the commands; 0 is success."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from latentguard.scan import Summary

FailOn = Literal["block", "review", "never"]
"""The mildest decision that makes the exit code 1."""

EXIT_MATCH = 1
EXIT_FAILED = 1
"""A check did not pass."""
EXIT_USAGE = 2
EXIT_UNREADABLE = 3
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def of_scan(summary: Summary, fail_on: FailOn) -> int:
    """The exit code of a scan that ran to its end."""
    from latentguard.judge import DECISIONS

    if summary.outcomes["error"]:
        return EXIT_UNREADABLE
    if fail_on == "never":
        return 0
    level = DECISIONS.index(fail_on)
    return EXIT_MATCH if any(summary.decisions[d] for d in DECISIONS[level:]) else 0
