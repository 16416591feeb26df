"""Scores to verdicts, as a step of a Triton ensemble. Needs NumPy alone.

`latentguard export triton` writes this file as model.py, with rules.json and latentguard/judge
beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

_HERE = Path(__file__).parent
# Before whatever latentguard is installed: the verdicts are those of the export.
sys.path.insert(0, str(_HERE))

from latentguard.judge import ModelId, Rules, decide  # noqa: E402
from latentguard.judge.numbers import usable  # noqa: E402


class TritonPythonModel:
    """Reads latents, probability, margin and best_prompt; gives decision, verdict (JSON),
    probability and margin, a row for each image."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the rules. Whatever cannot be read keeps Triton from serving the model."""
        given: dict[str, Any] = json.loads((_HERE / "rules.json").read_text("utf-8"))
        rules = Rules.of(given["policy"])
        if list(rules.prompts) != given["prompts"]:
            raise ValueError("rules.json: the policy and the prompts do not fit")
        model = ModelId(given["model"]["name"], given["model"]["sha256"])
        self._bound = rules.bind(
            model, given["space"], covered=given["covered"], seen=given["seen"]
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request: verdicts, or an error. Never an answer without either."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            return pb_utils.InferenceResponse(output_tensors=self._tensors(request))
        # Fail closed: these images have not been judged, and the client learns that.
        except Exception as error:
            kind = type(error).__name__
            return pb_utils.InferenceResponse(
                output_tensors=[], error=pb_utils.TritonError(f"not judged: {kind}: {error}")
            )

    def _tensors(self, request: Any) -> list[Any]:
        latents, probability, margin, best = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            for name in ("latents", "probability", "margin", "best_prompt")
        )
        if len({len(latents), len(probability), len(margin), len(best)}) != 1:
            raise ValueError("latents and scores are of different numbers of images")
        # Clips in a network can hide a NaN; no image gets its score from one.
        good = usable(latents)
        probability, margin = (
            np.where(good[:, None], scores, np.nan).astype(np.float32)
            for scores in (probability, margin)
        )
        verdicts = decide(probability, margin, best, self._bound)
        if len(verdicts) != len(latents):
            raise ValueError(f"{len(verdicts)} verdicts on {len(latents)} images")
        texts = [json.dumps(verdict.to_dict(), allow_nan=False) for verdict in verdicts]
        return [
            pb_utils.Tensor("decision", _column([verdict.decision for verdict in verdicts])),
            pb_utils.Tensor("verdict", _column(texts)),
            pb_utils.Tensor("probability", probability),
            pb_utils.Tensor("margin", margin),
        ]


def _column(texts: list[str]) -> Any:
    """Strings [B, 1], as the Python backend takes them."""
    return np.array([[text.encode()] for text in texts], dtype=np.object_)
