"""The frame of benchmarks that generate: which images, by which generator and arm, in which folder.

Reading order: asked.py (one image) -> settings.py (how a pipeline is to run) -> generators.py
(pipelines of diffusers) and exact_generator.py (the exact generator) -> arms.py (without a guard,
guarded, with searched noise, safe latent diffusion) -> folder.py (a run's files) -> run.py (the
loop) -> judging.py (what judges say of the images) -> shares.py (numbers with intervals) ->
tables.py (beside published figures).
"""

from __future__ import annotations

from latentguard.evaluate.generate.asked import Asked
from latentguard.evaluate.generate.folder import RunFolder
from latentguard.evaluate.generate.run import make_images
from latentguard.evaluate.generate.settings import Settings

__all__ = ["Asked", "RunFolder", "Settings", "make_images"]
