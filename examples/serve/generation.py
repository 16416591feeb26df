"""A guarded pipeline for a service: what is asked of it, and what it answers."""

from __future__ import annotations

import base64
import io
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from checks import Refused
from painters import Painter
from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, Field

from latentguard.errors import ModelError
from latentguard.guard import Budget, CallRecord, GenerationBlocked, LatentGuard
from latentguard.guard.layout import space_of
from latentguard.judge import ModelId, PolicyId, Verdict


class Asked(BaseModel):
    """A request. What is left out is the pipeline's own default; without a seed one is drawn."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1, max_length=2000)
    seed: int | None = Field(None, ge=0, lt=1 << 53)
    steps: int | None = Field(None, ge=1, le=150)
    guidance: float | None = Field(None, ge=0, le=50, allow_inf_nan=False)


class Generation:
    """One pipeline with one guard. It makes one image at a time; a service sees to that.

    seconds: of a call. A step after them fails, and the policy's `on_error` decides.

    Raises PolicyError, ModelError, GuardError: this guard cannot judge this pipeline.
    """

    def __init__(
        self,
        by: Painter,
        policy: str | Path = "default",
        model: str = "auto",
        *,
        audit: str | Path | None = None,
        seconds: float | None = None,
    ) -> None:
        self._by, pipe = by, by.pipe
        self.guard = LatentGuard(
            policy,
            model,
            device=pipe._execution_device,
            audit=audit,
            budget=Budget(timeout=seconds),
        )
        pipe.callback_on_step_end = self.guard  # loads the encoder, too
        known = self.guard.session(space=space_of(pipe)).identity
        self.policy = PolicyId(known["policy"], known["policy_version"], known["policy_sha256"])
        self.model = ModelId(known["model"], known["model_sha256"])
        self.space: str = known["space"]

    def arguments(self, asked: Asked) -> dict[str, Any]:
        """Of the call. Raises Refused for what this pipeline cannot be asked."""
        try:
            return self._by.arguments(asked.prompt, asked.steps, asked.guidance)
        except ModelError as error:
            raise Refused(422, str(error)) from error

    def generate(self, asked: Asked, request_id: str) -> dict[str, Any]:
        """One image and its verdict, as JSON.

        The verdicts are taken from the request, so they are those of this very call, whatever else
        runs. Raises Refused as `arguments` does.
        """
        arguments = self.arguments(asked)
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        generator = torch.Generator().manual_seed(seed)
        picture = None
        # A policy with `on_block: raise` gives no image, and the request still has its verdict.
        with self.guard.request(request_id) as request, suppress(GenerationBlocked):
            (picture,) = self._by.pipe(**arguments, generator=generator).images
        (call,) = request.calls
        return self._answer(call, picture, seed)

    def _answer(self, call: CallRecord, picture: Image | None, seed: int) -> dict[str, Any]:
        (verdict,), (outcome,) = call.verdicts, call.outcomes
        if picture is None and verdict.decision != "block":
            raise RuntimeError("the pipeline returned no image, and the guard did not block it")
        return {
            "request_id": call.request_id,
            "decision": verdict.decision,
            "reason": verdict.reason,
            **outcome.to_dict(),
            "image": None if picture is None else _png(picture),
            "seed": seed,
            "verdicts": [verdict.to_dict()],
            "policy": self.policy.to_dict(),
            "model": self.model.to_dict(),
        }


def verdicts_of(answer: dict[str, Any]) -> list[Verdict]:
    """The verdicts in an answer."""
    return [Verdict.from_dict(one) for one in answer["verdicts"]]


def _png(picture: Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")
