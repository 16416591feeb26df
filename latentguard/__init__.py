"""latentguard: content-safety moderation on the latents of image generators.

Reading order: README -> this file -> the room you need. Every public name is imported when it is
first used, so that `import latentguard` stays free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentguard.encoders import load_encoder
    from latentguard.guard import LatentGuard, optimize_noise
    from latentguard.judge import Verdict
    from latentguard.policy import Policy, load_policy
    from latentguard.scan import scan_files
    from latentguard.scorer import Scorer
    from latentguard.spaces import Latents, LatentSpace

__version__ = "0.1.0"

_HOME = {
    "LatentGuard": "latentguard.guard",
    "Latents": "latentguard.spaces",
    "LatentSpace": "latentguard.spaces",
    "Policy": "latentguard.policy",
    "Scorer": "latentguard.scorer",
    "Verdict": "latentguard.judge",
    "load_encoder": "latentguard.encoders",
    "load_policy": "latentguard.policy",
    "optimize_noise": "latentguard.guard",
    "scan_files": "latentguard.scan",
}

__all__ = [
    "LatentGuard",
    "LatentSpace",
    "Latents",
    "Policy",
    "Scorer",
    "Verdict",
    "__version__",
    "load_encoder",
    "load_policy",
    "optimize_noise",
    "scan_files",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'latentguard' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
