"""The guard in the denoising loop: sessions for any loop, LatentGuard for diffusers pipelines."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from latentguard.deprecated import former_names

if TYPE_CHECKING:
    from latentguard.guard.adapter import LatentGuard
    from latentguard.guard.answers import Blocked
    from latentguard.guard.audit import AuditLog
    from latentguard.guard.blocks import GuardBlock, guarded_blocks
    from latentguard.guard.noise import optimize_noise
    from latentguard.guard.output import GenerationBlocked
    from latentguard.guard.record import Attempt, CallRecord, Outcome, Steering, StepRecord
    from latentguard.guard.sessions import Budget, Session, StepResult, session

# Sessions work where diffusers is not installed.
_HOME = {
    "Attempt": "record",
    "AuditLog": "audit",
    "Blocked": "answers",
    "Budget": "sessions",
    "CallRecord": "record",
    "GenerationBlocked": "output",
    "GuardBlock": "blocks",
    "LatentGuard": "adapter",
    "Outcome": "record",
    "Session": "sessions",
    "StepRecord": "record",
    "StepResult": "sessions",
    "Steering": "record",
    "guarded_blocks": "blocks",
    "optimize_noise": "noise",
    "session": "sessions",
}

__all__ = [
    "Attempt",
    "AuditLog",
    "Blocked",
    "Budget",
    "CallRecord",
    "GenerationBlocked",
    "GuardBlock",
    "LatentGuard",
    "Outcome",
    "Session",
    "Steering",
    "StepRecord",
    "StepResult",
    "guarded_blocks",
    "optimize_noise",
    "session",
]


def _room(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'latentguard.guard' has no attribute {name!r}")
    return getattr(import_module(f"latentguard.guard.{_HOME[name]}"), name)


__getattr__ = former_names(__name__, {"Limits": "Budget"}, _room)


def __dir__() -> list[str]:
    return sorted(__all__)
