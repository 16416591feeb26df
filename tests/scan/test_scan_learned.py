"""A scan by a policy with concepts that were learned from examples, with both runtimes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from learned import EXAMPLES, NANO, photos, write_policy

from latentguard.export import Exported
from latentguard.scorer import Scorer


def _records(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_records_and_report_name_the_examples(tmp_path: Path, command: Any) -> None:
    policy, report = write_policy(tmp_path), tmp_path / "report.html"
    given = ("scan", EXAMPLES, "--policy", policy, "--model", "nano-flux2", "-q", "--heatmap")
    told = command(*given, "--format", "json", "--report", report)
    assert told.code == 1, told.err
    expected = Scorer(policy, NANO).verdicts(photos())
    for record, verdict in zip(_records(told.out), expected, strict=True):
        assert record["decision"] == verdict.decision
        assert record["concepts"][0]["prompt"] == "examples of handguns"
        assert record["concepts"][0]["margin"] == pytest.approx(
            verdict.concepts[0].margin, abs=1e-5
        )
    assert "examples of handguns" in report.read_text()


def test_a_run_says_the_same(tmp_path: Path, command: Any) -> None:
    policy, run = write_policy(tmp_path), tmp_path / "run"
    told = command("scan", EXAMPLES, "--policy", policy, "--run", run, "-q")
    assert told.code == 1, told.err
    plain = command("scan", EXAMPLES, "--policy", policy, "-q", "--format", "json")
    page = tmp_path / "run.html"
    assert command("scan", "report", run, "-o", page, "-q").code == 0
    assert "examples of handguns" in page.read_text()
    blocked = [r["id"] for r in _records(plain.out) if r["decision"] == "block"]
    assert blocked
    assert all(one in page.read_text() for one in blocked)
    # With other examples it is another policy, and the run is not gone on with.
    (tmp_path / "guns.safetensors").unlink()
    told = command("scan", EXAMPLES, "--policy", policy, "--run", run, "--resume", "-q")
    assert told.code == 2
    assert "guns.safetensors: no such file" in told.err


def test_the_exported_file_scans_alike(learned_export: Exported, command: Any) -> None:
    told = command(
        "scan",
        EXAMPLES,
        "--runtime",
        "onnx",
        "--model",
        learned_export.path,
        "-q",
        "--format",
        "json",
    )
    expected = Scorer(learned_export.path.with_name("house.yaml"), NANO).verdicts(photos())
    found = _records(told.out)
    assert [record["decision"] for record in found] == [v.decision for v in expected]
