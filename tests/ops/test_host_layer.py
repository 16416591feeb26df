"""The host execution layer reports each kind of bug, planted in a toy kernel."""

from __future__ import annotations

from pathlib import Path

import host_runner
import pytest

REPORTS = {
    "uninitialized": "uninitialized read of shared memory",
    "shared_bounds": "out-of-bounds access to shared memory",
    "global_read": "heap-buffer-overflow",
    "global_write": "heap-buffer-overflow",
    "early_return": "divergent barrier: 255 threads wait",
    "two_barriers": "divergent barrier",
    "divergent_shuffle": "divergent barrier",
    "missing_barrier": "shared memory",
    "missing_warp_barrier": "shared memory",
    "overwritten_too_early": "race in shared memory",
    "misaligned_vector": "misaligned address",
}


def test_a_correct_kernel_passes(runner: Path) -> None:
    assert host_runner.toy(runner, "reduction") == ""


@pytest.mark.parametrize("name", REPORTS)
def test_planted_bug_is_reported(runner: Path, name: str) -> None:
    assert REPORTS[name] in host_runner.toy(runner, name)
