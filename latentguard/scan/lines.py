"""JSON lines and CSV: one line per image, written as the scan goes."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from typing import Protocol, TextIO

from latentguard.judge import Rules, Verdict
from latentguard.scan.record import ScanRecord
from latentguard.scan.text import spreadsheet_cell


class Sink(Protocol):
    """Where records go. `close` writes what had to wait for the last record."""

    def add(self, record: ScanRecord) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object per line, in ASCII: ids keep every character, as an escape if need be."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def add(self, record: ScanRecord) -> None:
        line = json.dumps(record.to_dict(), ensure_ascii=True, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.flush()


class Csv:
    """One row per image; no cell of it is a formula, whatever the files call their records.

    The columns are fixed by the policy: those of `COLUMNS`, then each concept's probability.
    `not_checked` has the concepts that the model cannot see; `prompts_not_checked` has the prompts
    that it cannot see of the others ("blades: knife, sword; guns: musket").

    For each of `taxonomies` there follow the categories that are flagged (`mlcommons`), each
    category's score (`mlcommons:vcr`), empty where none of its concepts was judged, its level where
    the scheme has levels (`azure:Violence:severity`), and what was not checked, with the reason
    (`mlcommons:not_checked`).
    """

    COLUMNS = (
        "source",
        "index",
        "id",
        "space",
        "decision",
        "error",
        "reason",
        "matched",
        "concept",
        "prompt",
        "unit",
        "score",
        "threshold",
        "not_checked",
        "prompts_not_checked",
        "model",
        "model_sha256",
        "policy",
        "policy_version",
        "policy_sha256",
    )

    def __init__(self, file: TextIO, rules: Rules, taxonomies: Sequence[str] = ()) -> None:
        self._file = file
        self._concepts = rules.ids
        self._categories = [
            (name, tuple(rules.mapped[name]), rules.scheme(name).severities is not None)
            for name in taxonomies
        ]
        self._rows = csv.writer(file, quoting=csv.QUOTE_MINIMAL, lineterminator="\r\n")
        self._rows.writerow(
            [
                *self.COLUMNS,
                *[spreadsheet_cell(f"p:{name}") for name in self._concepts],
                *[spreadsheet_cell(name) for name in self._category_columns()],
            ]
        )

    def _category_columns(self) -> Iterator[str]:
        for scheme, categories, has_levels in self._categories:
            yield scheme
            for category in categories:
                yield f"{scheme}:{category}"
                if has_levels:
                    yield f"{scheme}:{category}:severity"
            yield f"{scheme}:not_checked"

    def _category_cells(self, verdict: Verdict) -> Iterator[str]:
        """In the order of `_category_columns`."""
        told = {found.scheme: found for found in verdict.taxonomies}
        for scheme, categories, has_levels in self._categories:
            found = told[scheme]
            yield spreadsheet_cell("; ".join(found.flagged))
            for category in categories:
                score = found.scores[category]
                yield "" if score is None else f"{score:.6f}"
                if has_levels:
                    level = (found.severities or {}).get(category)
                    yield "" if level is None else str(level)
            clauses = [f"{category}: {clause}" for category, clause in found.unchecked.items()]
            yield spreadsheet_cell("; ".join(clauses))

    def add(self, record: ScanRecord) -> None:
        lead, verdict = record.leading, record.verdict
        text = [
            record.space or "",
            verdict.decision,
            verdict.error or "",
            verdict.reason,
            " ".join(c.id for c in record.ranked if c.matched),
            lead.id if lead else "",
            lead.prompt if lead else "",
            lead.unit if lead else "",
        ]
        model = (record.judged_by.name, record.judged_by.sha256) if record.judged_by else ("", "")
        policy = record.policy
        seen = {c.id: f"{c.probability:.6f}" for c in verdict.concepts if c.covered}
        self._rows.writerow(
            [
                spreadsheet_cell(record.source),
                record.index,
                spreadsheet_cell(record.id or ""),
                *[spreadsheet_cell(value) for value in text],
                f"{lead.score:.6f}" if lead else "",
                f"{lead.threshold_value:.6f}" if lead else "",
                spreadsheet_cell(" ".join(c.id for c in verdict.concepts if not c.covered)),
                spreadsheet_cell(
                    "; ".join(
                        f"{c.id}: {', '.join(c.unseen)}"
                        for c in verdict.concepts
                        if c.covered and c.unseen
                    )
                ),
                *[
                    spreadsheet_cell(value)
                    for value in (*model, policy.name, policy.version, policy.sha256)
                ],
                *[seen.get(name, "") for name in self._concepts],
                *self._category_cells(verdict),
            ]
        )
        self._file.flush()

    def close(self) -> None:
        self._file.flush()
