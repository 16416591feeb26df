"""The documentation site: it is built without a warning, and has every page."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    named = {part for part in text.replace("\n", " ").split(" ") if part.endswith(".md")}
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert pages <= named
    assert yaml.safe_load(text)["site_name"] == "latentguard"


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    home = (tmp_path / "index.html").read_text("utf-8")
    assert 'href="guard.html"' in home
    commands = (tmp_path / "cli.html").read_text("utf-8")
    assert "latentguard concept learn" in commands
    assert "--positives" in commands
    assert "LatentGuard" in (tmp_path / "reference.html").read_text("utf-8")
