"""The error of a file without `latents`: one sentence with what is in it and what to do."""

from __future__ import annotations

from collections.abc import Iterable

from latentguard.errors import LatentsError
from latentguard.files.beside import TEXT

_SHOWN = 8


def no_latents(
    names: Iterable[str], arrays: Iterable[str], needs: str, said: bool = False
) -> LatentsError:
    """The error of a file without latents.

    Args:
        names: every key that it has, in order.
        arrays: those of them that hold numbers and could be latents.
        needs: what it should have, as in "the key latents".
        said: whether the operator named it, so that no advice is needed.
    """
    names, arrays = list(names), list(arrays)
    shown = ", ".join(name[:30] for name in names[:_SHOWN]) or "nothing"
    if len(names) > _SHOWN:
        shown += f" and {len(names) - _SHOWN} more"
    advice = "" if said else _advice(names, arrays)
    return LatentsError(f"needs {needs}, it holds {shown}{advice}")


def _advice(names: list[str], arrays: list[str]) -> str:
    texts = any(part in name for part in TEXT for name in names)
    if texts and not any("latent" in name for name in names):
        return ": these are text embeddings, from which no image is decoded; leave the file out"
    if not arrays:
        return ""
    return (
        f": save the numbers that are latents ({arrays[0][:30]}?) under the name latents, or say "
        "which they are (--key)"
    )
