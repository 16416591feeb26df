"""Many latents files against a policy: `scan_files`, and the sinks of `latentguard scan`.

Reading order: record.py (one image's result) -> judges.py (who judges, in PyTorch or from an
exported file) -> engine.py (paths to records) -> summary.py -> the sinks: lines.py (JSON lines and
CSV), table.py and report.py. The report collects report_data.py; page.py, with scales.py and
card.py, hands it to the templates. text.py keeps untrusted text harmless in all of them.
"""

from latentguard.judge import ModelId, PolicyId
from latentguard.scan.engine import Scan, scan_files
from latentguard.scan.record import ScanRecord
from latentguard.scan.report import Report
from latentguard.scan.summary import ModelInfo, Summary

__all__ = [
    "ModelId",
    "ModelInfo",
    "PolicyId",
    "Report",
    "Scan",
    "ScanRecord",
    "Summary",
    "scan_files",
]
