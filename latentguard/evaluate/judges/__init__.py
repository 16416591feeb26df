"""Judges of pictures: NudeNet, Q16, open_nsfw, and a policy of one's own.

Reading order: nudenet.py, open_nsfw.py (packages that hold their weights) -> q16.py with
q16_prompts.py (CLIP and the published prompt embeddings) -> policy.py -> catalog.py (by name).
"""

from __future__ import annotations
