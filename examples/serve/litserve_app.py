"""The generating service on LitServe, which runs a worker on each GPU.

    pip install 'latentguard[diffusers,serve]' litserve
    python examples/serve/litserve_app.py --pipeline PATH --policy family

    curl localhost:8000/v1/generate -H 'content-type: application/json' \\
        -d '{"prompt": "a lighthouse at dawn", "seed": 1}'

Requests and answers are those of generate_app.py. Every answer but 200 says `"decision": "block"`.
"""

# No `from __future__ import annotations`: LitServe reads the type of a request from its annotation,
# which then would be a string.

import os
import signal
import sys
import uuid
from dataclasses import replace
from typing import Any

import litserve
from bounded import Bounded
from checks import Limits, Refused
from fastapi import HTTPException
from generate_app import LIMITS, limits_of, options
from generation import Asked, Generation
from painters import Choice, chosen, painter
from refusals import add_refusals, refusal

from latentguard.errors import LatentGuardError
from latentguard.policy import load_policy

PATH = "/v1/generate"


class Guarded(litserve.LitAPI):
    """What a worker does: one pipeline with one guard, one request at a time."""

    def __init__(
        self, choice: Choice, policy: str, model: str = "auto", limits: Limits = LIMITS
    ) -> None:
        super().__init__(api_path=PATH)
        self._choice, self._policy, self._model, self._limits = choice, policy, model, limits

    def setup(self, device: str) -> None:
        """Load the pipeline and attach the guard. LitServe is not ready before that is done."""
        by = painter(replace(self._choice, device=device))
        self._generation = Generation(by, self._policy, self._model, seconds=self._limits.seconds)

    def decode_request(self, request: Asked) -> Asked:
        """The request, which LitServe has checked against its type."""
        return request

    def predict(self, asked: Asked) -> dict[str, Any]:
        """The answer of `Generation.generate`."""
        try:
            return self._generation.generate(asked, uuid.uuid4().hex)
        except Refused as error:
            raise HTTPException(error.status, error.reason) from error


def server(
    choice: Choice, policy: str, model: str = "auto", limits: Limits = LIMITS
) -> litserve.LitServer:
    """The server, whose `run` starts its workers and one process that listens."""
    made = litserve.LitServer(
        Guarded(choice, policy, model, limits),
        accelerator="auto" if choice.device is None else choice.device,
        timeout=limits.seconds,  # of a request that no worker has begun
        healthcheck_path="/healthz",
        max_payload_size=limits.max_bytes,
        middlewares=[(Bounded, {"path": PATH, "limits": limits})],
        disable_openapi_url=True,
    )
    add_refusals(made.app, lambda _, status, reason: refusal(status, reason))
    return made


def main() -> int:
    """The command line."""
    given = options(__doc__).parse_args()
    limits = limits_of(given)
    try:
        load_policy(given.policy)  # before workers start, each of which would say it
        made = server(chosen(given), given.policy, given.model, limits)
    except LatentGuardError as error:
        print(f"litserve_app.py: {error}", file=sys.stderr)
        return 2
    # LitServe ends its processes on Ctrl-C, and would leave them behind on a service's SIGTERM.
    # These themselves end by it, as if nothing had been changed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    # One process listens, so that the bound on requests holds for all of them.
    made.run(
        host=given.host,
        port=given.port,
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
