"""Latents and verdicts in the shape of a moderation endpoint that clients already know.

    client = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="-")
    url = "data:application/octet-stream;base64," + base64.b64encode(file).decode()
    client.moderations.create(input=[{"type": "image_url", "image_url": {"url": url}}])

A category of which the model can see nothing, or to which the policy maps nothing, is null, with
the reason beside it: it was not checked, which is no `false` and no 0.
"""

from __future__ import annotations

import base64
import binascii
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from checks import Given, Limits, Refused, read_latents

from latentguard.judge import categorize
from latentguard.runtime import Guard, Verdict

PATH = "/v1/moderations"
SCHEME = "openai"

_MEDIA = "application/octet-stream"
_SEND = (
    "send the bytes of a .safetensors, .npy or .pt file of latents as "
    f"'data:{_MEDIA};base64,...' in an input of type image_url"
)
# What an input of an image has, twice over; more is another kind of body, and costs memory.
_MARKS = 16
_KNOWN = ("input", "model")


def check_mapped(guard: Guard) -> None:
    """Raise Refused where the guard's policy has no words for the answer."""
    if SCHEME not in guard.rules.schemes:
        raise Refused(
            404,
            f"policy '{guard.policy['name']}' maps no concept to the taxonomy {SCHEME}, so there "
            f"is nothing to answer here: give its concepts `taxonomy: {{{SCHEME}: [...]}}`, and "
            "export it anew",
        )


def read_inputs(data: bytes, asked: Mapping[str, Any], guard: Guard, limits: Limits) -> list[Given]:
    """The latents of a request's `input`, one image each; in one array where they are alike.

    asked: what the query says of them, as in `read_latents`.
    Raises Refused, naming the input, for text, for addresses of pictures, and for whatever is not
    the latents of one image.
    """
    images = [
        _image(index, item, asked, guard, limits)
        for index, item in enumerate(_inputs(data, limits))
    ]
    first = images[0]
    kinds = {(g.latents.shape, g.latents.dtype, g.height, g.width) for g in images}
    if len(kinds) > 1:
        return images
    return [first._replace(latents=np.concatenate([image.latents for image in images]))]


def answer(verdicts: Sequence[Verdict], guard: Guard) -> dict[str, Any]:
    """The body of the answer: one result for each input, in their order."""
    return {
        "id": f"modr-{uuid.uuid4().hex}",
        "model": guard.model.name,
        "results": [_result(verdict, guard) for verdict in verdicts],
        "sha256": guard.sha256,
    }


def error_body(status: int, reason: str) -> dict[str, Any]:
    """An error as clients of such an endpoint read it; `decision` as everywhere here."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": reason, "type": kind, "param": None, "code": None}
    return {"error": error, "decision": "block"}


def _result(verdict: Verdict, guard: Guard) -> dict[str, Any]:
    found = categorize(verdict, guard.rules, SCHEME, every=True)
    judged = {name: score is not None for name, score in found.scores.items()}
    return {
        # A match outside of these categories, and what could not be judged, is flagged as well.
        "flagged": verdict.decision != "allow" or bool(found.flagged),
        "categories": {name: name in found.flagged if judged[name] else None for name in judged},
        "category_scores": dict(found.scores),
        "category_applied_input_types": {
            name: ["image"] if judged[name] else [] for name in judged
        },
        "latentguard": {
            "decision": verdict.decision,
            "reason": verdict.reason,
            "error": verdict.error,
            "unchecked": dict(found.unchecked),
        },
    }


def _inputs(data: bytes, limits: Limits) -> list[Any]:
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > _MARKS * (limits.max_images + 1):
        raise Refused(413, f"more than {limits.max_images} inputs, or much text; {_SEND}")
    try:
        body = json.loads(data, object_pairs_hook=_pairs)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(body, dict) or "input" not in body:
        raise Refused(400, f"the body must be a JSON object with `input`; {_SEND}")
    unknown = [key for key in body if key not in _KNOWN]
    if unknown:
        raise Refused(400, f"{unknown[0][:40]!r} is not known here; the body has input and model")
    # A client may name the model of another service; the answer says which one judged.
    if not isinstance(body.get("model", ""), str):
        raise Refused(400, "model must be text")
    inputs = body["input"]
    if isinstance(inputs, str):
        raise Refused(400, f"text is not judged here, only latents: {_SEND}")
    if not isinstance(inputs, list) or not inputs:
        raise Refused(400, f"input must be a list of at least one image; {_SEND}")
    if len(inputs) > limits.max_images:
        raise Refused(413, f"more than {limits.max_images} inputs in a request")
    return inputs


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, in which two readers find the same."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has one key twice")
    return found


def _image(index: int, item: Any, asked: Mapping[str, Any], guard: Guard, limits: Limits) -> Given:
    try:
        file = _file(item)
        given = read_latents(file, asked, guard, limits, what="the file", torch_files=True)
        if len(given.latents) != 1:
            raise Refused(400, f"the file holds {len(given.latents)} images; send one in an input")
    except Refused as error:
        raise Refused(error.status, f"input[{index}]: {error.reason}") from error
    return given


def _file(item: Any) -> bytes:
    """The bytes in an input's data URL. Nothing is fetched."""
    kind = item.get("type") if isinstance(item, dict) else None
    if isinstance(item, str) or kind == "text":
        raise Refused(400, f"text is not judged here, only latents: {_SEND}")
    place = item.get("image_url") if kind == "image_url" else None
    url = place.get("url") if isinstance(place, dict) else None
    if not isinstance(url, str):
        raise Refused(400, f"is no input of type image_url with a url; {_SEND}")
    head, comma, encoded = url.partition(",")
    if not url[:5].lower() == "data:" or not comma:
        raise Refused(400, f"addresses are not fetched: {_SEND}")
    if head[5:].lower() != f"{_MEDIA};base64":
        raise Refused(400, f"a URL of {head[5:65]!r} is not read, as only latents are: {_SEND}")
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(400, f"its base64 cannot be read: {error}") from error
