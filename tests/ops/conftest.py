"""Fixtures of the operators' tests: one back end per parameter."""

from __future__ import annotations

from pathlib import Path

import host_runner
import ops_cases
import pytest
import torch


@pytest.fixture(scope="session")
def runner() -> Path:
    """The host execution layer, compiled when its sources changed."""
    reason = ops_cases.host_layer_missing()
    if reason:
        pytest.skip(reason)
    return host_runner.build()


@pytest.fixture(scope="session", params=["reference", "cpu", "host-cuda", "cuda"])
def backend(request: pytest.FixtureRequest) -> ops_cases.Reference:
    """Every way to compute an operator that exists here; the others say what they need."""
    if request.param == "reference":
        return ops_cases.Reference()
    if request.param == "host-cuda":
        return ops_cases.HostCuda(request.getfixturevalue("runner"))
    if ops_cases.needs_extension:
        pytest.skip(ops_cases.EXTENSION_REASON)
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda.is_available() is False")
    return ops_cases.Operators(request.param)
