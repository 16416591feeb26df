"""An append-only audit log: one JSON line for each image and scored step."""

from __future__ import annotations

import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from latentguard.guard.record import StepRecord
from latentguard.guard.sessions import Session
from latentguard.verdict import SCHEMA_VERSION


class AuditLog:
    """Lines of JSON, appended to one file by any number of threads and processes.

    A line has: schema_version, time (UTC), request_id, policy, policy_version, policy_sha256,
    model, model_sha256, space, image (its index), step, final, action, seconds, `extra` if given,
    and the verdict (decision, reason, error, noise_level, concepts). Prompts of the user are not
    known to the guard and never written unless you put them into `extra`.

    A line that cannot be written raises OSError, which ends the generation: what cannot be audited
    is not let through.

    Args:
        path: the file; it and its folder are made where they do not exist, readable by the owner.
        extra: JSON-able data for every line, a tenant's name for one.
        sync: wait until each line is on the disk.
    """

    def __init__(
        self, path: str | Path, *, extra: dict[str, Any] | None = None, sync: bool = False
    ) -> None:
        self.path = Path(path)
        self._extra = extra
        self._sync = sync
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        os.close(self._open())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, session: Session, record: StepRecord) -> None:
        """Append the lines of one step."""
        common: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **session.identity,
            "step": record.step,
            "final": record.final,
            "how": record.how,
            "seconds": round(record.seconds, 6),
        }
        if self._extra is not None:
            common["extra"] = self._extra
        lines = [
            json.dumps({**common, "image": index, "action": action, **verdict.to_dict()})
            for index, (verdict, action) in enumerate(
                zip(record.verdicts, record.actions, strict=True)
            )
            if verdict is not None
        ]
        if lines:
            self._append("".join(f"{line}\n" for line in lines).encode())

    def _append(self, data: bytes) -> None:
        # One write to a file opened for appending: lines of several processes do not mix.
        with self._lock:
            file = self._open()
            try:
                written = os.write(file, data)
                if written != len(data):
                    raise OSError(f"{self.path}: only {written} of {len(data)} bytes were written")
                if self._sync:
                    os.fsync(file)
            finally:
                os.close(file)
