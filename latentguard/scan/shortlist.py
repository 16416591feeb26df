"""The records that a report shows, when there are too many to show all."""

from __future__ import annotations

from dataclasses import replace

from latentguard.scan.record import ScanRecord


class Shortlist:
    """At most `max_records` records, without their pictures; those not allowed before the others.

    `seen` counts all of them. Each is kept with its number in the scan, from 0.
    """

    def __init__(self, max_records: int) -> None:
        self.max_records = max(1, max_records)
        self.seen = 0
        self._flagged: list[tuple[int, ScanRecord]] = []
        self._allowed: list[tuple[int, ScanRecord]] = []

    def add(self, record: ScanRecord) -> tuple[int | None, int | None]:
        """(the number it is kept under or None, the number that had to give way or None)."""
        order, self.seen = self.seen, self.seen + 1
        flagged = record.outcome != "allow"
        dropped = None
        if len(self) >= self.max_records:
            if not flagged or not self._allowed:
                return None, None
            dropped = self._allowed.pop()[0]
        slim = replace(record, preview=None, heatmaps=None, draw=None)
        (self._flagged if flagged else self._allowed).append((order, slim))
        return order, dropped

    def __len__(self) -> int:
        return len(self._flagged) + len(self._allowed)

    def in_order(self) -> list[tuple[int, ScanRecord]]:
        """What is kept, in the order of the scan."""
        return sorted(self._flagged + self._allowed, key=lambda item: item[0])
