"""`latentguard doctor`: what is installed, what was compiled, and what each operator uses."""

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


def _operators(console: Console) -> bool:
    """Print how the operators were built, what they use and a self-test; whether all are right."""
    from latentguard.ops import inspect

    facts = inspect.build()
    if "reason" in facts:
        console.print(
            f"operators: the PyTorch reference is used: {facts['reason']}", soft_wrap=True
        )
    else:
        console.print("operators: compiled")
        for key, value in facts.items():
            console.print(f"  {key.replace('_', ' ')}: {value or 'none'}", soft_wrap=True)
    table = Table("device", "dtype", "uses", *inspect.OPERATORS, title="self-test: error")
    fine = True
    for device in inspect.devices():
        for dtype, tolerance in inspect.TOLERANCE.items():
            errors = inspect.self_test(device, dtype)
            marks = []
            for name in inspect.OPERATORS:
                right = errors[name] <= tolerance  # NaN is not
                fine = fine and right
                marks.append(f"{errors[name]:.1e} {'ok' if right else 'WRONG'}")
            name = str(dtype).removeprefix("torch.")
            table.add_row(device, name, inspect.choice(device, dtype), *marks)
    console.print(table)
    if "cuda" not in inspect.devices():
        console.print("CUDA: not checked, because torch sees no GPU here")
    return fine


def doctor() -> None:
    """Show what is installed and which kernels the operators use here, and test the kernels."""
    console = Console()
    table = Table("package", "version", title=f"latentguard {__version__}")
    table.add_row("python", platform.python_version())
    for package in _PACKAGES:
        table.add_row(package, _version(package))
    console.print(table)
    if importlib.util.find_spec("torch") is None:
        console.print("operators: not available, because torch is not installed")
        return
    if not _operators(console):
        console.print("operators: WRONG results, see the table; do not rely on this installation")
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(doctor)
