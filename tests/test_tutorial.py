"""docs/tutorial.md: every block is run, in order, as if there were no torch."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)```", PAGE, re.DOTALL)
WITHOUT = (
    "import sys, importlib.util as util; sys.modules['torch'] = None; found = util.find_spec\n"
    "util.find_spec = lambda name, *rest: None if name == 'torch' else found(name, *rest)\n"
)


def run(code: str, arguments: list[str], folder: Path) -> str:
    command = [sys.executable, "-c", WITHOUT + code, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_tutorial(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "latents.pt", tmp_path / "examples")
    said: list[str] = []
    for kind, title, text in BLOCKS:
        if title:
            (tmp_path / title).write_text(text)
        elif kind == "bash":
            arguments = text.split()
            assert arguments[0] == "latentguard"
            code = "from latentguard.cli import main; main()"
            said.append(run(code, arguments[1:], tmp_path))
        else:
            assert kind == "python"
            said.append(run(text, [], tmp_path))
    first, _, second, third = said
    assert re.search(r"beer-glass-pagoda +✕ block", first)
    assert re.search(r"beer-glass-pagoda +✓ allow", second)
    assert re.search(r"axe-grass +! review", second)
    lines = third.splitlines()
    assert any(line.startswith("revolver block") for line in lines)
    assert any(line.startswith("axe-grass review") for line in lines)
    assert (tmp_path / "garden.html").exists()
