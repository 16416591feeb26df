"""The packaged models without torch: NumPy and ONNX Runtime."""

from __future__ import annotations

from latentguard.bundled.guard import bundled_guard

__all__ = ["bundled_guard"]
