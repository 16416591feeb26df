"""The nodes, as ComfyUI sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentguard import LatentGuardError, load_policy
from latentguard.encoders.catalog import entries
from latentguard.policy import shipped_policies

from .conventions import SPACE_CHOICES, empty, read
from .heat import heat, painted
from .loaded import Loaded
from .sampling import SamplerGuard
from .told import blocked, stop, told

CATEGORY = "latentguard"
GUARD = "LATENTGUARD"

Inputs = dict[str, dict[str, Any]]

_SPACE = (
    SPACE_CHOICES,
    {
        "default": "auto",
        "tooltip": "The latent space. auto: the connected model's, else told by statistics; "
        "where these are not certain, the workflow stops and asks.",
    },
)
_MODEL = ("MODEL", {"tooltip": "The model that made these latents: it says what they are."})


class PolicyNode:
    """Loads a policy and names the model that judges by it."""

    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = (GUARD,)
    RETURN_NAMES = ("guard",)
    DESCRIPTION = "A LatentGuard policy: what is looked for, and what a match leads to."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        policies = sorted(shipped_policies(), key=lambda name: (name != "default", name))
        models = ["auto", *(entry.name for entry in entries())]
        return {
            "required": {
                "policy": (policies, {"default": policies[0]}),
                "model": (models, {"default": "auto"}),
            },
            "optional": {
                "policy_file": (
                    "STRING",
                    {"default": "", "tooltip": "A policy's YAML file, in place of `policy`."},
                ),
                "device": (["auto", "cpu"], {"default": "auto"}),
            },
        }

    @classmethod
    def IS_CHANGED(  # noqa: N802
        cls, policy: str, model: str, policy_file: str = "", device: str = "auto"
    ) -> str:
        """The policy's digest: a file that was edited is read again."""
        return load_policy(policy_file.strip() or policy).sha256

    def load(
        self, policy: str, model: str, policy_file: str = "", device: str = "auto"
    ) -> tuple[Loaded]:
        found = load_policy(policy_file.strip() or policy)
        return (Loaded(found, model, None if device == "auto" else device),)


class CheckNode:
    """Judges latents before they are decoded."""

    CATEGORY = CATEGORY
    FUNCTION = "check"
    RETURN_TYPES = ("LATENT", "STRING", "BOOLEAN")
    RETURN_NAMES = ("samples", "verdict", "blocked")
    OUTPUT_NODE = True
    DESCRIPTION = (
        "Judges latents before they are decoded. What a policy blocks stops the workflow, becomes "
        "blank latents, or passes with a flag. What cannot be read always stops the workflow."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        return {
            "required": {
                "guard": (GUARD,),
                "samples": ("LATENT",),
                "on_block": (["stop", "blank", "pass"], {"default": "stop"}),
            },
            "optional": {"space": _SPACE, "model": _MODEL},
        }

    def check(
        self,
        guard: Loaded,
        samples: dict[str, Any],
        on_block: str = "stop",
        space: str = "auto",
        model: Any = None,
    ) -> dict[str, Any]:
        if on_block not in ("stop", "blank", "pass"):
            raise LatentGuardError(f"on_block must be stop, blank or pass, got {on_block!r:.60}")
        latents, tensor = read(samples, space, model)
        verdicts = guard.scorer(latents.space).verdicts(latents)
        found = blocked(verdicts)
        if on_block == "stop":
            stop(verdicts, found)
        gone = [index for index in empty(tensor) if index not in found]
        if on_block == "blank":
            tensor[found] = 0
        text = told(verdicts)
        if gone:
            text += f"\nblank, as blocked before or never sampled: {', '.join(map(str, gone))}"
        # The copy that was judged: whoever else holds the given tensor cannot change it.
        return {
            "ui": {"text": [text]},
            "result": ({**samples, "samples": tensor}, text, bool(found or gone)),
        }


class SamplerGuardNode:
    """Guards whatever samples with a model."""

    CATEGORY = CATEGORY
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = (
        "Judges what the model predicts at each step of a sampler, and what comes out at the end. "
        "Blocked images become blank, or stop the workflow; a policy's `steer` moves images away "
        "from what they matched."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        return {
            "required": {
                "model": ("MODEL",),
                "guard": (GUARD,),
                "on_block": (["stop", "blank"], {"default": "stop"}),
            }
        }

    def patch(self, model: Any, guard: Loaded, on_block: str = "stop") -> tuple[Any]:
        if on_block not in ("stop", "blank"):
            raise LatentGuardError(f"on_block must be stop or blank, got {on_block!r:.60}")
        return (SamplerGuard(guard, on_block).patch(model),)


class HeatMapNode:
    """Shows where in an image a concept is."""

    CATEGORY = CATEGORY
    FUNCTION = "show"
    RETURN_TYPES = ("IMAGE", "MASK", "STRING")
    RETURN_NAMES = ("image", "mask", "concepts")
    DESCRIPTION = "Where in the latents a concept is; nothing is decoded. 0.5 is its threshold."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        return {
            "required": {
                "guard": (GUARD,),
                "samples": ("LATENT",),
                "concept": (
                    "STRING",
                    {"default": "", "tooltip": "A concept's id; empty: the strongest one."},
                ),
            },
            "optional": {
                "background": (["view", "black"], {"default": "view"}),
                "space": _SPACE,
                "model": _MODEL,
            },
        }

    @torch.inference_mode()
    def show(
        self,
        guard: Loaded,
        samples: dict[str, Any],
        concept: str = "",
        background: str = "view",
        space: str = "auto",
        model: Any = None,
    ) -> tuple[Tensor, Tensor, str]:
        latents, _ = read(samples, space, model)
        heats, concepts = heat(guard.scorer(latents.space), latents, concept.strip())
        return (*painted(latents, heats, background == "view"), "\n".join(concepts))


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "LatentGuardPolicy": PolicyNode,
    "LatentGuardCheck": CheckNode,
    "LatentGuardSamplerGuard": SamplerGuardNode,
    "LatentGuardHeatMap": HeatMapNode,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LatentGuardPolicy": "LatentGuard Policy",
    "LatentGuardCheck": "LatentGuard Check",
    "LatentGuardSamplerGuard": "LatentGuard Sampler Guard",
    "LatentGuardHeatMap": "LatentGuard Heat Map",
}
