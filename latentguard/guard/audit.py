"""An append-only audit log: one JSON line for each image and scored step."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from latentguard.guard.record import StepRecord
from latentguard.guard.sessions import Session
from latentguard.judge import SCHEMA_VERSION, Verdict
from latentguard.regular import RefusedError, open_regular, regular_descriptor

_PATIENCE = 10.0
"""Seconds for which a log may be held by another process."""


class AuditLog:
    """Lines of JSON, appended to one file by any number of threads and processes.

    A line has: schema_version, time (UTC), request_id, policy, policy_version, policy_sha256,
    model, model_sha256 (of a cascade's models the one that judged), space, image (its index),
    attempt, step, final, how, action, seconds, `extra` and `prompt` if asked for, and the verdict
    (decision, reason, error, noise_level, concepts). The prompts of concepts are the policy's; what
    a user wrote is not in it unless you ask.

    When a pipeline's call has ended, one more line stands there for each of its images that did not
    come out as it was generated first. In place of attempt, step, final, how, action and seconds it
    has outcome, attempts (seed, decision, reason, error) and note, as `Outcome` has them.

    A line that cannot be written raises OSError, which ends the generation: what cannot be audited
    is not let through. A full disk may leave half a line, of that generation; the next line, by
    whichever process, begins anew below it. Readers pass over lines that are empty.

    Args:
        path: the file; it and its folder are made where they do not exist, readable by the owner.
        extra: JSON-able data for every line, a tenant's name for one.
        prompts: write the user's prompt of each image too, null where the call had none.
        sync: wait until each line is on the disk.

    Raises TypeError or ValueError for an `extra` that is no JSON, OSError for a path that cannot be
    written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        extra: dict[str, Any] | None = None,
        prompts: bool = False,
        sync: bool = False,
    ) -> None:
        self.path = Path(path)
        self._extra = None if extra is None else json.loads(json.dumps(extra, allow_nan=False))
        self._prompts = prompts
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
        """Open the file for appending. Raises OSError where it is none: a pipe keeps no record."""
        try:
            return regular_descriptor(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except RefusedError as error:
            said = "the audit log must be a regular file"
            raise OSError(errno.EINVAL, said, str(self.path)) from error

    def write(self, session: Session, record: StepRecord) -> None:
        """Append the lines of one step."""
        how = {
            "attempt": record.attempt,
            "step": record.step,
            "final": record.final,
            "how": record.estimate_source,
            "seconds": round(record.seconds, 6),
        }
        self._write(
            self._line(session, index, verdict, {**how, "action": action})
            for index, (verdict, action) in enumerate(
                zip(record.verdicts, record.actions, strict=True)
            )
            if verdict is not None
        )

    def write_outcomes(self, session: Session) -> None:
        """Append what became of the images of a call, as far as it is not plainly `allowed`."""
        self._write(
            self._line(session, index, verdict, outcome.to_dict())
            for index, (verdict, outcome) in enumerate(
                zip(session.verdicts, session.outcomes, strict=True)
            )
            if outcome.kind != "allowed"
        )

    def _line(
        self, session: Session, index: int, verdict: Verdict, more: dict[str, Any]
    ) -> dict[str, Any]:
        line: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **session.identity,
            **({} if self._extra is None else {"extra": self._extra}),
            "image": index,
            **more,
            **verdict.to_dict(),
        }
        # Of a cascade's models, the one that judged this image at this step.
        who = (session.identity["model"], session.identity["model_sha256"])
        line["model"], line["model_sha256"] = verdict.model or who
        if self._prompts:
            known = index < len(session.prompts)
            line["prompt"] = session.prompts[index] if known else None
        return line

    def _write(self, lines: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        if text:
            self._append(text.encode())

    def _append(self, data: bytes) -> None:
        # One write to a file opened for appending: lines of several processes do not mix.
        with self._lock:
            file = self._open()
            try:
                self._wait_for_others(file)
                if not self._ends_whole(file):  # half a line may not take the next one with it
                    data = b"\n" + data
                written = os.write(file, data)
                if written != len(data):
                    raise OSError(f"{self.path}: only {written} of {len(data)} bytes were written")
                if self._sync:
                    os.fsync(file)
            finally:
                os.close(file)

    def _wait_for_others(self, file: int) -> None:
        """Lock the log until it is closed, so that no line of another process is seen half written.

        Raises OSError where somebody holds it for longer than `_PATIENCE`.
        """
        if sys.platform == "win32":  # only threads of one process are kept apart there
            return
        import fcntl

        until = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise OSError(
                        f"{self.path}: another process has held the audit log for {_PATIENCE:g} s"
                    ) from error
                time.sleep(0.001)

    def _ends_whole(self, file: int) -> bool:
        if os.fstat(file).st_size == 0:
            return True
        try:
            with open_regular(self.path) as log:
                log.seek(-1, os.SEEK_END)
                return log.read().endswith(b"\n")
        except OSError:  # may not be read, or was replaced just now: who knows how it ends
            return False
