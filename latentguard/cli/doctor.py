"""`latentguard doctor`: what is installed, what was built, and what each operator will use."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

import typer
from rich.console import Console
from rich.table import Table

from latentguard import __version__

_PACKAGES = ("torch", "numpy", "pydantic", "diffusers", "open_clip_torch", "onnxruntime", "onnx")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def doctor() -> None:
    """Say what is installed and which kernels the operators use here."""
    console = Console()
    table = Table("package", "version", title=f"latentguard {__version__}")
    table.add_row("python", platform.python_version())
    for package in _PACKAGES:
        table.add_row(package, _version(package))
    console.print(table)
    if importlib.util.find_spec("torch") is None:
        console.print("operators: not available, torch is not installed")
        return
    from latentguard.ops import library

    if library.extension is None:
        console.print(f"operators: the PyTorch reference is used, {library.missing}")
    else:
        console.print("operators: compiled kernels are used")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(doctor)
