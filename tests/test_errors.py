"""The kinds of errors, and which of them are others as well."""

from __future__ import annotations

from typing import Any

import pytest

import latentguard
from latentguard.cli.export import onnx_
from latentguard.guard.attachment import check_pipeline
from latentguard.guard.layout import space_of


@pytest.mark.parametrize(
    ("kind", "also"),
    [
        (latentguard.GuardError, latentguard.LatentsError),
        (latentguard.UsageError, latentguard.ModelError),
        (latentguard.PolicyError, ValueError),
        (latentguard.MissingExtraError, ImportError),
    ],
)
def test_kinds(kind: type[Exception], also: type[Exception]) -> None:
    assert issubclass(kind, latentguard.LatentGuardError)
    assert issubclass(kind, also)


def test_what_cannot_be_guarded_is_a_guard_error() -> None:
    pipe: Any = object()
    with pytest.raises(latentguard.GuardError, match="cannot be guarded"):
        check_pipeline(pipe)
    with pytest.raises(latentguard.GuardError, match="give space="):
        space_of(pipe)


def test_options_that_do_not_go_together_are_a_usage_error(tmp_path: Any) -> None:
    with pytest.raises(latentguard.UsageError, match="both --height and --width"):
        onnx_(model="nano-flux2", out=tmp_path / "a.onnx", height=64)
