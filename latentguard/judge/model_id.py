"""Who judged, and by what: models and policies are named down to the bytes."""

from __future__ import annotations

from typing import NamedTuple


class ModelId(NamedTuple):
    """Which weights scored an image: the encoder's name and the SHA-256 of its weights."""

    name: str
    sha256: str

    def to_dict(self) -> dict[str, str]:
        """As records and verdicts carry it."""
        return self._asdict()


class PolicyId(NamedTuple):
    """Which policy judged it: name, version and the SHA-256 of its file."""

    name: str
    version: str
    sha256: str

    def to_dict(self) -> dict[str, str]:
        """As records carry it."""
        return self._asdict()
