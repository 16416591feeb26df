"""Latents, policies and hostile names for the tests of the scan room.

Every test runs the real Scorer and the bundled encoder; what an image scores is decided by the
policies' thresholds, which no score (margin 2) or every score (margin -2) can reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from latentguard.files import save_latents
from latentguard.spaces import Latents

ALWAYS, NEVER = -2.0, 2.0

HOSTILE = (
    "<script>document.title='owned'</script>",
    '"><img src=https://example.org/x onerror="document.title=1">',
    "</style><style>body{display:none}</style>",
    "</script><script>document.title='owned'</script>",
    "javascript:alert(1)",
    "\x1b]0;owned\x07\x1b[2J\x1b[31mred",
    "gnp.\u202egro.lmth",
    '=HYPERLINK("https://example.org","click")',
    "@SUM(1+1)*cmd|' /C calc'!A0",
    'x";=1+1;"',
    "[bold red]markup[/bold red]",
    "line one\nline two\r\nthree",
    "zero\x00byte",
    "lone \ud800 surrogate",
    "a" * 5000,
)
"""Names that an untrusted file may give its records."""


def latents_of(count: int, seed: int = 0, side: int = 16, channels: int = 32) -> torch.Tensor:
    """Smooth random latents [count, channels, side, side] of about unit deviation."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, side // 4, side // 4, generator=random)
    return torch.nn.functional.interpolate(coarse, scale_factor=4.0, mode="bicubic")


def write_latents(
    path: Path, count: int = 3, seed: int = 0, side: int = 16, ids: Sequence[str] | None = None
) -> Path:
    save_latents(path, Latents(latents_of(count, seed, side), "flux2", True, ids=ids))
    return path


def policy_text(
    *concepts: tuple[str, str, float], uncovered: str = "warn", on_error: str = "block"
) -> str:
    """A policy of (id, action, margin threshold); every id is its own prompt."""
    lines = [
        "schema_version: 1",
        "name: made",
        'version: "7"',
        f"uncovered: {uncovered}",
        f"on_error: {on_error}",
        "concepts:",
    ]
    for name, action, margin in concepts:
        lines += [
            f"  - id: {name.replace(' ', '-')}",
            "    category: made",
            f"    prompts: [{name}]",
            "    contrast: [dog]",
            f"    threshold: {{margin: {margin}}}",
            f"    action: {action}",
        ]
    return "\n".join(lines) + "\n"
