"""A policy with its scorers: what a LATENTGUARD connection carries."""

from __future__ import annotations

from threading import Lock

import torch

from latentguard import LatentSpace, Policy, Scorer


class Loaded:
    """A policy, and a scorer for each latent space that was asked for.

    model: "auto" or a model's name. device: None is CUDA where there is one, else the CPU.
    """

    def __init__(self, policy: Policy, model: str = "auto", device: str | None = None) -> None:
        self.policy, self.model, self.device = policy, model, device
        self._scorers: dict[str, Scorer] = {}
        self._lock = Lock()

    def scorer(self, space: LatentSpace | str) -> Scorer:
        """The scorer of a space, made when it is first asked for. Raises what Scorer raises."""
        name = LatentSpace.get(space).name
        # ComfyUI runs nodes in inference mode. Weights made there could never have a gradient,
        # which steering needs.
        with self._lock, torch.inference_mode(False):
            if name not in self._scorers:
                self._scorers[name] = Scorer(
                    self.policy, self.model, space=name, device=self.device
                )
            return self._scorers[name]
