"""The errors that reach users. Each is one clear sentence: what is wrong, where, what would be
right.
"""

from __future__ import annotations

from collections.abc import Sequence


class LatentGuardError(Exception):
    """Base of every error that latentguard raises on purpose."""


class PolicyError(LatentGuardError, ValueError):
    """A policy that cannot be used; the message names file, line and key.

    errors: one sentence for each thing that is wrong; the message shows the first few of them.
    """

    def __init__(self, message: str, errors: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.errors: tuple[str, ...] = tuple(errors) or (message,)


class LatentsError(LatentGuardError, ValueError):
    """Latents, or a file of latents, that cannot be read with certainty."""


class GuardError(LatentsError):
    """A guard that cannot be attached, or that would have no effect where it was put."""


class ModelError(LatentGuardError, ValueError):
    """An encoder that cannot be found, loaded, or used with this policy or space."""


class UsageError(ModelError):
    """Options of the command line that do not fit together or cannot be used."""


class TooManyErrorsError(LatentGuardError):
    """A run that was stopped because more could not be read or judged than was allowed."""


class MissingExtraError(LatentGuardError, ImportError):
    """Something that is asked for needs packages which are not installed; the message says which
    extra brings them."""


class CoverageError(PolicyError, ModelError):
    """A policy with prompts that the model cannot see.

    It is a fault of the pair, so it is a PolicyError and a ModelError.
    """


EXTRAS = {
    "torch": "torch",
    "safetensors": "torch",
    "open_clip": "torch",
    "huggingface_hub": "torch",
    "diffusers": "diffusers",
    "transformers": "diffusers",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "onnx",
    "PIL": "eval",
    "matplotlib": "eval",
    "pyarrow": "scale",
    "fsspec": "scale",
    "ray": "ray",
}
"""The extra that brings a package which only some commands need."""


def missing_extra(what: str, error: ModuleNotFoundError) -> MissingExtraError | None:
    """What to say where `what` needs a package of an extra; None for any other package."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return MissingExtraError(
        f"{what} needs {package}, which is not installed: "
        f"pip install 'latentguard[{EXTRAS[package]}]'"
    )
