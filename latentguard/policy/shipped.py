"""The YAML files that come with latentguard."""

from __future__ import annotations

from pathlib import Path


def shipped_files(folder: str = "") -> dict[str, Path]:
    """The policies, or with `folder` what lies in that folder beside them, by name."""
    package = Path(__file__).resolve().parents[1]
    # Installed they lie inside the package, in a checkout beside it.
    for policies in (package / "policies", package.parent / "policies"):
        files = sorted((policies / folder).glob("*.yaml"))
        names = {f.stem: f for f in files if not f.name.endswith(".lock.yaml")}
        if names:
            return names
    return {}
