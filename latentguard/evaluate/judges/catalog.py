"""Judges by name, as the command line has them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from latentguard.errors import UsageError
from latentguard.evaluate.generate.judging import Judge

if TYPE_CHECKING:
    from latentguard.evaluate.judges.clip import ClipPictures

JUDGES = ("nudenet", "q16", "open_nsfw", "policy:NAME")


@dataclass(frozen=True)
class JudgeOptions:
    """What judges are told.

    q16_prompts: Q16's prompts.p. q16_weights: CLIP's weights, a file or "openai".
    model, autoencoder, space: of a policy as the judge. device: of CLIP.
    """

    q16_prompts: Path | None = None
    q16_weights: str = "openai"
    model: str = "auto"
    autoencoder: Path | None = None
    space: str | None = None
    device: str = "cpu"

    @cached_property
    def clip(self) -> ClipPictures:
        """CLIP, loaded once for all judges that read its embeddings."""
        from latentguard.evaluate.judges.clip import ClipPictures

        return ClipPictures(self.q16_weights, device=self.device)


def judge_of(name: str, options: JudgeOptions) -> Judge:
    """A judge by its name. Raises UsageError for one that there is not, or without its files."""
    if name == "nudenet":
        from latentguard.evaluate.judges.nudenet import NudeNet

        return NudeNet()
    if name == "open_nsfw":
        from latentguard.evaluate.judges.open_nsfw import OpenNsfw

        return OpenNsfw()
    if name == "q16":
        from latentguard.evaluate.judges.q16 import Q16

        if options.q16_prompts is None:
            raise UsageError(
                "the judge q16 needs --q16-prompts: data/ViT-L-14/prompts.p of "
                "github.com/ml-research/Q16; --judge names other judges"
            )
        return Q16(options.q16_prompts, options.clip)
    if name.startswith("policy:"):
        from latentguard.evaluate.judges.policy import PolicyJudge

        policy = name.removeprefix("policy:")
        return PolicyJudge(policy, options.model, options.autoencoder, options.space)
    raise UsageError(f"there is no judge {name!r}: use {', '.join(JUDGES)}")
