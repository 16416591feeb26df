"""A model of the RGB view of any space, once it is known of which. No torch."""

from __future__ import annotations

import json

from latentguard.encoders.catalog import readable_view
from latentguard.errors import ModelError
from latentguard.spaces import LatentSpace


def of_space(metadata: dict[str, str], given: str | LatentSpace | None) -> dict[str, str]:
    """What the file of a model of several spaces says once its space is known.

    Raises ModelError where no space is given, or one whose view cannot be read.
    """
    name = metadata["name"]
    if given is None:
        raise ModelError(
            f"model {name} reads the RGB view of several latent spaces: say of which (space=..., "
            "--space)"
        )
    # The view is of latents in the space's usual scaling, to which they are brought.
    space = LatentSpace.get(given).standard
    found = space.rgb_view
    if found is None or not readable_view(space):
        raise ModelError(
            f"model {name} reads linear RGB views, and space {space.name} has none that is fine "
            "enough to be read"
        )
    view = {"factors": found.factors, "bias": found.bias}
    card = f"{metadata['card']} Here it reads {space.name} latents."
    config = json.loads(metadata["config"]) | view
    scaled = "yes" if found.scaled else "no"
    return {"space": space.name, "card": card, "config": json.dumps(config), "scaled": scaled}
