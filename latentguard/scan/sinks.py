"""How the records of a shard are written: one file, Parquet or JSON lines.

A sink writes to a file of its own on this machine. Where that file appears, and that it appears
whole, is for the store.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from latentguard.scan.options import SinkName
from latentguard.scan.schema import from_row, need_pyarrow, schema, to_batch

if TYPE_CHECKING:
    import pyarrow

ROWS = 4096
"""Rows of a group in Parquet, which are in memory at a time."""

SUFFIXES: dict[SinkName, str] = {"parquet": ".parquet", "json": ".jsonl"}


class PartSink(Protocol):
    """One file of rows, as `schema.Numbering.row` makes them."""

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def close(self) -> None:
        """Finish the file."""

    def abandon(self) -> None:
        """Let go of the file, finished or not."""


class JsonPart:
    """One JSON object a line, in ASCII."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="ascii", newline="\n")

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self._file.write(json.dumps(row, ensure_ascii=True, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()

    def abandon(self) -> None:
        try:
            self._file.close()
        except OSError:  # what is left cannot be written, and is not wanted
            return


class ParquetPart:
    """Parquet, compressed with zstd, in groups of about `ROWS` rows."""

    def __init__(self, path: Path) -> None:
        need_pyarrow()
        from pyarrow import parquet

        # In Arrow's form a row takes a tenth of the memory.
        self._waiting: list[pyarrow.RecordBatch] = []
        self._writer = parquet.ParquetWriter(str(path), schema(), compression="zstd")

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._waiting.append(to_batch(rows))
        if sum(len(batch) for batch in self._waiting) >= ROWS:
            self._write()

    def close(self) -> None:
        if self._waiting:
            self._write()
        self._writer.close()

    def abandon(self) -> None:
        try:
            self._writer.close()
        except OSError:  # what is left cannot be written, and is not wanted
            return

    def _write(self) -> None:
        import pyarrow as pa

        table = pa.Table.from_batches(self._waiting)
        self._writer.write_table(table, row_group_size=len(table))
        self._waiting = []


def open_sink(name: SinkName, path: Path) -> PartSink:
    """A sink by its name. Raises MissingExtraError where pyarrow is missing."""
    return JsonPart(path) if name == "json" else ParquetPart(path)


def read_part(path: Path) -> list[dict[str, Any]]:
    """The records of a part, of either kind, as `ScanRecord.to_dict` gave them."""
    if path.name.endswith(SUFFIXES["json"]):
        lines = path.read_text(encoding="ascii").splitlines()
        return [from_row(json.loads(line)) for line in lines]
    need_pyarrow()
    from pyarrow import parquet

    return [from_row(row) for row in parquet.read_table(path).to_pylist()]
