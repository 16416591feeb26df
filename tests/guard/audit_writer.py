"""What writes to an audit log beside others: a module of its own, so that a process starts soon."""

from __future__ import annotations

from pathlib import Path

import torch
from guard_helpers import NEVER, LinearEncoder, policy

from latentguard import Latents, Scorer
from latentguard.guard import AuditLog, Session


def write_many(path: Path, name: str, count: int) -> None:
    """The records of `count` steps of three images each."""
    log = AuditLog(path, extra={"writer": name})
    session = Session(Scorer(policy(NEVER), LinearEncoder("sdxl", 4)), name, on_record=log.write)
    latents = Latents(torch.randn(3, 4, 8, 8), "sdxl", True)
    for _ in range(count):
        session.step(latents, noise_level=1.0)
