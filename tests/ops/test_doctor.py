"""`latentguard doctor` tells what runs and checks it."""

from __future__ import annotations

import math

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


@pytest.mark.parametrize("name", inspect.OPERATORS)
def test_the_self_test_sees_wrong_gradients(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    right = inspect._CALLS[name]

    def halved(first: torch.Tensor, *rest: object) -> object:
        if first.dtype == torch.float64:
            return right(first, *rest)
        return right(first.detach() + (first - first.detach()) / 2, *rest)

    monkeypatch.setitem(inspect._CALLS, name, halved)
    errors = inspect.self_test("cpu", torch.float32)
    assert errors.pop(name) > 0.1
    assert max(errors.values()) < inspect.TOLERANCE[torch.float32]


def test_the_self_test_sees_another_best_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(first: torch.Tensor, *rest: object) -> object:
        *scores, best = inspect.concept_similarity(first, *rest)  # type: ignore[arg-type]
        return *scores, best + (first.dtype != torch.float64)

    monkeypatch.setitem(inspect._CALLS, "concept_similarity", shifted)
    assert math.isnan(inspect.self_test("cpu", torch.float32)["concept_similarity"])


def test_other_dtypes_take_the_reference() -> None:
    assert inspect.choice("cpu", torch.float64) == "PyTorch reference"
