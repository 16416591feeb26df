"""ReNO (arXiv 2406.04312): noise whose image agrees with its prompt, by a reward's encoder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from latentguard.encoders import Encoder
from latentguard.evaluate.generate.arms import ITERATIONS, Made, made_of, model_facts, run_once
from latentguard.evaluate.generate.asked import Asked
from latentguard.evaluate.generate.generators import Generator
from latentguard.evaluate.generate.rewards import arm_name
from latentguard.evaluate.generate.run import wait_for_gpu
from latentguard.guard import optimize_noise
from latentguard.guard.noise import Agreement
from latentguard.spaces import Latents


class Reno:
    """The noise that `optimize_noise` finds for a prompt, then the pipeline.

    reward: as `encoder_named` takes it; the arm's name is made of it.
    encoders: by such names, that of the reward among them. All of them measure the latents that
        the search begins with and those that it finds: a reward alone may be fooled.
    """

    def __init__(
        self,
        generator: Generator,
        reward: str,
        encoders: Mapping[str, Encoder],
        iterations: int = ITERATIONS,
    ) -> None:
        self.name = arm_name(reward)
        self.reward = reward
        self._generator = generator
        self._encoders = dict(encoders)
        self._iterations = iterations

    def describe(self) -> dict[str, Any]:
        """The reward's model and the others that measure, by digest, and iterations."""
        return {
            "arm": self.name,
            "reward": self.reward,
            "iterations": self._iterations,
            "models": {name: model_facts(one) for name, one in self._encoders.items()},
        }

    def make(self, asked: Asked) -> Made:
        """The search, and one call with what it found. No policy, and nothing is blocked.

        facts: `similarity` with the prompt, the reward's cosine, of the first noise and after each
        iteration; `measured`, by reward, that of the first and of the best image. `seconds` is of
        search and picture alone.
        """
        encoder = self._encoders[self.reward]
        arguments = self._generator.arguments(asked)
        arguments.pop("output_type", None)
        cuda = encoder.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        found = optimize_noise(
            self._generator.pipe,
            arguments.pop("prompt", None),
            None,
            Agreement(encoder, asked.prompt),
            iterations=self._iterations,
            seed=asked.seed,
            space=self._generator.space,
            **arguments,
        )
        wait_for_gpu()
        searched = time.perf_counter()
        ran = run_once(self._generator, asked, {"latents": found.noise}, str(found.noise.device))
        shown = self._generator.show(ran.images)
        wait_for_gpu()
        ended = time.perf_counter()
        cosines = found.rewards[:, 0] / encoder.logit_scale
        facts = {
            "similarity": [round(float(value), 6) for value in cosines],
            "measured": self._measured(asked.prompt, found.first, found.latents),
            "seconds": {
                "search": round(searched - began, 4),
                "picture": round(ended - searched, 4),
            },
            "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        }
        return made_of(shown, ran, facts)

    @torch.no_grad()
    def _measured(self, prompt: str, first: Latents, best: Latents) -> dict[str, list[float]]:
        found = {}
        for name, encoder in self._encoders.items():
            text = encoder.encode_text([prompt])[0]
            values = [float(encoder.encode_latents(one)[0] @ text) for one in (first, best)]
            found[name] = [round(value, 6) for value in values]
        return found
