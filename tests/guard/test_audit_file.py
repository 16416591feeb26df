"""Where an audit log may lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from latentguard.guard import AuditLog


@pytest.mark.parametrize("read", [False, True])
def test_a_fifo_is_no_audit_log(tmp_path: Path, read: bool) -> None:
    """It would wait for a reader, and keep nothing."""
    path = tmp_path / "audit.jsonl"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if read else None
    try:
        with pytest.raises(OSError, match=r"must be a regular file|No such device"):
            AuditLog(path)
    finally:
        if reader is not None:
            os.close(reader)


def test_a_device_is_no_audit_log() -> None:
    with pytest.raises(OSError, match="must be a regular file"):
        AuditLog("/dev/null")


def test_a_new_audit_log_is_its_owners(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        AuditLog(tmp_path / "audit.jsonl")
    finally:
        os.umask(before)
    assert (tmp_path / "audit.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_log_that_somebody_holds_ends_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl", reason="locks need a POSIX system")
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    monkeypatch.setattr("latentguard.guard.audit._PATIENCE", 0.05)
    with path.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OSError, match=r"audit\.jsonl: another process has held the audit log"):
            log._append(b"{}\n")
    log._append(b"{}\n")
    assert path.read_bytes() == b"{}\n"
