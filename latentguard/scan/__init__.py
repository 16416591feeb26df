"""Many latents files against a policy: `scan_files`, and the sinks of `latentguard scan`.

Reading order: record.py (one image's result) -> judging.py (who judges) with scoring.py (torch) and
onnx.py (an exported file, no torch) -> engine.py (paths to records) -> summary.py -> the sinks:
lines.py (JSON lines, CSV), table.py, report.py with page.py and card.py. text.py keeps untrusted
text harmless in all of them.
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
