"""latentguard: content-safety moderation on the latents of image generators.

Reading order: README -> this file -> the room you need. Every public name is imported when it is
first used, so that `import latentguard` stays free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentguard.encoders import Encoder, load_encoder
    from latentguard.errors import (
        GuardError,
        LatentGuardError,
        LatentsError,
        MissingExtraError,
        ModelError,
        PolicyError,
        UsageError,
    )
    from latentguard.files import load_latents
    from latentguard.guard import GenerationBlocked, LatentGuard, optimize_noise
    from latentguard.judge import Verdict
    from latentguard.policy import Policy, load_policy
    from latentguard.scan import ScanRecord, scan_files
    from latentguard.scorer import Scorer
    from latentguard.spaces import Latents, LatentSpace

__version__ = "0.1.0"

_HOME = {
    "Encoder": "latentguard.encoders",
    "GenerationBlocked": "latentguard.guard",
    "GuardError": "latentguard.errors",
    "LatentGuard": "latentguard.guard",
    "LatentGuardError": "latentguard.errors",
    "LatentSpace": "latentguard.spaces",
    "Latents": "latentguard.spaces",
    "LatentsError": "latentguard.errors",
    "MissingExtraError": "latentguard.errors",
    "ModelError": "latentguard.errors",
    "Policy": "latentguard.policy",
    "PolicyError": "latentguard.errors",
    "ScanRecord": "latentguard.scan",
    "Scorer": "latentguard.scorer",
    "UsageError": "latentguard.errors",
    "Verdict": "latentguard.judge",
    "load_encoder": "latentguard.encoders",
    "load_latents": "latentguard.files",
    "load_policy": "latentguard.policy",
    "optimize_noise": "latentguard.guard",
    "scan_files": "latentguard.scan",
}

__all__ = [
    "Encoder",
    "GenerationBlocked",
    "GuardError",
    "LatentGuard",
    "LatentGuardError",
    "LatentSpace",
    "Latents",
    "LatentsError",
    "MissingExtraError",
    "ModelError",
    "Policy",
    "PolicyError",
    "ScanRecord",
    "Scorer",
    "UsageError",
    "Verdict",
    "__version__",
    "load_encoder",
    "load_latents",
    "load_policy",
    "optimize_noise",
    "scan_files",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'latentguard' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        from latentguard.errors import missing_extra

        missing = missing_extra(f"latentguard.{name}", error)
        if missing is None:
            raise
        raise missing from error


def __dir__() -> list[str]:
    return sorted(__all__)
