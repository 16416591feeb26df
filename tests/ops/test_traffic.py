"""The fused forward kernels move at most 1.15 of the least memory traffic, by the model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def _traffic() -> ModuleType:
    path = ROOT / "benchmarks" / "traffic.py"
    spec = importlib.util.spec_from_file_location("latentguard_traffic", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_fused_kernels_stay_near_the_minimum() -> None:
    for operator, model, batch, t in _traffic().table():
        assert t.fused <= 1.15 * t.minimum, (operator, model, batch)
        assert t.fused <= t.eager, (operator, model, batch)


def test_the_documented_table_is_current(capsys: object) -> None:
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    _traffic().main()
    for line in capsys.readouterr().out.splitlines():  # type: ignore[attr-defined]
        assert line in text
