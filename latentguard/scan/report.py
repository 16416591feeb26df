"""The HTML report: what it keeps while a scan runs (report_data.py), and the file at the end."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from latentguard.atomic import replacing
from latentguard.scan.report_data import ReportData
from latentguard.scan.summary import ModelInfo, Summary


class Report(ReportData):
    """Collects records, at most `max_cards` of them as cards, and writes the page.

    Every image is counted. Beyond those the page keeps what was not allowed before what was,
    and says how many it leaves out.
    """

    def render(
        self, models: Sequence[ModelInfo], summary: Summary, date: datetime | None = None
    ) -> str:
        """The page, complete: styles, script and pictures are inside."""
        from latentguard.scan.page import page

        return "".join(page(self, models, summary, date or datetime.now(UTC)))

    def write(self, path: str | Path, models: Sequence[ModelInfo], summary: Summary) -> None:
        """Write the page to `path`, whole or not at all. Raises OSError."""
        from latentguard.scan.page import page

        stream = page(self, models, summary, datetime.now(UTC))
        target = Path(path)
        if target.exists() and not target.is_file():  # a pipe or a terminal cannot be replaced
            with target.open("wb") as file:
                stream.dump(file, "utf-8")
            return
        with replacing(target) as file:
            stream.dump(file, "utf-8")
