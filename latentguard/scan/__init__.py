"""Many latents files against a policy: `scan_files`, and the sinks of `latentguard scan`.

Reading order: record.py (one image's result) -> judges.py (who judges, in PyTorch or from an
exported file) -> judging.py (batches to records) -> engine.py (paths to records) -> summary.py ->
the sinks: lines.py (JSON lines and CSV), table.py and report.py. The report collects
report_data.py; page.py, with scales.py and card.py, hands it to the templates. text.py keeps
untrusted text harmless in all of them.

Runs of many shards: options.py -> shard.py (`scan_shard`, the core) -> schema.py, sinks.py and
keep.py (what is written) -> store.py (where it lies, whole or not at all) -> entry.py and unit.py
(one shard's output) -> lease.py (who is at work), tidy.py and run.py (the folder) -> reader.py and
local.py (the local engine), told.py and ray_engine.py (Ray).

What adds up: bins.py, error_kinds.py and concept_tally.py -> tally.py (with tally_json.py) ->
parts.py (what runs left, as one tally) -> run_report.py, which run_view.py lays out with axis.py
and alternatives.py. A sample: sampling.py (what is drawn) -> sampled.py (while it is scanned) ->
estimates.py (what it says). progress.py and progress_views.py tell how far a scan is.
"""

from latentguard.judge import ModelId, PolicyId
from latentguard.scan.engine import Scan, scan_files
from latentguard.scan.judging import Judging
from latentguard.scan.local import run_local
from latentguard.scan.options import RunOptions
from latentguard.scan.record import ScanRecord
from latentguard.scan.report import Report
from latentguard.scan.run import Run, open_run
from latentguard.scan.shard import Shard, scan_shard
from latentguard.scan.summary import ModelInfo, Summary

__all__ = [
    "Judging",
    "ModelId",
    "ModelInfo",
    "PolicyId",
    "Report",
    "Run",
    "RunOptions",
    "Scan",
    "ScanRecord",
    "Shard",
    "Summary",
    "open_run",
    "run_local",
    "scan_files",
    "scan_shard",
]
