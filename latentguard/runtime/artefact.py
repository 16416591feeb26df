"""artifact.py under its former name."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from latentguard.deprecated import UNTIL
from latentguard.runtime import artifact

_RENAMED = {"Artefact": "Artifact", "open_artefact": "open_artifact"}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        present = _RENAMED.get(name, name)
        found = getattr(artifact, present)
        said = f"{__name__}.{name} is {artifact.__name__}.{present} now; {UNTIL}"
        warnings.warn(said, DeprecationWarning, stacklevel=2)
        return found
