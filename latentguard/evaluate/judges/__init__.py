"""Judges of pictures: NudeNet, Q16, open_nsfw, and a policy of one's own.

Reading order: nudenet.py, open_nsfw.py (packages that hold their weights) -> clip.py -> q16.py with
q16_prompts.py (CLIP and the published prompt embeddings) -> policy.py -> catalog.py (by name).
aesthetic.py is no judge of harm: it scores how much a picture is liked.
"""

from __future__ import annotations
