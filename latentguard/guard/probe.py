"""Whether the installed diffusers has the places that a guard hooks into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from latentguard.errors import GuardError

OLDEST = "0.32"
"""Of the versions of diffusers that are tested."""


def check_diffusers(diffusers: Any) -> None:
    """Raise GuardError, naming the place, where a version of diffusers lacks one.

    Without it a guard could be attached and never be asked.
    """
    version = getattr(diffusers, "__version__", "of an unknown version")
    for name, has in _PLACES.items():
        try:
            there = has(diffusers)
        except (AttributeError, ImportError):
            there = False
        if not there:
            raise GuardError(
                f"diffusers {version} has no {name}, which a guard hooks into, so nothing can be "
                f"guarded with it: install diffusers {OLDEST} or later, or an earlier one that is "
                "known to work (docs/guard.md), or moderate in a loop of your own with "
                "latentguard.guard.session"
            )


def _method(name: str) -> Callable[[Any], bool]:
    return lambda diffusers: callable(vars(diffusers.DiffusionPipeline).get(name))


_PLACES: dict[str, Callable[[Any], bool]] = {
    "DiffusionPipeline.progress_bar": _method("progress_bar"),
    "DiffusionPipeline.__setattr__": _method("__setattr__"),
    "DiffusionPipeline.from_pipe": lambda diffusers: isinstance(
        vars(diffusers.DiffusionPipeline).get("from_pipe"), classmethod
    ),
    "DiffusionPipeline that is a ConfigMixin": lambda diffusers: issubclass(
        diffusers.DiffusionPipeline, diffusers.configuration_utils.ConfigMixin
    ),
    "callbacks.PipelineCallback": lambda diffusers: isinstance(
        diffusers.callbacks.PipelineCallback, type
    ),
    "callbacks.MultiPipelineCallbacks": lambda diffusers: isinstance(
        diffusers.callbacks.MultiPipelineCallbacks, type
    ),
    "SchedulerMixin": lambda diffusers: isinstance(diffusers.SchedulerMixin, type),
}
