"""`latentguard doctor` tells what runs and checks it."""

from __future__ import annotations

import pytest
import torch
import typer
from typer.testing import CliRunner

from latentguard.cli import doctor
from latentguard.ops import inspect, library


def _run() -> object:
    app = typer.Typer()
    doctor.register(app)
    return CliRunner().invoke(app, [])


def test_doctor_reports_and_passes() -> None:
    result = _run()
    assert result.exit_code == 0, result.output
    assert "self-test" in result.output
    assert "WRONG" not in result.output
    wanted = "compiled" if library.extension is not None else "PyTorch reference is used"
    assert wanted in result.output


def test_doctor_fails_on_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = dict.fromkeys(inspect.OPERATORS, float("nan"))
    monkeypatch.setattr(inspect, "self_test", lambda device, dtype: errors)
    result = _run()
    assert result.exit_code == 1
    assert "WRONG" in result.output


def test_other_dtypes_take_the_reference() -> None:
    assert inspect.choice("cpu", torch.float64) == "PyTorch reference"
