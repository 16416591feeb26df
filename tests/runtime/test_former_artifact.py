"""artifact.py under its former name."""

from __future__ import annotations

import importlib

import pytest

from latentguard.deprecated import UNTIL
from latentguard.runtime import artifact


@pytest.mark.parametrize(
    ("former", "present"),
    [
        ("Artefact", "Artifact"),
        ("open_artefact", "open_artifact"),
        ("inner_digest", "inner_digest"),
    ],
)
def test_the_former_module(former: str, present: str) -> None:
    module = importlib.import_module("latentguard.runtime.artefact")
    with pytest.warns(DeprecationWarning, match=f"artifact.{present} now; {UNTIL}"):
        assert getattr(module, former) is getattr(artifact, present)


def test_what_it_never_had() -> None:
    module = importlib.import_module("latentguard.runtime.artefact")
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = module.nothing_such
