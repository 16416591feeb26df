"""LatentGuard's nodes for ComfyUI.

Reading order: nodes.py (what ComfyUI sees) -> conventions.py (what a LATENT is) -> loaded.py
(a policy and its scorers) -> sampling.py (the guard in a sampler) -> told.py, heat.py (what is
shown). Nothing here imports ComfyUI before a node runs.
"""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
