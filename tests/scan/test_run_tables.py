"""Runs over tables: options reach the processes that read, and rows are keyed by their ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_helpers import npy, options_of, records_of, scan_run
from scan_helpers import latents_of

from latentguard.files import Reading

pa = pytest.importorskip(
    "pyarrow", reason="needs pip install 'latentguard[scale]', which the dev extra has"
)
pq = pytest.importorskip(
    "pyarrow.parquet", reason="needs pip install 'latentguard[scale]', which the dev extra has"
)


def _rows(part: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(part).to_pylist()
    return rows


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_of_tables_are_keyed_by_their_ids(tmp_path: Path, calm: Path, workers: int) -> None:
    latents = latents_of(4).numpy()
    cells = [npy(one) for one in latents]
    for number in range(2):
        columns = {"key": [f"{number}-{n}" for n in range(4)], "clean": cells, "noisy": cells}
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet")
    np.savez(tmp_path / "2.npz", clean=latents, noisy=latents)
    paths = [tmp_path / name for name in ("0.parquet", "1.parquet", "2.npz")]
    reading = Reading.of("flux2", True, key="clean")
    options = options_of(calm, reading=reading)
    run = scan_run(tmp_path / f"run{workers}", options, paths, workers=workers)
    records = records_of(run)
    assert [record["error"] for record in records] == [None] * 12
    parts = [run.done[shard.number].part for shard in run.shards]
    keys = [row["__key__"] for part in parts for row in _rows(Path(run.place) / part.name)]
    assert keys == [
        *(f"{number}-{n}" for number in range(2) for n in range(4)), *[None] * 4,
    ]  # fmt: skip
    assert sum(entry.passed.left for entry in run.done.values()) == 3
